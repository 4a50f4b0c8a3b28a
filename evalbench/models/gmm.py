"""Analytic Gaussian mixtures with an exact denoiser, class labels, and an optional fixed error field.

x0 ~ sum_k w_k N(mu_k, std^2 I), so x_t ~ sum_k w_k N(alpha mu_k, (alpha^2 std^2 + sigma^2) I) on any path, and
E[x0 | x_t] is a softmax-weighted sum of Gaussian posteriors: exact answers for orders, counts and distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evalbench.interfaces import Model, Time
from evalbench.noise import Philox, use_code
from evalbench.registry import register

_DRAWS = 20_000  # size of the exact sample that quantile metrics refer to


@register("gmm")
@dataclass
class GaussianMixture(Model):
    """Mixture of isotropic Gaussians in D dimensions with exact denoiser, x0 prediction.

    Component k belongs to class k mod classes; weights are uniform. Means are normal with scale `spread`, moved by
    `offset` in every coordinate, drawn once from `seed`.

    Attributes:
        dim: D. components: K. classes: number of labels, divides K; 0 for an unconditional model.
        std: standard deviation of each component. spread: standard deviation of the means' coordinates.
        offset: mean of the means' coordinates (off-centre data shows wrong starts).
        error: RMS of a fixed smooth field added to eps, per coordinate; 0 is the exact score.
        seed: draws the means and the error field.
    """

    dim: int = 8
    components: int = 6
    classes: int = 3
    std: float = 0.5
    spread: float = 1.0
    offset: float = 0.0
    error: float = 0.0
    seed: int = 0
    means: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        self.means = torch.from_numpy(self.offset + self.spread * rng.standard_normal((self.components, self.dim)))
        self._frequencies = torch.from_numpy(rng.standard_normal((self.dim, self.dim)) / math.sqrt(self.dim))
        self._phases = torch.from_numpy(rng.uniform(0, 2 * math.pi, self.dim))
        self.shape = (self.dim,)
        self.num_classes = self.classes
        self.provides = frozenset({"labels", "gradient"} if self.classes else {"gradient"})

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.means, self._frequencies, self._phases = (
            tensor.to(device, dtype) for tensor in (self.means, self._frequencies, self._phases)
        )

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """E[x0 | x_t = x, label], (B, D); with `error`, that of eps plus the error field."""
        weights = self.responsibilities(x, alpha, sigma, labels)
        variance = alpha**2 * self.std**2 + sigma**2
        # posterior mean of component k: mu_k + gain (x - alpha mu_k); sums over k keep rows independent of the batch
        gain = alpha * self.std**2 / variance
        mean = (weights.unsqueeze(-1) * self.means).sum(1)  # (B, D)
        x0 = mean + gain * (x - alpha * mean)
        if self.error:
            # eps' = eps + e means x0' = x0 - sigma / alpha e; the field sees x at unit scale on every path
            scale = (alpha**2 + sigma**2) ** -0.5
            angles = ((scale * x).unsqueeze(1) * self._frequencies).sum(-1) + self._phases
            x0 = x0 - sigma / alpha * self.error * math.sqrt(2.0) * torch.sin(angles)
        return x0

    def responsibilities(
        self,
        x: torch.Tensor,
        alpha: Time = 1.0,
        sigma: Time = 0.0,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Posterior probability of each component given x_t = x and the label, (B, K); -1 means any class."""
        variance = alpha**2 * self.std**2 + sigma**2  # float, or (B, 1)
        offsets = x.unsqueeze(1) - _column(alpha) * self.means  # (B, K, D)
        logits = -0.5 * (offsets**2).sum(-1) / variance
        if labels is not None and self.classes:
            component_class = torch.arange(self.components, device=x.device) % self.classes
            excluded = (labels[:, None] >= 0) & (component_class != labels[:, None])
            logits = logits.masked_fill(excluded, -math.inf)
        return torch.softmax(logits, dim=1)

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        """Exact reference: `identity` mean (D,), cov (D, D), draws (20000, D); `modes` weights (K,)."""
        means = self.means.cpu().double().numpy()
        if key == "modes":
            return {"weights": np.full(self.components, 1.0 / self.components)}
        if key != "identity":
            raise NotImplementedError(f"model 'gmm' has no exact reference '{key}'")
        centred = means - means.mean(0)
        cov = centred.T @ centred / self.components + self.std**2 * np.eye(self.dim)
        return {"mean": means.mean(0), "cov": cov, "draws": self.draws(_DRAWS, seed=self.seed + 1)}

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Exact draws; a row is that of its (seed, index), of a component of its class."""
        rng = Philox()
        unit = np.stack([rng.normal(seed, i, use_code("data"), 0, self.dim) for i in indices])
        uniform = np.array([rng.uniform(seed, i, use_code("component"), 0, 1)[0] for i in indices])
        groups = self.classes if labels is not None else 1
        within = np.floor(uniform * (self.components // groups)).astype(int)
        component = within if labels is None else labels.cpu().numpy() + self.classes * within
        means = self.means.cpu().double().numpy()[component]
        return torch.from_numpy(means + self.std * unit).to(self.means)

    def draws(self, n: int, seed: int) -> np.ndarray:
        """n exact samples, (n, D) float64, components in turn."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        means = self.means.cpu().double().numpy()[np.arange(n) % self.components]
        return means + self.std * rng.standard_normal((n, self.dim))


def _column(value: Time) -> Time:
    return value.unsqueeze(-1) if isinstance(value, torch.Tensor) else value
