"""A path that starts later, shared by the methods that start below t_start. Registers nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalbench.errors import Unsupported
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Want

if TYPE_CHECKING:
    import torch


class Truncated(DenoiserWrap):
    """The same network on a path that starts at a fraction of t_start.

    Args:
        inner: the denoiser on the whole path.
        start: new start as a fraction of t_start in the path's time, in (0, 1].

    Raises:
        Unsupported: nothing of the path is left.
    """

    def __init__(self, inner: Denoiser, start: float) -> None:
        super().__init__(inner)
        t = start * inner.path.t_start
        if t <= inner.path.t_end:
            raise Unsupported(f"start={start:g} is time {t:g}, at or below the path's end {inner.path.t_end:g}")
        self.path = inner.path.between(t_start=t)

    def jvp(
        self, x: torch.Tensor, t: float, cond: Cond, want: Want, dx: torch.Tensor, dt: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.jvp(x, t, cond, want, dx, dt)
