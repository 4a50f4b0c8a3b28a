"""Guidance in an interval of noise levels, Kynkaanniemi et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.registry import register

from .cfg import Guided

if TYPE_CHECKING:
    import numpy as np
    import torch


@register("cfg-interval")
@dataclass(frozen=True)
class CFGInterval(Wrap):
    """Classifier-free guidance where low < sigma / alpha <= high, the plain conditional model elsewhere.

    Two network rows per evaluation inside the interval and one outside. sigma / alpha is the noise level of EDM,
    whatever the path. The default interval is ours; a model's own has to be found on it.

    Attributes:
        scale: guidance scale as in `cfg`. low, high: the interval, 0 <= low < high.
    """

    requires = frozenset({"labels"})
    guides = True

    scale: float = 2.0
    low: float = 0.2
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high:
            raise UserError(f"cfg-interval: needs 0 <= low < high, got low={self.low}, high={self.high}")

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return _Interval(denoiser, self)


class _Interval(DenoiserWrap):
    """Guided or not, by the noise level."""

    def __init__(self, inner: Denoiser, settings: CFGInterval) -> None:
        super().__init__(inner)
        self.settings = settings

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
        if not isinstance(t, int | float):
            raise Unsupported("not supported: cfg-interval needs one time for all rows")
        level = float(self.path.sigma(t)) / max(float(self.path.alpha(t)), 1e-30)
        inside = self.settings.low < level <= self.settings.high
        field = Guided(self.inner, self.settings.scale) if inside else self.inner
        return field(x, t, cond, want, step=step, rows=rows)
