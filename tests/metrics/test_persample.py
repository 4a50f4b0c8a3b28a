"""Means and quantiles of per-sample numbers."""

from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np
import pytest

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.metrics.common import CLUSTER
from evalbench.registry import build_metric

RNG = np.random.default_rng


def mean_of(metric_id, scores):
    metric = build_metric(metric_id)
    return metric.compute(metric.update({metric.arg: np.asarray(scores)}), None)


def paired(metric_id, a, b):
    metric = build_metric(metric_id)
    return metric.compute(metric.update({metric.arg: a, f"paired:{metric.arg}": b}), None)


def test_mean_with_its_standard_error():
    scores = RNG(0).normal(0.3, 0.02, 400).astype(np.float32)
    value = mean_of("align@tiny-fashion", scores)
    exact = scores.astype(np.float64)
    assert value.value == pytest.approx(exact.mean(), rel=1e-12)
    assert value.se == pytest.approx(exact.std(ddof=1) / 20, rel=1e-9)
    half = 1.95996 * value.se
    assert (value.low, value.high) == pytest.approx((value.value - half, value.value + half), rel=1e-6)


def test_alignment_is_the_raw_cosine():
    """Not times 100, not clipped at zero (pitfall P26)."""
    assert mean_of("align@tiny-fashion", [-0.25, -0.15]).value == pytest.approx(-0.2)


def test_mean_interval_covers():
    rng = RNG(1)
    values = [mean_of("align@tiny-fashion", rng.exponential(1, 200)) for _ in range(600)]
    assert 0.92 <= np.mean([v.low <= 1 <= v.high for v in values]) <= 0.97


def test_accuracy_has_an_interval_when_all_are_right():
    value = mean_of("accuracy@fashion-classifier", np.ones(50))
    assert (value.value, value.se, value.high) == (1, 0, 1)
    assert value.low == pytest.approx(50 / (50 + 1.96**2), rel=1e-4)


def test_accuracy_interval_covers():
    rng = RNG(2)
    values = [mean_of("accuracy@fashion-classifier", (rng.random(100) < 0.95).astype(float)) for _ in range(600)]
    assert 0.92 <= np.mean([v.low <= 0.95 <= v.high for v in values]) <= 0.99


def test_paired_errors_of_known_vectors():
    """|a - b| / D^1/2 is 0, 1, 2, 3, 10 for these rows."""
    a = np.array([0.0, 1, 2, 3, 10])[:, None] * np.array([[1.0, -1, 1, 1]])
    b = np.zeros_like(a)
    assert paired("paired-median@identity", a, b).value == 2
    assert paired("paired-p90@identity", a, b).value == pytest.approx(3 + 0.6 * 7)
    assert paired("paired-rms@identity", a, b).value == pytest.approx(np.sqrt((0 + 1 + 4 + 9 + 100) / 5))


def test_images_of_any_shape_are_flattened():
    a, b = RNG(3).standard_normal((2, 30, 3, 4, 4)).astype(np.float16)
    errors = np.sqrt(((a.astype(float) - b.astype(float)) ** 2).mean((1, 2, 3)))
    assert paired("paired-median@pixels", a, b).value == pytest.approx(np.median(errors), rel=1e-12)


def test_one_bad_sample_rules_the_rms_and_not_the_median():
    a, b = np.full((101, 2), 0.1), np.zeros((101, 2))
    a[7] = 1000
    assert paired("paired-median@identity", a, b).value == pytest.approx(0.1)
    assert paired("paired-rms@identity", a, b).value > 90


