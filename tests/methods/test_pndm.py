"""PNDM: the same samples as diffusers' scheduler, a hand-written Runge-Kutta start, counts and orders."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench import registry
from evalbench.engine import execute
from evalbench.errors import UserError
from evalbench.noise import NoiseSource
from evalbench.paths import EDM, Path, VPDiscrete, make_path

FINE = "dpm-solver++(order=3,algorithm=singlestep,solver_type=heun,lower_order_final=false)"


def stages(text: str, path: Path, nfe: int) -> list[int]:
    """Evaluations of each step."""
    plan = solver(text).plan_for(path, "time", nfe)
    count = Counter(op.step for op in plan.ops if hasattr(op, "want"))
    return [count[i] for i in range(plan.steps)]


def test_ten_released_steps_are_eighteen_calls():
    """ "10 steps" are 9 updates, 3 of them with 4 calls."""
    assert stages("pndm", make_path("vp-linear"), 18) == [4, 4, 4, 1, 1, 1, 1, 1, 1]


def test_s_pndm_spends_one_more_than_its_steps():
    assert stages("pndm(variant=s)", make_path("vp-linear"), 10) == [2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "final", "nfe", "expected"),
    [
        ("pndm", "t_end", 1, [1]),
        ("pndm", "t_end", 5, [4, 1]),
        ("pndm", "t_end", 11, [4, 4, 1, 1, 1]),
        ("pndm", "t_end", 12, [4, 4, 4]),
        ("pndm", "zero", 12, [4, 4, 1, 1, 1, 1]),
        ("pndm", "zero", 13, [4, 4, 4, 1]),
        ("pndm(variant=s)", "t_end", 1, [1]),
        ("pndm(variant=s)", "t_end", 2, [2]),
        ("pndm(variant=s)", "zero", 2, [1, 1]),
    ],
)
def test_small_budgets_shorten_the_start(text, final, nfe, expected):
    assert stages(text, make_path("vp-linear", final=final), nfe) == expected


@pytest.mark.parametrize("steps", [10, 20, 50])  # 1000 / steps is even: their middle times are ours
def test_equals_diffusers(steps):
    """Their last evaluation is at the time its step goes to, so it moves nothing: one call more, the same sample."""
    import diffusers

    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    path = VPDiscrete(alphas_cumprod=tuple(float(a) for a in scheduler.alphas_cumprod))
    field = exact(path, 8)
    start = NoiseSource(2, range(8), field.shape, dtype=torch.float64).start()
    x, before = start, start
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for timestep in scheduler.timesteps:
            eps = field(x.double(), (float(timestep) + 1) / 1000, COND, "eps")
            before, x = x, scheduler.step(eps, timestep, x, return_dict=False)[0]
    assert field.ledger.nfe.max() == steps + 9
    torch.testing.assert_close(before, x)
    times = [(k * (1000 // steps) + 1) / 1000 for k in reversed(range(steps))]
    field = exact(path, 8)
    ours = execute(solver("pndm").plan(path, times), field, start, COND, NoiseSource(2, range(8), field.shape))
    assert field.ledger.nfe.max() == steps + 8
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, x.double(), rtol=1e-4, atol=1e-4)


def by_hand(text: str, path: Path, times: list[float], x_T: torch.Tensor) -> torch.Tensor:
    """PNDM in y = x / alpha, where the transfer is y + (rho_t - rho_s) e."""
    field = exact(path, len(x_T))

    def eps(y: torch.Tensor, t: float) -> torch.Tensor:
        return field(y * float(path.alpha(t)), t, COND, "eps")

    def move(y: torch.Tensor, e: torch.Tensor, s: float, t: float) -> torch.Tensor:
        return y + float(path.rho(t) - path.rho(s)) * e

    y, old = x_T / float(path.alpha(times[0])), []
    for i, (s, t) in enumerate(pairwise(times)):
        e = eps(y, s)
        old.insert(0, e)
        if "variant=s" in text:
            mean = (e + eps(move(y, e, s, t), t)) / 2 if i == 0 else (3 * e - old[1]) / 2
        elif i < 3:
            half = (s + t) / 2
            e2 = eps(move(y, e, s, half), half)
            e3 = eps(move(y, e2, s, half), half)
            e4 = eps(move(y, e3, s, t), t)
            mean = (e + 2 * e2 + 2 * e3 + e4) / 6
        else:
            mean = (55 * e - 59 * old[1] + 37 * old[2] - 9 * old[3]) / 24
        y = move(y, mean, s, t)
    return y * float(path.alpha(times[-1]))


@pytest.mark.parametrize("text", ["pndm", "pndm(variant=s)"])
@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
def test_equals_the_formulas(text, kind):
    path = make_path(kind)
    times = np.linspace(path.t_start, path.t_end, 8).tolist()
    x_T = NoiseSource(1, range(4), (8,), dtype=torch.float64).start() * float(path.sigma(path.t_start))
    ours = execute(solver(text).plan(path, times), exact(path, 4), x_T, COND, NoiseSource(1, range(4), (8,)))
    torch.testing.assert_close(ours, by_hand(text, path, times, x_T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "path", "low", "high"),
    [
        ("pndm", make_path("vp-linear"), 1.9, 2.4),
        ("pndm(variant=s)", make_path("vp-linear"), 1.9, 2.2),
        # equal steps in sigma / alpha, for which the weights are made
        ("pndm(grid=time)", EDM(t_start=4.0, t_end=0.1), 3.5, 4.3),
        ("pndm(variant=s,grid=time)", EDM(t_start=4.0, t_end=0.1), 1.9, 2.2),
    ],
)
def test_order_of_convergence(text, path, low, high):
    fine, _ = draw(FINE, path, 900, 16)
    errors = [float((draw(text, path, nfe, 16)[0] - fine).norm(dim=1).median()) for nfe in (80, 160, 320)]
    order = np.log2(errors[0] / errors[2]) / 2
    print(f"{text}: order {order:.2f}")
    assert low < order < high


def test_unknown_variant_is_refused():
    with pytest.raises(UserError, match="variant=g"):
        registry.build_method("pndm(variant=g)")
    with pytest.raises(UserError, match="unknown grid"):
        registry.build_method("pndm(grid=even)")
