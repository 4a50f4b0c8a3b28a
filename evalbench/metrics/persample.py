"""Metrics that are a mean or a quantile of one number per sample: accuracy, alignment, paired errors."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from evalbench.errors import EvalbenchError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import Array, Rows, clusters_of, require_samples, rows_of, scores_of
from evalbench.registry import register
from evalbench.stats import (
    Z95,
    Interval,
    StandardError,
    normal_interval,
    quantile_interval,
    t_interval,
    wilson_interval,
)


@dataclass(frozen=True)
class Sums:
    """n, sum and sum of squares of a score, float64.

    Attributes:
        prompts: of each prompt its number, how many samples it has and the sum of their scores, (P, 3); (0, 3) where
            samples share none.
    """

    n: int
    total: float
    squares: float
    prompts: Array = field(default_factory=lambda: np.zeros((0, 3)))

    @classmethod
    def of(cls, scores: Array, parts: Parts) -> Sums:
        """Those of a chunk's scores (B,)."""
        rows = [np.stack([of, np.ones(len(of)), scores], axis=1) for of in clusters_of(parts)]
        return cls(len(scores), float(scores.sum()), float(scores @ scores), _by_prompt(*rows))

    def __add__(self, other: Sums) -> Sums:
        prompts = _by_prompt(self.prompts, other.prompts)
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares, prompts)

    def error(self) -> StandardError:
        """Of the mean; the samples of one prompt count as one, by what they differ from it together."""
        mean, count = self.total / self.n, len(self.prompts)
        if count < 2:
            variance = max(0.0, (self.squares - self.n * mean * mean) / (self.n - 1))
            return StandardError(float(np.sqrt(variance / self.n)), math.inf)
        gaps = self.prompts[:, 2] - self.prompts[:, 1] * mean
        return StandardError(float(np.sqrt(count / (count - 1) * (gaps @ gaps))) / self.n, count - 1)


def _by_prompt(*blocks: Array) -> Array:
    """Rows (prompt, samples, sum of scores), one for each prompt."""
    rows = np.concatenate([np.zeros((0, 3)), *blocks])
    names, inverse = np.unique(rows[:, 0], return_inverse=True)
    found = np.zeros((len(names), 3))
    found[:, 0] = names
    np.add.at(found[:, 1:], inverse, rows[:, 1:])
    return found


class PerSampleScore:
    """Mark of metrics that are a mean of one number per sample, which can be compared pair by pair."""

    @abstractmethod
    def per_sample(self, parts: Parts) -> Array:
        """The number of each sample, float64 (B,)."""


class MeanScore(PerSampleScore, Metric[Sums]):
    """Mean of a per-sample score with its standard error sd / sqrt(n)."""

    higher_is_better = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    def update(self, parts: Parts) -> Sums:
        return Sums.of(self.per_sample(parts), parts)

    def per_sample(self, parts: Parts) -> Array:
        return scores_of(self.id, parts, self.arg)

    def merge(self, a: Sums, b: Sums) -> Sums:
        return a + b

    def compute(self, state: Sums, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n = state.n
        require_samples(self.id, n, 2, "a mean with its error", allow_small_n=False)
        mean, error = state.total / n, state.error()
        shared = math.isfinite(error.df)
        interval = t_interval(mean, error.se, error.df) if shared else self.interval(mean, error.se, n)
        return Value(mean, n, error.se, interval.low, interval.high)

    def interval(self, mean: float, se: float, n: int) -> Interval:
        """95 % interval of the mean."""
        return normal_interval(mean, se)


@register("mode-distance")
class ModeDistance(MeanScore):
    """Mean squared distance to the nearest mode over that of exact draws: 1 is perfect, more is off the modes.

    Sees what a Frechet distance cannot: samples between the modes whose first two moments are right.
    """

    higher_is_better = False
    unit = "of exact draws"


@register("accuracy")
class Accuracy(MeanScore):
    """Share of samples whose class, as a classifier sees it, is the label they were made for (Wilson interval)."""

    unit = "fraction"

    def update(self, parts: Parts) -> Sums:
        state = super().update(parts)
        if state.squares != state.total:
            raise EvalbenchError(f"metric '{self.id}': '{self.arg}' must give 0 or 1 per sample")
        return state

    def interval(self, mean: float, se: float, n: int) -> Interval:
        return wilson_interval(mean * n, n)


@register("align")
class Alignment(MeanScore):
    """Mean raw cosine between image and caption (scale 1; not a CLIP score unless a published CLIP made it)."""

    unit = "cosine"


class PairedError(Metric[Rows]):
    """A summary of the errors |a - b| / sqrt(D) between samples and the fine reference from the same noise."""

    paired = True
    unit = "RMS per coordinate"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    def update(self, parts: Parts) -> Rows:
        a = rows_of(self.id, parts, self.arg).astype(np.float64)
        b = rows_of(self.id, parts, f"paired:{self.arg}").astype(np.float64)
        if a.shape != b.shape:
            raise EvalbenchError(f"metric '{self.id}': samples {a.shape} and their pairs {b.shape} differ in shape")
        return Rows((np.sqrt(np.mean((a - b) ** 2, axis=1)),))

    def merge(self, a: Rows, b: Rows) -> Rows:
        return a + b

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 2, "a summary with its error", allow_small_n=False)
        return self.summarise(state.joined())

    @abstractmethod
    def summarise(self, errors: np.ndarray) -> Value:
        """The value of the errors, float64 (n,)."""


class PairedQuantile(PairedError):
    """A quantile of the paired errors with its order-statistic interval; se is the half-width / 1.96."""

    q: ClassVar[float]

    def summarise(self, errors: np.ndarray) -> Value:
        value, interval = float(np.quantile(errors, self.q)), quantile_interval(errors, self.q)
        if interval is None:
            return Value(value, len(errors), note="too few samples for an interval")
        se = (interval.high - interval.low) / (2 * Z95)
        return Value(value, len(errors), se, interval.low, interval.high)


@register("paired-median")
class PairedMedian(PairedQuantile):
    """Median error against the fine reference from the same noise."""

    q = 0.5


@register("paired-p90")
class PairedP90(PairedQuantile):
    """90th percentile of the error against the fine reference from the same noise."""

    q = 0.9


@register("paired-rms")
class PairedRms(PairedError):
    """Root mean square error against the fine reference from the same noise (a few bad samples rule it)."""

    def summarise(self, errors: np.ndarray) -> Value:
        n, squares = len(errors), errors**2
        value = float(np.sqrt(squares.mean()))
        se = float(np.std(squares, ddof=1) / np.sqrt(n)) / (2 * value) if value > 0 else 0.0  # delta method
        interval = normal_interval(value, se)
        return Value(value, n, se, interval.low, interval.high)
