"""What a paired statistic returns: a difference with its standard error, from the effect of each sample on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evalbench.interfaces import Parts
from evalbench.metrics.common import Array
from evalbench.stats import Interval, StandardError, standard_error, t_interval


@dataclass(frozen=True)
class Difference:
    """new - base in the metric's unit, its standard error, and what must stand beside it.

    Attributes:
        n: samples, of each cell. note: such as `N < 8 d`.
        df: degrees of freedom of the standard error, for Student's t; with few samples or heavy tails the normal
            distribution would reject too often.
        slope: of the squared standard error by the value, see `StandardError`.
    """

    value: float
    se: float
    n: int
    note: str = ""
    df: float = math.inf
    slope: float = 0.0

    @property
    def interval(self) -> Interval:
        """95 % interval."""
        return t_interval(self.value, self.se, self.df, self.slope)


class TooFewSamples(Exception):
    """The statistic has no verdict at this N; the message says why."""


class Compute(Protocol):
    """(base, new, reference, clusters) -> Difference; clusters: int (N,), the prompt of each sample, None without."""

    def __call__(
        self, base: Array, new: Array, reference: Parts, clusters: np.ndarray | None = None, /
    ) -> Difference: ...


def from_influence(value: float, psi: Array, clusters: np.ndarray | None) -> Difference:
    """A difference whose first-order effect of each sample is psi, (N,)."""
    return with_error(value, standard_error(psi, clusters), len(psi))


def with_error(value: float, error: StandardError, n: int) -> Difference:
    """A difference over n samples with its standard error."""
    return Difference(value, error.se, n, df=error.df, slope=error.slope)
