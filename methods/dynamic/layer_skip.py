"""Leaving blocks out: the least a layer-pruning method has to beat."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.errors import UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Edit, NetworkWrap, Step, Wrap, block_range
from evalbench.registry import register

if TYPE_CHECKING:
    import numpy as np

CLAIM = Claim(
    text="Leaving out the middle block in 20 steps is further from the fine solution than 15 full steps.",
    suite="fashion-dit",
    arm="ddim+layer-skip",
    baseline="ddim",
    nfe=20,
    baseline_nfe=15,
    metric="paired-median@pixels",
    samples=128,
    direction="higher",
    effect=0.1,
    level="E",
    author="catalogue",
    transfer="none",
    source="a baseline of ours",
    witness="tests/methods/test_inside.py",
)


@register("layer-skip")
@dataclass(frozen=True)
class LayerSkip(Wrap):
    """Blocks left out: what their bodies would add is nothing; a UNet's resnet is its shortcut.

    A block is a whole transformer block, or a resnet or attention body of a UNet, in the order they run. No training
    and no search: the baseline of both.

    Attributes:
        blocks: `first-last`, both included and counted from 0; empty for the middle one.
        after: share of the steps that are computed in full first, 0..1; above 0 it needs a solver that says its steps.
    """

    requires = frozenset({"blocks"})

    blocks: str = ""
    after: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.after <= 1.0:
            raise UserError(f"layer-skip: after must be in 0..1, got {self.after}")
        if self.blocks:
            block_range(self.name, self.blocks)

    def check(self, nfe: int, blocks: int) -> None:
        if self.blocks:
            block_range(self.name, self.blocks, blocks)

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return denoiser.within(lambda inner: _Skipped(inner, self))


class _Skipped(NetworkWrap):
    """A network without some of its blocks."""

    def __init__(self, inner: Denoiser, settings: LayerSkip) -> None:
        super().__init__(inner)
        self.settings = settings

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable] | None:
        after, blocks = self.settings.after, self.blocks
        if after and step is not None and step.i < after * step.n:
            return None
        n, chosen = len(blocks.names), self.settings.blocks
        skipped = block_range(self.settings.name, chosen, n) if chosen else range(n // 2, n // 2 + 1)
        return blocks.bypass([blocks.names[i] for i in skipped]), self.settings
