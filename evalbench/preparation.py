"""What happens before sampling: search, statistics, calibration. Its noise and data are its own, its cost has a bill.

Reported samples use run seeds below `SEARCH`; everything here uses seeds from there on, so that a searched method is
never scored on the noise or on the reference draws it was searched with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field
from evalbench.errors import Unsupported
from evalbench.interfaces import Artifact, Cond, Denoiser, Modifier, Preparation, SampleBatch, Step, Time, Want, Wrap
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.models.nets import differentiable
from evalbench.noise import NoiseSource
from evalbench.registry import Chain
from evalbench.sampling import Setup, conditions, images_of, wrapped
from evalbench.spec import Cell, Suite, content_id

SEARCH = 2**32  # first seed of search noise and of the search split; run seeds lie below
_REFERENCE_SEED = SEARCH + 2**31  # the split that the metric oracle refers to, apart from what `data` hands out
_REFERENCE_SAMPLES = 20_000
_BLOCK = 500  # samples whose features are made at once


def preparation_key(suite: Suite, chain: Chain, cell: Cell) -> str:
    """Names what a preparation depends on; empty when the chain prepares nothing."""
    if not chain.prepares:
        return ""
    facts = {"generation": suite.generation(), "settings": chain.settings(), "guidance": cell.guidance}
    return content_id(facts | ({"nfe": cell.nfe} if chain.prepares == "per-nfe" else {}))


@dataclass(frozen=True)
class Prepared:
    """Artefacts of a chain's parts, in the order of `Chain.parts`, and what they cost in all.

    Attributes:
        bill: nfe, evals.ROLE, aux.ROLE, backward, cost and flops (missing where one is not known), and seconds.
    """

    artifacts: tuple[Artifact | None, ...]
    bill: dict[str, float]


def prepare(setup: Setup, chain: Chain, cell: Cell) -> Prepared:
    """Prepare every part of a chain: wraps from the network outwards, the solver, then the modifiers."""
    started = time.perf_counter()
    ledgers: list[Ledger] = []
    made: list[Artifact | None] = [None] * len(chain.parts)
    for i in _order(chain):
        part = chain.parts[i]
        if part.prepares:
            context = Context(setup, chain.equipped(made), cell, i, ledgers)
            with torch.no_grad():
                made[i] = part.prepare(context)
    return Prepared(tuple(made), _bill(ledgers) | {"seconds": time.perf_counter() - started})


def _order(chain: Chain) -> list[int]:
    def rank(i: int) -> int:
        part = chain.parts[i]
        return 0 if isinstance(part, Wrap) else 2 if isinstance(part, Modifier) else 1

    return sorted(range(len(chain.parts)), key=rank)


def _bill(ledgers: Sequence[Ledger]) -> dict[str, float]:
    """Totals over everything that was evaluated."""
    totals: dict[str, float] = {"nfe": 0.0, "cost": 0.0, "flops": 0.0, "backward": 0.0}
    for ledger in ledgers:
        counts = {"nfe": ledger.nfe, "cost": ledger.cost, "flops": ledger.flops, "backward": ledger.backward}
        counts |= {f"evals.{role}": rows for role, rows in ledger.evals.items()}
        counts |= {f"aux.{role}": rows for role, rows in ledger.aux.items()}
        for name, values in counts.items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total for name, total in totals.items() if math.isfinite(total)}


class _Billed(Field):
    """A field whose calls go to its own ledger, whichever was made last."""

    def __init__(self, inner: Denoiser, ledger: Ledger, setup: Setup) -> None:
        super().__init__(inner, ledger)
        self._setup = setup

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
        self._setup.door.ledger = self.ledger
        return super().__call__(x, t, cond, want, step=step, rows=rows)


_references: dict[str, Gaussian] = {}  # search splits of this process's suites


class Context(Preparation):
    """What one part may use.

    Args:
        setup: the suite's model. chain: with the artefacts made so far. cell: whose guidance and budget count.
        part: index into `chain.parts` of the part that prepares. ledgers: everything evaluated is entered here.
    """

    def __init__(self, setup: Setup, chain: Chain, cell: Cell, part: int, ledgers: list[Ledger]) -> None:
        self._setup, self._chain, self._cell, self._ledgers = setup, chain, cell, ledgers
        self._before = Chain(chain.solver, chain.others[: max(part - 1, 0)])
        # the solver and the modifiers stand outside every wrap
        preparing = chain.parts[part]
        self._wraps = len(self._before.wraps) if isinstance(preparing, Wrap) else len(chain.wraps)
        self.solver = self._before.sampler if isinstance(preparing, Modifier) else chain.solver
        self.path, self.grid, self.shape = setup.door.path, setup.door.grid, setup.door.shape
        # what is prepared once may not depend on which budget happened to come first
        self.nfe = cell.nfe if preparing.prepares == "per-nfe" else 0

    def noise(self, indices: Sequence[int], seed: int = 0) -> NoiseSource:
        return NoiseSource(SEARCH + seed, indices, self.shape, self._setup.dtype, self._setup.device)

    def rng(self, seed: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=SEARCH + seed))

    def cond(self, indices: Sequence[int]) -> Cond:
        return conditions(self._setup.suite, self._setup.model, indices, self._setup.device)

    def denoiser(self, batch: int) -> Denoiser:
        ledger = Ledger(batch)
        self._ledgers.append(ledger)
        self._setup.door.ledger = ledger
        inner = wrapped(self._setup.door, self._chain, self._cell.guidance, wraps=self._wraps)
        return _Billed(inner, ledger, self._setup)

    def x_T(self, noise: NoiseSource) -> torch.Tensor:
        return self._setup.model.start(noise, self.path)

    def data(self, n: int, seed: int = 0) -> tuple[torch.Tensor, Cond]:
        cond = self.cond(range(n))
        return self._setup.model.data(range(n), cond.labels, SEARCH + seed), cond

    def features(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name == "identity":
            return x.flatten(1)
        model = self._setup.model
        if not model.is_image:
            raise Unsupported(f"not supported: needs images for the features of {name}")
        pixels = (model.decode(x).clamp(-1.0, 1.0) + 1.0) * 127.5  # as in `to_uint8`, without its rounding
        return differentiable(name)(pixels.float())

    def distance(self, x: torch.Tensor) -> float:
        return self._distance(x, self._reference())

    def distance_to(self, data: torch.Tensor) -> Callable[[torch.Tensor], float]:
        reference = moments(self._features(data)).gaussian()
        return lambda x: self._distance(x, reference)

    def _distance(self, x: torch.Tensor, reference: Gaussian) -> float:
        return frechet_distance(moments(self._features(x)).gaussian(), reference)

    def _reference(self) -> Gaussian:
        key = content_id([self._setup.suite.generation(), _REFERENCE_SEED, _REFERENCE_SAMPLES])
        if key not in _references:
            labels = self.cond(range(_REFERENCE_SAMPLES)).labels
            x = self._setup.model.data(range(_REFERENCE_SAMPLES), labels, _REFERENCE_SEED)
            _references[key] = moments(self._features(x)).gaussian()
        return _references[key]

    def _features(self, x: torch.Tensor) -> np.ndarray:
        """Features of the suite's first Frechet distance; the samples themselves where it has none."""
        names = (self._setup.suite.metrics.primary, *self._setup.suite.metrics.names)
        extractor = next((name.partition("@")[2] for name in names if name.startswith("fd@")), "identity")
        extract: Any = registry.build_extractor(extractor)
        cond, model = self.cond(range(len(x))), self._setup.model
        found: list[np.ndarray] = []
        for rows in torch.split(torch.arange(len(x), device=x.device), _BLOCK):  # a decoder takes no reference at once
            batch = SampleBatch(x[rows], images_of(model, x[rows]), cond.rows(rows), model)
            found.append(extract(batch).flatten(1).cpu().numpy())
        return np.concatenate(found)
