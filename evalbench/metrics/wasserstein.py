"""Sliced 2-Wasserstein distance: SW_2 = (mean over directions of W_2^2 of the projections)^1/2.

Rabin et al. 2012; Bonneel et al. 2015. The order is 2 and the root is taken, so the number has the unit of the data.
W_2 of two one-dimensional samples matches their quantile functions exactly, also when the sizes differ.
"""

from __future__ import annotations

import numpy as np

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples, split_labels
from evalbench.registry import register
from evalbench.stats import t_interval

_DIRECTIONS = 256
_DIRECTION_SEED = 20_240_608
_GROUPS = 16  # of the delete-a-group jackknife


def directions(dims: int) -> Array:
    """256 fixed unit vectors, (256, D), from one Philox seed; part of the metric's definition."""
    generator = np.random.Generator(np.random.Philox(key=_DIRECTION_SEED))
    vectors: Array = generator.standard_normal((_DIRECTIONS, dims))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def squared_distances(a: Array, b: Array) -> Array:
    """W_2^2 of one-dimensional samples, row by row.

    Args:
        a: sorted along the last axis, (K, n). b: sorted, (K, m).

    Returns:
        The integral over u in (0, 1) of (F_a^-1(u) - F_b^-1(u))^2, (K,).
    """
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return np.asarray(np.mean((a - b) ** 2, axis=1))
    # both quantile functions are constant between neighbouring multiples of 1 / (n m): exact in integers
    cuts = np.union1d(np.arange(n) * m, np.arange(m) * n)
    weights = np.diff(cuts, append=n * m) / (n * m)
    distances: Array = (a[:, cuts // m] - b[:, cuts // n]) ** 2 @ weights
    return distances


@register("sw")
class SlicedWasserstein(RowsMetric):
    """Sliced 2-Wasserstein distance over 256 fixed directions; standard error and bias by a 16-group jackknife."""

    unit = "feature units"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n = state.n
        rule = f"2 in each of {_GROUPS} jackknife groups"
        small = require_samples(self.id, n, 2 * _GROUPS, rule, allow_small_n=allow_small_n)
        x = state.joined()
        axes = directions(x.shape[1])
        target = np.sort(axes @ reference_rows(self.id, self.reference_key, reference, x.shape[1]).T, axis=1)
        projected = axes @ x.T  # (256, n)
        order = np.argsort(projected, axis=1, kind="stable")
        ordered = np.take_along_axis(projected, order, axis=1)
        value = float(np.sqrt(squared_distances(ordered, target).mean()))
        if small:
            return Value(value, n, note="small N")

        labels = split_labels(n, _GROUPS)[order]
        without = []
        for group in range(_GROUPS):
            kept = ordered[labels != group].reshape(_DIRECTIONS, -1)
            without.append(float(np.sqrt(squared_distances(kept, target).mean())))
        left_out = np.array(without)
        se = float(np.sqrt((_GROUPS - 1) / _GROUPS * np.sum((left_out - left_out.mean()) ** 2)))
        interval = t_interval(value, se, _GROUPS - 1)
        bias = float((_GROUPS - 1) * (left_out.mean() - value))
        return Value(value, n, se, interval.low, interval.high, bias)
