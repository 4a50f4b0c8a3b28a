"""FD-infinity: the Frechet distance extrapolated to endless samples, Chong & Forsyth 2020 (arXiv 1911.07023).

As FD_N = FD + c / N + O(1 / N^2), the line through (1 / n, FD_n) of random subsets meets 1 / n = 0 at FD. Their
recipe: 15 sizes at equal steps, a random subset of each, ordinary least squares. What differs: subsets come from one
fixed seed, and sizes start at N / 10 as theirs do (5,000 of 50,000) but not below 8 dimensions, where 1 / N^2 is felt.
Samples are used as they are: their quasi-random latents are a sampler's matter, not a metric's.
"""

from __future__ import annotations

import numpy as np

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import check_reference, need_reference, require_samples
from evalbench.metrics.frechet import (
    Fit,
    FrechetDistance,
    FrechetState,
    Gaussian,
    frechet_distance,
    moments,
    unpack_statistics,
)
from evalbench.registry import register
from evalbench.stats import standard_error, t_interval

_SIZES = 15
_SUBSET_SEED = 20_240_609  # which samples a subset takes; part of the metric's definition


def subset_sizes(n: int, dims: int) -> list[int]:
    """15 sizes at equal steps from max(n / 10, 8 dims), but at most n / 2, to n."""
    first = min(max(n // 10, 8 * dims), n // 2)
    return sorted({round(size) for size in np.linspace(first, n, _SIZES)})


def subset_distances(features: np.ndarray, target: Gaussian, sizes: list[int]) -> np.ndarray:
    """FD of one random subset of each size, (len(sizes),)."""
    generator = np.random.Generator(np.random.Philox(key=_SUBSET_SEED))
    picks = [np.sort(generator.permutation(len(features))[:size]) for size in sizes]
    return np.array([frechet_distance(moments(features[pick]).gaussian(), target) for pick in picks])


def extrapolated(sizes: list[int], distances: np.ndarray) -> tuple[float, float]:
    """Intercept of the least-squares line in 1 / n, and its standard error by the scatter about the line."""
    design = np.stack([np.ones(len(sizes)), 1 / np.asarray(sizes, dtype=np.float64)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    line = inverse @ design.T @ distances
    scatter = float(np.sum((distances - design @ line) ** 2)) / (len(sizes) - 2)
    return float(line[0]), float(np.sqrt(scatter * inverse[0, 0]))


@register("fd-infinity")
class FrechetInfinity(FrechetDistance):
    """Frechet distance extrapolated to infinitely many samples (Chong & Forsyth 2020); may be slightly negative."""

    def compute(self, state: FrechetState, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n, dims = state.moments.n, len(state.moments.sum)
        require_samples(self.id, n, 2 * _SIZES, f"{_SIZES} subset sizes", allow_small_n=False)
        rule = f"8 x {dims} dimensions, a factor 2 between subsets"
        small = require_samples(self.id, n, 8 * dims, rule, allow_small_n=allow_small_n)
        target = unpack_statistics(need_reference(self.id, self.reference_key, reference))
        for array in (target.mean, target.cov):
            check_reference(self.id, self.reference_key, array, dims)

        features = np.concatenate(state.rows.blocks)
        sizes = subset_sizes(n, dims)
        value, scatter = extrapolated(sizes, subset_distances(features, target, sizes))
        fit = Fit(state.rows.blocks, target, state.moments, state.rows.clusters)
        samples = standard_error(fit.influence, fit.clusters)
        se = float(np.hypot(samples.se, scatter))  # of the samples, and of the subsets
        df = se**4 / (samples.se**4 / samples.df + scatter**4 / (len(sizes) - 2))  # Welch & Satterthwaite
        interval = t_interval(value, se, df)
        note = "small N; extrapolated too far" if small else "extrapolated far" if n < 16 * dims else ""
        return Value(value, n, se, interval.low, interval.high, note=note)
