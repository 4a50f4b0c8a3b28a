"""Metrics of inverse problems: nulls under exact posterior samples, closed forms, clustered intervals, refusals."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.models.gmm import GaussianMixture
from evalbench.models.gmm_inverse import InverseMixture, Posterior
from evalbench.registry import build_extractor, build_metric

M, R = 60, 12  # measurements, samples of each
LABELS = torch.arange(M * R) % 3
IDS = ("posterior-energy", "posterior-spread", "posterior-rmse", "consistency", "recovery-snr")


@lru_cache
def problem(seed: int = 0) -> tuple[InverseMixture, torch.Tensor, Posterior]:
    model = InverseMixture(components=12, std=0.3, noise=0.2, degradation="blur", measurements=M)
    model.to(torch.float64, torch.device("cpu"))
    y = model.measure(range(M * R), seed)
    return model, y, model.posterior(y, LABELS)


def features(x: torch.Tensor, labels: torch.Tensor | None = LABELS, seed: int = 0) -> np.ndarray:
    model, y, _ = problem(seed)
    return build_extractor("posterior")(SampleBatch(x, None, Cond(labels, None, y), model)).numpy()


def value(name: str, rows: np.ndarray):
    metric = build_metric(f"{name}@posterior")
    return metric.compute(metric.update({"posterior": rows}), None)


def exact_draws(seed: int, posterior: Posterior | None = None) -> torch.Tensor:
    return (posterior or problem()[2]).draws(1, [seed * 10**6 + i for i in range(M * R)])[:, 0]


@pytest.mark.parametrize(("name", "null"), [("posterior-energy", 0.0), ("posterior-spread", 1.0), ("consistency", 1.0)])
def test_exact_posterior_samples_score_the_null(name: str, null: float) -> None:
    errors = []
    for seed in range(8):
        found = value(name, features(exact_draws(50 + 3 * seed, problem(seed)[2]), seed=seed))
        errors.append((found.value - null) / found.se)
    assert abs(np.mean(errors)) < 3 / np.sqrt(len(errors))
    assert max(map(abs, errors)) < 4


def test_the_posterior_mean_has_no_spread_and_the_highest_snr() -> None:
    model, y, posterior = problem()
    rows = features(posterior.mean())
    assert value("posterior-rmse", rows).value == pytest.approx(0, abs=1e-12)
    assert value("posterior-spread", rows).value == pytest.approx(0, abs=1e-12)
    assert value("posterior-spread", rows).note == "narrower than the posterior"
    assert value("posterior-energy", rows).value > 0.5
    signal = float(np.trace(model.reference("identity")["cov"])) / 8
    risk = float(posterior.covariance().diagonal(dim1=1, dim2=2).mean())
    assert value("recovery-snr", rows).value == pytest.approx(10 * np.log10(signal / risk), rel=1e-9)
    moved = features(posterior.mean() + 0.3)
    assert value("posterior-rmse", moved).value == pytest.approx(0.3)
    assert value("recovery-snr", moved).value < value("recovery-snr", rows).value
    residual = ((y - model.operator(posterior.mean())) / 0.2).square().mean()
    assert value("consistency", rows).value == pytest.approx(float(residual), rel=1e-9)


def test_the_risk_is_the_error_to_the_truth_on_average() -> None:
    """E[|x - x0|^2 | y], without knowing x0, against the error to many truths."""
    _, _, posterior = problem()
    x = exact_draws(1)
    truths = posterior.draws(1000, list(range(M * R)))
    error = (x.unsqueeze(1) - truths).square().mean((1, 2))
    np.testing.assert_allclose(features(x)[:, 2], error, rtol=0.3)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_spread_and_energy_see_a_wrong_width(factor: float) -> None:
    posterior = problem()[2]
    mean = posterior.mean()
    rows = features(mean + factor * (exact_draws(1) - mean))
    exact = value("posterior-spread", features(exact_draws(1))).value
    spread = value("posterior-spread", rows)
    assert spread.value == pytest.approx(factor**2 * exact)
    assert spread.note == ("narrower" if factor < 1 else "wider") + " than the posterior"
    assert value("posterior-energy", rows).low > 0


def test_energy_and_spread_see_dropped_modes() -> None:
    """Samples of the most probable mode alone, exact within it."""
    model, y, _ = problem()
    posterior = model.posterior(y)  # of any class
    heaviest = torch.nn.functional.one_hot(posterior.weights.argmax(1), 12).double()
    several = posterior.weights.max(1).values.numpy() < 0.8
    assert several.mean() > 0.1
    for kept, right in ((posterior, True), (posterior._replace(weights=heaviest), False)):
        rows = features(exact_draws(3, kept), labels=None)[several]
        spread, energy = value("posterior-spread", rows), value("posterior-energy", rows)
        assert (energy.low < 0) == right
        assert (spread.high > 1) == right


def test_features_do_not_depend_on_the_company() -> None:
    model, y, _ = problem()
    x, order = exact_draws(1), torch.randperm(M * R, generator=torch.Generator().manual_seed(0))
    batch = SampleBatch(x[order], None, Cond(LABELS[order], None, y[order]), model)
    np.testing.assert_array_equal(build_extractor("posterior")(batch).numpy(), features(x)[order])


def table(rng: np.random.Generator, groups: int, size: int, shared: float) -> np.ndarray:
    """Rows of standard normal z; scores with a part that all samples of a measurement share."""
    key = np.repeat(np.arange(groups), size)
    score = 5 + shared * rng.standard_normal(groups)[key] + rng.standard_normal(len(key))
    z = rng.standard_normal((len(key), 3))
    return np.column_stack([key, score, score, np.ones(len(key)), score, rng.random(len(key)), z])


@pytest.mark.parametrize(("name", "true"), [("consistency", 5.0), ("posterior-spread", 1.0)])
def test_intervals_cover_with_samples_that_share_measurements(name: str, true: float) -> None:
    """Per-sample errors would cover far less: the shared part is twice as large as the rest."""
    rng = np.random.default_rng(1)
    found = [value(name, table(rng, 40, 8, shared=2.0)) for _ in range(400)]
    assert 0.92 <= np.mean([v.low <= true <= v.high for v in found]) <= 0.98


@pytest.mark.parametrize("name", ["consistency", "posterior-rmse", "recovery-snr"])
def test_samples_seen_twice_are_no_new_samples(name: str) -> None:
    rows = table(np.random.default_rng(2), 30, 3, shared=1.0)
    once, twice = value(name, rows), value(name, np.concatenate([rows, rows]))
    assert twice.value == pytest.approx(once.value)
    assert twice.se == pytest.approx(once.se)


def test_delta_method_errors() -> None:
    """Standard errors of the root and of the decibels against the spread over repeats."""
    rng = np.random.default_rng(3)
    for name in ("posterior-rmse", "recovery-snr"):
        found = [value(name, table(rng, 40, 4, shared=1.0)) for _ in range(400)]
        assert np.mean([v.se for v in found]) == pytest.approx(np.std([v.value for v in found]), rel=0.15)


def test_lonely_samples_say_nothing_of_spread() -> None:
    rows = table(np.random.default_rng(4), 20, 1, shared=0.0)
    with pytest.raises(UserError, match="measurements with at least 2 samples"):
        value("posterior-spread", rows)
    shared = table(np.random.default_rng(5), 3, 4, shared=0.0)
    shared[:, 0] += 100  # other measurements
    both = np.concatenate([rows, shared])
    assert value("posterior-spread", both).value == pytest.approx(value("posterior-spread", shared).value)


def test_one_measurement_has_no_interval() -> None:
    found = value("consistency", table(np.random.default_rng(6), 1, 5, shared=0.0))
    assert found.se is None
    assert "no interval" in found.note


@pytest.mark.parametrize("name", IDS)
def test_refusals(name: str) -> None:
    metric = build_metric(f"{name}@identity")
    with pytest.raises(UserError, match=f"write {name}@posterior"):
        metric.update({"identity": np.zeros((4, 3))})
    rows = table(np.random.default_rng(7), 2, 2, shared=0.0)
    rows[1, 4] = np.nan
    with pytest.raises(BadSamples, match="NaN or infinite for 1 of 4"):
        value(name, rows)


def test_a_perfect_recovery_has_no_decibels() -> None:
    rows = table(np.random.default_rng(8), 2, 2, shared=0.0)
    rows[:, 2] = 0
    with pytest.raises(EvalbenchError, match="mean square error is 0"):
        value("recovery-snr", rows)


def test_a_model_without_posterior_is_refused() -> None:
    model = GaussianMixture()
    for measured in (None, torch.zeros(2, 4)):
        batch = SampleBatch(torch.zeros(2, 8), None, Cond(measured=measured), model)
        with pytest.raises(UserError, match="run them on suite gmm-inverse"):
            build_extractor("posterior")(batch)


def test_the_class_that_a_mixture_sees() -> None:
    model = GaussianMixture(std=0.01, spread=3.0)
    model.to(torch.float64, torch.device("cpu"))
    labels = torch.arange(30) % 3
    x = model.data(range(30), labels, 0)
    seen = build_extractor("gmm-class")
    assert seen(SampleBatch(x, None, Cond(labels), model)).tolist() == [1.0] * 30
    assert seen(SampleBatch(x, None, Cond((labels + 1) % 3), model)).tolist() == [0.0] * 30
    with pytest.raises(UserError, match="need labels"):
        seen(SampleBatch(x, None, Cond(), model))


def test_the_class_needs_a_mixture() -> None:
    from evalbench.registry import build_model

    with pytest.raises(UserError, match="mixture with exact classes"):
        build_extractor("gmm-class")(SampleBatch(torch.zeros(1, 1), None, Cond(), build_model("fashion-mixture", {})))
