"""The exact token model against the sum over all sequences, and the path of its masks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from evalbench.errors import UserError
from evalbench.models.tokens import MarkovTokens
from evalbench.noise import NoiseSource
from evalbench.paths import Masked, make_path

L, V = 4, 3
MODEL = MarkovTokens(length=L, vocabulary=V, contrast=1.5, seed=3)
SEQUENCES = np.array(list(product(range(V), repeat=L)))


def probabilities() -> np.ndarray:
    """P(x) of every sequence, by the chain rule."""
    p = MODEL.stationary[SEQUENCES[:, 0]]
    for i in range(1, L):
        p = p * MODEL.transition[SEQUENCES[:, i - 1], SEQUENCES[:, i]]
    return p


def predict(model: MarkovTokens, x: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    return model.predict(x, t, 1 - t, t, None)


def test_the_chain_is_stationary_and_its_sequences_sum_to_one() -> None:
    np.testing.assert_allclose(MODEL.stationary @ MODEL.transition, MODEL.stationary, rtol=1e-12)
    assert probabilities().sum() == pytest.approx(1, rel=1e-12)


def test_conditionals_are_those_of_the_sum_over_all_sequences() -> None:
    """Every state of known and masked tokens, 256 of them."""
    p = probabilities()
    states = np.array(list(product(range(V + 1), repeat=L)))
    found = predict(MODEL, torch.from_numpy(states)).numpy()
    for state, probs in zip(states, found, strict=True):
        fits = ((state == SEQUENCES) | (state == V)).all(1) * p
        for place in range(L):
            expected = np.bincount(SEQUENCES[:, place], weights=fits, minlength=V) / fits.sum()
            np.testing.assert_allclose(probs[place], expected, rtol=1e-10, atol=1e-14)


def test_time_is_not_used_and_a_row_does_not_depend_on_its_company() -> None:
    model = MarkovTokens()
    x = model.data(range(12), None, 0)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = model.mask
    together = predict(model, x, 0.9)
    assert torch.equal(together, predict(model, x, 0.1))
    assert torch.equal(together[5:6], predict(model, x[5:6]))


def test_likelihood_and_entropy() -> None:
    p = probabilities()
    log_p = MODEL.log_likelihood(torch.from_numpy(SEQUENCES)).numpy()
    np.testing.assert_allclose(log_p, np.log(p), rtol=1e-12)
    assert MODEL.entropy == pytest.approx(-(p * np.log(p)).sum() / L, rel=1e-12)
    assert MODEL.reference("token-nll")["entropy"] == pytest.approx(MODEL.entropy)


def test_the_pairs_are_those_of_any_two_neighbours() -> None:
    pairs = MODEL.reference("tokens")["pairs"]
    for i in range(L - 1):
        counted = np.zeros((V, V))
        np.add.at(counted, (SEQUENCES[:, i], SEQUENCES[:, i + 1]), probabilities())
        np.testing.assert_allclose(pairs, counted, rtol=1e-12)


def test_data_are_exact_draws_keyed_by_seed_and_index() -> None:
    n = 20_000
    x = MODEL.data(range(n), None, seed=1)
    counts = np.bincount(x.numpy() @ V ** np.arange(L)[::-1], minlength=V**L)
    expected = n * probabilities()
    assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * np.sqrt(2 * 80)  # chi-square with 80 degrees
    assert torch.equal(MODEL.data([7, 3], None, 1), x[[7, 3]])
    assert not torch.equal(MODEL.data(range(9), None, 2), x[:9])


def test_sampling_starts_from_masks() -> None:
    x = MODEL.start(NoiseSource(0, [4, 5], (L,)), Masked())
    assert x.dtype == torch.int64
    assert x.tolist() == [[V] * L] * 2


@pytest.mark.parametrize("options", [{"length": 1}, {"vocabulary": 1}])
def test_refusals(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="length >= 2 and vocabulary >= 2"):
        MarkovTokens(**options)  # type: ignore[arg-type]


# --- the path -------------------------------------------------------------------------------------------------------

TIMES = np.linspace(0.01, 1.0, 23)


def test_log_linear() -> None:
    """The total noise of the paper, -log alpha, is -log(1 - (1 - eps) t)."""
    path = make_path("masked", eps=1e-3)
    np.testing.assert_allclose(-path.log_alpha(TIMES), -np.log(1 - (1 - 1e-3) * TIMES), rtol=1e-12)
    assert path.alpha(1.0) == pytest.approx(1e-3)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_clean_and_masked_are_all_there_is(exponent: float) -> None:
    path = Masked(exponent=exponent)
    np.testing.assert_allclose(path.alpha(TIMES) + path.sigma(TIMES), 1.0, rtol=1e-12)
    np.testing.assert_allclose(path.t_of_lambda(path.lam(TIMES)), TIMES, rtol=1e-9)
    h = 1e-6
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        np.testing.assert_allclose((value(TIMES + h) - value(TIMES - h)) / (2 * h), slope(TIMES), rtol=1e-6)
    assert (path.sigma(0.0), path.alpha(0.0)) == (0, 1)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 1.0}, {"exponent": 0.0}, {"t_start": 1.5}])
def test_a_path_that_is_no_probability_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="path 'masked' needs"):
        make_path("masked", **options)
