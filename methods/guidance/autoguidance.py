"""Autoguidance: "Guiding a Diffusion Model with a Bad Version of Itself", Karras et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.interfaces import Claim, Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.registry import register

if TYPE_CHECKING:
    import numpy as np
    import torch

CLAIM = Claim(
    text="Guided by its small version, the model's samples are nearer to the data than unguided ones.",
    suite="fashion-dit",
    arm="dpm-solver+++autoguidance(scale=1.5)",
    baseline="dpm-solver+++cfg(scale=1.0)",
    nfe=20,
    metric="fd@fashion64",
    direction="lower",
    effect=0.1,
    level="E",
    author="paper",
    transfer="weak",
    source="Autoguidance; the size is ours",
    witness="tests/methods/test_inside.py",
)


@register("autoguidance")
@dataclass(frozen=True)
class Autoguidance(Wrap):
    """Away from a worse model of the same data: guide + scale (model - guide), both with the conditions.

    One row of the model and one of the guide per evaluation; scale = 1 is the model alone. It needs no null label, and
    replaces the suite's guidance. The paper's guide is smaller and trained for less; ours is the suite's model of role
    `small`.

    Attributes:
        scale: of the guidance, any real number.
    """

    requires = frozenset({"role small"})
    guides = True

    scale: float = 1.5

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return _Guided(denoiser, self.scale)


class _Guided(DenoiserWrap):
    """A model and its worse version."""

    def __init__(self, inner: Denoiser, scale: float) -> None:
        super().__init__(inner)
        self.scale, self.guide = scale, inner.role("small")

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
        model = self.inner(x, t, cond, want, step=step, rows=rows)
        if self.scale == 1.0:
            return model
        guide = self.guide(x, t, cond, want, step=step, rows=rows)
        return guide + self.scale * (model - guide)
