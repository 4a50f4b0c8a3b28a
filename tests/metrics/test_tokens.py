"""Metrics of token sequences: exact cases, calibrated errors, the samples they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Cond, Model, SampleBatch
from evalbench.models.gmm import GaussianMixture
from evalbench.models.tokens import MarkovTokens
from evalbench.registry import build_extractor, build_metric

MODEL = MarkovTokens(length=16, vocabulary=4, contrast=1.0, seed=2)
FAIR = np.full((2, 2), 0.25)


def pair_tv(tokens, pairs):
    metric = build_metric("pair-tv@tokens")
    return metric.compute(metric.update({"tokens": np.asarray(tokens)}), {"pairs": np.asarray(pairs)})


def nll_gap(nll, entropy):
    metric = build_metric("nll-gap@token-nll")
    return metric.compute(metric.update({"token-nll": np.asarray(nll)}), {"entropy": np.array([entropy])})


def batch(x: torch.Tensor, model: Model = MODEL) -> SampleBatch:
    return SampleBatch(x, None, Cond(), model)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_exact_frequencies_are_at_no_distance() -> None:
    assert pair_tv([[0, 0], [0, 1], [1, 0], [1, 1]], FAIR).value == 0


def test_total_variation_by_hand() -> None:
    """00, 01, 10 in one sample and 00 three times in the other: (4, 1, 1, 0) / 6 against quarters."""
    value = pair_tv([[0, 0, 1, 0], [0, 0, 0, 0]], FAIR)
    assert value.value == pytest.approx((4 / 6 - 1 / 4 + 2 * (1 / 4 - 1 / 6) + 1 / 4) / 2)


def test_neighbours_are_ordered() -> None:
    exact = [[0.0, 1.0], [0.0, 0.0]]
    assert pair_tv([[0, 1]] * 3, exact).value == 0
    assert pair_tv([[1, 0]] * 3, exact).value == 1


@pytest.mark.parametrize(("mix", "low", "high"), [(0.5, 0.91, 0.98), (0.0, 0.94, 1)])
def test_interval_covers_the_expected_value(mix: float, low: float, high: float) -> None:
    """Pairs of one sequence depend on each other; conservative for exact samples, where the value has its kink."""
    rng, n = np.random.default_rng(0), 400
    values = []
    for seed in range(300):
        x = MODEL.data(range(n), None, seed).numpy()
        values.append(
            pair_tv(np.where(rng.random((n, 1)) < mix, np.sort(x, axis=1), x), MODEL.reference("tokens")["pairs"])
        )
    expected = np.mean([v.value for v in values])
    assert low <= np.mean([v.low <= expected <= v.high for v in values]) <= high


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        ([[0, 2]] * 2, EvalbenchError, "reference 'tokens' has 2 dimensions, the samples have 3"),
        ([[0, -1]] * 2, EvalbenchError, "two or more symbols 0, 1, ..."),
        ([[0], [1]], EvalbenchError, "two or more symbols 0, 1, ..."),
        ([[0, 1]], UserError, "needs at least 2 samples"),
    ],
)
def test_refused_pairs(tokens, kind, message) -> None:
    with pytest.raises(kind, match=message):
        pair_tv(tokens, FAIR)


# --- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "note"), [(0.3, ""), (-0.3, "samples are too probable")])
def test_both_sides_of_the_entropy_count(shift: float, note: str) -> None:
    nll = 1.2 + shift + 0.1 * np.array([-1.0, 1.0] * 50)
    value = nll_gap(nll, 1.2)
    assert value.value == pytest.approx(0.3)
    assert value.se == pytest.approx(0.1 / np.sqrt(99))
    assert value.note == note


def test_exact_samples_reach_the_entropy() -> None:
    values = []
    for seed in range(300):
        nll = build_extractor("token-nll")(batch(MODEL.data(range(200), None, seed)))
        values.append(nll_gap(nll.numpy(), MODEL.entropy))
    assert 0.92 <= np.mean([v.low == 0 for v in values]) <= 0.98  # zero is inside the interval
    assert all(v.note == "" or v.low > 0 for v in values)


# --- what they are made of ------------------------------------------------------------------------------------------


def test_features() -> None:
    x = MODEL.data(range(5), None, 0)
    tokens, nll = build_extractor("tokens")(batch(x)), build_extractor("token-nll")(batch(x))
    assert tokens.dtype == torch.int16
    assert torch.equal(tokens.long(), x)
    torch.testing.assert_close(nll, -MODEL.log_likelihood(x) / 16)


@pytest.mark.parametrize("name", ["tokens", "token-nll"])
def test_masks_and_other_models_are_refused(name: str) -> None:
    x = MODEL.data(range(5), None, 0)
    x[1, 3], x[4, 0] = MODEL.mask, -1
    with pytest.raises(BadSamples, match=r"2 of 5 samples hold \[MASK\]"):
        build_extractor(name)(batch(x))
    with pytest.raises(UserError, match=f"features '{name}' need a model of tokens"):
        build_extractor(name)(batch(torch.zeros(2, 8), GaussianMixture()))
