"""Linear inverse problems y = H x0 + noise n on a Gaussian mixture, with the exact posterior of x0 given y.

With x0 ~ sum_k w_k N(mu_k, s^2 I) and S = s^2 H H^T + noise^2 I, the posterior is a mixture again:

    weights  w_k N(y; H mu_k, S), normalised
    means    m_k = mu_k + G (y - H mu_k), G = s^2 H^T S^-1
    cov      P = s^2 (I - G H), the same for all components
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from evalbench.errors import UserError
from evalbench.interfaces import Operator
from evalbench.models.gmm import GaussianMixture
from evalbench.noise import Philox, use_code
from evalbench.registry import register

DEGRADATIONS = ("mask", "blur", "random")


class MatrixOperator(Operator):
    """y = H x0 + noise n with an explicit matrix; rows of a batch do not see each other.

    Attributes:
        matrix: H, (M, D). noise: standard deviation of each measurement, above 0.
    """

    def __init__(self, matrix: torch.Tensor, noise: float) -> None:
        self.matrix, self.noise = matrix, noise
        self._pinv = torch.linalg.pinv(matrix)  # (D, M)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _apply(self.matrix, x)

    def pinv(self, y: torch.Tensor) -> torch.Tensor:
        return _apply(self._pinv, y)


class Posterior(NamedTuple):
    """The exact posterior of x0 for each row of a batch: sum_k weights N(means, cov).

    Attributes:
        weights: (B, K). means: (B, K, D). cov: (D, D), of every component.
    """

    weights: torch.Tensor
    means: torch.Tensor
    cov: torch.Tensor

    def mean(self) -> torch.Tensor:
        """E[x0 | y], (B, D)."""
        return (self.weights.unsqueeze(-1) * self.means).sum(1)

    def covariance(self) -> torch.Tensor:
        """Cov[x0 | y], (B, D, D): within the components and between them."""
        offsets = self.means - self.mean().unsqueeze(1)  # (B, K, D)
        outer = offsets.unsqueeze(-1) * offsets.unsqueeze(-2)
        return self.cov + (self.weights[:, :, None, None] * outer).sum(1)

    def draws(self, n: int, seeds: Sequence[int]) -> torch.Tensor:
        """n exact draws for each row, (B, n, D); those of a row are a function of its posterior and its seed."""
        rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        uniform = torch.from_numpy(np.stack([rng.random(n) for rng in rngs])).to(self.means)  # (B, n)
        unit = np.stack([rng.standard_normal((n, len(self.cov))) for rng in rngs])
        component = (uniform.unsqueeze(-1) >= self.weights.cumsum(1).unsqueeze(1)).sum(-1)
        component = component.clamp(max=self.means.shape[1] - 1)  # the last sum is 1 but for rounding
        chosen = torch.take_along_dim(self.means, component.unsqueeze(-1), dim=1)  # (B, n, D)
        return chosen + _apply(torch.linalg.cholesky(self.cov), torch.from_numpy(unit).to(self.means))


@register("gmm-inverse")
@dataclass
class InverseMixture(GaussianMixture):
    """A Gaussian mixture seen through a linear operator with noise: inverse problems whose posterior is exact.

    Sample i belongs to measurement j = i mod measurements, so that several samples share one y. Its truth x0 is the
    data draw of index j, of class j mod classes; with cyclic labels that is the class of sample i as well, because
    `classes` divides `measurements`. y is a function of (j, seed) alone.

    Attributes:
        degradation: `mask` keeps the first `measured` coordinates; `blur` keeps evenly spaced rows of a circular
            Gaussian blur (standard deviation 1 coordinate); `random` has normal entries of variance 1 / dim.
        measured: M, length of y, 1..dim. noise: standard deviation of the measurement noise, above 0.
        measurements: number of different y.
    """

    degradation: Literal["mask", "blur", "random"] = "mask"
    measured: int = 4
    noise: float = 0.1
    measurements: int = 192
    _operator: MatrixOperator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()
        self._operator = MatrixOperator(self._matrix(), self.noise)
        self.provides = self.provides | {"operator"}

    def _check(self) -> None:
        where = "model 'gmm-inverse'"
        if self.degradation not in DEGRADATIONS:
            raise UserError(f"{where}: degradation must be one of {', '.join(DEGRADATIONS)}, got {self.degradation}")
        if not 1 <= self.measured <= self.dim:
            raise UserError(f"{where}: measured must lie in 1..{self.dim}, got {self.measured}")
        if not self.noise > 0:
            raise UserError(f"{where}: noise must be above 0, got {self.noise}")
        if self.measurements < 1 or self.measurements % max(self.classes, 1):
            raise UserError(f"{where}: measurements must be a multiple of classes, got {self.measurements}")

    def _matrix(self) -> torch.Tensor:
        """H, (M, D)."""
        if self.degradation == "mask":
            return torch.eye(self.measured, self.dim, dtype=torch.float64)
        if self.degradation == "random":
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 1]))  # apart from the means' draw
            return torch.from_numpy(rng.standard_normal((self.measured, self.dim)) / math.sqrt(self.dim))
        rows, columns = np.arange(self.measured) * self.dim // self.measured, np.arange(self.dim)
        gap = np.abs(rows[:, None] - columns)
        kernel = np.exp(-0.5 * np.minimum(gap, self.dim - gap) ** 2)
        return torch.from_numpy(kernel / kernel.sum(1, keepdims=True))

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        super().to(dtype, device)
        self._operator = MatrixOperator(self._matrix().to(device, dtype), self.noise)

    @property
    def operator(self) -> MatrixOperator:
        return self._operator

    def truth(self, indices: Sequence[int], seed: int) -> torch.Tensor:
        """The clean samples behind the measurements of samples `indices`, (B, D)."""
        problems = [i % self.measurements for i in indices]
        labels = torch.tensor([j % self.classes for j in problems]) if self.classes else None
        return self.data(problems, labels, seed)

    def measure(self, indices: Sequence[int], seed: int) -> torch.Tensor:
        """y of samples `indices`, (B, M)."""
        rng, use = Philox(), use_code("measurement")
        unit = np.stack([rng.normal(seed, i % self.measurements, use, 0, self.measured) for i in indices])
        x0 = self.truth(indices, seed)
        return self._operator(x0) + self.noise * torch.from_numpy(unit).to(x0)

    def posterior(self, y: torch.Tensor, labels: torch.Tensor | None = None) -> Posterior:
        """The exact posterior of x0 given y, (B, M), and the label; -1 and None mean any class. float64."""
        H, mu, y = (tensor.double() for tensor in (self._operator.matrix, self.means, y))
        S = self.std**2 * H @ H.T + self.noise**2 * torch.eye(self.measured, dtype=H.dtype, device=H.device)
        gain = torch.linalg.solve(S, self.std**2 * H).T  # (D, M)
        offsets = y.unsqueeze(1) - mu @ H.T  # (B, K, M)
        whitened = _apply(torch.linalg.inv(torch.linalg.cholesky(S)), offsets)
        logits = -0.5 * (whitened**2).sum(-1)
        if labels is not None and self.classes:
            component_class = torch.arange(self.components, device=y.device) % self.classes
            excluded = (labels[:, None] >= 0) & (component_class != labels[:, None])
            logits = logits.masked_fill(excluded, -math.inf)
        cov = self.std**2 * (torch.eye(self.dim, dtype=H.dtype, device=H.device) - gain @ H)
        return Posterior(torch.softmax(logits, 1), mu + _apply(gain, offsets), 0.5 * (cov + cov.T))


def _apply(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """matrix (M, D) times each row of x, (..., D): sums, whose bits do not depend on the place in the batch."""
    return (x.unsqueeze(-2) * matrix).sum(-1)
