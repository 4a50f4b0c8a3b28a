"""Warm start, as in ConsisSR's inference: noise an estimate to a level s < T and sample from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evalbench.engine import check_choice
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Modifier, Solver
from evalbench.registry import register

from .truncated import Truncated

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_SOURCE = "ConsisSR; methods-a entry 37, where the estimate is a GAN's super-resolution, which ours is not"
CLAIM = (
    Claim(
        text="DDIM from a draft at half the path, 10 evaluations in all, is as near to the data as DDIM at 50.",
        suite="gmm-smooth",
        arm="ddim+warm-start",
        baseline="ddim",
        nfe=10,
        baseline_nfe=50,
        metric="fd@identity",
        direction="equal",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        witness="tests/methods/test_starts.py",
    ),
    Claim(
        text="At 10 evaluations in all, DDIM from a draft at half the path is nearer to the data (size ours).",
        suite="gmm-smooth",
        arm="ddim+warm-start",
        baseline="ddim",
        nfe=10,
        metric="fd@identity",
        direction="lower",
        effect=0.2,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        witness="tests/methods/test_starts.py",
    ),
)


@register("warm-start")
@dataclass(frozen=True)
class WarmStart(Modifier):
    """Warm start (after ConsisSR): starts any solver at s < T from alpha_s z + sigma_s eps, z an estimate of x0.

    On VP paths sqrt(ab_s) z + sqrt(1 - ab_s) eps; eps is fresh noise of its own, not that of x_T.

    * `estimate="draft"`: z is a sample of the same solver on the whole path, from x_T, with `draft` evaluations; the
      rest of the budget walks from s. The budget is the total. A budget that leaves less for the rest shortens the
      draft to all but one evaluation; at budget 1 there is no draft, and the solver runs alone from x_T. What differs
      from the paper: its z is another network's super-resolution, which knows the measured image and costs no
      diffusion step. Our draft knows nothing that the solver does not, and few steps make it too smooth; noise at s
      hides that less the smaller s is.
    * `estimate="pinv"`: z = H^+ y of an inverse problem, free of evaluations: the paper's setting with the simplest
      of estimates. Needs a suite with an operator; the whole budget walks from s.

    It is not SDEdit (z is a user's picture) and not `analytic-init` (z is the mean of the data).

    Attributes:
        start: s / T, as a fraction of t_start in the path's time, above 0 and at most 1.
        draft: evaluations of the draft, at least 1.
        estimate: `draft` or `pinv`.
    """

    start: float = 0.5
    draft: int = 2
    estimate: Literal["draft", "pinv"] = "draft"

    def __post_init__(self) -> None:
        check_choice("warm-start", "estimate", self.estimate, ("draft", "pinv"))
        if not 0.0 < self.start <= 1.0:
            raise UserError(f"warm-start: start must be above 0 and at most 1, got {self.start}")
        if self.draft < 1:
            raise UserError(f"warm-start: draft must be at least 1 evaluation, got {self.draft}")

    def modify(self, solver: Solver) -> Solver:
        return FromEstimate(solver, self)


class FromEstimate(Solver):
    """A solver that starts from a noised estimate."""

    def __init__(self, solver: Solver, settings: WarmStart) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        if self.settings.estimate == "pinv":
            operator = denoiser.operator  # raises Unsupported where the suite is no inverse problem
            if cond.measured is None:
                raise Unsupported("not supported: warm-start(estimate=pinv) needs measurements")
            z, spent = operator.pinv(cond.measured), 0
        else:
            spent = min(self.settings.draft, nfe - 1)
            if spent == 0:
                return self.solver.sample(denoiser, x_T, cond, nfe, noise)
            # random numbers of its own: the second run's are not to repeat the draft's
            z = self.solver.sample(denoiser, x_T, cond, spent, noise.candidate(1))
        inner = Truncated(denoiser, self.settings.start)
        alpha, sigma = float(inner.path.alpha(inner.path.t_start)), float(inner.path.sigma(inner.path.t_start))
        x_s = alpha * z + sigma * noise.normal("warm-start")
        return self.solver.sample(inner, x_s, cond, nfe - spent, noise)
