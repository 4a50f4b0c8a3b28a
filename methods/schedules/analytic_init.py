"""Analytic-Init, "Identifying and Solving Conditional Image Leakage in Image-to-Video Diffusion Model" (CIL).

Only the start at inference is here; the training part (TimeNoise) and the motion score of the paper are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evalbench.errors import UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Modifier, Preparation, Solver
from evalbench.registry import register

from .truncated import Truncated

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

CLAIM = Claim(
    text="From the same M < T, Analytic-Init has a lower Frechet distance than N(0, I) on off-centre data (size ours).",
    suite="gmm-offcentre",
    arm="dpm-solver+++analytic-init(start=0.8)",
    baseline="dpm-solver+++analytic-init(start=0.8,statistics=false)",
    nfe=20,
    metric="fd@identity",
    direction="lower",
    effect=0.5,
    level="E",
    author="catalogue",
    transfer="weak",
    source="CIL, Analytic-Init; methods-b entry 21 and A11",
    prepare_seeds=(0, 1, 2),
    witness="tests/methods/test_starts.py",
)


@register("analytic-init")
@dataclass(frozen=True)
class AnalyticInit(Modifier):
    """Analytic-Init (CIL): starts any solver at M < T from the Gaussian that has the data's mean and total variance.

    x_M ~ N(alpha_M E[x0], (sigma_M^2 + alpha_M^2 trCov / d) I), which on VP paths is
    N(sqrt(ab_M) E[x0], (1 - ab_M + ab_M trCov / d) I), the isotropic Gaussian nearest to the marginal at M. E[x0], of
    the shape of a sample, and trCov / d, one number, are taken over all conditions, once, from the search split of the
    data. x_M is made from the noise of x_T, so that starts stay paired; the solver then walks its grid over what is
    left of the path, and the whole budget is spent there. No evaluation is saved or added.

    `statistics=false` is the start without them, mean 0 and variance 1: N(0, I) on VP paths at any M. It gains nothing
    over that where the data is centred and of unit scale. It is not OMS, which predicts the mean from the condition.

    Attributes:
        start: M / T, the start as a fraction of t_start in the path's time, above 0 and at most 1.
        statistics: use the data's mean and variance.
        samples: clean samples that they are taken from, at least 2. seed: draws those samples.
    """

    prepares = "once"

    start: float = 0.9
    statistics: bool = True
    samples: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.start <= 1.0:
            raise UserError(f"analytic-init: start must be above 0 and at most 1, got {self.start}")
        if self.samples < 2 or self.seed < 0:
            raise UserError(f"analytic-init: needs samples >= 2 and seed >= 0, got {self.samples}, {self.seed}")

    def prepare(self, context: Preparation) -> Artifact:
        if not self.statistics:
            return Artifact()
        x = context.data(self.samples, self.seed)[0].double().cpu().numpy()
        # over n, not n - 1: the mean is subtracted as it is used
        return Artifact({"mean": x.mean(0)}, {"variance": float(x.var(0).mean())})

    def modify(self, solver: Solver) -> Solver:
        return FromMarginal(solver, self)


class FromMarginal(Solver):
    """A solver that starts at M from an isotropic Gaussian."""

    def __init__(self, solver: Solver, settings: AnalyticInit) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        inner = Truncated(denoiser, self.settings.start)
        mean, variance = self._statistics()
        alpha, sigma = float(inner.path.alpha(inner.path.t_start)), float(inner.path.sigma(inner.path.t_start))
        unit = x_T / float(denoiser.path.sigma(denoiser.path.t_start))
        x_M = alpha * x_T.new_tensor(mean) + math.sqrt(sigma**2 + alpha**2 * variance) * unit
        return self.solver.sample(inner, x_M, cond, nfe, noise)

    def _statistics(self) -> tuple[np.ndarray, float]:
        """E[x0], (*S), and trCov / d."""
        if not self.settings.statistics:
            return np.zeros(()), 1.0
        artifact = self.settings.prepared()
        return artifact.arrays["mean"], float(artifact.facts["variance"])
