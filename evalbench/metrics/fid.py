"""FID, sFID and the Inception Score: the metrics that may be called so, on the original Inception network only.

`fid@clean`, `fid@pytorch`, `fid@tf1` and `fid@adm` differ from each other in resizing, and so in value: on FFHQ by 0.2
(clean-fid's README). The recipe is the id.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import Array, Rows, require_samples, rows_of, split_labels
from evalbench.metrics.frechet import FrechetDistance, FrechetState
from evalbench.metrics.inception import recipe_of
from evalbench.registry import register
from evalbench.stats import t_interval

_SPLITS = 10  # of the Inception Score: Salimans et al. 2016


@register("fid")
class FID(FrechetDistance):
    """Frechet distance of the original Inception network's pooled features (Heusel et al. 2017), by a named recipe."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (recipe_of(self.name, self.arg),)

    @property
    def reference_key(self) -> str:
        return self.needs[0]

    def update(self, parts: Parts) -> FrechetState:
        return super().update({self.arg: parts[self.needs[0]]})


@register("sfid")
class SpatialFID(FID):
    """Frechet distance of the first 7 channels of `mixed_6/conv` at all 17 x 17 places (Nash et al. 2021)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"{recipe_of(self.name, self.arg)}:spatial",)


@register("is")
class InceptionScore(Metric[Rows]):
    """Inception Score (Salimans et al. 2016): exp of the mean KL of p(y|x) from p(y), mean over 10 splits.

    Logits without bias, as everybody computes it. The splits are fixed random tenths of the sample indices. It needs no
    reference and sees none: a sampler that copies one training image per class scores well.
    """

    unit = "effective classes"
    higher_is_better = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"{recipe_of(self.name, self.arg)}:logits",)

    def update(self, parts: Parts) -> Rows:
        return Rows((rows_of(self.id, parts, self.needs[0]),))

    def merge(self, a: Rows, b: Rows) -> Rows:
        return a + b

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 2 * _SPLITS, f"{_SPLITS} splits", allow_small_n=False)
        labels = split_labels(state.n, _SPLITS)
        logits = state.joined()
        scores = np.array([inception_score(logits[labels == k]) for k in range(_SPLITS)])
        value, se = float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(_SPLITS))
        interval = t_interval(value, se, _SPLITS - 1)
        return Value(value, state.n, se, interval.low, interval.high)


def inception_score(logits: Array) -> float:
    """exp(mean_i KL(p_i | mean_j p_j)) of logits (n, classes), float64, in one split."""
    log_p: Any = logits - logits.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
