"""Precision, recall, density and coverage: k-nearest-neighbour balls in feature space.

    precision   share of samples inside the ball of at least one reference point    Kynkaanniemi et al. 2019, k = 3
    recall      share of reference points inside the ball of at least one sample    the same, roles exchanged
    density     mean number of reference balls that a sample lies in, over k        Naeem et al. 2020, k = 5
    coverage    share of reference points whose ball holds at least one sample      the same

The ball of a point reaches to its k-th nearest neighbour in its own set, itself not counted. Balls of 2019 are closed
(`improved-precision-and-recall-metric`), those of 2020 open (`prdc`), as in the authors' code. The search is exact, in
float64, in blocks: memory does not grow with n m.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evalbench.errors import UserError
from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples, split_labels
from evalbench.registry import register
from evalbench.stats import normal_interval, t_interval, wilson_interval

_BLOCK = 1024  # rows per block: 8 MB of distances
_GROUPS = 16  # of the delete-a-group jackknife
_SPARE = 48  # neighbours kept per sample: enough to lose a group and still have k
_radii_known: dict[str, Array] = {}  # of references, by digest: every cell of a run meets the same one


def squared_distances(x: Array, y: Array) -> Array:
    """|x_i - y_j|^2 of all pairs, (n, m), never below zero."""
    squares: Array = x @ y.T
    squares *= -2
    squares += np.einsum("nd,nd->n", x, x)[:, None]
    squares += np.einsum("md,md->m", y, y)
    return np.maximum(squares, 0.0, out=squares)


def _blocks(x: Array) -> Iterator[slice]:
    for start in range(0, len(x), _BLOCK):
        yield slice(start, start + _BLOCK)


def nearest(x: Array, k: int) -> tuple[Array, NDArray[np.int64]]:
    """The k nearest other points of each point: squared distances in rising order, and indices, both (n, k)."""
    distances, indices = np.empty((len(x), k)), np.empty((len(x), k), dtype=np.int64)
    for rows in _blocks(x):
        squares = squared_distances(x[rows], x)
        own = np.arange(len(x))[rows]
        squares[np.arange(len(own)), own] = np.inf
        near = np.argpartition(squares, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(squares, near, axis=1), axis=1, kind="stable")
        indices[rows] = np.take_along_axis(near, order, axis=1)
        distances[rows] = np.take_along_axis(squares, indices[rows], axis=1)
    return distances, indices


def radii(x: Array, k: int) -> Array:
    """Squared distance of each point to its k-th nearest other point, (n,)."""
    return nearest(x, k)[0][:, k - 1]


def _reference_radii(y: Array, k: int) -> Array:
    digest = hashlib.sha256(np.ascontiguousarray(y).tobytes() + f"{y.shape} {k}".encode()).hexdigest()
    if digest not in _radii_known:
        _radii_known[digest] = radii(y, k)
    return _radii_known[digest]


class NeighbourMetric(RowsMetric):
    """A score from nearest-neighbour balls.

    Attributes:
        k: which neighbour a ball reaches to; part of the definition.
        least: samples that the score and its interval need.
    """

    higher_is_better = True
    unit = "fraction"
    k: ClassVar[int]
    least: ClassVar[int] = 2 * _GROUPS

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, self.least, f"k = {self.k} and an interval", allow_small_n=False)
        x = state.joined()
        y = reference_rows(self.id, self.reference_key, reference, x.shape[1])
        if len(y) <= self.k:
            raise UserError(f"metric '{self.id}' needs more than {self.k} reference samples, got {len(y)}")
        centre = y.mean(axis=0)  # distances by products lose digits far from the origin
        return self.score(x - centre, y - centre)

    def score(self, x: Array, y: Array) -> Value:
        """The value of samples x (n, D) and reference y (m, D)."""
        raise NotImplementedError


@register("precision")
class Precision(NeighbourMetric):
    """Share of samples inside the 3-nearest-neighbour ball of a reference point (Kynkaanniemi et al. 2019)."""

    k = 3
    least = 2

    def score(self, x: Array, y: Array) -> Value:
        reach = _reference_radii(y, self.k)
        inside = sum(int((squared_distances(x[rows], y) <= reach).any(axis=1).sum()) for rows in _blocks(x))
        interval = wilson_interval(inside, len(x))
        share = inside / len(x)
        return Value(share, len(x), float(np.sqrt(share * (1 - share) / len(x))), interval.low, interval.high)


@register("density")
class Density(NeighbourMetric):
    """Reference 5-nearest-neighbour balls around a sample, over 5 (Naeem et al. 2020); may exceed 1."""

    unit = "ratio"
    k = 5
    least = 2

    def score(self, x: Array, y: Array) -> Value:
        reach = _reference_radii(y, self.k)
        counts = np.concatenate([(squared_distances(x[rows], y) < reach).sum(axis=1) for rows in _blocks(x)]) / self.k
        value, se = float(counts.mean()), float(counts.std(ddof=1) / np.sqrt(len(x)))
        interval = normal_interval(value, se)
        return Value(value, len(x), se, max(0.0, interval.low), interval.high)


@register("coverage")
class Coverage(NeighbourMetric):
    """Share of reference points whose 5-nearest-neighbour ball holds a sample (Naeem et al. 2020)."""

    k = 5

    def score(self, x: Array, y: Array) -> Value:
        groups = split_labels(len(x), _GROUPS)
        reach = _reference_radii(y, self.k)
        held = np.zeros((len(y), _GROUPS), dtype=bool)  # which groups have a sample in the ball
        for rows in _blocks(y):
            inside = squared_distances(y[rows], x) < reach[rows, None]
            for group in range(_GROUPS):
                held[rows, group] = inside[:, groups == group].any(axis=1)
        return _jackknifed(_shares(held), len(x))


@register("recall")
class Recall(NeighbourMetric):
    """Share of reference points inside the 3-nearest-neighbour ball of a sample (Kynkaanniemi et al. 2019)."""

    k = 3

    def score(self, x: Array, y: Array) -> Value:
        groups = split_labels(len(x), _GROUPS)
        reach = _radii_without(x, self.k, groups)  # (17, n)
        held = np.zeros((1 + _GROUPS, len(y)), dtype=bool)
        for rows in _blocks(y):
            squares = squared_distances(y[rows], x)
            for left_out in range(1 + _GROUPS):
                held[left_out, rows] = (squares <= reach[left_out]).any(axis=1)
        return _jackknifed(held.mean(axis=1), len(x))


def _shares(held: NDArray[np.bool_]) -> Array:
    """From which groups reach a point, (m, G): the share reached by all, and by all but each group, (1 + G,)."""
    reached = held.sum(axis=1)
    return np.array([(reached > 0).mean(), *((reached - held[:, g] > 0).mean() for g in range(held.shape[1]))])


def _radii_without(x: Array, k: int, groups: NDArray[np.int64]) -> Array:
    """Squared radii in the whole set, then without each group; -1, no ball, for the group left out. (1 + G, n)."""
    count = min(len(x) - 1, _SPARE)
    distances, indices = nearest(x, count)
    reach = np.empty((1 + _GROUPS, len(x)))
    reach[0] = distances[:, k - 1]
    for group in range(_GROUPS):
        kept = groups[indices] != group
        place = (np.cumsum(kept, axis=1) >= k).argmax(axis=1)  # column of the k-th neighbour that is left
        reach[1 + group] = distances[np.arange(len(x)), place]
        short = np.flatnonzero((kept.sum(axis=1) < k) & (groups != group))
        for i in short:  # a cluster of one group; so rare that it may be slow
            others = np.flatnonzero((groups != group) & (np.arange(len(x)) != i))
            reach[1 + group, i] = np.sort(squared_distances(x[i : i + 1], x[others])[0])[k - 1]
        reach[1 + group, groups == group] = -1.0
    return reach


def _jackknifed(shares: Array, n: int) -> Value:
    """A share with its delete-a-group error; shares[0] of all samples, the rest without one group each."""
    value, left_out = float(shares[0]), shares[1:]
    se = float(np.sqrt((_GROUPS - 1) / _GROUPS * np.sum((left_out - left_out.mean()) ** 2)))
    interval = t_interval(value, se, _GROUPS - 1)
    # no bias: both grow with n by definition, and what they would be at another n is another question
    return Value(value, n, se, max(0.0, interval.low), min(1.0, interval.high))
