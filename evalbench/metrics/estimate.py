"""What a paired statistic returns: a difference with its standard error, from the effect of each sample on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Plan(NamedTuple):
    """How the samples of a cell were drawn, the same in both cells.

    Attributes:
        clusters: int (N,), the prompt of each sample where prompts are a draw of many; samples of one count as one.
        strata: int (N,), the class of each sample where a fixed number of each was made; what varies between classes is
            no error then. Without effect beside clusters, or where a class has one sample.
    """

    clusters: np.ndarray | None = None
    strata: np.ndarray | None = None


INDEPENDENT = Plan()


class TooFewSamples(Exception):
    """The statistic has no verdict at this N; the message says why."""


class Compute(Protocol):
    """(base, new, reference, plan) -> Difference."""

    def __call__(self, base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference: ...


def from_influence(value: float, psi: Array, plan: Plan = INDEPENDENT) -> Difference:
    """A difference whose first-order effect of each sample is psi, (N,)."""
    return with_error(value, standard_error(psi, *plan), len(psi))


def with_error(value: float, error: StandardError, n: int) -> Difference:
    """A difference over n samples with its standard error."""
    return Difference(value, error.se, n, df=error.df, slope=error.slope)
