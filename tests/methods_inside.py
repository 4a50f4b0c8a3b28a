"""Draws from twins, for the tests of methods that reach into the network."""

from __future__ import annotations

from collections.abc import Sequence
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
