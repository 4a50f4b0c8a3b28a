"""Sequences of tokens against an exact distribution: frequencies of neighbours, and likelihood against entropy.

Neither says all: frequencies of pairs see no longer dependence, and the likelihood alone favours samples that are too
probable (Holtzman et al. 2020 on text of greedy decoding); hence its distance to the entropy, from either side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Extractor, Parts, SampleBatch, Value
from evalbench.metrics.common import Rows, RowsMetric, check_reference, need_reference, require_samples
from evalbench.metrics.persample import MeanScore, Sums
from evalbench.registry import register
from evalbench.stats import normal_interval

if TYPE_CHECKING:
    import torch


class _Language(Protocol):
    mask: int

    def log_likelihood(self, x: torch.Tensor) -> torch.Tensor: ...


def _language(extractor: str, batch: SampleBatch) -> _Language:
    if "tokens" not in batch.model.provides:
        raise UserError(
            f"features '{extractor}' need a model of tokens, and '{batch.model.name}' is none; "
            "leave metrics of tokens out of --metrics"
        )
    model = cast(_Language, batch.model)
    bad = int(((batch.x < 0) | (batch.x >= model.mask)).any(1).sum())
    if bad:
        raise BadSamples(f"{bad} of {len(batch.x)} samples hold [MASK] or no token at all")
    return model


@register("tokens")
class Tokens(Extractor):
    """The sequences, int16 (B, L)."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        _language("tokens", batch)
        return batch.x.short()


@register("token-nll")
class TokenNLL(Extractor):
    """-log P(x) / L under the exact model of the suite, nats per token, float64 (B,)."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return -_language("token-nll", batch).log_likelihood(batch.x) / batch.x.shape[1]


@register("pair-tv")
class PairTV(RowsMetric):
    """Total-variation distance between the frequencies of neighbouring tokens and the exact ones."""

    unit = "probability"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n = state.n
        require_samples(self.id, n, 2, "frequencies with an error", allow_small_n=False)
        exact = need_reference(self.id, self.reference_key, reference)["pairs"].astype(np.float64)
        tokens = state.joined().astype(np.int64)
        if tokens.min() < 0 or tokens.shape[1] < 2:
            raise EvalbenchError(f"metric '{self.id}': '{self.arg}' must give two or more symbols 0, 1, ... per sample")
        check_reference(self.id, self.reference_key, exact, max(len(exact), int(tokens.max()) + 1))
        shares = pair_shares(tokens, len(exact))
        gap = shares.mean(0) - exact.ravel()
        value = float(np.abs(gap).sum() / 2)
        # delta method, as for mode-coverage, but the pairs of a sample come together
        influence = shares @ np.sign(gap) / 2
        se = float(np.std(influence, ddof=1) / np.sqrt(n))
        interval = normal_interval(value, se)
        return Value(value, n, se, max(0.0, interval.low), min(1.0, interval.high))


def pair_shares(tokens: np.ndarray, symbols: int) -> np.ndarray:
    """Share of each pair of neighbours (a, b) in a sample, (N, V^2)."""
    n, length = tokens.shape
    codes = tokens[:, :-1] * symbols + tokens[:, 1:] + symbols**2 * np.arange(n)[:, None]
    counts = np.bincount(codes.ravel(), minlength=n * symbols**2).reshape(n, symbols**2)
    shares: np.ndarray = counts / (length - 1)
    return shares


@register("nll-gap")
class NllGap(MeanScore):
    """|mean negative log-likelihood - entropy| under the exact model: 0 for exact samples."""

    higher_is_better = False
    unit = "nats per token"

    @property
    def reference_key(self) -> str:
        return self.arg

    def compute(self, state: Sums, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        entropy = float(need_reference(self.id, self.reference_key, reference)["entropy"].item())
        mean = super().compute(state, None)
        assert mean.se is not None
        assert mean.high is not None
        interval = normal_interval(abs(mean.value - entropy), mean.se)
        note = "samples are too probable" if mean.high < entropy else ""
        return Value(abs(mean.value - entropy), mean.n, mean.se, max(0.0, interval.low), interval.high, note=note)
