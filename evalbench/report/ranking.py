"""Ranks with what the pairwise tests allow, the same methods ranked at equal NFE, FLOPs and latency, and what flips.

A rank interval is no interval of a number: the lowest rank is one more than the methods that are surely better, the
highest leaves behind those that are surely worse, "surely" by two-sided tests of all pairs at 5 % after Holm. Two
methods whose test says nothing share ranks: it cannot tell. Only measured points are ranked, nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import fmean, median
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from evalbench.report.view import Block, Row
from evalbench.spec import Record
from evalbench.stats import Z95, holm, p_beyond

Axis: TypeAlias = Literal["nfe", "flops", "latency"]
Basis: TypeAlias = Literal["paired", "intervals"]
AXES: Mapping[Axis, str] = {"nfe": "equal NFE", "flops": "equal FLOPs", "latency": "equal latency"}
SLACK = 0.10  # a method is within an allowance that it exceeds by up to this share
MOST_PAIRS = 1000  # paired tests of a report; what comes later is ranked by the intervals of the values


class Difference(NamedTuple):
    """first - second of a metric from samples of the same noise, its standard error degrees of freedom and slope."""

    value: float
    se: float
    df: float = math.inf
    slope: float = 0.0


Differences: TypeAlias = Callable[[Record, Record, str], Difference | None]


class Ranks(NamedTuple):
    """The ranks that the tests allow, 1 is best."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


class Place(NamedTuple):
    """A method in a ranking: the row that stands for it, what that spent, its ranks."""

    row: Row
    spent: float
    ranks: Ranks


class Flip(NamedTuple):
    """Two methods that two rankings order differently; sure when the tests of both are."""

    better: str  # in the first ranking
    worse: str
    sure: bool


@dataclass(frozen=True, eq=False)
class Ranking:
    """Methods at one allowance, best value first.

    Attributes:
        axis: what is equal. budget: the NFE budget whose allowance this is. allowance: the most that may be spent.
        places: best value first. beats: (K, K), [i, j] where the tests are sure that place i is better than place j.
        basis: of the tests; `intervals` as soon as one pair had no paired test.
    """

    axis: Axis
    budget: int
    allowance: float
    places: tuple[Place, ...]
    beats: np.ndarray
    basis: Basis

    @cached_property
    def order(self) -> dict[str, int]:
        """Index of each method in `places`: 0 has the best value."""
        return {place.row.method: i for i, place in enumerate(self.places)}

    def place(self, method: str) -> Place | None:
        """Where a method stands; None for one without a point."""
        return self.places[self.order[method]] if method in self.order else None

    def like_best(self, method: str) -> bool:
        """Whether the tests cannot tell the method from the one with the best value."""
        return method in self.order and not self.beats[0, self.order[method]]


def rank_intervals(beats: np.ndarray) -> list[Ranks]:
    """Lowest and highest rank of each of K.

    Args:
        beats: (K, K), [i, j] where i is surely better than j.
    """
    above, below = beats.sum(axis=0), beats.sum(axis=1)
    return [Ranks(1 + int(a), len(beats) - int(b)) for a, b in zip(above, below, strict=True)]


def flips(first: Ranking, second: Ranking) -> list[Flip]:
    """Pairs ordered one way by the values in `first` and the other way in `second`, sure ones first."""
    shared = [method for method in first.order if method in second.order]
    i = np.array([first.order[method] for method in shared], dtype=int)
    j = np.array([second.order[method] for method in shared], dtype=int)
    turned = np.triu(j[:, None] > j[None, :], 1)
    sure = first.beats[np.ix_(i, i)] & second.beats[np.ix_(j, j)].T
    found = [Flip(shared[a], shared[b], bool(sure[a, b])) for a, b in np.argwhere(turned)]
    return sorted(found, key=lambda flip: not flip.sure)


def pareto_front(x: Sequence[float], y: Sequence[float], *, higher_is_better: bool = False) -> list[int]:
    """Indices of the points that no other one beats on both axes (x: less is better), by x."""
    kept: list[int] = []
    best = math.inf
    sign = -1.0 if higher_is_better else 1.0
    for i in sorted(range(len(x)), key=lambda i: (x[i], sign * y[i])):
        if sign * y[i] < best:
            best = sign * y[i]
            kept.append(i)
    return kept


