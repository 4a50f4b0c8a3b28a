"""KID: the unbiased squared maximum mean discrepancy with the cubic kernel k(x, y) = (x.y / D + 1)^3.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Binkowski et al. 2018. It is computed once, over all samples, in blocks. clean-fid and torchmetrics average it over
random subsets of 1000: the same expectation with more noise, and a number that depends on the draw of the subsets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples
from evalbench.registry import register
from evalbench.stats import normal_interval

_BLOCK = 512  # rows per block: 2 MB of kernel values, which stay in a core's cache
_own_means: dict[str, float] = {}  # of references, by digest: every cell of a run meets the same one


@dataclass(frozen=True)
class Mmd:
    """The unbiased estimate and the effect of each sample on it.

    Attributes:
        value: MMD^2; may be negative near zero.
        influence: psi_i = 2 (mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j)), centred, (n,); sd(psi) / sqrt(n) is the
            standard error of the U-statistic with y taken as given, and sd(psi_a - psi_b) / sqrt(n) that of a paired
            difference.
    """

    value: float
    influence: Array

    @property
    def se(self) -> float:
        """Standard error of the value."""
        return float(np.std(self.influence, ddof=1) / np.sqrt(len(self.influence)))


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


def _mean_others(x: Array) -> Array:
    """mean_{j != i} k(x_i, x_j), (n,); every pair is computed once."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), _BLOCK):
        for j in range(i, len(x), _BLOCK):
            k = cubic_kernel(x[i : i + _BLOCK], x[j : j + _BLOCK])
            if i == j:
                np.fill_diagonal(k, 0.0)
            else:
                sums[j : j + _BLOCK] += k.sum(axis=0)
            sums[i : i + _BLOCK] += k.sum(axis=1)
    return sums / (len(x) - 1)


def mmd2(x: Array, y: Array) -> Mmd:
    """Unbiased MMD^2 of samples x (n, D) and reference y (m, D), float64, n, m >= 2."""
    own, cross = _mean_others(x), _row_sums(x, y) / len(y)
    psi = 2 * (own - cross)
    return Mmd(float(own.mean() + _own_mean(y) - 2 * cross.mean()), psi - psi.mean())


def _own_mean(y: Array) -> float:
    """mean_{i != j} k(y_i, y_j), remembered: a reference is larger than any cell and is met once per cell."""
    digest = hashlib.sha256(np.ascontiguousarray(y).tobytes() + str(y.shape).encode()).hexdigest()
    if digest not in _own_means:
        _own_means[digest] = float(_mean_others(y).mean())
    return _own_means[digest]


@register("kid")
class KernelDistance(RowsMetric):
    """KID: unbiased squared MMD with the cubic kernel, over all samples."""

    unit = "squared MMD"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 4, "a U-statistic with its error", allow_small_n=False)
        x = state.joined()
        mmd = mmd2(x, reference_rows(self.id, self.reference_key, reference, x.shape[1]))
        interval = normal_interval(mmd.value, mmd.se)
        return Value(mmd.value, state.n, mmd.se, interval.low, interval.high)
