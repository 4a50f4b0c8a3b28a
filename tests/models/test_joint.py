"""The joint mixture at a time per element, against Gaussian conditioning written out and against its own density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evalbench.errors import Unsupported, UserError
from evalbench.models.gmm import GaussianMixture
from evalbench.models.joint import JointMixture
from evalbench.paths import VPLinear

MODEL = JointMixture(image=3, text=2, components=4, image_std=0.4, text_std=0.7, seed=5)
D, IMAGE, TEXT = 5, slice(0, 3), slice(3, 5)
RNG = torch.Generator().manual_seed(0)
X = torch.randn(6, D, generator=RNG, dtype=torch.float64)
ALPHA = 0.1 + 0.9 * torch.rand(6, D, generator=RNG, dtype=torch.float64)
SIGMA = 0.1 + torch.rand(6, D, generator=RNG, dtype=torch.float64)


def log_density(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, which: slice = slice(None)) -> torch.Tensor:
    """log p(x) up to a constant in x, of some of the elements, (B,)."""
    std = torch.tensor([0.4] * 3 + [0.7] * 2, dtype=torch.float64)
    variance = (alpha * std) ** 2 + sigma**2
    squares = (x[:, None] - alpha[:, None] * MODEL.means) ** 2 / variance[:, None]
    logits = -0.5 * (squares + torch.log(variance)[:, None])[..., which].sum(-1)
    return torch.logsumexp(logits, 1)


def test_the_denoiser_is_tweedies_formula_of_its_density_at_any_times() -> None:
    """E[x0] = (x + sigma^2 grad log p(x)) / alpha, element by element."""
    x = X.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, ALPHA, SIGMA).sum(), x)
    found = MODEL.predict(X, torch.ones_like(X), ALPHA, SIGMA, None)
    torch.testing.assert_close(found, (X + SIGMA**2 * score) / ALPHA, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["float", "row", "element"])
def test_one_time_for_all_is_the_plain_mixture(form: str) -> None:
    joint = JointMixture(image=3, text=2, image_std=0.5, text_std=0.5)
    plain = GaussianMixture(dim=5, components=6, classes=0, std=0.5)
    plain.means = joint.means
    shape = {"float": (), "row": (6, 1), "element": (6, D)}[form]
    alpha, sigma = (torch.full(shape, v, dtype=torch.float64) if shape else v for v in (0.8, 0.6))
    found = joint.predict(X, 0.5, alpha, sigma, None)
    torch.testing.assert_close(found, plain.predict(X, 0.5, 0.8, 0.6, None), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joint.responsibilities(X), plain.responsibilities(X))


def split(image: tuple[float, float], text: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of either modality, per element."""
    alpha, sigma = torch.empty_like(X), torch.empty_like(X)
    for where, (a, s) in ((IMAGE, image), (TEXT, text)):
        alpha[:, where], sigma[:, where] = a, s
    return alpha, sigma


def test_a_clean_text_is_a_condition() -> None:
    """The image's denoiser is that of p(image | text): a mixture with the text's responsibilities for weights."""
    alpha, sigma = split((0.6, 0.8), (1.0, 0.0))
    found = MODEL.predict(X, alpha, alpha, sigma, None)
    torch.testing.assert_close(found[:, TEXT], X[:, TEXT])  # what is given stays
    for x, x0 in zip(X.numpy(), found.numpy(), strict=True):
        means = MODEL.means.numpy()
        prior = np.exp(-0.5 * ((x[TEXT] - means[:, TEXT]) ** 2).sum(1) / 0.7**2)
        variance = (0.6 * 0.4) ** 2 + 0.8**2
        weight = prior * np.exp(-0.5 * ((x[IMAGE] - 0.6 * means[:, IMAGE]) ** 2).sum(1) / variance)
        each = means[:, IMAGE] + 0.6 * 0.4**2 / variance * (x[IMAGE] - 0.6 * means[:, IMAGE])
        np.testing.assert_allclose(x0[IMAGE], weight @ each / weight.sum(), rtol=1e-10, atol=1e-12)


def test_a_text_of_noise_alone_leaves_the_marginal() -> None:
    alpha, sigma = split((0.6, 0.8), (0.0, 1.0))
    found = MODEL.predict(X, alpha, alpha, sigma, None)[:, IMAGE]
    x = X.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, alpha, sigma, IMAGE).sum(), x)
    torch.testing.assert_close(found, ((X + 0.8**2 * score) / 0.6)[:, IMAGE], rtol=1e-10, atol=1e-12)


def test_at_the_start_of_the_path_little_is_left_of_the_text() -> None:
    path = VPLinear()
    noisy = MODEL.predict(X, X, *split((0.6, 0.8), (path.alpha(1.0), path.sigma(1.0))), None)[:, IMAGE]
    absent = MODEL.predict(X, X, *split((0.6, 0.8), (0.0, 1.0)), None)[:, IMAGE]
    assert 0 < (noisy - absent).abs().max() < 5 * path.alpha(1.0)


def test_conditionals() -> None:
    """Weights by Bayes; their mean over texts is the marginal mean of the images."""
    weights, means = MODEL.conditional("image", X)
    torch.testing.assert_close(weights, MODEL.responsibilities(X, elements=TEXT))
    assert torch.equal(means, MODEL.means[:, IMAGE])
    draws = MODEL.data(range(20_000), None, 0)
    images = MODEL.conditional("image", draws)[0] @ means
    se = images.std(0) / math.sqrt(len(images))
    assert ((images.mean(0) - MODEL.means.mean(0)[IMAGE]).abs() < 4 * se).all()


@pytest.mark.parametrize(("key", "where"), [("identity", slice(None)), ("image-part", IMAGE), ("text-part", TEXT)])
def test_references_are_the_moments_of_the_data(key: str, where: slice) -> None:
    reference, n = MODEL.reference(key), 20_000
    x = MODEL.data(range(n), None, 3).numpy()[:, where]
    for draws in (x, reference["draws"]):
        se = np.sqrt(np.diag(reference["cov"]) / n)
        assert (np.abs(draws.mean(0) - reference["mean"]) < 4 * se).all()
        scale = np.sqrt(np.outer(np.diag(reference["cov"]), np.diag(reference["cov"])))
        np.testing.assert_allclose(np.cov(draws.T) / scale, reference["cov"] / scale, atol=0.05)
    assert MODEL.reference("modes")["weights"].tolist() == [0.25] * 4


def test_measurements_are_data_keyed_by_index() -> None:
    measured = MODEL.measure(range(10), 0)
    assert torch.equal(measured, MODEL.data(range(10), None, 0))
    assert torch.equal(MODEL.measure([7, 2], 0), measured[[7, 2]])


def test_modalities_are_a_capability() -> None:
    assert MODEL.modalities == {"image": IMAGE, "text": TEXT}
    with pytest.raises(Unsupported, match="not supported: needs modalities"):
        _ = GaussianMixture().modalities


@pytest.mark.parametrize("options", [{"image": 0}, {"text_std": 0.0}, {"components": 0}])
def test_refusals(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="model 'gmm-joint' needs"):
        JointMixture(**options)  # type: ignore[arg-type]
