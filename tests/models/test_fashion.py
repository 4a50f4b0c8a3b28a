"""The exact image model against brute force: dense Gaussians in all 1024 pixels, autograd, its own draws."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from math import log, pi
from pathlib import Path

import numpy as np
import pytest
import torch

from evalbench.models.fashion import WEIGHTS, FashionMixture

PER_CLASS = 8


@lru_cache
def model(dtype: torch.dtype = torch.float64) -> FashionMixture:
    made = FashionMixture()
    made.to(dtype, torch.device("cpu"))
    return made


def noisy(alpha: float, sigma: float, labels: list[int]) -> torch.Tensor:
    x0 = torch.from_numpy(model().draws(np.array([max(label, 0) for label in labels]), seed=4))
    generator = torch.Generator().manual_seed(0)
    return alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)


def dense(x: torch.Tensor, alpha: float, sigma: float, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x0 | x] and log p(x) of one image with full covariance matrices."""
    tables = model().tables
    assert tables is not None
    components, rank = tables.values.shape
    eye = torch.eye(1024, dtype=torch.float64)
    logs, means = [], []
    for k in range(components):
        if label >= 0 and k // PER_CLASS != label:
            continue
        basis = tables.span @ tables.basis[:, k * rank : (k + 1) * rank]
        mu = tables.mean + tables.span @ tables.centres[k]
        cov = basis @ torch.diag(tables.values[k]) @ basis.T + tables.noise * eye
        total = alpha**2 * cov + sigma**2 * eye
        offset = x.flatten() - alpha * mu
        solved = torch.linalg.solve(total, offset)
        weight = tables.log_weights[k] - (0.0 if label >= 0 else log(10))
        logs.append(weight - 0.5 * (offset @ solved + torch.linalg.slogdet(total)[1] + 1024 * log(2 * pi)))
        means.append(mu + alpha * cov @ solved)
    stacked = torch.stack(logs)
    return torch.softmax(stacked, 0) @ torch.stack(means), torch.logsumexp(stacked, 0)


@pytest.mark.parametrize(
    ("alpha", "sigma", "label"),  # eighty dense components take seconds: one unconditional case
    [(0.7, 0.6, 3), (0.05, 0.99, 3), (0.999, 0.03, 3), (1.0, 20.0, 3), (0.7, 0.6, -1)],
)
def test_denoiser_and_density_are_those_of_dense_gaussians(alpha: float, sigma: float, label: int) -> None:
    x = noisy(alpha, sigma, [label])
    labels = torch.tensor([label])
    x0, log_density = dense(x, alpha, sigma, label)
    torch.testing.assert_close(model().predict(x, 0.5, alpha, sigma, labels).flatten(), x0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model().log_density(x, alpha, sigma, labels)[0], log_density, rtol=1e-9, atol=1e-7)


def test_denoiser_is_tweedie_of_its_own_density() -> None:
    alpha, sigma = 0.8, 0.3
    x = noisy(alpha, sigma, [0, 5, 9]).requires_grad_()
    labels = torch.tensor([-1, -1, -1])
    (score,) = torch.autograd.grad(model().log_density(x, alpha, sigma, labels).sum(), x)
    expected = (x + sigma**2 * score).detach() / alpha
    torch.testing.assert_close(model().predict(x.detach(), 0.5, alpha, sigma, labels), expected)


def test_density_of_a_row_does_not_depend_on_its_company() -> None:
    x = noisy(0.7, 0.6, [3, 3])
    mixed = model().log_density(x, 0.7, 0.6, torch.tensor([3, -1]))
    for i, label in enumerate((3, -1)):
        alone = model().log_density(x[i : i + 1], 0.7, 0.6, torch.tensor([label]))
        torch.testing.assert_close(mixed[i : i + 1], alone)


def test_float32_keeps_the_digits() -> None:
    for alpha, sigma in ((0.9999, 0.01), (0.5, 0.86), (0.0066, 1.0)):
        x, labels = noisy(alpha, sigma, list(range(10))), torch.arange(10)
        exact = model().predict(x, 0.5, alpha, sigma, labels)
        single = model(torch.float32).predict(x.float(), 0.5, alpha, sigma, labels)
        assert (single - exact).abs().max() < 2e-3


def test_per_row_noise_levels_equal_single_ones() -> None:
    alphas, sigmas = [0.9, 0.5, 0.1], [0.4, 0.8, 0.99]
    x = torch.cat([noisy(a, s, [i]) for i, (a, s) in enumerate(zip(alphas, sigmas, strict=True))])
    labels = torch.arange(3)
    columns = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in (alphas, sigmas))
    together = model().predict(x, 0.5, *columns, labels)
    for i in range(3):
        alone = model().predict(x[i : i + 1], 0.5, alphas[i], sigmas[i], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_row_has_the_same_bits_anywhere_in_the_batch() -> None:
    made = model(torch.float32)
    x = torch.randn(256, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    labels, order = torch.arange(256) % 10, torch.randperm(256, generator=torch.Generator().manual_seed(2))
    straight = made.predict(x, 0.5, 0.7, 0.71, labels)
    assert torch.equal(straight[order], made.predict(x[order], 0.5, 0.7, 0.71, labels[order]))


def test_exact_moments_match_draws() -> None:
    exact = model().reference("pixels")
    draws = model().draws(np.arange(20_000) % 10, seed=5).reshape(20_000, -1)
    assert np.abs(draws.mean(0) - exact["mean"]).max() < 0.03
    # the largest variance is 0.61; its sampling error at this N is 0.006
    assert np.abs(np.cov(draws.T) - exact["cov"]).max() < 0.04
    np.testing.assert_array_equal(model().draws(np.arange(5), seed=1), model().draws(np.arange(5), seed=1))


def test_the_card_is_of_these_weights() -> None:
    card = json.loads(Path(WEIGHTS).with_suffix(".json").read_text())
    assert card["sha256"] == sha256(Path(WEIGHTS).read_bytes()).hexdigest()
    assert np.sqrt(model().tables.noise) == pytest.approx(card["noise_std"])  # type: ignore[union-attr]
