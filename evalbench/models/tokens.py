"""Sequences of tokens with exact conditionals: a stationary Markov chain behind a mask.

The probability of a clean token given any set of others depends on the nearest known token on either side alone:
P(x_l = v | a at distance i to the left, b at distance j to the right) is proportional to P^i[a, v] P^j[v, b]. So the
ideal network of absorbing diffusion, which needs no time (Ou et al., RADD), is a table look-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evalbench.errors import UserError
from evalbench.interfaces import Model, Time
from evalbench.noise import NoiseSource, Philox, use_code
from evalbench.paths import Path
from evalbench.registry import register


@register("tokens")
@dataclass
class MarkovTokens(Model):
    """Stationary Markov chain over V symbols with the exact probabilities of masked tokens, independent of time.

    States are int64 (L,), symbols 0..V-1, and V is [MASK]. The transition probabilities are a softmax of normal
    logits, drawn once from `seed`.

    Attributes:
        length: L. vocabulary: V. contrast: standard deviation of the logits; 0 makes tokens independent.
        seed: draws the logits.
        transition: P[a, b] = P(next = b | a), (V, V). stationary: its invariant distribution, (V,). Both float64.
    """

    native = "probs"
    provides = frozenset({"tokens"})

    length: int = 64
    vocabulary: int = 8
    contrast: float = 2.0
    seed: int = 0
    transition: np.ndarray = field(init=False, repr=False)
    stationary: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length < 2 or self.vocabulary < 2:
            raise UserError(
                f"model 'tokens' needs length >= 2 and vocabulary >= 2, got {self.length}, {self.vocabulary}"
            )
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        logits = self.contrast * rng.standard_normal((self.vocabulary, self.vocabulary))
        self.transition = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        self.stationary = _stationary(self.transition)
        self.shape = (self.length,)
        self._from_left, self._from_right = (torch.from_numpy(table) for table in self._tables())

    @property
    def mask(self) -> int:
        """The symbol of [MASK]."""
        return self.vocabulary

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self._from_left, self._from_right = (t.to(device, dtype) for t in (self._from_left, self._from_right))

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """P^i[a, v] by distance, neighbour and token, (L + 1, V + 1, V), and P^j[v, b]; row V is for no neighbour."""
        powers = np.stack([np.linalg.matrix_power(self.transition, i) for i in range(self.length + 1)])
        nobody = np.broadcast_to(self.stationary, (self.length + 1, 1, self.vocabulary))
        from_left = np.concatenate([powers, nobody], axis=1)
        from_right = np.concatenate([powers.transpose(0, 2, 1), np.ones_like(nobody)], axis=1)
        return from_left, from_right

    def start(self, noise: NoiseSource, path: Path) -> torch.Tensor:
        """All [MASK]."""
        return torch.full((len(noise.samples), self.length), self.mask, dtype=torch.int64, device=noise.device)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """P(x0_l = v | the known tokens of x), (B, L, V); certain where the token is known."""
        known = x != self.mask
        place = torch.arange(self.length, device=x.device)
        left = torch.where(known, place, -1).cummax(1).values  # (B, L), -1 where nothing is known
        right = torch.where(known, place, self.length).flip(1).cummin(1).values.flip(1)
        edge = x.new_full((len(x), 1), self.mask)
        padded = torch.cat([edge, x, edge], dim=1)
        weights = self._from_left[place - left, padded.gather(1, left + 1)]
        weights = weights * self._from_right[right - place, padded.gather(1, right + 1)]  # (B, L, V)
        return weights / weights.sum(-1, keepdim=True)

    def log_likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """log P(x) of whole sequences without [MASK], in nats, float64 (B,)."""
        log_first, log_next = (torch.from_numpy(np.log(p)).to(x.device) for p in (self.stationary, self.transition))
        return log_first[x[:, 0]] + log_next[x[:, :-1], x[:, 1:]].sum(1)

    @property
    def entropy(self) -> float:
        """Entropy of the sequences per token, in nats: the mean of -log P(x) / L of exact samples."""
        first = -self.stationary @ np.log(self.stationary)
        rate = -self.stationary @ (self.transition * np.log(self.transition)).sum(1)
        return float(first + (self.length - 1) * rate) / self.length

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        rng = Philox()
        uniform = np.stack([rng.uniform(seed, i, use_code("data"), 0, self.length) for i in indices])
        x = np.empty(uniform.shape, dtype=np.int64)
        x[:, 0] = np.searchsorted(np.cumsum(self.stationary)[:-1], uniform[:, 0], side="right")
        steps = np.cumsum(self.transition, axis=1)[:, :-1]
        for i in range(1, self.length):
            x[:, i] = (uniform[:, i : i + 1] >= steps[x[:, i - 1]]).sum(1)
        return torch.from_numpy(x).to(self._from_left.device)

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        """Exact reference: `tokens` pairs (V, V), P(x_l = a, x_l+1 = b); `token-nll` entropy (1,), nats per token."""
        if key == "tokens":
            return {"pairs": self.stationary[:, None] * self.transition}
        if key == "token-nll":
            return {"entropy": np.array([self.entropy])}
        raise NotImplementedError(f"model 'tokens' has no exact reference '{key}'")


def _stationary(transition: np.ndarray) -> np.ndarray:
    """pi with pi P = pi and sum 1."""
    size = len(transition)
    equations = np.vstack([transition.T - np.eye(size), np.ones((1, size))])
    found: np.ndarray = np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return found
