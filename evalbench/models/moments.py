"""A Gaussian with the first two moments of a mixture: the cheap partner of `gmm` for methods that use two models."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from evalbench.interfaces import Model, Time
from evalbench.models.gmm import GaussianMixture
from evalbench.registry import register


@register("gmm-moments")
@dataclass
class MomentMatched(Model):
    """One Gaussian N(m, C) with mean and covariance of the `gmm` of the same options; exact denoiser, x0 prediction.

    Right in its first two moments, so a Frechet distance hardly sees its error; it puts samples between the modes.

    Attributes:
        dim, components, std, spread, offset, seed: as in `gmm`. It knows no classes.
    """

    dim: int = 8
    components: int = 6
    std: float = 0.5
    spread: float = 1.0
    offset: float = 0.0
    seed: int = 0
    mean: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        mixture = GaussianMixture(
            dim=self.dim,
            components=self.components,
            classes=0,
            std=self.std,
            spread=self.spread,
            offset=self.offset,
            seed=self.seed,
        )
        moments = mixture.reference("identity")
        self.mean = torch.from_numpy(moments["mean"])
        self._values, self._vectors = torch.linalg.eigh(torch.from_numpy(moments["cov"]))
        self.shape = (self.dim,)
        self.provides = frozenset({"gradient"})

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.mean, self._values, self._vectors = (
            tensor.to(device, dtype) for tensor in (self.mean, self._values, self._vectors)
        )

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """E[x0 | x_t = x] = m + C alpha (alpha^2 C + sigma^2 I)^-1 (x - alpha m), (B, D)."""
        gain = alpha * self._values / (alpha**2 * self._values + sigma**2)
        # sums, not matrix products: the bits of a row may not depend on the batch
        y = ((x - alpha * self.mean).unsqueeze(-1) * self._vectors).sum(1)  # (B, D) in the eigenbasis
        x0: torch.Tensor = self.mean + ((gain * y).unsqueeze(1) * self._vectors).sum(-1)
        return x0
