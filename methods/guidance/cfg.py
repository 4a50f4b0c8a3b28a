"""Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with scale = 1 + w."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.registry import register

if TYPE_CHECKING:
    import torch


@register("cfg")
@dataclass(frozen=True)
class CFG(Wrap):
    """Classifier-free guidance: u + scale (c - u), two network rows per evaluation.

    scale = 1 is the conditional model (one row, no null call), scale = 0 the unconditional one (one row). The scale
    is that of diffusers' `guidance_scale`, which is 1 + w in the paper's eq. 6. The combination is linear, so it is
    the same whether x0, eps or v is combined.

    Attributes:
        scale: guidance scale, any real number.
    """

    requires = frozenset({"labels"})
    guides = True

    scale: float = 1.0

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return Guided(denoiser, self.scale)


class Guided(DenoiserWrap):
    """The guided field of an inner denoiser."""

    def __init__(self, inner: Denoiser, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

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
        if self.scale == 1.0:
            return self.inner(x, t, cond, want, step=step, rows=rows)
        unconditional = self.inner(x, t, cond.null(), want, step=step, rows=rows)
        if self.scale == 0.0:
            return unconditional
        conditional = self.inner(x, t, cond, want, step=step, rows=rows)
        return unconditional + self.scale * (conditional - unconditional)
