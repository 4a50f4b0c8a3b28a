"""A Gaussian mixture with a rare mode and two rewards that look for it: what searches at sampling time are judged on.

With mu the mean of the rare mode and a, b orthogonal directions of length std,

    target     -|x0 - (mu + a)| / sqrt(D)      which methods may ask for, through the denoiser
    held-out   -|x0 - (mu + b)| / sqrt(D)      which only metrics see

Each is the distance to the mode with an error of its own, as scores of images are. A sample that gives all it has to
the target ends sqrt(2 / D) std below the best of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Time
from evalbench.models.gmm import GaussianMixture
from evalbench.noise import Philox, use_code
from evalbench.registry import register

_DRAWS = 20_000  # size of the exact sample that quantile metrics refer to
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it spread evenly over [0, 1): any run of draws has nearly the exact shares


@register("gmm-reward")
@dataclass
class RewardMixture(GaussianMixture):
    """An unconditional Gaussian mixture whose first component is rare, with a target and a held-out reward.

    The other components share what is left evenly. Rewards are minus an RMS distance
    per coordinate, in the units of x, 0 at best.

    Attributes:
        rare: weight of the first component, in (0, 1).
    """

    classes: int = 0
    rare: float = 0.06
    weights: torch.Tensor = field(init=False, repr=False)
    points: torch.Tensor = field(init=False, repr=False)  # (2, D): the optima of target and held-out reward

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model 'gmm-reward'"
        if self.classes:
            raise UserError(f"{where}: has no labels, set classes = 0")
        if self.components < 2 or self.dim < 2:
            raise UserError(f"{where}: needs dim >= 2 and components >= 2, got {self.dim} and {self.components}")
        if not 0 < self.rare < 1:
            raise UserError(f"{where}: rare must lie in (0, 1), got {self.rare}")
        others = (1.0 - self.rare) / (self.components - 1)
        self.weights = torch.tensor([self.rare] + [others] * (self.components - 1), dtype=torch.float64)
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 2]))  # apart from the means' draw
        directions = np.linalg.qr(rng.standard_normal((self.dim, 2)))[0].T  # orthonormal, (2, D)
        self.points = self.means[0] + self.std * torch.from_numpy(np.ascontiguousarray(directions))
        self.provides = self.provides | {"reward"}

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        super().to(dtype, device)
        self.weights, self.points = self.weights.to(device, dtype), self.points.to(device, dtype)

    def reward(self, name: str, x0: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if name == "held-out":
            raise Unsupported("not supported: reward 'held-out' is for metrics alone; methods may ask for 'target'")
        if name != "target":
            raise Unsupported(f"not supported: needs reward {name}, model 'gmm-reward' has 'target'")
        return -_distance(x0, self.points[0])

    def held_out(self, x0: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The reward that no method may optimise, (B,), higher is better."""
        return -_distance(x0, self.points[1])

    def responsibilities(
        self,
        x: torch.Tensor,
        alpha: Time = 1.0,
        sigma: Time = 0.0,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shares = super().responsibilities(x, alpha, sigma, labels) * self.weights
        return shares / shares.sum(1, keepdim=True)

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        means, weights = (tensor.cpu().double().numpy() for tensor in (self.means, self.weights))
        if key == "modes":
            return {"weights": weights}
        if key != "identity":
            raise NotImplementedError(f"model 'gmm-reward' has no exact reference '{key}'")
        mean = weights @ means
        cov = ((means - mean).T * weights) @ (means - mean) + self.std**2 * np.eye(self.dim)
        return {"mean": mean, "cov": cov, "draws": self.draws(_DRAWS, seed=self.seed + 1)}

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        rng = Philox()
        unit = np.stack([rng.normal(seed, i, use_code("data"), 0, self.dim) for i in indices])
        uniform = np.array([rng.uniform(seed, i, use_code("component"), 0, 1)[0] for i in indices])
        return torch.from_numpy(self._placed(uniform, unit)).to(self.means)

    def draws(self, n: int, seed: int) -> np.ndarray:
        """n exact samples, (n, D) float64, components evenly interleaved in their shares."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        return self._placed(np.arange(n) * _GOLDEN % 1.0, rng.standard_normal((n, self.dim)))

    def _placed(self, uniform: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """Samples of the components that uniform numbers (n,) choose, from unit normals (n, D)."""
        cumulative = np.cumsum(self.weights.cpu().double().numpy())
        component = np.minimum(np.searchsorted(cumulative, uniform, side="right"), self.components - 1)
        placed: np.ndarray = self.means.cpu().double().numpy()[component] + self.std * unit
        return placed


def _distance(x: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """RMS per coordinate, (B,)."""
    return (x - point).square().mean(-1).sqrt()
