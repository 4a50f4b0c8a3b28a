"""What the metrics share: checked features, fixed splits, references, and the rule on small N."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.registry import extractor_caveat

Array: TypeAlias = NDArray[np.float64]
_SPLIT_SEED = 20_240_607  # fixes which half, or block, a sample index falls into; changing it changes numbers


CLUSTER = "cluster"  # name of the array that says which samples belong together, int (B,)


@dataclass(frozen=True)
class Rows:
    """Per-sample rows of the chunks seen so far, in chunk order; a state that merges without arithmetic.

    Attributes:
        blocks: arrays (B, ...), one per chunk. cluster_blocks: for each chunk which samples share a prompt, int (B,);
            empty where all are independent.
    """

    blocks: tuple[np.ndarray, ...]
    cluster_blocks: tuple[np.ndarray, ...] = ()

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.blocks + other.blocks, self.cluster_blocks + other.cluster_blocks)

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(len(block) for block in self.blocks)

    def joined(self) -> Array:
        """All rows as float64."""
        return np.concatenate([block.astype(np.float64) for block in self.blocks])

    @property
    def clusters(self) -> np.ndarray | None:
        """The cluster of each sample, int (n,); None where all are independent."""
        return np.concatenate(self.cluster_blocks) if self.cluster_blocks else None


def value_of(metric: Metric[Any], state: Any, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
    """`metric.compute`, with what must be said of the features it was computed from in the note."""
    value = metric.compute(state, reference, allow_small_n=allow_small_n)
    caveats = dict.fromkeys(extractor_caveat(name) for name in metric.needs)
    return replace(value, note="; ".join(filter(None, (value.note, *caveats))))


def clusters_of(parts: Parts) -> tuple[np.ndarray, ...]:
    """The clusters of a chunk for `Rows`: what the chunk says of them, or nothing."""
    return (parts[CLUSTER],) if CLUSTER in parts else ()


def rows_of(metric: str, parts: Parts, name: str) -> np.ndarray:
    """The array of an extractor as (B, D), in its own dtype.

    Args:
        metric: id, for the message. parts: what `update` got. name: key in parts.

    Raises:
        BadSamples: a number is not finite.
    """
    rows = parts[name].reshape(len(parts[name]), -1)
    bad = int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
    if bad:
        raise BadSamples(f"{metric}: '{name}' is NaN or infinite for {bad} of {len(rows)} samples")
    return rows


class RowsMetric(Metric[Rows]):
    """A metric that keeps the rows of one extractor and refers to the suite's reference of the same name."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    @property
    def reference_key(self) -> str:
        return self.arg

    def update(self, parts: Parts) -> Rows:
        return Rows((rows_of(self.id, parts, self.arg),), clusters_of(parts))

    def merge(self, a: Rows, b: Rows) -> Rows:
        return a + b


def scores_of(metric: str, parts: Parts, name: str) -> Array:
    """The array of an extractor that gives one number per sample, as float64 (B,).

    Raises:
        BadSamples: a number is not finite. UserError: the extractor gives more than one number per sample.
    """
    rows = rows_of(metric, parts, name)
    if rows.shape[1] != 1:
        raise UserError(
            f"metric '{metric}' needs one number per sample, but '{name}' gives {rows.shape[1]}; "
            "see `evalbench list metrics`"
        )
    return rows[:, 0].astype(np.float64)


def need_reference(metric: str, key: str, reference: Parts | None) -> Parts:
    """The reference, or the error that it is missing."""
    if reference is None:
        raise UserError(f"metric '{metric}' needs the reference '{key}'; name it in the suite's [references]")
    return reference


def reference_rows(metric: str, key: str, reference: Parts | None, dims: int) -> Array:
    """Single samples of the reference as float64 (M, D): its `features`, or the `draws` of an exact model.

    Raises:
        UserError: no reference, or one without single samples. EvalbenchError: other dimensions, or not finite.
    """
    reference = need_reference(metric, key, reference)
    found = [reference[name] for name in ("features", "draws") if name in reference]
    if not found:
        raise UserError(
            f"metric '{metric}' needs single samples, but reference '{key}' has only {sorted(reference)}; "
            "make it with `features` or `draws`"
        )
    rows = found[0].reshape(len(found[0]), -1).astype(np.float64)
    check_reference(metric, key, rows, dims)
    return rows


def check_reference(metric: str, key: str, array: np.ndarray, dims: int) -> None:
    """Raise EvalbenchError unless the last axis of a reference array is `dims` and all of it is finite."""
    if array.shape[-1] != dims:
        raise EvalbenchError(
            f"metric '{metric}': reference '{key}' has {array.shape[-1]} dimensions, the samples have {dims}"
        )
    if not np.isfinite(array).all():
        raise EvalbenchError(f"metric '{metric}': reference '{key}' holds NaN or infinite numbers")


def require_samples(metric: str, n: int, need: int, why: str, *, allow_small_n: bool) -> bool:
    """Whether n < need; raises UserError then, unless allowed.

    Args:
        metric: id. n: samples there are. need: samples the statistic asks for. why: how `need` comes about.
        allow_small_n: the user said --allow-small-n.
    """
    if n < need and not allow_small_n:
        raise UserError(
            f"metric '{metric}' needs at least {need} samples ({why}), got {n}; raise --samples or pass --allow-small-n"
        )
    return n < need


def split_labels(n: int, groups: int, clusters: np.ndarray | None = None) -> NDArray[np.int64]:
    """Which of `groups` equal groups each sample index falls into, int (n,); the same for all methods of a suite.

    A fixed random split: positions modulo something would follow the label plan. With `clusters`, int (n,), whole
    clusters are dealt out, in the order of their first sample.
    """
    if clusters is not None:
        _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
        return split_labels(len(first), groups)[np.argsort(np.argsort(first))][inverse]
    order = np.random.Generator(np.random.Philox(key=_SPLIT_SEED)).permutation(n)
    labels = np.empty(n, dtype=np.int64)
    labels[order] = np.arange(n) * groups // n
    return labels
