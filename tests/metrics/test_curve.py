"""Values over N: the exact law of Gaussians, the last point is the value, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import UserError
from evalbench.metrics.curve import curve
from evalbench.registry import build_metric

D = 32
EXACT = {"mean": np.zeros(D), "cov": np.eye(D)}


def state_of(metric, x):
    return metric.merge(metric.update({"identity": x[:700]}), metric.update({"identity": x[700:]}))


def test_plug_in_values_lie_on_the_line_of_the_law():
    """N(0.1, 1): FD is 0.32, the slope d + d (d + 1) / 4 = 296; mean of 12 draws."""
    metric, curves = build_metric("fd@identity"), []
    for x in 0.1 + np.random.default_rng(0).standard_normal((12, 4000, D)):
        curves.append(curve(metric, state_of(metric, x), EXACT, [4000, 500, 1000, 2000]))
    assert [value.n for value in curves[0].values] == [500, 1000, 2000, 4000]
    assert curves[-1].values[-1].value == pytest.approx(metric.compute(state_of(metric, x), EXACT).value, rel=1e-5)
    assert np.mean([found.limit for found in curves]) == pytest.approx(D * 0.01, abs=0.03)
    assert np.mean([found.slope for found in curves]) == pytest.approx(D + D * (D + 1) / 4, rel=0.1)


def test_an_unbiased_metric_has_no_slope():
    metric, rng = build_metric("kid@identity"), np.random.default_rng(1)
    y = rng.standard_normal((400, D))
    slopes = [
        curve(metric, metric.update({"identity": x}), {"features": y}, [100, 200, 400, 800]).slope
        for x in 0.3 + rng.standard_normal((16, 800, D))
    ]
    assert abs(np.mean(slopes)) < 3 * np.std(slopes, ddof=1) / 4


def test_what_has_no_curve_is_refused():
    metric, x = build_metric("fd@identity"), np.random.default_rng(2).standard_normal((900, D))
    for sizes in ([900], [0, 900], [100, 901]):
        with pytest.raises(UserError, match="name at least two different ones, from 1 to the 900 samples"):
            curve(metric, state_of(metric, x), EXACT, sizes)
    with pytest.raises(UserError, match="needs at least 64 samples"):
        curve(metric, state_of(metric, x), EXACT, [20, 900])
    mean = build_metric("align@tiny-fashion")
    with pytest.raises(UserError, match="metric 'align@tiny-fashion' has no curve over N; ask for fd, kid, sw"):
        curve(mean, mean.update({"tiny-fashion": np.ones(5)}), None, [2, 5])
