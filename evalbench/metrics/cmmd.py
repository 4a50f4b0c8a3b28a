"""CMMD: squared maximum mean discrepancy of CLIP vectors with a Gaussian kernel (Jayasumana et al. 2024, 2401.09603).

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),   sigma = 10

times 1000. The authors' code takes the biased means, i = j included; so does the value here. The unbiased one
differs by (1 - mean k(x, x')) / N and its like for the reference, which is the bias given.
"""

from __future__ import annotations

import numpy as np

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples
from evalbench.metrics.neighbours import squared_distances
from evalbench.registry import register
from evalbench.stats import normal_interval

SIGMA, SCALE = 10.0, 1000.0
_BLOCK = 1024


def gaussian_kernel(x: Array, y: Array) -> Array:
    """exp(-|x - y|^2 / (2 sigma^2)) of all pairs, (n, m)."""
    values: Array = np.exp(squared_distances(x, y) / (-2 * SIGMA**2))
    return values


def kernel_means(x: Array, y: Array) -> Array:
    """mean_j k(x_i, y_j), (n,), in blocks."""
    means = np.zeros(len(x))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        for first in range(0, len(y), _BLOCK):
            means[rows] += gaussian_kernel(x[rows], y[first : first + _BLOCK]).sum(axis=1)
    return means / len(y)


@register("cmmd")
class CMMD(RowsMetric):
    """CMMD of CLIP image vectors: `cmmd@clip-image:ViT-L-14-336:openai` is the published one."""

    unit = "squared MMD x 1000"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 4, "a kernel distance with its error", allow_small_n=False)
        x = state.joined()
        y = reference_rows(self.id, self.reference_key, reference, x.shape[1])
        own, cross, theirs = kernel_means(x, x), kernel_means(x, y), kernel_means(y, y)
        value = float(own.mean() + theirs.mean() - 2 * cross.mean())
        bias = float((1 - own.mean()) / (len(x) - 1) + (1 - theirs.mean()) / (len(y) - 1))
        se = float(np.std(2 * (own - cross), ddof=1) / np.sqrt(len(x)))
        interval = normal_interval(SCALE * value, SCALE * se)
        return Value(SCALE * value, len(x), SCALE * se, interval.low, interval.high, SCALE * bias)
