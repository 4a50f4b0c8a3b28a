"""Draws from twins, for the tests of methods that reach into the network."""

from __future__ import annotations

import torch
import twins

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.runner import make_cell

B = 2


def draw(
    method: str, nfe: int = 6, kind: str = "dit", guidance: float = 1.0, small: str = ""
) -> tuple[torch.Tensor, Ledger]:
    """Samples of a chain, and what they cost."""
    made = twins.setup(kind, small)
    cond, ledger = sampling.conditions(made.suite, made.model, range(B), made.device), Ledger(B, nfe)
    cell = make_cell(made.suite, method, nfe, guidance, 0)
    return sampling.sample(made, registry.build_method(method), cell, range(B), cond, ledger), ledger
