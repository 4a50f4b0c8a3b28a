"""Sliced Wasserstein distance: closed forms, exact matching of unequal sizes, calibrated errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from evalbench.errors import BadSamples, UserError
from evalbench.metrics.wasserstein import directions, squared_distances
from evalbench.registry import build_metric

RNG = np.random.default_rng


def sw(x, y, **options):
    metric = build_metric("sw@identity")
    return metric.compute(metric.update({"identity": x}), {"draws": y}, **options)


def test_directions_are_fixed_unit_vectors_all_around():
    axes = directions(3)
    assert axes.shape == (256, 3)
    assert np.linalg.norm(axes, axis=1) == pytest.approx(np.ones(256))
    assert axes.T @ axes / 256 == pytest.approx(np.eye(3) / 3, abs=0.05)
    # Philox is stable across machines and versions; a change here changes every sw@ number
    assert axes[0] == pytest.approx(FIRST_DIRECTION, abs=1e-12)


FIRST_DIRECTION = [0.7756672903292294, -0.6212949376715966, -0.11105338867840964]


def test_shifted_copy():
    """A shift by v moves the projection on u by u.v exactly, whatever the samples."""
    x, shift = RNG(0).standard_normal((200, 4)), np.array([0.5, -1, 0, 2])
    expected = np.sqrt(np.mean((directions(4) @ shift) ** 2))
    assert sw(x + shift, x).value == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(np.linalg.norm(shift) / 2, rel=0.1)  # |v| / d^1/2 over all directions


def test_shifted_gaussians():
    """N(v, I) against N(0, s^2 I): SW_2^2 = mean (u.v)^2 + (1 - s)^2."""
    shift = np.array([1.0, 0.5, 0])
    x, y = RNG(1).standard_normal((6000, 3)) + shift, 0.5 * RNG(2).standard_normal((4500, 3))
    expected = np.sqrt(np.mean((directions(3) @ shift) ** 2) + 0.25)
    assert sw(x, y).value == pytest.approx(expected, rel=0.02)


def test_zero_on_itself_in_any_order():
    x = RNG(3).standard_normal((64, 5))
    assert sw(x[::-1], x).value == 0


@pytest.mark.parametrize(("n", "m"), [(6, 4), (7, 5), (5, 5), (3, 12)])
def test_unequal_sizes_are_matched_exactly(n, m):
    """Against copies of every sample up to a common size; and, in order 1, against scipy."""
    a, b = np.sort(RNG(4).standard_normal((2, n))), np.sort(RNG(5).standard_normal((2, m)))
    common = np.repeat(a, m, axis=1) - np.repeat(b, n, axis=1)
    assert squared_distances(a, b) == pytest.approx(np.mean(common**2, axis=1), rel=1e-12)
    assert np.mean(np.abs(common[0])) == pytest.approx(wasserstein_distance(a[0], b[0]))


def test_interval_covers_the_expected_value_and_bias_is_seen():
    rng = RNG(6)
    y = rng.standard_normal((300, 2))
    values = [sw(0.5 + rng.standard_normal((200, 2)), y) for _ in range(150)]
    expected = np.mean([v.value for v in values])
    assert 0.90 <= np.mean([v.low <= expected <= v.high for v in values]) <= 0.99
    spread = np.std([v.value for v in values], ddof=1)
    assert np.mean([v.se for v in values]) == pytest.approx(spread, rel=0.12)
    # where the distance is small the finite sample pushes it up
    near = sw(rng.standard_normal((200, 2)), y)
    assert near.bias > 0


def test_refusals():
    x = RNG(7).standard_normal((40, 3))
    with pytest.raises(
        UserError,
        match=r"^metric 'sw@identity' needs at least 32 samples \(2 in each of 16 jackknife groups\), got 31; "
        r"raise --samples or pass --allow-small-n$",
    ):
        sw(x[:31], x)
    few = sw(x[:31], x, allow_small_n=True)
    assert (few.se, few.low, few.note) == (None, None, "small N")
    assert sw(x[:33], x).se > 0  # groups of unequal size
    x[2] = np.nan
    with pytest.raises(BadSamples, match="NaN or infinite for 1 of 40"):
        sw(x, x)
