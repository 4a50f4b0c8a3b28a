"""The interval cache: every k-th step computes a range of blocks, the steps between add what it added."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.errors import UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Edit, Features, Step, Wrap, block_range
from evalbench.registry import register

from ._kept import Keeping, branch

if TYPE_CHECKING:
    import numpy as np

CLAIM = Claim(
    text="Half of the steps with all blocks cached is no nearer to the fine solution than half as many full steps.",
    suite="fashion-dit",
    arm="ddim+interval-cache(every=2)",
    baseline="ddim",
    nfe=20,
    baseline_nfe=10,
    metric="paired-median@pixels",
    samples=128,
    direction="higher",
    effect=0.05,
    level="E",
    author="catalogue",
    transfer="none",
    source="the baseline of all caches, at equal FLOPs",
    witness="tests/methods/test_inside.py",
)


@register("interval-cache")
@dataclass(frozen=True)
class IntervalCache(Wrap):
    """Every k-th step computes a range of blocks; between them each block adds what it added in that step.

    The baseline of all caches. Blocks outside the range are always computed. A block's addition is kept after its
    gates (of a UNet's resnet, before its shortcut, which is always computed); learned caches keep the outputs of
    sub-layers before them, which is another thing. With `every=1` it is the model itself.

    Attributes:
        every: k, at least 1; the first step is always computed.
        blocks: `first-last`, both included and counted from 0 in the order they run; empty for all.
    """

    requires = frozenset({"blocks"})

    every: int = 2
    blocks: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"interval-cache: every must be at least 1, got {self.every}")
        if self.blocks:
            block_range("interval-cache", self.blocks)

    def check(self, nfe: int, blocks: int) -> None:
        if self.blocks:
            block_range("interval-cache", self.blocks, blocks)

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return denoiser.within(lambda inner: _Cached(inner, self))


class _Cached(Keeping):
    """Blocks that add what they added."""

    def __init__(self, inner: Denoiser, settings: IntervalCache) -> None:
        super().__init__(inner, settings.name)
        self.settings = settings

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable] | None:
        if self.settings.every == 1:
            return None
        blocks, which = self.blocks, branch(cond, rows)
        if self.known(step).i % self.settings.every == 0 or which not in self.kept:
            kept: Features = {}
            self.kept[which] = kept
            chosen = self.settings.blocks
            cached = block_range(self.settings.name, chosen, len(blocks.names)) if chosen else range(len(blocks.names))
            return blocks.keep_additions([blocks.names[i] for i in cached], kept), (self.settings, "keep")
        return blocks.add(self.kept[which]), (self.settings, "reuse")
