"""An exact Gaussian-mixture network behind the metered door, for tests of methods."""

from __future__ import annotations

import torch

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.interfaces import Cond, Solver
from evalbench.models.gmm import GaussianMixture
from evalbench.noise import NoiseSource
from evalbench.paths import Path

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
COND = Cond()


def solver(text: str) -> Solver:
    """The solver of a method text."""
    return registry.build_method(text).solver


def exact(path: Path, batch: int, budget: int | None = None, grid: str = "logsnr", **options: object) -> Field:
    """The exact network of a mixture, counting and holding a budget; options are those of the mixture."""
    model = GaussianMixture(**{"classes": 0, **options})
    door, ledger = NetworkDoor(model, path, grid), Ledger(batch, budget)
    door.ledger = ledger
    return Field(door, ledger)


def draw(text: str, path: Path, nfe: int, batch: int = 64, dtype: torch.dtype = torch.float64, **options):
    """Samples of a method, (B, D), and the evaluations it spent."""
    field = exact(path, batch, nfe, options.pop("grid", "logsnr"), **options)
    field.inner.model.to(dtype, torch.device("cpu"))
    noise = NoiseSource(0, range(batch), field.shape, dtype=dtype)
    x_T = noise.start() * float(path.sigma(path.t_start))
    x = solver(text).sample(field, x_T, COND, nfe, noise)
    return x, float(field.ledger.nfe.mean())
