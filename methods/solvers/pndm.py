"""PNDM, Liu, Ren, Lin & Zhao 2022 (arXiv 2202.09778): pseudo numerical methods, S-PNDM and F-PNDM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from evalbench.engine import Eval, Plan, PlannedSolver, State, check_choice, check_grid, linear_step
from evalbench.interfaces import Claim
from evalbench.paths import Path
from evalbench.registry import register

from .ipndm import ADAMS_BASHFORTH

_ORDER = {"s": 2, "f": 4}  # of the multistep part
_START = {"s": (1, 2), "f": (3, 4)}  # Runge-Kutta steps, evaluations of each

CLAIM = Claim(
    text="At 20 evaluations the pseudo linear multistep transfer is nearer to the flow's end than DDIM (size ours).",
    suite="gmm-smooth",
    arm="pndm(grid=time)",
    baseline="ddim(grid=time)",
    nfe=20,
    metric="paired-median@identity",
    direction="lower",
    effect=0.25,
    level="E",
    author="catalogue",
    transfer="fair",
    source="Liu et al. 2022, arXiv 2202.09778; methods-a entry 39 has F-PNDM as the base solver of Time-Shift",
    witness="tests/methods/test_pndm.py",
)


@register("pndm")
@dataclass(frozen=True)
class PNDM(PlannedSolver):
    """PNDM (Liu et al. 2022): the `ddim` transfer on Runge-Kutta and Adams-Bashforth means of eps.

    phi(x, e, s, t) is the `ddim` step from s to t. A pseudo Runge-Kutta start fills the history, then every step has
    one evaluation; the history holds each step's first evaluation. The weights are those of equal steps: the order is
    4 (F-PNDM) where they are equal in sigma / alpha, on other smooth grids 2 at most, as that of S-PNDM is.

    * `variant="f"`, F-PNDM: three steps of classical Runge-Kutta, e = (e1 + 2 e2 + 2 e3 + e4) / 6 with e2, e3 at the
      middle time, 4 evaluations each; then e = (55 e - 59 e' + 37 e'' - 9 e''') / 24. n >= 3 steps spend n + 9: nine
      updates, which the released code of Time-Shift calls "10 steps", are 18 evaluations.
    * `variant="s"`, S-PNDM: one step of improved Euler, e = (e1 + e2) / 2, 2 evaluations; then e = (3 e - e') / 2.
      n steps spend n + 1.

    Here `nfe` is evaluations, never the paper's steps. Where the start does not fit, this is not the paper's method
    any more: below 12 evaluations F-PNDM has as many Runge-Kutta steps as fit (S-PNDM none at 1), and the orders grow
    as in `ipndm`. A step to t = 0 is first order, because the network is not evaluated there. It is not `ipndm`, which
    has no Runge-Kutta steps. diffusers' PNDMScheduler is F-PNDM with a last evaluation whose step goes nowhere: its
    "10 steps" are the same nine updates, and 19 evaluations; with `skip_prk_steps` it is neither variant.

    Attributes:
        variant: `f` or `s`.
        grid: time grid; empty takes the suite's (the paper's are `time` and `quadratic`).
    """

    variant: Literal["f", "s"] = "f"
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("pndm", "variant", self.variant, tuple(_ORDER))

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Plan:
        most, calls = _START[self.variant]
        # a last step to t = 0 is no Runge-Kutta step
        starts = min(most, (nfe - (path.final == "zero")) // calls)
        times = self.times(path, self.grid or suite_grid, nfe - starts * (calls - 1))
        return self._plan(path, times, starts)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        return self._plan(path, times, _START[self.variant][0])

    def _plan(self, path: Path, times: Sequence[float], starts: int) -> Plan:
        plan = Plan("eps")
        x = plan.x_T
        history: list[Eval] = []  # newest first
        for i, (s, t) in enumerate(pairwise(times)):
            history = [plan.evaluate(x, s, t), *history][: _ORDER[self.variant]]
            if t == 0.0:
                x = _transfer(plan, path, x, s, t, {history[0]: 1.0})
            elif i < starts:
                x = self._runge_kutta(plan, path, x, history[0], s, t)
            else:
                mean = dict(zip(history, ADAMS_BASHFORTH[len(history)], strict=True))
                x = _transfer(plan, path, x, s, t, mean)
        return plan.finish(x)

    def _runge_kutta(self, plan: Plan, path: Path, x: State, e1: Eval, s: float, t: float) -> State:
        """Pseudo improved Euler (S-PNDM) or pseudo Runge-Kutta (F-PNDM) from x at s, with e1 there, to t."""

        def stage(e: Eval, u: float) -> Eval:
            return plan.evaluate(_transfer(plan, path, x, s, u, {e: 1.0}), u, t, inner=True)

        if self.variant == "s":
            return _transfer(plan, path, x, s, t, {e1: 0.5, stage(e1, t): 0.5})
        middle = 0.5 * (s + t)
        e2 = stage(e1, middle)
        e3 = stage(e2, middle)
        e4 = stage(e3, t)
        return _transfer(plan, path, x, s, t, {e1: 1 / 6, e2: 1 / 3, e3: 1 / 3, e4: 1 / 6})


def _transfer(plan: Plan, path: Path, x: State, s: float, t: float, mean: dict[Eval, float]) -> State:
    """phi(x, e, s, t) with e a weighted mean of evaluations."""
    a, b = linear_step(path, s, t, "eps")
    return plan.update({x: a}, {e: b * weight for e, weight in mean.items()})
