"""ODE and SDE of one model: which published solver each of them is, their order in law, and when which is better."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench.errors import UserError
from evalbench.noise import NoiseSource
from evalbench.paths import grid, make_path

KINDS = ("vp-linear", "edm", "flow")


# --- two witnesses each: a published solver, and the equation written out -------------------------------------------


@pytest.mark.parametrize("final", ["t_end", "zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ode", "ddim"),
        ("ode(update=euler)", "euler"),
        ("sde", "ddpm"),
        ("sde", "ddim(eta=1)"),
        ("sde", "dpm-solver++(algorithm=sde,order=1)"),
    ],
)
def test_each_is_a_known_solver(text, same, kind, final):
    path = make_path(kind, final=final)
    x, spent = draw(text, path, 9)
    expected, _ = draw(same, path, 9)
    assert spent == 9
    np.testing.assert_allclose(x, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["vp-linear", "edm"])
@pytest.mark.parametrize(("text", "noisy"), [("ode(update=euler)", False), ("sde(update=euler)", True)])
def test_euler_is_the_equation_of_song_et_al(text, noisy, kind):
    """VP: f = -beta x / 2, g^2 = beta. EDM (VE): f = 0, g^2 = d sigma^2 / dt = 2 t."""
    path = make_path(kind)
    field = exact(path, 8, None, "logsnr", seed=1)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    noise = NoiseSource(0, range(8), field.shape, dtype=torch.float64)
    x_T = x = noise.start() * float(path.sigma(path.t_start))
    for s, t in pairwise(grid(path, "logsnr", 8)):
        beta = 0.1 + s * 19.9
        rate, g2 = (-0.5 * beta, beta) if kind == "vp-linear" else (0.0, 2 * s)
        score = field(x, s, COND, "score")
        z = noise.increment(path.fraction(s), path.fraction(t))
        reverse = rate * x - g2 * score if noisy else rate * x - 0.5 * g2 * score
        x = x - (s - t) * reverse + (math.sqrt(g2 * (s - t)) * z if noisy else 0.0)
    got = solver(text).sample(field, x_T, COND, 8, noise)
    np.testing.assert_allclose(got, x, rtol=1e-8, atol=1e-8)


class UnitNoise:
    """Instead of normals: row k of the batch is the k-th independent direction, so results are its coefficients."""

    def __init__(self, rows: int) -> None:
        self.rows, self.drawn = rows, 0

    def increment(self, u_from: float, u_to: float) -> torch.Tensor:
        self.drawn += 1
        return torch.eye(self.rows, dtype=torch.float64)[:, self.drawn : self.drawn + 1]


def variance_error(text: str, kind: str, steps: int) -> float:
    """Variance at the end, exact for data N(0, 0.25) and the exact start, minus that of the path."""
    path = make_path(kind)
    field = exact(path, steps + 1, None, "logsnr", dim=1, components=1, spread=0.0, std=0.5)
    field.inner.model.to(torch.float64, torch.device("cpu"))

    def variance(t):
        return float(path.alpha(t) ** 2 * 0.25 + path.sigma(t) ** 2)

    x_T = torch.zeros(steps + 1, 1, dtype=torch.float64)
    x_T[0] = math.sqrt(variance(path.t_start))
    x = solver(text).sample(field, x_T, COND, steps, UnitNoise(steps + 1))
    return float(x.pow(2).sum()) - variance(path.t_end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["ode", "sde", "ode(update=euler)", "sde(update=euler)"])
def test_first_order_in_law(text, kind):
    steps = (100, 200, 400)
    errors = [abs(variance_error(text, kind, n)) for n in steps]
    measured = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    print(f"{text} {kind}: {errors} order {measured:.2f}")
    assert 0.85 < measured < 1.25


# --- which is better, in sliced W1 on the catalogue's mixture (d = 8, K = 6, std 0.5, VP) ---------------------------

# The catalogue's error field of size 0.2 is not the suite's: its four figures all come out for a field of a quarter
# of the size, RMS 0.05 per coordinate (0.2 / 8^.5 / 2^.5: the norm, over 8 coordinates, of the amplitude of a sine).
FIELD = 0.25


@lru_cache(maxsize=2)
def reference(n: int, seed: int) -> np.ndarray:
    return exact(make_path("vp-linear"), 1, seed=seed).inner.model.draws(20_000, seed=99)


def sliced_w1(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over 128 directions of W1; quantiles of the larger set y at the ranks of x."""
    axes = np.random.Generator(np.random.Philox(key=7)).standard_normal((x.shape[1], 128))
    axes /= np.linalg.norm(axes, axis=0)
    ranks = (np.arange(len(x)) + 0.5) / len(x)
    quantiles = np.quantile(y @ axes, ranks, axis=0)
    return float(np.abs(np.sort(x @ axes, axis=0) - quantiles).mean())


