"""T-Stitch: "T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.registry import register

if TYPE_CHECKING:
    import numpy as np
    import torch


@register("t-stitch")
@dataclass(frozen=True)
class TStitch(Wrap):
    """Trajectory stitching: a small model for the first share of the steps, the base model for the rest.

    Both models share the noise path and the solver's state is not touched; guidance is applied inside whichever model
    is active. Step i of n belongs to the small model iff (i + 1) / n <= r, so floor(r n) steps do. The released scripts
    differ from each other (t / 1000 >= 1 - r for DiT, > for LDM, (i + 1) / N <= r for SD, i / N <= r for LCM); this is
    the one for SD, and the ledger's `evals.small` says how many evaluations it made.

    More models follow each other with `then`: step i belongs to the first of them whose cumulative share of the steps
    is at least (i + 1) / n, and to the base model after the last.

    Needs a suite with models of the roles, `small` and those of `then`, and a solver that says its steps.

    Attributes:
        r: share of the steps that the small model makes, 0..1. reverse: the large model first, the negative control.
        then: roles after `small` with their shares, `medium:0.3` or `medium:0.3/large:0.1`; empty for none.
    """

    requires = frozenset({"role small"})

    r: float = 0.4
    reverse: bool = False
    then: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.r <= 1.0:
            raise UserError(f"t-stitch: r must be in 0..1, got {self.r}")
        shares = self.shares()
        if sum(share for _, share in shares) > 1.0 + 1e-9:
            raise UserError(
                f"t-stitch: r and the shares of then={self.then} add up to more than 1; give smaller shares"
            )
        object.__setattr__(self, "requires", frozenset(f"role {role}" for role, _ in shares))

    def shares(self) -> list[tuple[str, float]]:
        """Roles in their order, the base model's left out, with their shares of the steps."""
        found = [("small", self.r)]
        for entry in self.then.split("/") if self.then else ():
            role, _, share = entry.partition(":")
            try:
                found.append((role, float(share)))
            except ValueError:
                role = ""
            if not role or not 0.0 <= found[-1][1] <= 1.0:
                raise UserError(f"t-stitch: then={self.then}: write role:share with shares in 0..1, such as medium:0.3")
        return found

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return _Stitched(denoiser, self.shares(), self.reverse)


class _Stitched(DenoiserWrap):
    """One of several models, by the step."""

    def __init__(self, inner: Denoiser, shares: Sequence[tuple[str, float]], reverse: bool) -> None:
        super().__init__(inner)
        self.models = [(inner.role(role), share) for role, share in shares]
        self.reverse = reverse

    def __call__(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        if step is None:
            raise Unsupported("not supported: t-stitch needs a solver that says its steps")
        return self._model(step)(x, t, cond, want, step=step, rows=rows)

    def _model(self, step: Step) -> Denoiser:
        # with the large model first, the small one still makes floor(r n) steps: the last ones
        done = step.n - step.i if self.reverse else step.i + 1
        until = 0.0
        for model, share in self.models:
            until += share
            if done / step.n <= until:
                return model
        return self.inner


_SOURCE = "T-Stitch (catalogue A 19 and section 7: DDIM-50, a Gaussian of matched moments as the small model)"

CLAIM = (
    Claim(
        text="With 40 % of the steps by the small model the Frechet distance stays within 10 % of the base model's",
        suite="gmm-64-pair",
        arm="ddim(grid=time)+t-stitch(r=0.4)",
        baseline="ddim(grid=time)",
        nfe=50,
        metric="fd@identity",
        direction="equal",
        effect=0.1,
        level="E",
        author="paper",
        transfer="fair",
        source=_SOURCE,
    ),
    Claim(
        text="In reversed order, large model first, samples end off the modes: 50 % further from the nearest one",
        suite="gmm-64-pair",
        arm="ddim(grid=time)+t-stitch(r=0.4,reverse=true)",
        baseline="ddim(grid=time)+t-stitch(r=0.4)",
        nfe=50,
        metric="mode-distance@gmm-mode-distance",
        direction="higher",
        effect=0.5,
        level="E",
        author="catalogue",
        transfer="fair",
        source=_SOURCE,
    ),
)
