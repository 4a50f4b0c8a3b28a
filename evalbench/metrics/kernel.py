"""KID: the unbiased squared maximum mean discrepancy with the cubic kernel k(x, y) = (x.y / D + 1)^3.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Binkowski et al. 2018. It is computed once, over all samples, in blocks. clean-fid and torchmetrics average it over
random subsets of 1000: the same expectation with more noise, and a number that depends on the draw of the subsets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples, split_labels
from evalbench.registry import register
from evalbench.stats import StandardError, corrected_standard_error, t_interval

_BLOCK = 512  # rows per block: 2 MB of kernel values, which stay in a core's cache
_own_means: dict[str, float] = {}  # of references, by digest: every cell of a run meets the same one


@dataclass(frozen=True)
class Mmd:
    """The unbiased estimate and the effect of each sample on it, with y taken as given.

    Attributes:
        value: MMD^2; may be negative near zero.
        influence: psi_i = 2 (mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j)), centred, (n,).
        in_half: the same within the half that a sample belongs to, (n,). half_of: 0 or 1, int (n,).
        clusters: int (n,), equal for the samples of a cluster; None for independent samples.
    """

    value: float
    influence: Array
    in_half: Array
    half_of: NDArray[np.int64]
    clusters: np.ndarray | None = None

    def __sub__(self, other: Mmd) -> Mmd:
        """The paired difference: row i of both comes from the same noise."""
        influence, in_half = self.influence - other.influence, self.in_half - other.in_half
        return Mmd(self.value - other.value, influence, in_half, self.half_of, self.clusters)

    @property
    def error(self) -> StandardError:
        """Standard error of the value, a U-statistic of second order."""
        return corrected_standard_error(self.influence, self.in_half, self.half_of, self.clusters)


def cubic_kernel(x: Array, y: Array) -> Array:
    """(x.y / D + 1)^3 of all pairs, (n, m)."""
    base: Array = (x / x.shape[1]) @ y.T
    base += 1.0
    cubes: Array = base * base
    cubes *= base
    return cubes


def _row_sums(x: Array, y: Array) -> Array:
    """sum_j k(x_i, y_j), (n,)."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), _BLOCK):
        for j in range(0, len(y), _BLOCK):
            sums[i : i + _BLOCK] += cubic_kernel(x[i : i + _BLOCK], y[j : j + _BLOCK]).sum(axis=1)
    return sums


def _sums_by_group(x: Array, groups: Array) -> Array:
    """sum_{j != i, j in g} k(x_i, x_j), (n, G); every pair is computed once.

    Args:
        groups: (n, G), 1 where a sample belongs to a group, else 0.
    """
    sums = np.zeros_like(groups)
    for i in range(0, len(x), _BLOCK):
        for j in range(i, len(x), _BLOCK):
            k = cubic_kernel(x[i : i + _BLOCK], x[j : j + _BLOCK])
            if i == j:
                np.fill_diagonal(k, 0.0)
            else:
                sums[j : j + _BLOCK] += k.T @ groups[i : i + _BLOCK]
            sums[i : i + _BLOCK] += k @ groups[j : j + _BLOCK]
    return sums


def mmd2(x: Array, y: Array, clusters: np.ndarray | None = None) -> Mmd:
    """Unbiased MMD^2 of samples x (n, D), n >= 4, and reference y (m, D), m >= 2, float64.

    With clusters the pairs within a cluster are left out of the first mean: they say nothing of independent samples.
    """
    n, half_of = len(x), split_labels(len(x), 2, clusters)
    members = np.eye(2)[half_of]  # (n, 2)
    sums, pairs = _sums_by_group(x, members), np.tile(members.sum(axis=0), (n, 1)) - members
    if clusters is not None:
        within, others = _within_clusters(x, clusters)
        sums, pairs = sums - within[:, None] * members, pairs - others[:, None] * members
    cross, mine = _row_sums(x, y) / len(y), (np.arange(n), half_of)
    own = sums.sum(axis=1) / pairs.sum(axis=1)
    psi = 2 * (own - cross)
    in_half = 2 * (sums[mine] / pairs[mine] - cross)
    weights = pairs.sum(axis=1) / pairs.sum()
    value = float(weights @ own + _own_mean(y) - 2 * cross.mean())
    return Mmd(value, psi - psi.mean(), in_half, half_of, clusters)


def _within_clusters(x: Array, clusters: np.ndarray) -> tuple[Array, Array]:
    """sum_{j != i} k(x_i, x_j) over the cluster of i, (n,), and the number of those j, (n,)."""
    sums, others = np.zeros(len(x)), np.zeros(len(x))
    for cluster in np.split(
        np.argsort(clusters, kind="stable"), np.unique(np.sort(clusters), return_index=True)[1][1:]
    ):
        k = cubic_kernel(x[cluster], x[cluster])
        sums[cluster], others[cluster] = k.sum(axis=1) - np.diag(k), len(cluster) - 1
    return sums, others


def _own_mean(y: Array) -> float:
    """mean_{i != j} k(y_i, y_j), remembered: a reference is larger than any cell and is met once per cell."""
    digest = hashlib.sha256(np.ascontiguousarray(y).tobytes() + str(y.shape).encode()).hexdigest()
    if digest not in _own_means:
        everyone = np.ones((len(y), 1))
        _own_means[digest] = float(_sums_by_group(y, everyone).sum()) / (len(y) * (len(y) - 1))
    return _own_means[digest]


@register("kid")
class KernelDistance(RowsMetric):
    """KID: unbiased squared MMD with the cubic kernel, over all samples."""

    version = 2  # 2: the interval to second order
    unit = "squared MMD"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 4, "a U-statistic with its error", allow_small_n=False)
        x = state.joined()
        mmd = mmd2(x, reference_rows(self.id, self.reference_key, reference, x.shape[1]), state.clusters)
        error = mmd.error
        interval = t_interval(mmd.value, error.se, error.df)
        return Value(mmd.value, state.n, error.se, interval.low, interval.high)