def distance(text: str, nfe: int, error: float = 0.0, n: int = 1024, seed: int = 1, grid: str = "time") -> float:
    x, _ = draw(text, make_path("vp-linear"), nfe, n, grid=grid, std=0.5, seed=seed, error=error)
    return sliced_w1(x.numpy(), reference(n, seed))


@pytest.mark.parametrize(("seed", "grid"), [(0, "time"), (1, "time"), (1, "logsnr")])
def test_with_an_exact_score_the_ode_is_better_at_few_steps(seed, grid):
    """Catalogue, 20 steps: 0.056 (ODE) against 0.102 (SDE)."""
    ode, sde = (distance(text, 20, n=2048, seed=seed, grid=grid) for text in ("ode", "sde"))
    print(f"seed {seed} {grid}: ode {ode:.3f} sde {sde:.3f}")
    assert ode < sde
    assert 0.056 / 2 < ode < 0.056 * 2
    assert 0.102 / 2 < sde < 0.102 * 2


def test_that_depends_on_the_update():
    """Euler-Maruyama at 20 steps is not behind Euler, whose own errors are larger on the log-SNR grid."""
    ode, sde = (distance(f"{text}(update=euler)", 20, n=2048, grid="logsnr") for text in ("ode", "sde"))
    print(f"euler: ode {ode:.3f} sde {sde:.3f}")
    assert sde < 1.1 * ode


def test_with_a_wrong_score_the_sde_is_better_and_the_ode_is_stuck():
    ode_20, ode_60 = distance("ode", 20, 0.2), distance("ode", 60, 0.2)
    assert distance("sde", 60, 0.2) < 0.7 * ode_60
    assert abs(ode_60 - ode_20) < 0.05 * ode_20  # three times the steps


@pytest.mark.slow
@pytest.mark.parametrize(("error", "ode_says", "sde_says"), [(0.2, 0.142, 0.070), (0.1, 0.070, 0.034)])
def test_catalogue_figures_at_200_steps(error, ode_says, sde_says):
    ode, sde = (distance(text, 200, FIELD * error, n=2048) for text in ("ode", "sde"))
    print(f"error {error} (RMS {FIELD * error}): ode {ode:.3f} sde {sde:.3f}")
    assert sde < ode
    assert ode_says / 2 < ode < ode_says * 2
    assert sde_says / 2 < sde < sde_says * 2


@pytest.mark.slow
def test_on_the_error_suite_200_steps_do_not_free_the_ode():
    """gmm-error's own field, RMS 0.2 per coordinate: four times as far, the same ratio."""
    ode_50, ode_200, sde = distance("ode", 50, 0.2), distance("ode", 200, 0.2), distance("sde", 200, 0.2)
    print(f"ode 50 {ode_50:.3f}, ode 200 {ode_200:.3f}, sde 200 {sde:.3f}")
    assert abs(ode_200 - ode_50) < 0.03 * ode_50
    assert 1.5 < ode_200 / sde < 3.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ode(update=heun)", "update"),
        ("sde(update=heun)", "update"),
        ("ode(grid=linear)", "unknown grid"),
        ("sde(grid=linear)", "unknown grid"),
    ],
)
def test_bad_settings_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        solver(text)
