"""What caches share: which steps are computed in full, and features kept apart for each branch of guidance."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Self

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Features, NetworkWrap, Step

if TYPE_CHECKING:
    import numpy as np

# Faster Diffusion's keys of 50 steps, counted from the first; the same from the other end is the bad order
_FIFTY = (0, 1, 2, 3, 5, 10, 15, 25, 35)
_NAMED = {"50ls": _FIFTY, "50ls-late": (0, *sorted(49 - key for key in _FIFTY[:-1]))}


def check_keys(where: str, keys: str) -> None:
    """Raise UserError unless a text names key steps; see `key_steps`."""
    key_steps(where, keys, None)


def key_steps(where: str, keys: str, n: int | None) -> frozenset[int]:
    """The steps that are computed in full, of n; the first always is.

    Args:
        where: the method, for errors.
        keys: `uniform:K`, every K-th from the first; `50ls`, Faster Diffusion's nine of 50, early ones dense, and
            `50ls-late`, as many with the late ones dense, both scaled to n as round(key n / 50); or `0/1/4`.
        n: number of steps; None checks the text alone.

    Raises:
        UserError: none of these, or a key that is beyond the last step.
    """
    known = f"{where}: keys={keys}: write uniform:K with K >= 1, {', '.join(_NAMED)}, or steps such as 0/1/4"
    if keys in _NAMED:
        steps = n or 50
        return frozenset(min(round(key * steps / 50), steps - 1) for key in _NAMED[keys])
    kind, _, number = keys.partition(":")
    if kind == "uniform":
        if not number.isdecimal() or int(number) < 1:
            raise UserError(known)
        return frozenset(range(0, n or 1, int(number)))
    if not all(key.isdecimal() for key in keys.split("/")):
        raise UserError(known)
    found = frozenset(int(key) for key in keys.split("/"))
    if n is not None and max(found) >= n:
        raise UserError(f"{where}: key {max(found)} is beyond the grid of {n} steps; give keys in 0..{n - 1}")
    return found | {0}


class Keeping(NetworkWrap):
    """A wrap that keeps features of the last key step, apart for each batch of conditions that it is called with.

    Guidance calls it twice in a step, with conditions and without. The solver must walk one trajectory: one that
    evaluates another state in the same step gets what was kept of the last.
    """

    def __init__(self, inner: Denoiser, method: str) -> None:
        super().__init__(inner)
        self.method = method
        self.kept: dict[Hashable, Features] = {}

    def _around(self, inner: Denoiser) -> Self:
        clone = super()._around(inner)
        clone.kept = {}  # another network has other features
        return clone

    def known(self, step: Step | None) -> Step:
        """The step, which must be said."""
        if step is None:
            raise Unsupported(f"not supported: {self.method} needs a solver that says its steps")
        return step


def branch(cond: Cond, rows: np.ndarray | None) -> Hashable:
    """Names a batch of conditions."""
    labels = None if cond.labels is None else tuple(cond.labels.tolist())
    return labels, cond.captions, None if rows is None else rows.tobytes()
