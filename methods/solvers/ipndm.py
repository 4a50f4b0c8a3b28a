"""iPNDM: PNDM (Liu et al. 2022, arXiv 2202.09778) with lower orders at the start (Zhang & Chen 2023, 2204.13902)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evalbench.engine import (
    Eval,
    Plan,
    PlannedSolver,
    check_choice,
    check_grid,
    linear_step,
    multistep_order,
    polynomial_weights,
)
from evalbench.paths import Path
from evalbench.registry import register

# Adams-Bashforth weights for equal steps, newest evaluation first (Hairer, Norsett & Wanner 1993, III.1).
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@register("ipndm")
@dataclass(frozen=True)
class IPNDM(PlannedSolver):
    """iPNDM (Zhang & Chen 2023): the `ddim` step on an Adams-Bashforth mean of the last eps evaluations.

    One evaluation per step, lower orders in the first steps, first order in a step to t = 0. The weights are those of
    equal steps: order p holds only on a grid that is uniform in sigma / alpha, on other smooth grids the order is 2
    at most. `variable_step=true` (iPNDM_v) has the weights of the actual steps and order p, and equals
    `deis(space=rho)`. diffusers' IPNDMScheduler is order 4 of this on its own path alpha = cos(pi t / 2),
    sigma = sin(pi t / 2), from alpha = 0, where its first step takes x0 = 0, and with fourth order also in the step
    to sigma = 0. PNDMScheduler starts with Runge-Kutta steps instead.

    Attributes:
        order: 1 to 4. variable_step: weights of the actual steps (iPNDM_v).
        grid: time grid; empty takes the suite's.
    """

    order: int = 4
    variable_step: bool = False
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("ipndm", "order", self.order, (1, 2, 3, 4))

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("eps")
        x = plan.x_T
        history: list[tuple[float, Eval]] = []  # newest first
        for i, (s, t) in enumerate(pairwise(times)):
            p = multistep_order(self.order, i, times)
            history = [(s, plan.evaluate(x, s, t)), *history][: self.order]
            used = history[:p]
            a, b = linear_step(path, s, t, "eps")
            weights = [b * w for w in ADAMS_BASHFORTH[p]]
            if self.variable_step and p > 1:
                a, weights = polynomial_weights(path, s, t, [u for u, _ in used], "rho")
            x = plan.update({x: a}, {e: c for (_, e), c in zip(used, weights, strict=True)})
        return plan.finish(x)
