"""Draws from twins and counts by hand, for the tests of methods that reach into the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import twins

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.interfaces import Artifact
from evalbench.preparation import Prepared, prepare
from evalbench.runner import make_cell

B = 2


def draw(
    method: str, nfe: int = 6, kind: str = "dit", guidance: float = 1.0, small: str = ""
) -> tuple[torch.Tensor, Ledger]:
    """Samples of a chain, and what they cost; what it prepares is not counted."""
    artifacts = prepared(method, nfe, kind, guidance, small).artifacts if registry.build_method(method).prepares else ()
    return draw_with(artifacts, method, nfe, kind, guidance, small)


def draw_with(
    artifacts: Sequence[Artifact | None],
    method: str,
    nfe: int = 6,
    kind: str = "dit",
    guidance: float = 1.0,
    small: str = "",
    batch: Sequence[int] = range(B),
) -> tuple[torch.Tensor, Ledger]:
    """The same with artefacts of the chain's parts, none for a chain that prepares nothing, of given samples."""
    made, chain = twins.setup(kind, small), registry.build_method(method)
    cond, ledger = sampling.conditions(made.suite, made.model, batch, made.device), Ledger(len(batch), nfe)
    cell = make_cell(made.suite, method, nfe, guidance, 0)
    return sampling.sample(made, chain.equipped(artifacts) if artifacts else chain, cell, batch, cond, ledger), ledger


@cache
def prepared(method: str, nfe: int = 6, kind: str = "dit", guidance: float = 1.0, small: str = "") -> Prepared:
    """What a chain prepares on a twin, and its bill."""
    made = twins.setup(kind, small)
    return prepare(made, registry.build_method(method), make_cell(made.suite, method, nfe, guidance, 0))


@dataclass(frozen=True)
class ByHand:
    """Operations of one row of a DiT twin, counted by hand: a multiply-add is two; a label is looked up for nothing.

    Attributes:
        tokens, width, blocks, patch: of the network, whose images have one channel.
    """

    tokens: int
    width: int
    blocks: int
    patch: int

    @classmethod
    def of(cls, kind: str = "dit", side: int = 0) -> ByHand:
        """A twin's, for images of a side; 0 is its own."""
        config = twins.setup(kind).door.network.config
        assert config["in_channels"] == config["out_channels"] == 1
        side = side or config["sample_size"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return cls((side // config["patch_size"]) ** 2, width, config["num_layers"], config["patch_size"])

    @property
    def embedding(self) -> int:
        """Of the time, from 256 sinusoids."""
        return 2 * 256 * self.width + 2 * self.width**2

    @property
    def attention(self) -> int:
        """Four projections and two products."""
        return 4 * 2 * self.tokens * self.width**2 + 2 * 2 * self.tokens**2 * self.width

    @property
    def feed_forward(self) -> int:
        return 2 * 2 * self.tokens * self.width * 4 * self.width

    @property
    def block(self) -> int:
        """With its own embedding of the time, and six modulations from it."""
        return self.embedding + 2 * self.width * 6 * self.width + self.attention + self.feed_forward

    @property
    def ends(self) -> int:
        """Patches in and out, and the last norm's two modulations from one more embedding."""
        return 2 * 2 * self.tokens * self.width * self.patch**2 + self.embedding + 2 * self.width * 2 * self.width

    @property
    def whole(self) -> int:
        """A full forward."""
        return self.ends + self.blocks * self.block
