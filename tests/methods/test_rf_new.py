"""The rectified-flow++ "new" sampler: the release's loop, Euler's method up to two steps, and where it fails."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench.errors import UserError
from evalbench.noise import NoiseSource
from evalbench.paths import Flow, grid, make_path

BATCH = 64
SMOOTH = {"std": 0.5, "seed": 1}


def start(path, batch: int = 8):
    """(field, noise, z) in float64, z the unit noise behind x_T."""
    field = exact(path, batch, None, "time", **SMOOTH)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    noise = NoiseSource(0, range(batch), field.shape, dtype=torch.float64)
    return field, noise, noise.start()


def test_on_a_flow_it_is_the_published_update():
    path = Flow(t_start=0.99)
    field, noise, z_init = start(path)
    x_T = path.t_start * z_init
    got = solver("rf-new").sample(field, x_T, COND, 6, noise)
    x = x_T
    for t, t_next in pairwise(grid(path, "time", 6)):
        x0_hat = x - t * field(x, t, COND, "velocity")
        x = (1 - t_next) * x0_hat + t_next * z_init
    np.testing.assert_allclose(got, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["vp-linear", "edm"])
def test_on_other_paths_it_is_alpha_x0_plus_sigma_z_init(kind):
    path = make_path(kind, final="zero")
    field, noise, z_init = start(path)
    x_T = float(path.sigma(path.t_start)) * z_init
    got = solver("rf-new").sample(field, x_T, COND, 5, noise)
    x = x_T
    for t, t_next in pairwise(grid(path, "time", 5)):
        eps = field(x, t, COND, "eps")
        x = path.alpha(t_next) * (x - path.sigma(t) * eps) / path.alpha(t) + path.sigma(t_next) * z_init
    np.testing.assert_allclose(got, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("text", ["ddim", "euler"])
def test_up_to_two_steps_it_is_euler(n, text):
    """Algebra: from t = 1, where the velocity is z - x0_hat, to t = 0, where the state is x0_hat."""
    path = Flow(t_start=1 - 1e-7, final="zero")
    x, spent = draw("rf-new", path, n, grid="time", **SMOOTH)
    euler, _ = draw(text, path, n, grid="time", **SMOOTH)
    assert spent == n
    assert torch.allclose(x, euler, atol=1e-6) == (n <= 2)


@lru_cache(maxsize=1)
def fine() -> torch.Tensor:
    text = "dpm-solver++(order=3,algorithm=singlestep,solver_type=heun,lower_order_final=false)"
    return draw(text, make_path("flow"), 900, BATCH, **SMOOTH)[0]


def error(text: str, nfe: int) -> float:
    """Median over samples of the RMS error of a sample's coordinates, on the grid uniform in t."""
    x, _ = draw(text, make_path("flow"), nfe, BATCH, grid="time", **SMOOTH)
    return float((x - fine()).pow(2).mean(1).sqrt().median())


@pytest.mark.parametrize(("nfe", "catalogue", "euler"), [(4, 0.108, 0.192), (16, 0.30, 0.048), (64, 0.74, 0.012)])
def test_it_gains_at_4_steps_and_diverges_on_a_curved_flow(nfe, catalogue, euler):
    new, plain = error("rf-new", nfe), error("euler", nfe)
    print(f"{nfe}: rf-new {new:.3f}, euler {plain:.4f}")
    assert (new < plain) == (catalogue < euler)
    assert catalogue / 2 < new < catalogue * 2
    assert euler / 2 < plain < euler * 2


def test_it_is_exact_on_a_straight_flow():
    """One Gaussian at one point: every estimate of x0 is that point, the case that the method is made for."""
    straight = {"components": 1, "std": 1e-6, "seed": 1}
    path = Flow(final="zero")
    x, _ = draw("rf-new", path, 16, grid="time", **straight)
    point = exact(path, 1, **straight).inner.model.means
    np.testing.assert_allclose(x, point.expand_as(x), atol=1e-8)


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="unknown grid"):
        solver("rf-new(grid=linear)")
