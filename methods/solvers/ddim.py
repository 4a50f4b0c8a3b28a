"""DDIM, Song, Meng & Ermon 2021 (arXiv 2010.02502), eq. 12 and 16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evalbench.engine import Noise, Plan, PlannedSolver, State, check_grid
from evalbench.errors import UserError
from evalbench.paths import Path
from evalbench.registry import register


@register("ddim")
@dataclass(frozen=True)
class DDIM(PlannedSolver):
    """DDIM (Song et al. 2021): first-order exact step on x0 and eps; eta adds noise.

    Order 1, one evaluation per step. eta = 0 is the deterministic sampler (the first-order DPM-Solver, and Euler in
    EDM's coordinates x / alpha); eta = 1 is ancestral DDPM sampling with the small variance (eq. 16), which is
    `ddpm`. The last step to t = 0 is x0 itself. Equals diffusers' DDIMScheduler on its own time steps.

    Attributes:
        eta: noise level, 0..1 (eq. 16).
        grid: time grid; empty takes the suite's.
    """

    eta: float = 0.0
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"ddim: eta must lie in 0..1, got {self.eta}")

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("eps")
        x = plan.x_T
        for s, t in pairwise(times):
            x = ddim_step(plan, path, x, s, t, self.eta)
        return plan.finish(x)


def ddim_step(plan: Plan, path: Path, x: State, s: float, t: float, eta: float) -> State:
    """One step of eq. 12 from s to t: x_t = alpha_t x0 + sqrt(sigma_t^2 - sigma_eta^2) eps + sigma_eta z."""
    alpha_s, sigma_s, alpha_t, sigma_t = path.alpha(s), path.sigma(s), path.alpha(t), path.sigma(t)
    # eq. 16 in general form: the variance of the forward bridge x_t | x_s, x_0
    bridge = sigma_t**2 / sigma_s**2 * max(sigma_s**2 - (alpha_s / alpha_t) ** 2 * sigma_t**2, 0.0)
    sigma_eta = eta * math.sqrt(bridge)
    direction = math.sqrt(max(sigma_t**2 - sigma_eta**2, 0.0))
    eps = plan.evaluate(x, s, t)
    # x0 = (x - sigma_s eps) / alpha_s
    scale = alpha_t / alpha_s
    return plan.update({x: scale}, {eps: direction - scale * sigma_s}, Noise(sigma_eta, s, t))
