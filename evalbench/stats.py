"""Intervals, standard errors, percentile summaries and the robust line; plain numbers in and out. No torch, no ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of raw latency samples, in the unit of the samples.

    Attributes:
        n: number of samples.
    """

    n: int
    median: float
    p10: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Line:
    """A robust line y = intercept + slope x.

    Attributes:
        r2: share of the variance of y that the line explains; negative for a line worse than the mean of y. A
            constant y gives 1 where the line meets it, else 0.
        slope_low, slope_high: 95 % interval of the slope (Sen 1968).
    """

    slope: float
    intercept: float
    r2: float
    slope_low: float
    slope_high: float


def normal_interval(value: float, se: float) -> Interval:
    """value -/+ 1.96 se."""
    return Interval(value - Z95 * se, value + Z95 * se)


def t_interval(value: float, se: float, df: float, slope: float = 0.0) -> Interval:
    """value -/+ t se, t the two-sided 95 % point of Student's distribution with df degrees of freedom.

    Args:
        slope: see `StandardError`; the end on the side where the error is larger lies farther out.
    """
    t = t_quantile(0.05, df)
    return Interval(value - reach(-slope, se, t), value + reach(slope, se, t))


def reach(slope: float, se: float, t: float) -> float:
    """How far an interval reaches to the side where the squared error rises: the x with x = t (se^2 + slope x)^1/2.

    A slope below 0 counts as 0: an end is never nearer than t se.
    """
    rise = max(slope, 0.0) * t * t / 2
    return rise + math.sqrt(rise * rise + (t * se) ** 2)


def t_quantile(level: float, df: float) -> float:
    """Two-sided point of Student's distribution: 1.96 at level 0.05 for infinite df."""
    from scipy.special import stdtrit  # slow to import; `evalbench list` imports this module

    return -float(stdtrit(df, level / 2))


