"""Chunks of a cell -> metrics with intervals: in chunk order, in float64, whoever computed the chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import value_of
from evalbench.spec import Chunk, MetricValue
from evalbench.store import Store

References = Callable[[str], Parts | None]


def parts_of(metrics: Iterable[Metric[Any]]) -> tuple[str, ...]:
    """Extractors that a cell needs for these metrics, sorted."""
    return tuple(sorted({part for metric in metrics for part in metric.needs}))


def paired_parts(metrics: Iterable[Metric[Any]]) -> tuple[str, ...]:
    """Extractors that the fine solution needs, sorted."""
    return parts_of(metric for metric in metrics if metric.paired)


@dataclass(frozen=True)
class Reduced:
    """What the chunks of a cell say.

    Attributes:
        metrics: values by metric id. missing: the reason for each metric that has none.
        counts: per-sample means of the ledger, see `count_means`.
    """

    metrics: dict[str, MetricValue]
    missing: dict[str, str]
    counts: dict[str, float]


def reduce_cell(
    store: Store,
    chunks: Sequence[Chunk],
    solution: Sequence[Chunk] | None,
    metrics: Sequence[Metric[Any]],
    references: References,
    *,
    allow_small_n: bool = False,
) -> Reduced:
    """All metrics and counts of a cell, from one reading of its chunks.

    Args:
        store: holds the chunks. chunks: of the cell, in order.
        solution: chunks of the fine solution over the same samples; None when there is none.
        metrics: what to compute. references: reference arrays by key.
        allow_small_n: compute set distances below their least N, marked.

    Raises:
        BadSamples: samples that no score may be computed from. DamagedChunk: see `Store.read_chunk`.
    """
    missing: dict[str, str] = {}
    wanted = []
    for metric in metrics:
        if metric.paired and solution is None:
            missing[metric.id] = "no fine solution to pair with"
        elif metric.reference_key and references(metric.reference_key) is None:
            missing[metric.id] = f"the suite has no reference '{metric.reference_key}' at this guidance"
        else:
            wanted.append(metric)
    whole = _Whole()
    states = states_of(store, chunks, solution, wanted, whole.see)
    values: dict[str, MetricValue] = {}
    for metric in wanted:
        reference = references(metric.reference_key) if metric.reference_key else None
        try:
            value = value_of(metric, states[metric.id], reference, allow_small_n=allow_small_n)
            values[metric.id] = _checked(metric, value)
        except (UserError, EvalbenchError) as error:
            missing[metric.id] = str(error)
    return Reduced(values, missing, count_means(joined(whole.counts)))


class _Whole:
    """What only a whole cell shows, from its chunks in order: the ledger's counts, and samples that are there twice."""

    def __init__(self) -> None:
        self.counts: list[dict[str, np.ndarray]] = []
        self._first: dict[str, int] = {}  # digest of a sample -> where it was seen first

    def see(self, chunk: Chunk, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take a chunk.

        Raises:
            BadSamples: it has fewer samples than planned, or one that another place has; with the ids of the samples.
        """
        self.counts.append(counts_in(arrays))
        digests = facts.get("digests", [])  # of images; older chunks have none
        if digests and len(digests) != chunk.stop - chunk.start:
            raise BadSamples(f"{len(digests)} samples stand for samples {chunk.start}-{chunk.stop - 1}")
        for i, digest in enumerate(digests, chunk.start):
            if digest and self._first.setdefault(digest, i) != i:  # none: planned to repeat an earlier sample
                raise BadSamples(f"sample {i} is a copy of sample {self._first[digest]}")


def states_of(
    store: Store,
    chunks: Sequence[Chunk],
    solution: Sequence[Chunk] | None,
    metrics: Sequence[Metric[Any]],
    see: Callable[[Chunk, Mapping[str, np.ndarray], Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """States of a cell's metrics by id, merged in chunk order; `see` is shown every chunk, its arrays and its facts."""
    states: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        parts, facts = store.read_whole_chunk(chunk)
        if see is not None:
            see(chunk, parts, facts)
        if solution is not None and any(metric.paired for metric in metrics):
            fine = store.read_chunk(solution[i])
            parts |= {f"paired:{name}": values for name, values in fine.items()}
        for metric in metrics:
            state = metric.update(parts)
            states[metric.id] = metric.merge(states[metric.id], state) if i else state
    return states


def _checked(metric: Metric[Any], value: Value) -> MetricValue:
    """NaN is never a score."""
    if not np.isfinite(value.value):
        raise EvalbenchError(f"{metric.id} is {value.value}")
    return MetricValue(
        value=value.value,
        n=value.n,
        se=value.se,
        low=value.low,
        high=value.high,
        bias=value.bias,
        note=value.note,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
    )


def counts_in(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ledger's counts among the arrays of samples, by name, each (B,)."""
    return {name.removeprefix("count:"): values for name, values in arrays.items() if name.startswith("count:")}


def joined(blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The counts of a cell's chunks in order; one that only some have (a role not always called) is zero in others."""
    names = dict.fromkeys(name for block in blocks for name in block)
    return {name: np.concatenate([block.get(name, np.zeros(len(block["nfe"]))) for block in blocks]) for name in names}


def count_means(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of counts over samples, and the 95th percentile of nfe; what is not finite for every sample stays out."""
    means = {name: float(values.mean()) for name, values in counts.items() if np.isfinite(values).all()}
    return means | ({"nfe_p95": float(np.percentile(counts["nfe"], 95))} if "nfe" in means else {})
