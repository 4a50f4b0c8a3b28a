"""Inverse problems on a mixture: the posterior against integration of the density, measurements by index alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.errors import UserError
from evalbench.models.gmm_inverse import InverseMixture
from evalbench.spec import load_suite

CPU = torch.device("cpu")
DEGRADATIONS = ("mask", "blur", "random")


def model_of(**options: object) -> InverseMixture:
    model = InverseMixture(**options)  # type: ignore[arg-type]
    model.to(torch.float64, CPU)
    return model


@pytest.mark.parametrize("label", [-1, 1])
@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_posterior_is_the_integral_of_prior_times_likelihood(degradation: str, label: int) -> None:
    model = model_of(dim=2, measured=1, components=4, classes=2, std=0.4, noise=0.3, degradation=degradation)
    y = torch.tensor([[0.35]], dtype=torch.float64)
    axis = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    keep = [k for k in range(4) if label < 0 or k % 2 == label]
    prior = torch.stack([(-0.5 * ((x - model.means[k]) ** 2).sum(1) / 0.4**2).exp() for k in keep]).sum(0)
    weights = prior * (-0.5 * ((y - model.operator(x)) ** 2).sum(1) / 0.3**2).exp()
    weights = weights / weights.sum()
    mean = weights @ x
    cov = (weights[:, None] * (x - mean)).T @ (x - mean)
    found = model.posterior(y, torch.tensor([label]))
    torch.testing.assert_close(found.mean()[0], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.covariance()[0], cov, rtol=0, atol=1e-6)


def test_one_component_is_the_textbook_formula() -> None:
    """In information form: precision I / s^2 + H^T H / noise^2."""
    model = model_of(dim=5, components=1, classes=0, measured=3, std=0.7, noise=0.2, degradation="random", offset=1.0)
    H, y = model.operator.matrix, model.measure(range(4), 0)
    precision = torch.eye(5, dtype=H.dtype) / 0.49 + H.T @ H / 0.04
    right = model.means / 0.49 + y @ H / 0.04
    found = model.posterior(y)
    torch.testing.assert_close(found.mean(), torch.linalg.solve(precision, right.T).T)
    torch.testing.assert_close(found.covariance()[2], torch.linalg.inv(precision))


def test_draws_have_the_posterior_moments_and_depend_on_the_row_alone() -> None:
    model = model_of(components=6, classes=0, std=0.5, noise=0.5)
    posterior = model.posterior(model.measure(range(3), 0))
    assert posterior.weights.max(1).values.min() < 0.7, "one mode would not test the choice of components"
    draws = posterior.draws(40_000, [5, 6, 7])
    torch.testing.assert_close(draws.mean(1), posterior.mean(), rtol=0, atol=0.03)
    cov = torch.stack([torch.cov(rows.T) for rows in draws])
    torch.testing.assert_close(cov, posterior.covariance(), rtol=0, atol=0.04)
    alone = model.posterior(model.measure([2], 0)).draws(10, [7])
    torch.testing.assert_close(posterior.draws(10, [5, 6, 7])[2:], alone)


def test_the_truth_is_a_posterior_draw() -> None:
    """Over many measurements the whitened truth has mean 0 and covariance I, if y and posterior fit each other."""
    model = model_of(measurements=6000, std=0.4, noise=0.3, degradation="blur")
    labels = torch.arange(6000) % 3
    y, x0 = model.measure(range(6000), 4), model.truth(range(6000), 4)
    posterior = model.posterior(y, labels)
    whiten = torch.linalg.inv(torch.linalg.cholesky(posterior.covariance()))
    z = (whiten @ (x0 - posterior.mean()).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(z.mean(0), np.zeros(8), atol=0.06)
    np.testing.assert_allclose(torch.cov(z.T), np.eye(8), atol=0.12)


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_measurements_repeat_and_do_not_depend_on_their_company(degradation: str) -> None:
    model = model_of(degradation=degradation, measurements=6, noise=0.2)
    y = model.measure(range(18), 0)
    assert y.shape == (18, 4)
    assert torch.equal(y[:6], y[6:12])
    assert len({tuple(row) for row in y.tolist()}) == 6
    assert torch.equal(model.measure([11, 3], 0), y[[11, 3]])
    assert not torch.allclose(model.measure(range(18), 1), y)


def test_measurement_noise_has_its_scale() -> None:
    model = model_of(measurements=3000, noise=0.2)
    residual = model.measure(range(3000), 0) - model.operator(model.truth(range(3000), 0))
    assert residual.std() == pytest.approx(0.2, rel=0.03)


def test_the_truth_has_the_class_of_its_label() -> None:
    model = model_of(std=0.01, spread=3.0, measurements=9)
    seen = model.responsibilities(model.truth(range(30), 0)).argmax(1) % 3
    assert torch.equal(seen, torch.arange(30) % 3)


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_operator(degradation: str) -> None:
    model = model_of(degradation=degradation)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = model.operator(x)
    torch.testing.assert_close(y, x @ model.operator.matrix.T)
    torch.testing.assert_close(model.operator(model.operator.pinv(y)), y)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model.operator.matrix.sum(0).expand(5, 8))
    if degradation == "blur":
        torch.testing.assert_close(model.operator.matrix.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degradation": "fog"}, "degradation"),
        ({"measured": 0}, "measured must lie in 1..8, got 0"),
        ({"measured": 9}, "measured must lie in 1..8, got 9"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"noise": math.nan}, "noise must be above 0"),
        ({"measurements": 10}, "multiple of classes"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build_model("gmm-inverse", options)
    if options.get("degradation") == "fog":
        with pytest.raises(UserError, match="must be one of mask, blur, random"):
            InverseMixture(**options)  # type: ignore[arg-type]


def test_the_suite_is_an_inverse_problem() -> None:
    suite = load_suite("gmm-inverse")
    setup = sampling.build(suite)
    cond = sampling.conditions(suite, setup.model, range(384), setup.device)
    assert {"operator", "gradient", "labels"} <= setup.door.provides
    assert cond.measured is not None
    assert torch.equal(cond.measured[:192], cond.measured[192:])
    assert torch.equal(cond.rows(torch.tensor([3])).measured, cond.measured[3:4])  # type: ignore[arg-type]
