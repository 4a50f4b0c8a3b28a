"""DDPM ancestral sampling, Ho, Jain & Abbeel 2020 (arXiv 2006.11239), section 3.2, eq. 11 and algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from evalbench.engine import Noise, Plan, PlannedSolver, check_choice, check_grid
from evalbench.paths import Path
from evalbench.registry import register


@register("ddpm")
@dataclass(frozen=True)
class DDPM(PlannedSolver):
    """DDPM (Ho et al. 2020): ancestral sampling from the posterior of the forward chain.

    Order 1 in law (a stochastic sampler), one evaluation per step. `variance="small"` is the posterior variance
    given x0 (optimal for data at one point), and then it equals `ddim(eta=1)`; `large` is that for data N(0, I),
    which on VP paths is the chain's own beta. The chain is the bridge between any two times of the path, so it runs
    on every path and grid; noise is an increment of one Brownian path, so runs of different step counts stay paired.
    The step to t = 0 adds no noise and returns x0. Equals diffusers' DDPMScheduler (`fixed_small`, `fixed_large`)
    without clipping, on its own time steps and noise.

    Attributes:
        variance: `small` or `large`, the two choices of section 3.2.
        grid: time grid; empty takes the suite's.
    """

    variance: Literal["small", "large"] = "small"
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("ddpm", "variance", self.variance, ("small", "large"))

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("eps")
        x = plan.x_T
        for s, t in pairwise(times):
            alpha_s, sigma_s, alpha_t, sigma_t = path.alpha(s), path.sigma(s), path.alpha(t), path.sigma(t)
            ratio = alpha_s / alpha_t
            beta = max(sigma_s**2 - ratio**2 * sigma_t**2, 0.0)  # variance of x_s given x_t
            if self.variance == "small":
                variance = beta * sigma_t**2 / sigma_s**2
            else:
                variance = beta * (alpha_t**2 + sigma_t**2) / (alpha_s**2 + sigma_s**2)
            eps = plan.evaluate(x, s, t)
            # eq. 11: mean = (x - beta / sigma_s eps) / ratio
            noise = Noise(math.sqrt(variance) if t > 0 else 0.0, s, t)
            x = plan.update({x: 1.0 / ratio}, {eps: -beta / sigma_s / ratio}, noise)
        return plan.finish(x)
