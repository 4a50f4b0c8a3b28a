"""A joint Gaussian mixture of two modalities, with the exact denoiser for a time of its own in every element.

x0 = (image, text) ~ sum_k 1/K N(mu_k, diag(std^2)). At alpha_d, sigma_d in element d the posterior of a component is
Gaussian element by element, so E[x0 | x] is closed form whatever the times are: a modality at t = 0 is a condition,
one at t_start is (nearly) absent. Marginals and conditionals are mixtures too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evalbench.errors import UserError
from evalbench.interfaces import Model, Time
from evalbench.noise import Philox, use_code
from evalbench.registry import register

_DRAWS = 20_000  # size of the exact sample that quantile metrics refer to


@register("gmm-joint")
@dataclass
class JointMixture(Model):
    """Mixture of two modalities, `image` and `text`, with exact denoiser for any times, x0 prediction.

    Weights are uniform; means are normal with scale `spread`, drawn once from `seed`. A sample is the image's elements
    and then the text's. `measure` gives whole exact draws: what a modality that is given is read from.

    Attributes:
        image, text: number of elements of each. components: K.
        image_std, text_std: standard deviation of each component in either modality.
        spread: standard deviation of the means' coordinates. seed: draws the means.
    """

    provides = frozenset({"modalities", "gradient"})

    image: int = 4
    text: int = 4
    components: int = 6
    image_std: float = 0.5
    text_std: float = 0.5
    spread: float = 1.0
    seed: int = 0
    means: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.image, self.text, self.components) < 1 or min(self.image_std, self.text_std) <= 0:
            raise UserError("model 'gmm-joint' needs image, text and components of at least 1, and std above 0")
        dim = self.image + self.text
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        self.means = torch.from_numpy(self.spread * rng.standard_normal((self.components, dim)))
        self._std = torch.tensor([self.image_std] * self.image + [self.text_std] * self.text, dtype=torch.float64)
        self.shape = (dim,)

    @property
    def modalities(self) -> Mapping[str, slice]:
        return {"image": slice(0, self.image), "text": slice(self.image, self.image + self.text)}

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.means, self._std = self.means.to(device, dtype), self._std.to(device, dtype)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """E[x0 | x], (B, D); alpha and sigma are floats, per row (B, 1), or per element (B, D)."""
        weights = self.responsibilities(x, alpha, sigma)
        mean = (weights.unsqueeze(-1) * self.means).sum(1)  # (B, D)
        # posterior mean of component k: mu_k + gain (x - alpha mu_k)
        gain = alpha * self._std**2 / (alpha**2 * self._std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    def responsibilities(
        self, x: torch.Tensor, alpha: Time = 1.0, sigma: Time = 0.0, elements: slice | None = None
    ) -> torch.Tensor:
        """Posterior probability of each component given the noisy x, or some of its elements, (B, K)."""
        each = slice(None) if elements is None else elements
        variance = alpha**2 * self._std**2 + sigma**2  # (D,) or (B, D)
        scale = _between(alpha) if isinstance(alpha, torch.Tensor) else alpha
        squares = (x.unsqueeze(1) - scale * self.means) ** 2 / _between(variance)  # (B, K, D)
        return torch.softmax(-0.5 * squares[..., each].sum(-1), dim=1)

    def conditional(self, wanted: str, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact distribution of a modality given the other: its weights (B, K) and means (K, D of `wanted`).

        Args:
            wanted: `image` or `text`; its components keep their standard deviation.
            given: clean samples, (B, D); the elements of the other modality are read.
        """
        (other,) = (where for name, where in self.modalities.items() if name != wanted)
        return self.responsibilities(given, elements=other), self.means[:, self.modalities[wanted]]

    def measure(self, indices: Sequence[int], seed: int) -> torch.Tensor:
        """Whole exact draws, (B, D)."""
        return self.data(indices, None, seed)

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        rng = Philox()
        dim = self.image + self.text
        unit = np.stack([rng.normal(seed, i, use_code("data"), 0, dim) for i in indices])
        uniform = np.array([rng.uniform(seed, i, use_code("component"), 0, 1)[0] for i in indices])
        component = np.floor(uniform * self.components).astype(int)
        return torch.from_numpy(self._means()[component] + self._stds() * unit).to(self.means)

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        """Exact reference: `modes` weights (K,); `identity`, `image-part`, `text-part` mean, cov, draws."""
        if key == "modes":
            return {"weights": np.full(self.components, 1.0 / self.components)}
        parts = {f"{name}-part": where for name, where in self.modalities.items()} | {"identity": slice(None)}
        if key not in parts:
            raise NotImplementedError(f"model 'gmm-joint' has no exact reference '{key}'")
        means, stds = self._means(), self._stds()
        centred = means - means.mean(0)
        cov = centred.T @ centred / self.components + np.diag(stds**2)
        where = parts[key]
        return {"mean": means.mean(0)[where], "cov": cov[where, where], "draws": self._draws()[:, where]}

    def _draws(self) -> np.ndarray:
        """Exact samples, (20000, D), components in turn."""
        rng = np.random.Generator(np.random.Philox(key=self.seed + 1))
        means = self._means()[np.arange(_DRAWS) % self.components]
        draws: np.ndarray = means + self._stds() * rng.standard_normal(means.shape)
        return draws

    def _means(self) -> np.ndarray:
        means: np.ndarray = self.means.cpu().double().numpy()
        return means

    def _stds(self) -> np.ndarray:
        stds: np.ndarray = self._std.cpu().double().numpy()
        return stds


def _between(values: torch.Tensor) -> torch.Tensor:
    """Room for the components: (D,) or (B, D) to (..., 1, D)."""
    return values.unsqueeze(-2)
