"""Verdict statistics of posterior and token metrics: level on exact nulls, sign, agreement with the metric itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from _null_routes import (
    DIMS,
    EXACT,
    MEASUREMENTS,
    ONE,
    OTHER,
    SHARED,
    SYMBOLS,
    chains,
    posterior_rows,
)

from evalbench import registry
from evalbench.metrics.common import value_of
from evalbench.metrics.differences import ROUTES, Difference, TooFewSamples
from evalbench.metrics.tokens import pair_shares

REPEATS = 100
LIMIT = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)
POSTERIOR = ("posterior-energy", "posterior-rmse", "recovery-snr")


def missed(draw: Callable[[np.random.Generator], Difference], truth: float = 0.0) -> float:
    """Share of intervals that leave out the truth."""
    found = (draw(np.random.default_rng([key, 9])).interval for key in range(REPEATS))
    return float(np.mean([not i.low <= truth <= i.high for i in found]))


def twins(rng: np.random.Generator, rho: float) -> tuple[np.ndarray, np.ndarray]:
    shared, own = rng.standard_normal((MEASUREMENTS * SHARED, DIMS)), rng.standard_normal((MEASUREMENTS * SHARED, DIMS))
    return shared, rho * shared + math.sqrt(1 - rho**2) * own


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("name", POSTERIOR)
def test_posterior_metrics_keep_their_level(name: str, rho: float) -> None:
    def draw(rng: np.random.Generator) -> Difference:
        a, b = twins(rng, rho)
        key = int(rng.integers(2**31))  # the exact draws are the same for both cells
        return ROUTES[name].compute(*(posterior_rows(np.random.default_rng(key), z) for z in (a, b)), {})

    assert missed(draw) <= LIMIT


@pytest.mark.parametrize("name", POSTERIOR)
def test_difference_is_that_of_the_metric_and_worse_samples_are_worse(name: str) -> None:
    rng = np.random.default_rng(1)
    a, b = (posterior_rows(np.random.default_rng(2), z) for z in (twins(rng, 0.9)[0], 2 + twins(rng, 0.9)[0]))
    metric = registry.build_metric(f"{name}@posterior")
    base, new = (value_of(metric, metric.update({"posterior": rows}), None).value for rows in (a, b))
    found = ROUTES[name].compute(a, b, {})
    assert found.value == pytest.approx(new - base)
    assert (found.interval.low > 0) if not metric.higher_is_better else (found.interval.high < 0)


def test_standard_error_of_a_posterior_metric_is_that_of_its_repetitions() -> None:
    for name in POSTERIOR:
        found = []
        for key in range(200):
            rng = np.random.default_rng([key, 3])
            a, b = twins(rng, 0.5)
            found.append(ROUTES[name].compute(posterior_rows(rng, a), posterior_rows(rng, b), {}))
        spread = np.std([d.value for d in found], ddof=1)
        assert np.mean([d.se for d in found]) == pytest.approx(spread, rel=0.2), name


def test_other_measurements_have_no_verdict() -> None:
    rows = posterior_rows(np.random.default_rng(0), twins(np.random.default_rng(0), 0)[0])
    other = rows.copy()
    other[0, 0] = 77
    with pytest.raises(TooFewSamples, match="do not have the same measurements"):
        ROUTES["posterior-rmse"].compute(rows, other, {})
    few = rows[: 4 * SHARED]
    with pytest.raises(TooFewSamples, match="4 measurements; a verdict needs 5"):
        ROUTES["posterior-rmse"].compute(few, few, {})


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        lambda rng, n: (chains(rng, n), chains(rng, n)),
        lambda rng, n: (chains(rng, n, ONE), chains(rng, n, OTHER)),
        lambda rng, n: (chains(rng, n), np.repeat(chains(rng, n // 2), 2, axis=0)[rng.permutation(n)]),
    ],
    ids=["twins", "equally far", "copies in new"],
)
def test_frequencies_of_pairs_keep_their_level(pair: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    assert missed(lambda rng: ROUTES["pair-tv"].compute(*pair(rng, 256), EXACT)) <= LIMIT


def test_frequencies_that_are_farther_off_are_found() -> None:
    """And by as much as they are, where the difference of two plug-in values says 0.092 of 0.106."""
    off = (0.5, 0.1, 0.2, 0.2)
    large = pair_shares(chains(np.random.default_rng(0), 100_000, off).astype(int), SYMBOLS).mean(0)
    exact = np.abs(large - 1 / SYMBOLS**2).sum() / 2
    rngs = (np.random.default_rng([key, 1]) for key in range(20))
    found = [ROUTES["pair-tv"].compute(chains(rng, 1024), chains(rng, 1024, off), EXACT) for rng in rngs]
    assert all(d.interval.low > 0 for d in found)
    assert np.mean([d.value for d in found]) == pytest.approx(exact, rel=0.06)


@pytest.mark.parametrize(("shift", "rho", "flip"), [(0.0, 0.9, 1), (0.3, 0.9, 1), (0.3, 0.5, -1)])
def test_likelihoods_keep_their_level(shift: float, rho: float, flip: int) -> None:
    def draw(rng: np.random.Generator) -> Difference:
        a, own = rng.standard_normal((2, 128))
        b = rho * a + math.sqrt(1 - rho**2) * own
        return ROUTES["nll-gap"].compute(a + shift + 2, b + flip * shift + 2, {"entropy": np.array([2.0])})

    assert missed(draw) <= LIMIT


def test_likelihood_nearer_to_the_entropy_from_either_side_is_better() -> None:
    x = np.random.default_rng(0).standard_normal(500)
    entropy = {"entropy": np.array([2.0])}
    for far in (1.0, 3.0):
        found = ROUTES["nll-gap"].compute(x + far, 0.9 * x + 2.1, entropy)
        assert found.interval.high < 0
