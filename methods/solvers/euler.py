"""Euler's method on the probability-flow ODE (Song et al. 2021, arXiv 2011.13456, eq. 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evalbench.engine import Plan, PlannedSolver, check_grid
from evalbench.paths import Path
from evalbench.registry import register


@register("euler")
@dataclass(frozen=True)
class Euler(PlannedSolver):
    """Euler on the probability-flow ODE dx/dt in the path's own time.

    Order 1, one evaluation per step. Equals `ddim` on edm and flow paths, where alpha and sigma are linear in t, and
    differs from it on VP paths, where it also integrates the linear part of the ODE by Euler. diffusers'
    EulerDiscreteScheduler walks in sigma / alpha and therefore is `ddim`, not this; its FlowMatchEulerDiscreteScheduler
    is this. A step to t = 0 is the exact first-order step, which returns x0 (on edm and flow paths it is Euler's).

    Attributes:
        grid: time grid; empty takes the suite's.
    """

    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("velocity")
        x = plan.x_T
        for s, t in pairwise(times):
            if t == 0.0:
                x0 = plan.evaluate(x, s, t, want="x0")
                x = plan.update({x: 0.0}, {x0: 1.0})
            else:
                velocity = plan.evaluate(x, s, t)
                x = plan.update({x: 1.0}, {velocity: t - s})
        return plan.finish(x)
