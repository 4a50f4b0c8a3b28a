"""Intervals, percentiles and the robust line."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from evalbench import stats

RNG = np.random.default_rng


def test_normal_and_t_intervals():
    assert norm.ppf(0.975) == pytest.approx(stats.Z95, rel=1e-14)
    assert stats.normal_interval(3, 0.5) == stats.Interval(3 - 0.5 * stats.Z95, 3 + 0.5 * stats.Z95)
    wide = stats.t_interval(0, 1, 15)
    assert (wide.low, wide.high) == pytest.approx((-2.13145, 2.13145), abs=1e-5)


@pytest.mark.parametrize("slope", [-0.4, 0.0, 0.3])
def test_an_interval_ends_where_the_error_there_makes_it_end(slope):
    """And p is 0.05 for a margin at its end."""
    value, se, df = 1.7, 0.5, 12.0
    t, found = stats.t_quantile(0.05, df), stats.t_interval(1.7, 0.5, 12.0, slope)
    for end in (found.low, found.high):
        there = np.sqrt(max(se**2, se**2 + slope * (end - value)))
        assert abs(end - value) == pytest.approx(t * there, rel=1e-12)
    assert (found.high - value > t * se * 1.001) == (slope > 0)
    assert (value - found.low > t * se * 1.001) == (slope < 0)
    assert float(stats.p_beyond(value, found.low, se, df, slope)) == pytest.approx(0.05)
    assert float(stats.p_beyond(-value, found.low, se, df, -slope)) == pytest.approx(0.05)


def test_error_of_a_u_statistic_never_falls_below_its_second_part():
    g = RNG(5).standard_normal(100)
    first = stats.u_statistic_error(g, 0.0, 0.0)
    assert first.se == pytest.approx(2 * g.std(ddof=1) / 10)
    assert stats.u_statistic_error(0.01 * g, 1.0, 0.0).se == pytest.approx(np.sqrt(2) / 100)
    assert stats.u_statistic_error(0 * g, 0.0, 0.0) == stats.StandardError(0.0, np.inf)


def test_wilson_interval():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    interval = stats.wilson_interval(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson_interval(0, 10).low == 0
    assert stats.wilson_interval(10, 10).high == 1


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [10, 37, 100, 1000])
def test_quantile_interval_covers_by_the_binomial_law(n, q):
    """Exact coverage for values 1..n: P(low <= B < high); the next narrower intervals cut too much."""
    interval = stats.quantile_interval(np.arange(1.0, n + 1)[::-1], q)
    below, above = binom.cdf(np.arange(n + 1) - 1, n, q), binom.sf(np.arange(n + 2) - 1, n, q)
    if interval is None:
        assert below[1] > 0.025 or above[n] > 0.025
        return
    low, high = int(interval.low), int(interval.high)
    assert below[low] <= 0.025
    assert above[high] <= 0.025
    assert low == n or below[min(low + 1, n)] > 0.025
    assert above[high - 1] > 0.025


def test_quantile_interval_covers_when_drawn():
    rng, truth = RNG(0), norm.ppf(0.9)
    hits = 0
    for _ in range(2000):
        interval = stats.quantile_interval(rng.standard_normal(80), 0.9)
        hits += interval.low <= truth <= interval.high
    assert 0.945 <= hits / 2000 <= 0.985


def test_percentiles():
    found = stats.percentiles(np.arange(101.0)[::-1])
    assert found == stats.Percentiles(101, 50, 10, 90, 99)
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match=r"^percentiles need at least one sample, all of them finite$"):
            stats.percentiles(bad)


def test_line_through_points():
    line = stats.line_fit(np.array([5.0, 10, 20, 40]), 0.2 + 0.03 * np.array([5.0, 10, 20, 40]))
    assert (line.slope, line.intercept, line.r2) == pytest.approx((0.03, 0.2, 1))
    assert line.slope_low <= line.slope <= line.slope_high


def test_line_resists_wild_points():
    x = np.arange(1.0, 21)
    y = 1 + 2 * x + 0.01 * RNG(1).standard_normal(20)
    y[[3, 18]] += 500  # least squares would tilt by 3
    line = stats.line_fit(x, y)
    assert line.slope == pytest.approx(2, abs=0.01)
    assert line.slope_low < 2 < line.slope_high
    assert line.r2 < 0.5
    assert abs(np.polyfit(x, y, 1)[0] - 2) > 1


def test_flat_line():
    line = stats.line_fit(np.array([1.0, 2, 3]), np.full(3, 4.0))
    assert (line.slope, line.intercept, line.r2) == (0, 4, 1)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([1.0, np.nan], [1.0, 2.0]), ([], [])]
)
def test_no_line(x, y):
    with pytest.raises(ValueError, match=r"^a line needs at least two different x, one y for each, all finite$"):
        stats.line_fit(np.array(x), np.array(y))
