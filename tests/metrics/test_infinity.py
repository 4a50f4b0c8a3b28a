"""FD-infinity: closed forms, the line it fits, calibrated intervals, no dependence on anything but the samples."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import UserError
from evalbench.metrics.infinity import extrapolated, subset_sizes
from evalbench.registry import build_metric

RNG = np.random.default_rng
D = 64
EXACT = {"mean": np.zeros(D), "cov": np.eye(D)}


def value(x, name="fd-infinity", **options):
    metric = build_metric(f"{name}@identity")
    return metric.compute(metric.update({"identity": x}), EXACT, **options)


def test_a_line_in_1_over_n_is_met_exactly():
    sizes = subset_sizes(4000, 8)
    assert (sizes[0], sizes[-1], len(sizes)) == (400, 4000, 15)
    intercept, error = extrapolated(sizes, 3.5 + 120.0 / np.array(sizes))
    assert intercept == pytest.approx(3.5, rel=1e-12)
    assert error == pytest.approx(0, abs=1e-9)


def test_subsets_are_never_tiny_and_reach_a_factor_of_two():
    assert subset_sizes(4000, 64)[0] == 512
    assert subset_sizes(600, 64)[0] == 300
    assert len(subset_sizes(30, 1)) == 15


def test_exact_gaussian_samples_are_at_distance_zero():
    """The plug-in value is off by d/N + d(d+1)/4N = 0.54 here; less than 5 % of that may be left."""
    n, draws = 2048, 40
    found = [value(RNG(s).standard_normal((n, D))) for s in range(draws)]
    plug_in = [value(RNG(s).standard_normal((n, D)), "fd").value for s in range(4)]
    bias = D / n + D * (D + 1) / (4 * n)
    assert np.mean(plug_in) == pytest.approx(bias, rel=0.1)
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 0.05 * bias
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.9
    assert values.std() == pytest.approx(np.mean([one.se for one in found]), rel=0.35)


def test_a_known_distance_is_covered():
    """N(0.1, 1.2^2 I) is at d (0.1^2 + 0.2^2) = 3.2 from N(0, I)."""
    found = [value(0.1 + 1.2 * RNG(s).standard_normal((1024, D))) for s in range(40)]
    assert np.mean([one.value for one in found]) == pytest.approx(3.2, rel=0.03)
    assert np.mean([one.low <= 3.2 <= one.high for one in found]) >= 0.88


def test_shrunk_samples_are_worse_than_exact_ones_where_the_plug_in_says_better():
    """0.98 x is at 64 (1 - 0.98)^2 = 0.0256; the plug-in at N is least near the scale 1 - (d + 1) / (8 N) = 0.984."""
    exact = [RNG(s).standard_normal((512, D)) for s in range(32)]
    assert np.mean([value(0.98 * x, "fd").value - value(x, "fd").value for x in exact]) < -0.005
    assert np.mean([value(0.98 * x).value - value(x).value for x in exact]) == pytest.approx(0.0256, abs=0.02)


def test_same_samples_same_bits():
    x = RNG(0).standard_normal((700, D))
    assert value(x) == value(x.copy())


def test_small_n_is_refused_or_marked():
    x = RNG(0).standard_normal((400, D))
    with pytest.raises(UserError, match=r"'fd-infinity@identity' needs at least 512 samples \(8 x 64 dimensions"):
        value(x)
    assert value(x, allow_small_n=True).note == "small N; extrapolated too far"
    assert value(RNG(0).standard_normal((600, D))).note == "extrapolated far"
    assert value(RNG(0).standard_normal((1024, D))).note == ""
    with pytest.raises(UserError, match="needs at least 30 samples"):
        value(x[:20], allow_small_n=True)
