"""The analytic mixture: its denoiser against autograd of its own density, its moments against its draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalbench.models.gmm import GaussianMixture

CPU = torch.device("cpu")


def _model(**options: float) -> GaussianMixture:
    model = GaussianMixture(**options)  # type: ignore[arg-type]
    model.to(torch.float64, CPU)
    return model


def _log_density(model: GaussianMixture, x: torch.Tensor, alpha: float, sigma: float, label: int) -> torch.Tensor:
    """Brute force over components, up to a constant."""
    keep = [k for k in range(model.components) if label < 0 or k % model.classes == label]
    variance = alpha**2 * model.std**2 + sigma**2
    terms = torch.stack([-0.5 * ((x - alpha * model.means[k]) ** 2).sum(-1) / variance for k in keep])
    return torch.logsumexp(terms, 0)


@pytest.mark.parametrize("label", [-1, 0, 2])
@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.4), (0.1, 0.99), (1.0, 5.0), (0.999, 0.02)])
def test_denoiser_is_tweedie_of_the_density(alpha: float, sigma: float, label: int) -> None:
    model = _model()
    x = (torch.randn(6, 8, dtype=torch.float64) * (alpha + sigma)).requires_grad_()
    (score,) = torch.autograd.grad(_log_density(model, x, alpha, sigma, label).sum(), x)
    labels = torch.full((6,), label)
    x0 = model.predict(x.detach(), 0.5, alpha, sigma, labels)
    torch.testing.assert_close(x0, ((x + sigma**2 * score) / alpha).detach(), rtol=1e-9, atol=1e-9)


def test_per_row_times_equal_single_times() -> None:
    model, x = _model(error=0.2), torch.randn(3, 8, dtype=torch.float64)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.4, 0.8, 0.98])
    together = model.predict(x, 0.0, alpha.double()[:, None], sigma.double()[:, None], None)
    for i in range(3):
        alone = model.predict(x[i : i + 1], 0.0, float(alpha.double()[i]), float(sigma.double()[i]), None)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_error_field_moves_eps_by_its_rms() -> None:
    exact, wrong = _model(dim=64), _model(dim=64, error=0.2)
    x, alpha, sigma = torch.randn(500, 64, dtype=torch.float64), 0.6, 0.8
    x0, moved = (model.predict(x, 0.5, alpha, sigma, None) for model in (exact, wrong))
    eps_difference = (x0 - moved) * alpha / sigma
    assert eps_difference.pow(2).mean().sqrt() == pytest.approx(0.2, rel=0.1)


def test_exact_moments_match_draws() -> None:
    model = _model(offset=1.0)
    reference = model.reference("identity")
    draws = model.draws(60_000, seed=3)
    np.testing.assert_allclose(draws.mean(0), reference["mean"], atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), reference["cov"], atol=0.06)


def test_a_row_has_the_same_bits_anywhere_in_the_batch() -> None:
    model, x = _model(), torch.randn(33, 8, dtype=torch.float64)
    order = torch.randperm(33)
    straight, shuffled = (model.predict(rows, 0.5, 0.7, 0.71, None) for rows in (x, x[order]))
    assert torch.equal(straight[order], shuffled)
