"""Paired differences of metrics that refer to an exact model: posteriors of inverse problems, sequences of tokens.

Parts of `differences`, which says what every route guarantees. Metrics whose best value is no end of their scale
(`consistency`, `posterior-spread`: 1 is exact) have no route: neither a rise nor a fall is a gain.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from evalbench import registry
from evalbench.interfaces import Parts
from evalbench.metrics.common import Array
from evalbench.metrics.estimate import INDEPENDENT, Compute, Difference, Plan, TooFewSamples, from_influence
from evalbench.metrics.posterior import FACTS, PosteriorMetric, PosteriorRows
from evalbench.metrics.tokens import pair_shares
from evalbench.stats import standard_error

_MEASUREMENTS = 5  # below these Student's t says little about how measurements differ
_SEQUENCES = 40


def posterior_difference(name: str) -> Compute:
    """Difference of a posterior metric over the same measurements, each measurement counting as one.

    The metric is a function g of a mean over measurements weighted by their samples; psi of a measurement is
    g' w (value - mean) G / sum w in either cell, and the difference of the two is one influence.
    """

    def compute(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
        if not np.array_equal(base[:, 0], new[:, 0]):
            raise TooFewSamples("the two cells do not have the same measurements")
        (a, psi_a), (b, psi_b) = (_posterior(_metric(name), rows) for rows in (new, base))
        error = standard_error(psi_a - psi_b)
        return Difference(a - b, error.se, len(base), df=error.df)

    return compute


@cache
def _metric(name: str) -> PosteriorMetric:
    found = registry.build_metric(f"{name}@posterior")
    assert isinstance(found, PosteriorMetric)
    return found


def _posterior(metric: PosteriorMetric, table: Array) -> tuple[float, Array]:
    """Value of the metric and the effect of each measurement on it, (G,)."""
    key, square, risk, signal, chi2, distance = table[:, :FACTS].T
    rows = PosteriorRows(key, square, risk, signal, chi2, distance, table[:, FACTS:])
    found = metric.grouped(rows)
    groups, total = len(found.values), float(found.sizes.sum())
    if groups < _MEASUREMENTS:
        raise TooFewSamples(f"N too small: {groups} measurements; a verdict needs {_MEASUREMENTS}")
    mean = float(found.values @ found.sizes / total)
    value, slope = metric.scaled(mean, 1.0, rows)  # |g'|; the sign is that of the step below
    sign = 1.0 if metric.scaled(mean + 1e-6 * abs(mean), 0.0, rows)[0] >= value else -1.0
    return value, sign * slope * found.sizes * (found.values - mean) * (groups / total)


def nll_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of |mean - entropy|; psi has the sign of each side's own gap.

    ||a| - |b|| is at most |a - b| and at most |a + b|, so where a sign is uncertain the interval is too wide, not too
    narrow.
    """
    if len(base) < 2:
        raise TooFewSamples(f"N too small: {len(base)} samples; a mean with its error needs 2")
    entropy = float(reference["entropy"].item())
    (a, psi_a), (b, psi_b) = (_gap(x, entropy) for x in (new, base))
    return from_influence(a - b, psi_a - psi_b, plan)


def _gap(x: Array, entropy: float) -> tuple[float, Array]:
    gap = float(x.mean()) - entropy
    return abs(gap), math.copysign(1.0, gap) * (x - x.mean())


def pair_tv_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of total-variation distances of pair frequencies, each extrapolated to N = infinity.

    A frequency that is exact contributes E|noise| ~ N^-1/2 to the plug-in value, one that is clearly off contributes no
    bias. (2^1/2 D_N - (D_a + D_b) / 2) / (2^1/2 - 1) over two halves removes the first and keeps the second; psi is the
    same combination of the signs of the gaps in the whole and in each half.
    """
    if len(base) < _SEQUENCES:
        raise TooFewSamples(f"N too small: {len(base)} sequences; a difference of frequencies needs {_SEQUENCES}")
    exact = reference["pairs"].astype(np.float64)
    half = _halves(len(base), plan.clusters)
    (a, psi_a), (b, psi_b) = (_pair_tv(x.astype(np.int64), exact, half) for x in (new, base))
    return from_influence(a - b, psi_a - psi_b, plan)


def _halves(n: int, clusters: np.ndarray | None) -> np.ndarray:
    """0 or 1 per sample, fixed and balanced; a cluster lies in one half."""
    _, inverse = np.unique(np.arange(n) if clusters is None else clusters, return_inverse=True)
    groups = int(inverse.max()) + 1
    return np.asarray(np.random.default_rng(0).permutation(groups)[inverse] % 2)


def _pair_tv(tokens: np.ndarray, exact: Array, half: np.ndarray) -> tuple[float, Array]:
    shares = pair_shares(tokens, len(exact)) - exact.ravel()
    whole, psi = _tv(shares)
    value, influence = math.sqrt(2) * whole, math.sqrt(2) * psi
    for k in (0, 1):
        part, psi_part = _tv(shares[half == k])
        value -= part / 2
        influence[half == k] -= psi_part * (len(shares) / (half == k).sum() / 2)
    scale = 1 / (math.sqrt(2) - 1)
    return scale * value, scale * influence


def _tv(gaps: Array) -> tuple[float, Array]:
    mean = gaps.mean(0)
    return float(np.abs(mean).sum() / 2), (gaps - mean) @ np.sign(mean) / 2
