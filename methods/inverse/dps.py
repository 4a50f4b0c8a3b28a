"""DPS, Chung, Kim, Mccann, Klasky & Ye 2023 (ICLR): Diffusion Posterior Sampling for General Noisy Inverse Problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from evalbench.engine import check_grid
from evalbench.errors import UserError
from evalbench.interfaces import Cond, Denoiser, Solver, Step
from evalbench.paths import grid
from evalbench.registry import register

if TYPE_CHECKING:
    from evalbench.noise import NoiseSource


@register("dps")
@dataclass(frozen=True)
class DPS(Solver):
    """DPS (Chung et al. 2023): ancestral sampling, each step followed by a gradient step on the data residual.

        x_next = ddpm_step(x_t) - zeta grad_{x_t} |y - H x0_hat(x_t)|

    One evaluation and one backward pass through the network per step. The gradient is that of the norm, per sample,
    as in the released code; algorithm 1 of the paper takes the gradient of the squared norm with a step
    zeta' / |y - H x0_hat|, which is this one with zeta = 2 zeta'. zeta is a free step size and knows no measurement
    noise, so the samples are no exact posterior samples even where the model is exact; they need several hundred steps
    of size about 1 in the paper. zeta = 0 is `ddpm` (eta = 1) or `ddim` (eta = 0), unconditional on y. Near names:
    PiGDM and DDRM use the pseudo-inverse of H.

    Attributes:
        zeta: step size, >= 0, in units of x.
        eta: noise of the step, 0..1: 1 is DDPM's small variance, as in the paper; 0 is DDIM.
        grid: time grid; empty takes the suite's.
    """

    requires = frozenset({"operator", "gradient"})

    zeta: float = 1.0
    eta: float = 1.0
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if not self.zeta >= 0:
            raise UserError(f"dps: zeta must be at least 0, got {self.zeta}")
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"dps: eta must lie in 0..1, got {self.eta}")

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        times = grid(denoiser.path, self.grid or denoiser.grid, nfe)
        x = x_T
        for i, (s, t) in enumerate(pairwise(times)):
            x0, gradient = guided(denoiser, x, s, cond, Step(i, nfe, s, t, x_T))
            x = self._ancestral(denoiser, x, x0, s, t, noise) - self.zeta * gradient
        return x

    def _ancestral(
        self, denoiser: Denoiser, x: torch.Tensor, x0: torch.Tensor, s: float, t: float, noise: NoiseSource
    ) -> torch.Tensor:
        """A step of DDIM's eq. 12 from s to t with x0 given."""
        path = denoiser.path
        alpha_s, sigma_s, alpha_t, sigma_t = (float(v) for u in (s, t) for v in (path.alpha(u), path.sigma(u)))
        bridge = sigma_t**2 / sigma_s**2 * max(sigma_s**2 - (alpha_s / alpha_t) ** 2 * sigma_t**2, 0.0)
        sigma_eta = self.eta * math.sqrt(bridge)
        direction = math.sqrt(max(sigma_t**2 - sigma_eta**2, 0.0))
        x = alpha_t * x0 + direction / sigma_s * (x - alpha_s * x0)
        return x + sigma_eta * noise.increment(path.fraction(s), path.fraction(t)) if sigma_eta else x


def guided(denoiser: Denoiser, x: torch.Tensor, t: float, cond: Cond, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """x0_hat at (x, t) and the gradient of |y - H x0_hat| with respect to x, each (B, *S)."""
    assert cond.measured is not None
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoiser(x, t, cond, "x0", step=step)
        residual = (cond.measured - denoiser.operator(x0)).flatten(1)
        total = torch.linalg.vector_norm(residual, dim=1).sum()
    return x0.detach(), denoiser.gradient(total, x)
