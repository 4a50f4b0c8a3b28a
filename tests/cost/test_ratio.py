"""The ratio of two medians: exact where nothing varies, covered where processes, rounds and samples do."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.cost.ratio import MIN_PROCESSES, Ratio, median_ratio, verdict
from evalbench.stats import Interval


def timings(
    rng: np.random.Generator, process: float, rounds: float, sample: float, shared: float, shape=(5, 5, 2), ratio=2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two arms with true ratio `ratio`: log-normal effects by process, round and sample, and what both share."""
    by_process, by_round = (shape[0], 1, 1), (shape[0], shape[1], 1)
    both = rng.normal(0, shared, by_process) + rng.normal(0, shared / 2, by_round)

    def arm(seconds: float) -> np.ndarray:
        own = rng.normal(0, process, by_process) + rng.normal(0, rounds, by_round) + rng.normal(0, sample, shape)
        return seconds * np.exp(both + own)

    return arm(0.01 * ratio), arm(0.01)


@pytest.mark.parametrize("paired", [True, False])
def test_constant_timings_give_their_ratio_exactly(paired: bool) -> None:
    found = median_ratio(np.full((5, 3, 2), 0.75), np.full((5, 3, 2), 0.25), paired=paired, resamples=50)
    assert (found.value, found.interval.low, found.interval.high, found.processes) == (3.0, 3.0, 3.0, 5)


def test_what_both_arms_share_cancels() -> None:
    rng = np.random.default_rng(0)
    slowness = rng.choice([1.0, 2.0, 4.0, 8.0], (5, 4, 1))  # powers of two: products are exact
    b = 0.25 * slowness
    paired = median_ratio(3 * b, b, resamples=100)
    assert (paired.value, paired.interval.low, paired.interval.high) == (3.0, 3.0, 3.0)
    apart = median_ratio(3 * b, b, paired=False, resamples=100)
    assert apart.interval.low < 3.0 < apart.interval.high


@pytest.mark.parametrize(
    ("process", "rounds", "sample", "shared"),
    [(0.05, 0.0, 0.01, 0.0), (0.05, 0.0, 0.01, 0.02), (0.02, 0.02, 0.02, 0.05)],
    ids=["processes", "processes-shared", "all"],
)
def test_the_interval_covers_the_truth(process: float, rounds: float, sample: float, shared: float) -> None:
    rng, trials = np.random.default_rng(1), 150
    hits = 0
    for seed in range(trials):
        found = median_ratio(*timings(rng, process, rounds, sample, shared), resamples=100, seed=seed).interval
        hits += found.low <= 2.0 <= found.high
    assert hits / trials > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)


def test_the_interval_is_wider_than_if_all_timings_were_independent() -> None:
    a, b = timings(np.random.default_rng(2), 0.05, 0.0, 0.005, 0.0, shape=(5, 10, 4))
    nested = median_ratio(a, b, resamples=200).interval
    flat = median_ratio(a.reshape(200, 1, 1), b.reshape(200, 1, 1), resamples=200).interval
    assert nested.high - nested.low > 2 * (flat.high - flat.low)


def test_samples_of_one_round_vary_too() -> None:
    a = np.broadcast_to([1.0, 2.0, 3.0, 4.0, 5.0], (5, 1, 5))  # processes and rounds are all alike
    found = median_ratio(a, np.ones((5, 1, 5)), resamples=200)
    assert found.value == 3.0
    assert 1.0 <= found.interval.low < 3.0 < found.interval.high <= 5.0


def test_swapping_the_arms_inverts_the_verdict() -> None:
    a, b = timings(np.random.default_rng(3), 0.02, 0.02, 0.02, 0.05, ratio=1.5)
    forward, back = median_ratio(a, b, resamples=400), median_ratio(b, a, resamples=400)
    assert forward.value == pytest.approx(1 / back.value, rel=1e-12)
    assert forward.interval.low > 1 > back.interval.high
    assert forward.interval.low == pytest.approx(1 / back.interval.high, rel=0.05)


def test_equal_input_gives_equal_output() -> None:
    a, b = timings(np.random.default_rng(4), 0.02, 0.02, 0.02, 0.05)
    assert median_ratio(a, b, resamples=50, seed=7) == median_ratio(a, b, resamples=50, seed=7)
    assert median_ratio(a, b, resamples=50, seed=7) != median_ratio(a, b, resamples=50, seed=8)


def test_few_processes_have_a_ratio_and_no_interval() -> None:
    found = median_ratio(np.full((MIN_PROCESSES - 1, 3, 2), 0.5), np.full((MIN_PROCESSES - 1, 3, 2), 0.25))
    assert (found.value, found.interval, found.processes) == (2.0, None, MIN_PROCESSES - 1)


def test_arms_of_their_own_processes_may_differ_in_shape() -> None:
    a, b = np.full((6, 3, 2), 0.5), np.full((5, 4, 1), 0.25)
    assert median_ratio(a, b, paired=False, resamples=20).interval.high == 2.0
    with pytest.raises(ValueError, match="same processes and rounds"):
        median_ratio(a, b)


@pytest.mark.parametrize("bad", [np.ones((5, 3)), np.ones((5, 0, 1))])
def test_timings_have_three_axes(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="processes, rounds, samples"):
        median_ratio(bad, bad)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_timings_are_positive_numbers(wrong: float) -> None:
    a = np.ones((5, 2, 2))
    a[0, 0, 0] = wrong
    with pytest.raises(ValueError, match="finite and above 0"):
        median_ratio(a, np.ones((5, 2, 2)))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.90, 0.95, "faster"),
        (0.90, 0.96, "undecided"),
        (0.96, 1.04, "indistinguishable"),
        (1 / 1.05, 1.05, "indistinguishable"),
        (0.94, 1.06, "undecided"),
        (0.951, 1.0, "undecided"),
        (1.04, 1.30, "undecided"),
        (1.06, 1.30, "slower"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low: float, high: float, expected: str) -> None:
    assert verdict(Ratio(1.0, Interval(low, high), 5)) == expected
    swapped = {"faster": "slower", "slower": "faster"}.get(expected, expected)
    assert verdict(Ratio(1.0, Interval(1 / high, 1 / low), 5)) == swapped


def test_the_margin_is_a_choice_and_no_interval_is_no_verdict() -> None:
    assert verdict(Ratio(1.2, Interval(1.15, 1.19), 5), margin=0.2) == "indistinguishable"
    assert verdict(Ratio(9.0, None, 4)) == "undecided"