@pytest.mark.parametrize(
    ("metric_id", "truth"),
    # errors are |z| for D = 1: quantiles of the half-normal distribution, and its root mean square
    [("paired-median@identity", 0.67449), ("paired-p90@identity", 1.64485), ("paired-rms@identity", 1.0)],
)
def test_paired_interval_covers(metric_id, truth):
    rng = RNG(4)
    zeros = np.zeros((150, 1))
    values = [paired(metric_id, rng.standard_normal((150, 1)), zeros) for _ in range(600)]
    assert 0.93 <= np.mean([v.low <= truth <= v.high for v in values]) <= 0.985
    spread = np.std([v.value for v in values], ddof=1)
    width = np.mean([v.se for v in values]) / spread
    assert 0.92 < width < (1.1 if metric_id == "paired-rms@identity" else 1.3)  # order statistics round outwards


def test_too_few_samples_for_a_tail_have_no_interval():
    value = paired("paired-p90@identity", RNG(5).standard_normal((20, 1)), np.zeros((20, 1)))
    assert (value.se, value.low, value.note) == (None, None, "too few samples for an interval")


def test_equal_sets_have_no_error():
    x = RNG(6).standard_normal((40, 3))
    for metric_id in ("paired-median@identity", "paired-p90@identity", "paired-rms@identity"):
        value = paired(metric_id, x, x)
        assert (value.value, value.low, value.high) == (0, 0, 0)


def test_refusals():
    x = RNG(7).standard_normal((5, 3))
    with pytest.raises(EvalbenchError, match=r"samples \(5, 3\) and their pairs \(4, 3\) differ in shape"):
        paired("paired-median@identity", x, x[:4])
    with pytest.raises(UserError, match="needs one number per sample, but 'tiny-fashion' gives 3"):
        mean_of("align@tiny-fashion", x)
    with pytest.raises(UserError, match=r"^metric 'align@tiny-fashion' needs at least 2 samples"):
        mean_of("align@tiny-fashion", [0.5])
    with pytest.raises(EvalbenchError, match="'fashion-classifier' must give 0 or 1 per sample"):
        mean_of("accuracy@fashion-classifier", [0.5, 0.5])
    bad = x.copy()
    bad[1, 1] = np.nan
    for a, b in ((x, bad), (bad, x)):
        with pytest.raises(BadSamples, match="identity' is NaN or infinite for 1 of 5 samples"):
            paired("paired-median@identity", a, b)
    with pytest.raises(BadSamples, match="'tiny-fashion' is NaN or infinite for 1 of 2 samples"):
        mean_of("align@tiny-fashion", [0.5, np.nan])


# --- samples that share a prompt ------------------------------------------------------------------------------------


def by_prompt(metric, scores, prompts, cuts=(0,)):
    """A value from chunks that begin at `cuts`."""
    edges = [*cuts, len(scores)]
    states = [metric.update({metric.arg: scores[a:b], CLUSTER: prompts[a:b]}) for a, b in pairwise(edges)]
    return metric.compute(functools.reduce(metric.merge, states), None)


def test_samples_of_one_prompt_count_as_one():
    """40 prompts of 8: what a prompt does to all of its samples is no independent evidence."""
    metric, prompts = build_metric("align@tiny-fashion"), np.arange(320) % 40
    missed, blind = [], []
    for key in range(400):
        rng = np.random.default_rng(key)
        scores = rng.standard_normal(40)[prompts] + 0.3 * rng.standard_normal(320)
        value = by_prompt(metric, scores, prompts, cuts=(0, 100, 200))
        alone = metric.compute(metric.update({metric.arg: scores}), None)
        assert value.value == pytest.approx(alone.value)
        missed.append(not value.low <= 0 <= value.high)
        blind.append(not alone.low <= 0 <= alone.high)
    assert 0.025 <= np.mean(missed) <= 0.08
    assert np.mean(blind) > 0.3, "the test sees the difference"


def test_one_sample_for_each_prompt_is_as_independent_samples():
    metric, scores = build_metric("align@tiny-fashion"), np.random.default_rng(0).standard_normal(50)
    alone = metric.compute(metric.update({metric.arg: scores}), None)
    assert by_prompt(metric, scores, np.arange(50)).se == pytest.approx(alone.se)
