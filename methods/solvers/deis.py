"""DEIS, Zhang & Chen 2023 (arXiv 2204.13902): the multistep (Adams-Bashforth) variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evalbench.engine import (
    SPACES,
    Eval,
    Plan,
    PlannedSolver,
    Space,
    check_choice,
    check_grid,
    linear_step,
    multistep_order,
    polynomial_weights,
)
from evalbench.paths import Path
from evalbench.registry import register


@register("deis")
@dataclass(frozen=True)
class DEIS(PlannedSolver):
    """DEIS (Zhang & Chen 2023): eps as a polynomial through the last evaluations, integrated by quadrature.

    Order p extrapolates through p evaluations (the paper's AB index is p - 1), one evaluation per step; the first
    steps have as many nodes as exist. A step to t = 0 is first order. `space` is the variable of the polynomial: `t`
    is tAB-DEIS, `rho` (sigma / alpha) is rhoAB-DEIS, `logrho` is diffusers' DEISMultistepScheduler (orders 1 to 3):
    an exponential integrator in lambda, which is not `dpm-solver` multistep, whose coefficients are approximate. Order
    1 is `ddim`. The paper's rhoRK variants are `heun` and
    other Runge-Kutta methods in sigma / alpha, not this.

    Attributes:
        order: 1 to 4. space: `t`, `rho` or `logrho`.
        lower_order_final: the last steps fall to orders ..., 2, 1; diffusers does it below 15 steps only.
        grid: time grid; empty takes the suite's.
    """

    order: int = 3
    space: Space = "t"
    lower_order_final: bool = False
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("deis", "order", self.order, (1, 2, 3, 4))
        check_choice("deis", "space", self.space, SPACES)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("eps")
        x = plan.x_T
        history: list[tuple[float, Eval]] = []  # newest first
        for i, (s, t) in enumerate(pairwise(times)):
            p = multistep_order(self.order, i, times, lower_order_final=self.lower_order_final)
            history = [(s, plan.evaluate(x, s, t)), *history][: self.order]
            used = history[:p]
            if p == 1:
                a, b = linear_step(path, s, t, "eps")
                weights = [b]
            else:
                a, weights = polynomial_weights(path, s, t, [u for u, _ in used], self.space)
            x = plan.update({x: a}, {e: c for (_, e), c in zip(used, weights, strict=True)})
        return plan.finish(x)
