"""The mixture with a rare mode: its shares in denoiser, data and references, and which rewards methods may know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evalbench import sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond
from evalbench.models.gmm import GaussianMixture
from evalbench.models.gmm_reward import RewardMixture
from evalbench.paths import Flow
from evalbench.spec import load_suite

CPU = torch.device("cpu")


def model_of(**options: object) -> RewardMixture:
    model = RewardMixture(**options)  # type: ignore[arg-type]
    model.to(torch.float64, CPU)
    return model


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_the_denoiser_is_bayes_rule_with_the_shares(sigma: float) -> None:
    """A sum over components, written out for one state at a time."""
    model = model_of(components=4, rare=0.06, std=0.5)
    alpha, weights = 1.0 - sigma, np.array([0.06] + [0.94 / 3] * 3)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 8)))
    found = model.predict(x, sigma, alpha, sigma, None)
    for row, state in enumerate(x.numpy()):
        variance = alpha**2 * 0.25 + sigma**2
        means = model.means.numpy()
        density = weights * np.exp(-((state - alpha * means) ** 2).sum(1) / 2 / variance)
        posterior = [m + alpha * 0.25 / variance * (state - alpha * m) for m in means]
        expected = density @ np.array(posterior) / density.sum()
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-10)


def test_even_shares_are_the_plain_mixture() -> None:
    model = model_of(components=4, rare=0.25)
    plain = GaussianMixture(components=4, classes=0)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 8)))
    torch.testing.assert_close(model.predict(x, 0.4, 0.6, 0.4, None), plain.predict(x, 0.4, 0.6, 0.4, None))
    for name, value in plain.reference("identity").items():
        if name != "draws":
            np.testing.assert_allclose(model.reference("identity")[name], value, atol=1e-12)


def test_data_and_draws_have_the_shares_and_the_moments() -> None:
    model, n = model_of(std=0.1, seed=1), 20_000
    reference = model.reference("identity")
    np.testing.assert_allclose(model.reference("modes")["weights"], [0.06] + [0.188] * 5)
    for x in (model.data(range(n), None, 5).numpy(), reference["draws"]):
        rare = model.responsibilities(torch.from_numpy(x)).argmax(1) == 0
        assert float(rare.double().mean()) == pytest.approx(0.06, abs=4 * math.sqrt(0.06 * 0.94 / n))
        np.testing.assert_allclose(x.mean(0), reference["mean"], atol=0.04)
        np.testing.assert_allclose(np.cov(x.T), reference["cov"], atol=0.05)
    runs = model.responsibilities(torch.from_numpy(reference["draws"])).argmax(1).unflatten(0, (20, -1)) == 0
    assert (runs.double().mean(1) - 0.06).abs().max() < 0.005, "any run of the draws has the shares"


def test_a_data_row_is_a_function_of_its_seed_and_index() -> None:
    model = model_of()
    torch.testing.assert_close(model.data([7, 3], None, 0), model.data(range(10), None, 0)[[7, 3]], rtol=0, atol=0)
    assert not torch.allclose(model.data([7], None, 0), model.data([7], None, 1))


def test_rewards_are_distances_to_two_points_of_the_rare_mode() -> None:
    model = model_of(std=0.3)
    a, b = model.points - model.means[0]
    assert float(a.norm()) == pytest.approx(0.3)
    assert float(b.norm()) == pytest.approx(0.3)
    assert float((a * b).sum()) == pytest.approx(0, abs=1e-12)
    best, other = model.points[:1], model.points[1:]
    assert float(model.reward("target", best, None)) == 0 == float(model.held_out(other, None))
    apart = -0.3 * math.sqrt(2 / 8)
    assert float(model.held_out(best, None)) == pytest.approx(apart)
    assert float(model.reward("target", other, None)) == pytest.approx(apart)
    moved = best + 0.7  # in every coordinate
    assert float(model.reward("target", moved, None)) == pytest.approx(-0.7)


def test_methods_cannot_ask_for_the_held_out_reward() -> None:
    door = NetworkDoor(model_of(), Flow(), "time")
    door.ledger = ledger = Ledger(2)
    field, x = Field(door, ledger), torch.zeros(2, 8, dtype=torch.float64)
    assert field.reward("target", x, Cond()).shape == (2,)
    np.testing.assert_array_equal(ledger.aux["reward.target"], 1)
    with pytest.raises(Unsupported, match="'held-out' is for metrics alone"):
        field.reward("held-out", x, Cond())
    with pytest.raises(Unsupported, match="needs reward beauty"):
        field.reward("beauty", x, Cond())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"classes": 3}, "set classes = 0"), ({"rare": 1.0}, "rare must lie"), ({"components": 1}, "components >= 2")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardMixture(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gmm-reward-flow", "gmm-reward"])
def test_the_suites_rank_by_the_held_out_reward(name: str) -> None:
    suite = load_suite(name)
    assert suite.metrics.primary == "shortfall@reward-held-out"
    assert "reward" in sampling.build(suite).model.provides
