"""From relative differences by seed to a word of design section 12: intervals, power, the seeds that would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from evalbench.interfaces import Claim
from evalbench.stats import Interval, t_interval

Word: TypeAlias = Literal[
    "holds",  # level M
    "fails",
    "observed here",  # level E
    "not observed here",
    "undecided here",
    "nothing to say",  # no verdict: nothing was measured, or an interval over a mechanism that has no third word
    "not supported",
    "error",
]
POWER = 0.8
MOST_SEEDS = 10_000  # more is not advised
_QUANTILES = 500  # of the spread, in the integral of the power


@dataclass(frozen=True)
class Spread:
    """How far an effect is known.

    Prepare seeds k and run seeds s are crossed, and both are random: with the means over the other,
    se^2 = var_k / K + var_s / S, and Satterthwaite's degrees of freedom. What k and s do together is counted twice, so
    the interval is wide rather than narrow. With three prepare seeds it has hardly more than two degrees of freedom
    where they dominate: that is what three draws of a search can say.

    Attributes:
        parts: (variance, number of draws) of each source; run seeds last.
    """

    parts: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, grid: np.ndarray) -> Spread:
        """Of differences (K, S); K = 1 without prepare seeds."""
        sources = [grid.mean(axis=1)] if len(grid) > 1 else []
        return cls(tuple((float(np.var(x, ddof=1)), len(x)) for x in (*sources, grid.mean(axis=0))))

    @property
    def se(self) -> float:
        """Standard error."""
        return math.sqrt(sum(variance / n for variance, n in self.parts))

    @property
    def df(self) -> float:
        """Degrees of freedom."""
        squares = sum((variance / n) ** 2 / (n - 1) for variance, n in self.parts)
        return self.se**4 / squares if squares > 0 else sum(n - 1 for _, n in self.parts)

    def interval(self, effect: float) -> Interval:
        """95 % interval."""
        return t_interval(effect, self.se, self.df)

    def with_seeds(self, n: int) -> Spread:
        """The spread that n run seeds would have."""
        return Spread((*self.parts[:-1], (self.parts[-1][0], n)))

    def power(self, size: float, direction: str) -> float:
        """Probability that the interval says "observed" when the claim is true.

        `lower` and `higher`: the true effect has the claimed size, and the interval lies on its side of 0 (a noncentral
        t). `equal`: there is no effect, and the interval lies inside +-size.
        """
        if self.se == 0:
            return 1.0
        from scipy.stats import chi2, norm

        u = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        half = (self.interval(0.0).high / self.se) * np.sqrt(chi2.ppf(u, self.df) / self.df)  # in units of se
        reached = norm.cdf(size / self.se - half)
        return float(np.mean(reached if direction != "equal" else np.maximum(0.0, 2 * reached - 1)))


def verdict(claim: Claim, effect: float, spread: Spread) -> tuple[Word, str]:
    """The word on an effect, and what must stand beside it.

    Observed: the interval lies on the claimed side of 0, or inside +-effect for `equal`. Not observed: it excludes the
    claimed size (`equal`: lies outside +-effect), and a true claim would have been observed with 80 % power, and the
    implementation has a second witness. A mechanism holds or fails by the interval alone.
    """
    size, found = claim.effect, spread.interval(effect)
    half = (found.high - found.low) / 2
    if claim.direction == "equal":
        seen, excluded, margin = abs(effect) + half <= size, abs(effect) - half > size, abs(size - abs(effect))
    else:
        toward = -effect if claim.direction == "lower" else effect
        seen, excluded, margin = toward - half > 0, toward + half < size, max(toward, size - toward)
    if seen:
        smaller = claim.direction != "equal" and excluded
        word: Word = "holds" if claim.level == "M" else "observed here"
        return word, f"the interval excludes the claimed size of {100 * size:g} %" if smaller else ""
    if claim.level == "M":
        return ("fails", "") if excluded else ("nothing to say", f"no verdict: {_advice(claim, spread, margin)}")
    if not excluded or spread.power(size, claim.direction) < POWER:
        return "undecided here", _advice(claim, spread, margin)
    if not claim.witness:
        return "undecided here", "the interval excludes the claimed size, but no second witness is named"
    return "not observed here", ""


def _advice(claim: Claim, spread: Spread, margin: float) -> str:
    """How many run seeds would decide, at the effect and the spread that were measured."""

    def decides(n: int) -> bool:
        more = spread.with_seeds(n)
        return more.interval(0.0).high < margin and more.power(claim.effect, claim.direction) >= POWER

    low, high = len(claim.seeds), 2 * len(claim.seeds)
    while high < MOST_SEEDS and not decides(high):
        low, high = high, 2 * high
    if high >= MOST_SEEDS:
        return "only more prepare seeds could decide" if claim.prepare_seeds else "no number of seeds in reach decides"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return f"{high} seeds would decide"