def p_beyond(
    difference: ArrayLike, margin: ArrayLike, se: ArrayLike, df: ArrayLike, slope: ArrayLike = 0.0
) -> NDArray[np.float64]:
    """Two-sided p of "the difference is within the margin" by Student's t, elementwise.

    At most 0.05 iff `t_interval` lies beyond the margin on one side. Without error it is 0 or 1.
    """
    from scipy.special import stdtr  # slow to import

    beyond, se = np.abs(difference) - margin, np.asarray(se, dtype=float)
    # the error at the margin, if it is larger there: beyond it from below when the difference is negative
    rise = np.maximum(-np.sign(difference) * np.asarray(slope), 0.0) * np.maximum(beyond, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(df, -beyond / np.sqrt(se**2 + rise))
    found: NDArray[np.float64] = np.where(beyond <= 0, 1.0, np.where(se == 0, 0.0, np.minimum(p, 1.0)))
    return found


@dataclass(frozen=True)
class StandardError:
    """A standard error and the degrees of freedom it was estimated with; infinite where nothing varies.

    Attributes:
        slope: what the squared error rises by with the value, where both are high or low together by chance: at a truth
            above the value by x the squared error is se^2 + slope x.
    """

    se: float
    df: float
    slope: float = 0.0


def standard_error(
    influence: np.ndarray, clusters: np.ndarray | None = None, strata: np.ndarray | None = None
) -> StandardError:
    """Standard error of a statistic from the first-order effect of each sample on it: sd(psi) / sqrt(n).

    Samples of one cluster (images of one prompt) count as one, by the sum of their effects; unlike sizes are allowed.
    The degrees of freedom are Satterthwaite's, 2 / (relative variance of the estimated variance): n - 1 for normal psi,
    fewer for heavy tails, which an interval of Student's t then allows for.

    Args:
        influence: psi, (n,). clusters: int (n,), equal for the samples of a cluster; None for independent samples.
        strata: int (n,), the class of each sample where a plan fixes how many each has; only what varies within classes
            is error then. Without effect beside clusters, or where a class has one sample.
    """
    if clusters is None and strata is not None and is_plan(strata):
        return _stratified_error(influence, strata)
    effects = influence - influence.mean()
    if clusters is not None:
        _, inverse = np.unique(clusters, return_inverse=True)
        sums = np.bincount(inverse, weights=effects)
        effects = sums * (len(sums) / len(influence))
    n = len(effects)
    variance = float(effects @ effects) / (n - 1)
    if variance == 0:
        return StandardError(0.0, math.inf)
    kurtosis = float(np.mean(effects**4) / np.mean(effects**2) ** 2)
    return StandardError(math.sqrt(variance / n), 2 * n / (kurtosis - (n - 3) / (n - 1)))


def is_plan(strata: np.ndarray) -> bool:
    """Whether every class has the two samples that its variance takes."""
    return bool(np.unique(strata, return_counts=True)[1].min() > 1)


def within_strata(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Values (n,) less the mean of their class."""
    _, of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    found: np.ndarray = values - (np.bincount(of, values) / sizes)[of]
    return found


def _stratified_error(influence: np.ndarray, strata: np.ndarray) -> StandardError:
    """se^2 = sum_a n_a s_a^2 / n^2 (Cochran 1977, section 5.4); Satterthwaite's degrees of freedom."""
    _, of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    effects = within_strata(influence, strata)
    squares, fourths = np.bincount(of, effects**2), np.bincount(of, effects**4)
    terms = sizes / (sizes - 1) * squares / len(influence) ** 2
    if not terms.sum() > 0:
        return StandardError(0.0, math.inf)
    kurtosis = fourths * sizes / np.where(squares > 0, squares, 1.0) ** 2
    relative = (kurtosis - (sizes - 3) / (sizes - 1)) / sizes
    return StandardError(math.sqrt(terms.sum()), float(2 * terms.sum() ** 2 / np.sum(terms**2 * relative)))


def corrected_standard_error(
    influence: np.ndarray,
    in_half: np.ndarray,
    halves: NDArray[np.int64],
    clusters: np.ndarray | None = None,
    strata: np.ndarray | None = None,
) -> StandardError:
    """Standard error of a statistic of second order, T_N = T + mean(psi) + mean(h(x_i, x_j)), h centred and degenerate.

    The estimated influence psi_N is evaluated at the sample itself. Its variance V_N is too large by 4 E h^2 / N, while
    that of T_N is V + 2 E h^2 / N: near the floor, where V vanishes, the plain interval is too wide by sqrt(2). As V_N
    of half a sample is too large by twice as much, 1.5 V_N - 0.5 V_{N/2} is right; it is at least V_N / 2.

    Args:
        influence: psi_N, (n,). in_half: the influence of each sample on the statistic of its own half, (n,).
        halves: 0 or 1, int (n,). clusters, strata: as in `standard_error`; a cluster lies in one half.
    """
    if strata is not None and not all(is_plan(strata[halves == k]) for k in (0, 1)):
        strata = None
    whole = standard_error(influence, clusters, strata)
    parts = [
        standard_error(in_half[half], *(None if of is None else of[half] for of in (clusters, strata))).se
        for half in (halves == 0, halves == 1)
    ]
    variance = 1.5 * whole.se**2 - (parts[0] ** 2 + parts[1] ** 2) / 8  # a half's squared error is 2 V_{N/2} / N
    return StandardError(math.sqrt(max(variance, whole.se**2 / 2)), whole.df)


def u_statistic_error(g: np.ndarray, squares: float, along: float, strata: np.ndarray | None = None) -> StandardError:
    """Standard error of a U-statistic theta + mean 2 g(x_i) + mean_{i != j} psi(x_i, x_j), psi centred and degenerate.

    Its variance is 4 E g^2 / n + 2 E psi^2 / n^2 (Hoeffding 1948), each part estimated by itself. The estimated g of a
    sample is the mean of its row, and E psi^2 / n too large in its square; what is left of the first part may be below
    0 by chance, and counts as 0 then. So the error is never below that of the second part, which is nearly all of it
    where the first vanishes: in a distance near its least. There an error in one piece falls with the value.

    Farther off the two still move together: a sample in which g is large by chance has a large value and a large error,
    and misses lie on one side, as in the expansion of a studentised U-statistic (Helmers 1991). `slope` is
    Cov(value, 4 E g^2 / n) / Var(value) by (8 / n^2) (E g^3 + E g g psi); E g g psi of estimated g holds E psi psi psi
    / n too, which leads where psi does.

    Args:
        g: estimated, centred, (n,). squares: mean of psi^2 over pairs. along: mean of g_i psi_ij g_j over pairs.
        strata: as in `standard_error`; g and psi are centred within classes then.
    """
    n, plain = len(g), standard_error(2 * g, None, strata)
    second = 2 * squares / n**2
    variance = second + max(plain.se**2 - 2 * second, 0.0)
    if variance == 0:
        return plain
    slope = 8 / n**2 * (float(np.mean(g**3)) + along) / variance
    return StandardError(math.sqrt(variance), plain.df, slope)


def wilson_interval(successes: float, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927); unlike value -/+ 1.96 se it has a width when all n succeed."""
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # at the ends the formula gives 0 and 1 but for rounding
    return Interval(centre - half if successes > 0 else 0.0, centre + half if successes < n else 1.0)


def quantile_interval(values: np.ndarray, q: float, level: float = 0.95) -> Interval | None:
    """Order-statistic interval of the q-quantile: free of any assumption on the distribution, never too short.

    The number of samples below the q-quantile is binomial(n, q), so [x_(l), x_(u)] covers it with probability
    P(l <= B < u); l and u cut at most (1 - level) / 2 from either side (David & Nagaraja 2003, section 7.1).

    Args:
        values: samples, (n,), in any order.
        q: probability in (0, 1).
        level: wanted coverage.

    Returns:
        The interval; None when n is too small for one at this level.
    """
    from scipy.stats import binom

    ordered, tail = np.sort(values), (1 - level) / 2
    n = len(ordered)
    low = int(binom.ppf(tail, n, q))  # the largest l, 1-based, with P(B < l) < tail
    high = int(binom.ppf(1 - tail, n, q)) + 1  # the smallest u with P(B >= u) <= tail
    if low < 1 or high > n:
        return None
    return Interval(float(ordered[low - 1]), float(ordered[high - 1]))


def holm(p_values: Sequence[float] | np.ndarray, level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected with a family-wise error of at most `level` (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order] = np.logical_and.accumulate(p[order] <= level / (len(p) - np.arange(len(p))))
    return [bool(found) for found in rejected]


def benjamini_hochberg(p_values: Sequence[float] | np.ndarray, level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected with a false discovery rate of at most `level` (Benjamini & Hochberg 1995).

    For p-values that are independent or positively dependent (Benjamini & Yekutieli 2001).
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / max(len(p), 1))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: below[-1] + 1 if len(below) else 0]] = True
    return [bool(found) for found in rejected]


def percentiles(samples: np.ndarray) -> Percentiles:
    """Median, p10, p90 and p99 of raw samples, (n,), linear between order statistics.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    if samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError("percentiles need at least one sample, all of them finite")
    p10, median, p90, p99 = np.quantile(samples, [0.10, 0.50, 0.90, 0.99])
    return Percentiles(samples.size, float(median), float(p10), float(p90), float(p99))


def line_fit(x: np.ndarray, y: np.ndarray) -> Line:
    """Theil-Sen line: the median of the slopes of all pairs; a quarter of wild points does not move it.

    Args:
        x: such as NFE, (n,), at least two different values. y: such as seconds, (n,).

    Raises:
        ValueError: fewer than two different x, or a number that is not finite.
    """
    from scipy.stats import theilslopes

    if len(x) != len(y) or len(np.unique(x)) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a line needs at least two different x, one y for each, all finite")
    fit = theilslopes(y, x, alpha=0.95)
    slope, intercept = float(fit.slope), float(fit.intercept)
    residual = float(np.sum((y - intercept - slope * x) ** 2))
    total = float(np.sum((y - np.mean(y)) ** 2))
    r2 = 1 - residual / total if total > 0 else float(residual == 0)
    return Line(slope, intercept, r2, float(fit.low_slope), float(fit.high_slope))
