"""Mode coverage: exact cases, missing modes, calibrated errors."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.registry import build_metric

RNG = np.random.default_rng


def coverage(modes, weights):
    metric = build_metric("mode-coverage@gmm-mode")
    state = metric.update({"gmm-mode": np.asarray(modes, dtype=np.float64)})
    return metric.compute(state, {"weights": np.asarray(weights)})


def test_exact_shares_score_one():
    value = coverage([0, 0, 1, 2], [0.5, 0.25, 0.25])
    assert (value.value, value.note) == (1, "")


def test_total_variation():
    """Frequencies (1/2, 1/2, 0) against thirds: 1 - (1/6 + 1/6 + 1/3) / 2."""
    value = coverage([0, 1] * 50, [1 / 3] * 3)
    assert value.value == pytest.approx(2 / 3)
    assert value.note == "missing modes: 2"


def test_an_empty_mode_is_missing_only_where_samples_were_due():
    assert coverage([0] * 100, [0.5, 0.46, 0.04]).note == "missing modes: 1"


@pytest.mark.parametrize(("shares", "low", "high"), [([0.5, 0.3, 0.2], 0.91, 0.98), ([0.25, 0.25, 0.5], 0.94, 1)])
def test_interval_covers_the_expected_value(shares, low, high):
    """Conservative where the shares are right, because the absolute value has its kink there."""
    rng, weights = RNG(0), [0.25, 0.25, 0.5]
    values = [coverage(rng.choice(3, 400, p=shares), weights) for _ in range(500)]
    expected = np.mean([v.value for v in values])
    assert low <= np.mean([v.low <= expected <= v.high for v in values]) <= high


@pytest.mark.parametrize(
    ("modes", "weights", "kind", "message"),
    [
        ([0, 3], [0.5, 0.5], EvalbenchError, "reference 'modes' has 2 dimensions, the samples have 4"),
        ([0, 0.5], [0.5, 0.5], EvalbenchError, "'gmm-mode' must give mode indices"),
        ([0, -1], [0.5, 0.5], EvalbenchError, "'gmm-mode' must give mode indices"),
        ([0, np.nan], [0.5, 0.5], BadSamples, "'gmm-mode' is NaN or infinite for 1 of 2 samples"),
        ([0, 1], [0.5, 0.4], EvalbenchError, "the weights of reference 'modes' do not sum to 1"),
        ([0], [0.5, 0.5], UserError, "needs at least 2 samples"),
    ],
)
def test_refusals(modes, weights, kind, message):
    with pytest.raises(kind, match=message):
        coverage(modes, weights)


def test_of_a_real_mixture():
    """Samples drawn from the mixture cover it; samples of one class do not."""
    import torch

    from evalbench.interfaces import Cond, SampleBatch
    from evalbench.registry import build_extractor, build_model

    model = build_model("gmm", {"dim": 3, "components": 6, "classes": 3, "std": 0.05, "spread": 2.0})
    draws = torch.from_numpy(np.asarray(model.draws(600, seed=3)))
    modes = build_extractor("gmm-mode")(SampleBatch(draws, None, Cond(), model)).numpy()
    weights = model.reference("modes")["weights"]
    assert modes.dtype == np.float64
    assert coverage(modes, weights).value == pytest.approx(1)
    assert coverage(modes[modes % 3 == 0], weights).value == pytest.approx(1 / 3)
    assert coverage(modes[modes % 3 == 0], weights).note == "missing modes: 1, 2, 4, 5"
