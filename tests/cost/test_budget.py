"""Published budgets become evaluations of the field, and only where that can be known."""

from __future__ import annotations

import pytest
import torch
from exact_model import exact, solver

from evalbench import registry
from evalbench.cost.budget import nfe_of_budget, rows_per_evaluation
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap
from evalbench.paths import EDM, VPLinear, grid

PATH = VPLinear()
PLANNED = ["ddim", "euler", "heun", "dpm-solver", "dpm-solver(algorithm=singlestep)", "dpm-solver++", "unipc", "deis"]


@pytest.mark.parametrize("rows", [1, 2, None])
def test_nfe_is_nfe(rows: int | None) -> None:
    assert nfe_of_budget("nfe", 7, solver("heun"), PATH, rows) == 7


@pytest.mark.parametrize(("budget", "rows", "nfe"), [(20, 1, 20), (20, 2, 10), (21, 2, 10), (2, 2, 1), (20, 3, 6)])
def test_rows_are_shared_out(budget: int, rows: int, nfe: int) -> None:
    assert nfe_of_budget("evals", budget, solver("ddim"), PATH, rows) == nfe


def test_rows_that_buy_no_evaluation_or_an_unknown_number() -> None:
    with pytest.raises(Unsupported, match="1 rows, but one evaluation takes 2"):
        nfe_of_budget("evals", 1, solver("ddim"), PATH, 2)
    with pytest.raises(Unsupported, match="vary along"):
        nfe_of_budget("evals", 20, solver("ddim"), PATH, None)


@pytest.mark.parametrize(("text", "steps", "nfe"), [("ddim", 10, 10), ("heun", 18, 35), ("heun", 1, 1)])
def test_steps_of_the_grid(text: str, steps: int, nfe: int) -> None:
    assert nfe_of_budget("steps", steps, solver(text), EDM()) == nfe


@pytest.mark.parametrize("text", PLANNED)
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_the_budget_makes_that_many_steps(text: str, steps: int) -> None:
    method = solver(text)
    nfe = nfe_of_budget("steps", steps, method, PATH)
    assert method.steps_for(PATH, nfe) == steps
    assert nfe == 1 or method.steps_for(PATH, nfe - 1) < steps
    assert len(method.times(PATH, "logsnr", nfe)) == steps + 1
    assert method.plan_for(PATH, "logsnr", nfe).nfe <= nfe


def test_a_solver_without_a_plan_has_no_steps() -> None:
    with pytest.raises(Unsupported, match="has no plan"):
        nfe_of_budget("steps", 10, solver("diffusers:DDIMScheduler"), PATH)


def test_steps_that_no_budget_makes() -> None:
    method = solver("ddim")
    object.__setattr__(method, "steps_for", lambda path, nfe: nfe // 2 * 2)
    assert nfe_of_budget("steps", 4, method, PATH) == 4
    with pytest.raises(Unsupported, match="makes no 3 steps"):
        nfe_of_budget("steps", 3, method, PATH)


def test_what_was_typed_is_checked() -> None:
    with pytest.raises(UserError, match="unknown budget unit 'eval'"):
        nfe_of_budget("eval", 10, solver("ddim"), PATH)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        nfe_of_budget("steps", 0, solver("ddim"), PATH)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (0.0, 1), (2.5, 2)])
def test_rows_of_guidance_are_counted(scale: float, rows: int) -> None:
    door = exact(PATH, 1, classes=3).inner
    times = grid(PATH, "logsnr", 4)[:-1]
    assert rows_per_evaluation(registry.build_guidance(scale).wrap, door, times) == rows
    assert not door.ledger.evals  # the network was not called


class LateGuidance(DenoiserWrap):
    def __call__(self, x: torch.Tensor, t: float, cond: Cond, *args: object, **named: object) -> torch.Tensor:
        scale = 2.0 if t < 0.5 else 1.0
        return registry.build_guidance(scale).wrap(self.inner)(x, t, cond, *args, **named)


def test_rows_that_vary_are_not_one_number() -> None:
    door: Denoiser = exact(PATH, 1, classes=3).inner
    times = grid(PATH, "time", 4)[:-1]
    assert times[0] > 0.5 > times[-1]
    assert rows_per_evaluation(LateGuidance, door, times) is None
