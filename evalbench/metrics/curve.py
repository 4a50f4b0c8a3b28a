"""A metric at several N from the same features, with the line in 1 / N: how much of a value is its finite sample.

As E[D_n] = D + c / n + O(1 / n^2), values of one sampler at several n lie near a line in 1 / n that ends at D. Subsets
are nested: the first n samples of one fixed random order, so that the last one is the value itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalbench.errors import UserError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import CLUSTER, Rows, value_of
from evalbench.metrics.frechet import FrechetState

_ORDER_SEED = 20_240_611  # which samples a size takes; changing it changes numbers


@dataclass(frozen=True)
class Curve:
    """Values of one metric by sample count.

    Attributes:
        metric: id. values: one per size, ascending in n, each with its own error and bias. limit, slope: D and c of
            D + c / n by least squares weighted with 1 / se^2. The scatter of nested subsets says nothing of the error
            of `limit`; `fd-infinity` has one with an interval.
    """

    metric: str
    values: tuple[Value, ...]
    limit: float
    slope: float


def curve(metric: Metric[Any], state: Any, reference: Parts | None, sizes: Sequence[int]) -> Curve:
    """The metric of the samples in `state` at several sizes.

    Args:
        metric: one that keeps its rows, such as `fd`, `kid`, `sw` or `recall`. state: of all samples.
        reference: arrays of its reference. sizes: at least two different ones, at most the number of samples.

    Raises:
        UserError: a metric without rows, wrong sizes, or too few samples for the metric's statistic at a size.
    """
    rows = state.rows if isinstance(state, FrechetState) else state
    if not isinstance(rows, Rows) or metric.needs != (metric.arg,) or metric.paired:
        raise UserError(f"metric '{metric.id}' has no curve over N; ask for fd, kid, sw, recall and the like")
    wanted = sorted(set(sizes))
    if len(wanted) < 2 or wanted[0] < 1 or wanted[-1] > rows.n:
        raise UserError(f"sizes {list(sizes)}: name at least two different ones, from 1 to the {rows.n} samples")
    order = np.random.Generator(np.random.Philox(key=_ORDER_SEED)).permutation(rows.n)
    features, clusters = np.concatenate(rows.blocks), rows.clusters

    def at(size: int) -> Value:
        picked = np.sort(order[:size])
        parts = {metric.arg: features[picked]} | ({} if clusters is None else {CLUSTER: clusters[picked]})
        return value_of(metric, metric.update(parts), reference)

    values = tuple(at(size) for size in wanted)
    limit, slope = _line(values)
    return Curve(metric.id, values, limit, slope)


def halved(n: int, times: int = 3) -> list[int]:
    """n / 2^times, ..., n / 2, n."""
    return [n >> i for i in range(times, -1, -1)]


def parse_sizes(text: str | None) -> list[int]:
    """`1000,2000` as numbers; nothing for None."""
    words = [] if text is None else text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise UserError(f"--sizes {text}: write sample counts with commas, such as --sizes 1000,2000,5000")
    return [int(word) for word in words]


def _line(values: Sequence[Value]) -> tuple[float, float]:
    weights = np.array([1.0 if not value.se else 1 / value.se for value in values])
    design = np.array([[1.0, 1 / value.n] for value in values]) * weights[:, None]
    (limit, slope), *_ = np.linalg.lstsq(design, weights * np.array([value.value for value in values]), rcond=None)
    return float(limit), float(slope)
