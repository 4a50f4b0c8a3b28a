"""EDM's deterministic and stochastic samplers, Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evalbench.engine import Noise, Plan, PlannedSolver, State, check_grid, linear_step
from evalbench.errors import UserError
from evalbench.paths import Path
from evalbench.registry import register


@register("heun")
@dataclass(frozen=True)
class Heun(PlannedSolver):
    """EDM's Heun sampler (Karras et al. 2022): second order in x / alpha against sigma / alpha, with optional churn.

    Order 2, two evaluations per step, one for a step without correction. Algorithm 1 for S_churn = 0, else
    algorithm 2. n steps cost 2 n evaluations, or 2 n - 1 when the last step is Euler's: an odd budget ends with an
    Euler step, and a step to t = 0 always is one (algorithm 1, line 6), so with `final = "zero"` an even budget is
    spent to all but one. Budget 1 is a single Euler step. It is not Heun's method on dx/dt of the path: in these
    coordinates the field is eps, so its Euler step is `ddim`. diffusers' HeunDiscreteScheduler is this with a last
    step to 0. Churn raises the noise level, but never above that of t_start, where EDM's code goes beyond sigma_max.

    Attributes:
        S_churn: amount of new noise over all steps; a step of n adds at most S_churn / n relative noise level.
        S_min, S_max: noise levels sigma / alpha between which noise is added.
        S_noise: standard deviation of the new noise.
        grid: time grid; empty takes the suite's (the paper's is `karras`).
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if not (self.S_churn >= 0 and self.S_min >= 0 and self.S_max >= self.S_min and self.S_noise >= 0):
            raise UserError(
                "heun: needs S_churn >= 0, 0 <= S_min <= S_max and S_noise >= 0, got "
                f"{self.S_churn}, {self.S_min}, {self.S_max}, {self.S_noise}"
            )

    def steps_for(self, path: Path, nfe: int) -> int:
        return (nfe + 1) // 2

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Plan:
        return self._plan(path, self.times(path, self.grid or suite_grid, nfe), euler_last=nfe % 2 == 1)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        return self._plan(path, times, euler_last=False)

    def _plan(self, path: Path, times: Sequence[float], *, euler_last: bool) -> Plan:
        plan = Plan("eps")
        x, n = plan.x_T, len(times) - 1
        for i, (s, t) in enumerate(pairwise(times)):
            x_hat, t_hat = self._churn(plan, path, x, s, i, n)
            # d x / alpha = eps d sigma / alpha: Euler's step
            a, b = linear_step(path, t_hat, t, "eps")
            d = plan.evaluate(x_hat, t_hat, t)
            x = plan.update({x_hat: a}, {d: b})
            if t > 0 and not (euler_last and i == n - 1):
                d_next = plan.evaluate(x, t, t, inner=True)
                x = plan.update({x_hat: a}, {d: 0.5 * b, d_next: 0.5 * b})
        return plan.finish(x)

    def _churn(self, plan: Plan, path: Path, x: State, t: float, i: int, n: int) -> tuple[State, float]:
        """Lines 4 to 6 of algorithm 2: raise the noise level of x by the factor 1 + gamma."""
        rho = path.rho(t)
        gamma = min(self.S_churn / n, math.sqrt(2.0) - 1.0) if self.S_min <= rho <= self.S_max else 0.0
        if gamma == 0.0 or t >= path.t_start:
            return x, t
        t_hat = min(float(path.t_of_rho(rho * (1.0 + gamma))), path.t_start)
        alpha_hat, rho_hat = path.alpha(t_hat), path.rho(t_hat)
        added = self.S_noise * alpha_hat * math.sqrt(max(rho_hat**2 - rho**2, 0.0))
        return plan.update({x: alpha_hat / path.alpha(t)}, {}, Noise(added, use="churn", step=i)), t_hat
