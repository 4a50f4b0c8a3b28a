"""Stochastic interpolants: the paper's drift written out, exact variances on Gaussian data, and when noise helps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench.errors import UserError
from evalbench.noise import NoiseSource
from evalbench.paths import Path, grid, make_path

KINDS = ("vp-linear", "edm", "flow")
SCHEDULES = ("constant", "sigma", "reverse")
NAME = "stochastic-interpolant"


# --- the paper's equations, step by step, from the network's own velocity and score ---------------------------------


def naive(field, x: torch.Tensor, times, epsilon, integrator: str, noise: NoiseSource) -> torch.Tensor:
    """dx = (b - epsilon s) dt + sqrt(2 epsilon) dW run downwards in t, as loops."""
    path = field.path

    def backward_drift(x, t):
        return field(x, t, COND, "velocity") - epsilon(t) * field(x, t, COND, "score")

    for s, t in pairwise(times):
        if t == 0.0:
            x = field(x, s, COND, "x0")
            continue
        h, z = s - t, noise.increment(path.fraction(s), path.fraction(t))
        if integrator == "euler-maruyama":
            x = x - h * backward_drift(x, s) + math.sqrt(2 * epsilon(s) * h) * z
            continue
        kick = math.sqrt((epsilon(s) + epsilon(t)) * h) * z
        if integrator == "heun":
            k_1 = backward_drift(x, s)
            k_2 = backward_drift(x - h * k_1 + kick, t)
            x = x - 0.5 * h * (k_1 + k_2) + kick
        else:
            x = x + kick
            k_1 = backward_drift(x, t)
            k_2 = backward_drift(x - h * k_1, t)
            x = x - 0.5 * h * (k_1 + k_2)
    return x


def epsilon_of(path: Path, schedule: str, scale: float):
    """epsilon(t); `reverse` by differences: g^2 / 2 = sigma^2 d log(sigma / alpha) / dt."""

    def reverse(t):
        dt = 1e-5 * t
        return path.sigma(t) ** 2 * (path.lam(t - dt) - path.lam(t + dt)) / (2 * dt)

    return {
        "constant": lambda _: scale,
        "sigma": lambda t: scale * path.sigma(t),
        "reverse": lambda t: scale * reverse(t),
    }[schedule]


@pytest.mark.parametrize("final", ["t_end", "zero"])
@pytest.mark.parametrize("integrator", ["euler-maruyama", "heun", "heun-released"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_process(kind, schedule, integrator, final):
    path = make_path(kind, final=final, **({"t_start": 0.99} if kind == "flow" else {}))
    field = exact(path, 8, None, "logsnr", seed=1)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    noise = NoiseSource(0, range(8), field.shape, dtype=torch.float64)
    x_T = noise.start() * float(path.sigma(path.t_start))
    nfe = 12 if integrator == "euler-maruyama" else 24
    text = f"{NAME}(epsilon=0.3,schedule={schedule},integrator={integrator})"
    x = solver(text).sample(field, x_T, COND, nfe, noise)
    expected = naive(field, x_T, grid(path, "logsnr", 12), epsilon_of(path, schedule, 0.3), integrator, noise)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_evaluation_is_one_euler_maruyama_step(kind):
    for integrator in ("heun", "heun-released"):
        x, spent = draw(f"{NAME}(integrator={integrator})", make_path(kind), 1)
        plain, _ = draw(NAME, make_path(kind), 1)
        assert spent == 1
        np.testing.assert_array_equal(x, plain)


# --- exact in law on Gaussian data: the state is a linear map of independent unit normals ---------------------------


class UnitNoise:
    """Instead of normals: row k of the batch is the k-th independent direction, so results are its coefficients."""

    def __init__(self, rows: int) -> None:
        self.rows, self.seen = rows, {}

    def increment(self, u_from: float, u_to: float) -> torch.Tensor:
        row = self.seen.setdefault((u_from, u_to), 1 + len(self.seen))
        out = torch.zeros(self.rows, 1, dtype=torch.float64)
        out[row] = 1.0
        return out


def variance_error(text: str, path: Path, steps: int, nfe: int) -> float:
    """Variance at the end, for data N(0, 0.25) and the exact start, minus that of the path."""
    field = exact(path, steps + 1, None, "logsnr", dim=1, components=1, spread=0.0, std=0.5)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    x_T = torch.zeros(steps + 1, 1, dtype=torch.float64)

    def variance(t):
        return path.alpha(t) ** 2 * 0.25 + path.sigma(t) ** 2

    x_T[0] = math.sqrt(variance(path.t_start))
    x = solver(text).sample(field, x_T, COND, nfe, UnitNoise(steps + 1))
    return float(x.pow(2).sum()) - float(variance(path.t_end))


FIRST_ORDER = [(name, kind) for name in ("euler-maruyama", "heun-released") for kind in ("vp-linear", "edm")]


@pytest.mark.parametrize(("integrator", "kind"), [*FIRST_ORDER, *(("heun", kind) for kind in KINDS)])
@pytest.mark.parametrize(
    "settings", ["epsilon=0", "epsilon=0.5", "epsilon=1,schedule=sigma", "epsilon=1,schedule=reverse"]
)
def test_order_in_law(settings, integrator, kind):
    """Slopes of the variance's error: 1, and 2 for Heun's (3 on edm with epsilon = t, whose second order cancels).

    On flow paths first-order errors of the start and the end have different signs, and no slope is seen.
    """
    per_step = 1 if integrator == "euler-maruyama" else 2
    text = f"{NAME}({settings},integrator={integrator})"
    steps = (100, 200, 400)
    errors = [abs(variance_error(text, make_path(kind), n, per_step * n)) for n in steps]
    measured = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    print(f"{text} {kind}: {errors} order {measured:.2f}")
    if integrator == "heun":
        assert 1.8 < measured < 3.3
    else:
        assert 0.85 < measured < 1.15


# --- relations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_probability_flow(kind):
    path = make_path(kind)
    x, _ = draw(f"{NAME}(epsilon=0)", path, 10)
    np.testing.assert_allclose(x, draw("euler", path, 10)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_reverse_schedule_is_the_reverse_time_sde(kind):
    path = make_path(kind)
    x, _ = draw(f"{NAME}(schedule=reverse)", path, 10)
    np.testing.assert_array_equal(x, draw("sde(update=euler)", path, 10)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_diffusion_coefficient_ends_in_the_mixture(schedule, kind):
    """Mean and covariance of 1024 samples after 40 Heun steps; their standard errors are 0.04 and 0.05."""
    x, _ = draw(f"{NAME}(epsilon=0.5,schedule={schedule},integrator=heun)", make_path(kind), 80, 1024, seed=1)
    reference = exact(make_path(kind), 1, seed=1).inner.model.reference("identity")
    np.testing.assert_allclose(x.mean(0), reference["mean"], atol=0.15)
    np.testing.assert_allclose(np.cov(x.T.numpy()), reference["cov"], atol=0.25)


def test_noise_helps_where_the_network_is_wrong():
    """Catalogue (sliced W1): error 0.2 leaves the ODE at 0.142, the SDE at 0.070. Here W1 of the first coordinates."""
    path, options = make_path("vp-linear"), {"seed": 1, "error": 0.2}
    reference = exact(path, 1, seed=1).inner.model.draws(512, seed=3)

    def distance(text):
        x, _ = draw(text, path, 50, 512, **options)
        return float(np.abs(np.sort(x.numpy(), axis=0) - np.sort(reference, axis=0)).mean())

    assert distance(f"{NAME}(schedule=reverse)") < 0.75 * distance(f"{NAME}(epsilon=0)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{NAME}(epsilon=-1)", "epsilon must be 0 or more"),
        (f"{NAME}(epsilon=nan)", "epsilon"),
        (f"{NAME}(schedule=cosine)", "schedule"),
        (f"{NAME}(integrator=rk4)", "integrator"),
        (f"{NAME}(grid=linear)", "unknown grid"),
    ],
)
def test_bad_settings_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        solver(text)
