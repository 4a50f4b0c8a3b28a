"""`fashion-mixture`: an exact model of real images, a class-conditional mixture of low-rank Gaussians.

Component k is N(mu_k, F_k F_k^T + s^2 I) in the 1024 pixels of a 32x32 image; means and factors lie in one common span
m + Q z, so that an evaluation is one projection onto the span, the mixture's algebra there, and one projection back.
With F_k F_k^T = U diag(l) U^T and v = alpha^2 s^2 + sigma^2 the noisy component is N(alpha mu_k, alpha^2 U diag(l) U^T
+ v I), whose posterior mean of x0 is mu_k + gain_iso y + U diag(gain - gain_iso) U^T y at y = x - alpha mu_k, with
gain = alpha (l + s^2) / (alpha^2 l + v) and gain_iso = alpha s^2 / v (Gaussian conditioning, the Woodbury identity).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evalbench.errors import Unsupported
from evalbench.interfaces import Model, Time
from evalbench.noise import Philox, use_code
from evalbench.registry import register

WEIGHTS = Path(__file__).parent / "zoo" / "fashion-mixture.safetensors"
SHAPE = (1, 32, 32)
NUM_CLASSES = 10


@dataclass(frozen=True)
class Tables:
    """The model's numbers in one dtype.

    Attributes:
        mean: (P,) m. span: (P, q) orthonormal Q. centres: (K, q) component means in the span.
        basis: (q, K r) the eigenvectors U of all components side by side. values: (K, r) eigenvalues l.
        projected: (K, r) U_k^T centre_k. log_weights: (K,) log probability within the component's class.
        noise: s^2.
    """

    mean: torch.Tensor
    span: torch.Tensor
    centres: torch.Tensor
    basis: torch.Tensor
    values: torch.Tensor
    projected: torch.Tensor
    log_weights: torch.Tensor
    noise: float

    def to(self, dtype: torch.dtype, device: torch.device) -> Tables:
        """All tensors converted."""
        moved = {name: value.to(device, dtype) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Tables(**moved, noise=self.noise)


def load_tables(file: Path = WEIGHTS) -> Tables:
    """Read the fitted numbers and bring them to working form in float64: Q by QR, factors by eigendecomposition."""
    from safetensors.torch import load_file

    raw = {name: tensor.double() for name, tensor in load_file(file).items()}
    span, rotation = torch.linalg.qr(raw["span"])
    sign = torch.sign(torch.diagonal(rotation))  # QR is unique up to signs; keep the stored orientation
    span = span * sign
    values, vectors = [], []
    for factors in raw["factors"]:  # (q, r)
        u, s, _ = torch.linalg.svd(factors, full_matrices=False)
        values.append(s**2)
        vectors.append(u)
    basis = torch.cat(vectors, dim=1)
    centres = raw["means"]
    projected = torch.einsum("kq,kqr->kr", centres, torch.stack(vectors))
    weights = raw["weights"] / raw["weights"].sum(1, keepdim=True)
    return Tables(
        mean=raw["mean"],
        span=span.contiguous(),
        centres=centres,
        basis=basis.contiguous(),
        values=torch.stack(values),
        projected=projected,
        log_weights=weights.flatten().log(),
        noise=float(raw["noise"]) ** 2,
    )


@register("fashion-mixture")
@dataclass
class FashionMixture(Model):
    """Exact class-conditional model of Fashion-MNIST-like images, 32x32, x0 prediction, 10 classes."""

    is_image = True
    tables: Tables | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.shape = SHAPE
        self.num_classes = 10
        self.provides = frozenset({"labels", "gradient"})

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.tables = load_tables().to(dtype, device)

    def caption(self, label: int) -> str:
        from evalbench.models.nets import caption

        return caption(label)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """E[x0 | x_t = x, label], (B, 1, 32, 32); alpha, sigma floats or (B, 1, 1, 1)."""
        tables = self._loaded()
        alpha, sigma = _row(alpha), _row(sigma)  # floats or (B, 1)
        centred = x.flatten(1) - alpha * tables.mean  # (B, P)
        z = centred @ tables.span  # (B, q)
        responsibilities, y = self._responsibilities(z, alpha, sigma, labels)  # (B, K), (B, K, r)
        iso = alpha * tables.noise / (alpha**2 * tables.noise + sigma**2)
        alpha3, sigma3, iso3 = _row3(alpha), _row3(sigma), _row3(iso)
        gain = alpha3 * (tables.values + tables.noise) / (alpha3**2 * (tables.values + tables.noise) + sigma3**2)
        inner = (responsibilities.unsqueeze(-1) * (gain - iso3) * y).flatten(1)  # (B, K r)
        # sum_k w_k [centre_k + iso (z - alpha centre_k) + U_k (gain - iso) y_k], minus iso z, which `centred` brings
        mixed = (1.0 - alpha * iso) * (responsibilities @ tables.centres) + inner @ tables.basis.T  # (B, q)
        return (tables.mean + iso * centred + mixed @ tables.span.T).reshape(x.shape)

    def responsibilities(
        self, x: torch.Tensor, alpha: float = 1.0, sigma: float = 0.0, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Posterior probability of each component given x_t = x and the label, (B, K)."""
        tables = self._loaded()
        z = (x.flatten(1) - alpha * tables.mean) @ tables.span
        return self._responsibilities(z, alpha, sigma, labels)[0]

    def log_density(self, x: torch.Tensor, alpha: float, sigma: float, labels: torch.Tensor | None) -> torch.Tensor:
        """log p(x_t = x | label), (B,); -1 means any class, all classes equally likely."""
        tables = self._loaded()
        centred = x.flatten(1) - alpha * tables.mean
        z = centred @ tables.span
        outside = (centred**2).sum(1) - (z**2).sum(1)
        variance = alpha**2 * tables.noise + sigma**2
        q, pixels = tables.span.shape[1], tables.span.shape[0]
        rest = -0.5 * (outside / variance + (pixels - q) * np.log(variance) + pixels * np.log(2 * np.pi))
        inside = torch.logsumexp(self._logits(z, alpha, sigma, labels)[0], dim=1) - 0.5 * (z**2).sum(1) / variance
        prior = float(np.log(self.num_classes))  # of a class, for the rows that may be of any
        density: torch.Tensor = rest + inside - (prior if labels is None else prior * (labels < 0))
        return density

    def _responsibilities(
        self, z: torch.Tensor, alpha: Time, sigma: Time, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, y = self._logits(z, alpha, sigma, labels)
        return torch.softmax(logits, dim=1), y

    def _logits(
        self, z: torch.Tensor, alpha: Time, sigma: Time, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(w_k N(z; ...)) without the terms common to all components, (B, K), and y_k = U_k^T (z - alpha c_k).

        |z|^2 / v is common and large: left in, it would cost float32 the digits that tell components apart.
        """
        tables = self._loaded()
        components, rank = tables.values.shape
        alpha3 = _row3(alpha)
        y = (z @ tables.basis).view(-1, components, rank) - alpha3 * tables.projected  # (B, K, r)
        variance = alpha**2 * tables.noise + sigma**2
        along = alpha3**2 * tables.values + _row3(variance)  # variances along U_k
        # |z - alpha c|^2 - |z|^2 = alpha^2 |c|^2 - 2 alpha z.c
        distance = alpha**2 * (tables.centres**2).sum(1) - 2 * alpha * (z @ tables.centres.T)
        inside = (y**2 * (1.0 / _row3(variance) - 1.0 / along)).sum(-1)
        q = tables.span.shape[1]
        log_variance = torch.log(torch.as_tensor(variance, dtype=z.dtype))
        determinant = torch.log(along).sum(-1) + (q - rank) * log_variance
        logits = tables.log_weights - 0.5 * (distance / variance - inside + determinant)
        if labels is None:
            return logits, y
        own = torch.arange(components, device=z.device) // (components // self.num_classes)
        excluded = (labels[:, None] >= 0) & (own != labels[:, None])
        return logits.masked_fill(excluded, -torch.inf), y

    def draws(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Exact samples of the given classes, float64 (N, 1, 32, 32), not clipped."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        rank = load_tables().values.shape[1]
        u = rng.random(len(labels))
        coefficients = rng.standard_normal((len(labels), rank))
        return _images(labels, u, coefficients, rng.standard_normal((len(labels), math.prod(SHAPE))))

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Exact draws; a row is that of its (seed, index, label)."""
        if labels is None:
            raise Unsupported("not supported: data without labels")
        rng, rank = Philox(), load_tables().values.shape[1]
        u = np.array([rng.uniform(seed, i, use_code("component"), 0, 1)[0] for i in indices])
        coefficients = np.stack([rng.normal(seed, i, use_code("coefficients"), 0, rank) for i in indices])
        noise = np.stack([rng.normal(seed, i, use_code("pixels"), 0, math.prod(SHAPE)) for i in indices])
        return torch.from_numpy(_images(labels.cpu().numpy(), u, coefficients, noise)).to(self._loaded().mean)

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        """Exact moments in pixels: `pixels` mean (1024,), cov (1024, 1024), all classes equally likely."""
        if key != "pixels":
            raise NotImplementedError(f"model 'fashion-mixture' has no exact reference '{key}'")
        tables = load_tables()
        weights = torch.exp(tables.log_weights) / self.num_classes
        centre = weights @ tables.centres
        moved = tables.centres - centre
        scaled = tables.basis * (weights[:, None] * tables.values).flatten()
        inner = (weights[:, None] * moved).T @ moved + scaled @ tables.basis.T
        cov = tables.span @ inner @ tables.span.T + tables.noise * torch.eye(len(tables.mean), dtype=torch.float64)
        return {"mean": (tables.mean + tables.span @ centre).numpy(), "cov": cov.numpy()}

    def _loaded(self) -> Tables:
        if self.tables is None:
            raise RuntimeError("fashion-mixture: call to(dtype, device) before predict")
        return self.tables


def _images(labels: np.ndarray, u: np.ndarray, coefficients: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Samples (N, 1, 32, 32) of classes from uniform u (N,), unit coefficients (N, r) and unit noise (N, 1024)."""
    tables = load_tables()
    per_class = len(tables.values) // NUM_CLASSES
    weights = np.exp(tables.log_weights.numpy()).reshape(NUM_CLASSES, per_class)
    inner = np.minimum((u[:, None] > weights.cumsum(1)[labels]).sum(1), per_class - 1)
    k = labels * per_class + inner
    rank = tables.values.shape[1]
    basis = tables.basis.numpy().reshape(-1, len(tables.values), rank).transpose(1, 0, 2)  # (K, q, r)
    z = tables.centres.numpy()[k] + np.einsum("nqr,nr->nq", basis[k], coefficients * np.sqrt(tables.values.numpy()[k]))
    pixels = tables.mean.numpy() + z @ tables.span.numpy().T + np.sqrt(tables.noise) * noise
    images: np.ndarray = pixels.reshape(-1, *SHAPE)
    return images


def _row(value: Time) -> Time:
    """(B, 1, 1, 1) to (B, 1); floats stay."""
    return value.flatten(1) if isinstance(value, torch.Tensor) else value


def _row3(value: Time) -> Time:
    """(B, 1) to (B, 1, 1); floats stay."""
    return value.unsqueeze(-1) if isinstance(value, torch.Tensor) else value