class Ranker:
    """Ranks the rows of blocks by one metric, remembering the paired tests.

    Args:
        metric: id. differences: paired difference of two records, None where there is none to have; without it, all
            tests use the intervals of the values. milliseconds: of an image, by cell id.
    """

    def __init__(
        self, metric: str, differences: Differences | None = None, milliseconds: Mapping[str, float] | None = None
    ) -> None:
        self.metric = metric
        self._differences = differences
        self._milliseconds = milliseconds or {}
        self._paired: dict[tuple[str, str], Difference | None] = {}

    def spent(self, row: Row, axis: Axis) -> float | None:
        """What a row spends of an axis: NFE budget, cost (FLOPs in forwards) or milliseconds per image."""
        if axis == "nfe":
            return float(row.nfe)
        if axis == "flops":
            found = row.mean_count("cost")
            return found if found is not None else row.mean_count("flops")
        if not self._milliseconds:
            return None
        times = [self._milliseconds[r.cell.id] for r in row.records if r.cell.id in self._milliseconds]
        return sum(times) / len(times) if times else None

    def rankings(self, block: Block, budget: int) -> dict[Axis, Ranking]:
        """The rankings that can be had at a budget, by axis."""
        found = {axis: self.ranking(block, budget, axis) for axis in AXES}
        return {axis: ranking for axis, ranking in found.items() if ranking is not None}

    def ranking(self, block: Block, budget: int, axis: Axis = "nfe") -> Ranking | None:
        """The methods at what the median method spends at a budget; None where fewer than two have a point.

        Equal NFE is the budget itself. On the other axes every method stands with the dearest of its rows that spends
        no more than the allowance, give or take `SLACK`.
        """
        rows = [row for row in block.rows if self.metric in row.numbers]
        spending = [(row, spent) for row in rows if (spent := self.spent(row, axis)) is not None]
        at_budget = [spent for row, spent in spending if row.nfe == budget]
        if len(at_budget) < 2:
            return None
        allowance = median(at_budget)
        chosen = _chosen([pair for pair in spending if axis != "nfe" or pair[0].nfe == budget], allowance)
        if len(chosen) < 2:
            return None
        sign = -1.0 if block.higher_is_better(self.metric) else 1.0
        ordered = sorted(chosen, key=lambda pair: (sign * pair[0].numbers[self.metric].value, pair[0].method))
        beats, basis = self._beats([row for row, _ in ordered], sign)
        ranks = rank_intervals(beats)
        places = tuple(Place(row, spent, found) for (row, spent), found in zip(ordered, ranks, strict=True))
        return Ranking(axis, budget, allowance, places, beats, basis)

    def _beats(self, rows: Sequence[Row], sign: float) -> tuple[np.ndarray, Basis]:
        """[i, j]: i is surely better than j, by Holm over all pairs."""
        loss, se, margin = self._apart(rows, sign)
        df, slope = np.full_like(se, math.inf), np.zeros_like(se)
        i, j = np.triu_indices(len(rows), 1)
        paired = [self._pair(a, b) for a, b in combinations(rows, 2)] if self._affords(len(i)) else []
        for a, b, found in zip(i, j, paired, strict=False):
            if found is not None:
                loss[a, b], se[a, b], margin[a, b], df[a, b] = sign * found.value, found.se, 0.0, found.df
                slope[a, b] = sign * found.slope
        p_values = p_beyond(loss[i, j], margin[i, j], se[i, j], df[i, j], slope[i, j])
        rejected = np.array(holm(p_values), dtype=bool)
        beats = np.zeros_like(loss, dtype=bool)
        beats[i, j] = rejected & (loss[i, j] < 0)
        beats[j, i] = rejected & (loss[i, j] > 0)
        return beats, "paired" if paired and None not in paired else "intervals"

    def _apart(self, rows: Sequence[Row], sign: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss of i against j, its standard error and margin, from the values' own intervals; each (K, K).

        As if their samples had nothing in common. A bias cancels only in part: a loss up to the larger estimate of it
        says nothing. Without an interval the error is infinite.
        """
        numbers = [row.numbers[self.metric] for row in rows]
        value = sign * np.array([number.value for number in numbers])
        se = np.array([math.inf if number.half is None else number.half / Z95 for number in numbers])
        bias = np.array([abs(number.bias or 0.0) for number in numbers])
        return value[:, None] - value, np.hypot(se[:, None], se), np.maximum(bias[:, None], bias)

    def _affords(self, pairs: int) -> bool:
        return self._differences is not None and len(self._paired) + pairs <= MOST_PAIRS

    def _pair(self, a: Row, b: Row) -> Difference | None:
        """The paired difference a - b, remembered either way round."""
        key = (_key(a), _key(b))
        if key not in self._paired and key[::-1] in self._paired:
            found = self._paired[key[::-1]]
            return found and found._replace(value=-found.value, slope=-found.slope)
        if key not in self._paired:
            self._paired[key] = self._mean_difference(a, b)
        return self._paired[key]

    def _mean_difference(self, a: Row, b: Row) -> Difference | None:
        """Over seeds, whose samples are independent; None unless both rows have the same seeds."""
        assert self._differences is not None
        mine, other = ({r.cell.seed: r for r in row.records if r.status == "ok"} for row in (a, b))
        if mine.keys() != other.keys():
            return None
        found = [self._differences(mine[seed], other[seed], self.metric) for seed in sorted(mine)]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found):
            return None
        se = math.sqrt(sum(one.se**2 for one in known)) / len(known)
        # the squared error of a mean of K falls by K^2, its value by K
        slope = fmean(one.slope for one in known) / len(known)
        return Difference(fmean(one.value for one in known), se, min(one.df for one in known), slope)


def _chosen(spending: Sequence[tuple[Row, float]], allowance: float) -> list[tuple[Row, float]]:
    """The dearest row of each method within the allowance."""
    found: dict[str, tuple[Row, float]] = {}
    for row, spent in spending:
        if spent <= allowance * (1 + SLACK) and (row.method not in found or spent > found[row.method][1]):
            found[row.method] = (row, spent)
    return list(found.values())


def _key(row: Row) -> str:
    return row.records[0].cell.id
