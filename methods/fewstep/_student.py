"""A network fine-tuned for a few DDIM steps: the training of MMD-DDM, and the network with other weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from evalbench.interfaces import Artifact, Cond, Denoiser, Edit, NetworkWrap, Preparation, Step
from evalbench.paths import grid

if TYPE_CHECKING:
    from torch import nn

BATCH_OF_DATA = 512  # real images whose features a step's batch is drawn from


def _gradient(loss: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, weights)[0]


class Tuned(NetworkWrap):
    """The network with other weights for the length of each call.

    Args:
        weights: by the names of the network's parameters; those left out keep theirs.
    """

    def __init__(self, inner: Denoiser, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(inner)
        self.weights = weights

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable]:
        network = self.network

        @contextmanager
        def tuned() -> Iterator[None]:
            kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
            try:
                for name, value in self.weights.items():
                    owner, _, attribute = name.rpartition(".")
                    module = network.get_submodule(owner)
                    kept.append((module, attribute, module._parameters[attribute]))
                    module._parameters[attribute] = value  # type: ignore[assignment]
                yield
            finally:
                for module, attribute, parameter in kept:
                    module._parameters[attribute] = parameter

        return tuned, "tuned weights"


def tuned_weights(artifact: Artifact, network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of an artefact, as the network's are kept."""
    like = dict(network.named_parameters())
    return {name: torch.from_numpy(value).to(like[name]) for name, value in artifact.arrays.items()}


def ddim(denoiser: Denoiser, x: torch.Tensor, cond: Cond, times: tuple[float, ...], done: int, n: int) -> torch.Tensor:
    """DDIM (eta = 0) from times[0] to times[-1], with a gradient where one is wanted.

    Args:
        done, n: steps before these, and of the whole trajectory.
    """
    path = denoiser.path
    for i, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoiser(x, t, cond, "x0", step=Step(done + i, n, t, t_next))
        eps = (x - float(path.alpha(t)) * x0) / float(path.sigma(t))
        x = float(path.alpha(t_next)) * x0 + float(path.sigma(t_next)) * eps if t_next > path.t_end else x0
    return x


def mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Unbiased squared MMD of features (N, D) and (M, D) by the kernel (<a, b> / D + 1)^3 (MMD-DDM; KID's)."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def within(a: torch.Tensor) -> torch.Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2.0 * kernel(x, y).mean()


def train(
    context: Preparation, steps: int, iterations: int, batch: int, rate: float, clip: float, features: str, seed: int
) -> Artifact:
    """Weights that make `steps` DDIM steps look like the data: the gradient goes through all of them.

    Every forward is on the preparation's bill, every backward pass under `aux.training`.
    """
    network = context.denoiser(1).network
    names = [name for name, _ in network.named_parameters()]
    shapes = [value.shape for _, value in network.named_parameters()]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([value.detach().flatten() for _, value in network.named_parameters()]).requires_grad_(True)
    real = context.features(context.data(BATCH_OF_DATA, seed)[0], features).double()
    times, rng = grid(context.path, "time", steps), context.rng(seed)
    optimiser = torch.optim.Adam([flat], lr=rate)
    losses = []
    for i in range(iterations):
        indices = range(i * batch, (i + 1) * batch)
        noise, cond = context.noise(indices, seed), context.cond(indices)
        rows = torch.as_tensor(rng.integers(0, len(real), batch), device=real.device)
        field = context.denoiser(batch)
        with torch.enable_grad():
            weights = {n: v.view(s) for n, v, s in zip(names, torch.split(flat, sizes), shapes, strict=True)}
            student = field.within(partial(Tuned, weights=weights))
            x = ddim(student, context.x_T(noise), cond, times, 0, steps)
            loss = mmd2(context.features(x, features).double(), real[rows])
            flat.grad = field.auxiliary("training", partial(_gradient, loss, flat), batch)
        torch.nn.utils.clip_grad_norm_([flat], clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    found = {
        n: v.view(s).detach().cpu().numpy() for n, v, s in zip(names, torch.split(flat, sizes), shapes, strict=True)
    }
    return Artifact(found, {"losses": losses, "steps": steps, "features": features})
