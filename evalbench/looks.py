"""Deciding while samples arrive: intervals that hold at every look, for verdicts and never for table values.

Two designs, one question: is the difference new - base away from 0, and in which direction, or inside +-tolerance?

- looks at growing N, each with a part of the level, by the spending function of Lan & DeMets (1983) that mimics Pocock
  (1977): level log(1 + (e - 1) share). Differences of accumulating samples have independent increments in information,
  1 / se^2, so the points follow from the recursion of Armitage, McPherson & Rowe (1969). Information is measured at
  every look: it grows as N for a mean, but up to as N^2 for a distance whose noise is of second order, whose looks then
  have less in common (taken as N, a Frechet difference without shared noise was wrong in 6.2 % of 2000, for 5 %). For
  every paired statistic that has a standard error; a look at a Frechet difference is of at least 8 d samples more;
- per-sample paired scores after every sample: the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha,
  Kennedy & Ramdas ("Time-uniform central limit theory and asymptotic confidence sequences"), valid at all times at
  once: mean +- s [2 (n r + 1) / (n^2 r) log((n r + 1)^1/2 / level)]^1/2.

A stop is for a direction (the interval leaves out 0) or for futility (it lies inside the tolerance, which goes first).
A verdict of `evalbench compare` asks more: the interval beyond the tolerance. A difference of exactly one tolerance has
a direction, and no N puts it beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeAlias

import numpy as np

from evalbench.metrics.estimate import Difference

Decision: TypeAlias = Literal["above", "below", "inside", "open"]
LEVEL = 0.05
_NODES = 128  # of the recursion over looks


@dataclass(frozen=True)
class Look:
    """What a look says: samples so far, the difference with half of its interval at this look, the decision."""

    n: int
    difference: float
    half: float
    decision: Decision


def decision_of(difference: float, half: float, tolerance: float) -> Decision:
    """Where an interval lies: inside the tolerance, else above or below 0, else open."""
    if abs(difference) + half <= tolerance:
        return "inside"
    if abs(difference) > half:
        return "above" if difference > 0 else "below"
    return "open"


def sequence_half(sd: float, n: int, planned: int, level: float = LEVEL) -> float:
    """Half of the asymptotic confidence sequence of a mean of n terms with standard deviation sd.

    r is near the one that is narrowest at a quarter of the planned N, where a difference of two tolerances decides.
    """
    rho2 = 4 * (-2 * math.log(level) + math.log(-2 * math.log(level) + 1)) / planned
    return sd * math.sqrt(2 * (n * rho2 + 1) / (n * n * rho2) * math.log(math.sqrt(n * rho2 + 1) / level))


def spent(share: float, level: float = LEVEL) -> float:
    """Level spent when a share of the planned samples is there: level log(1 + (e - 1) share)."""
    return level * math.log1p((math.e - 1) * share)


@cache
def boundaries(shares: tuple[float, ...], level: float = LEVEL) -> tuple[float, ...]:
    """Two-sided points z_k of the looks at these shares of the planned N, where information grows as N.

    Args:
        shares: rising, in (0, 1], the last is 1.
    """
    spending = Spending(level)
    return tuple(spending.point(share, share) for share in shares)


@dataclass
class Spending:
    """The points of looks one by one, so that crossing any has chance `level`.

    The density of the running sum on paths that have not crossed, by recursion over looks (Armitage, McPherson & Rowe
    1969), on the nodes of Gauss and Legendre.
    """

    level: float = LEVEL
    _mass: np.ndarray = field(default_factory=lambda: np.array([1.0]))  # chance at each node
    _sums: np.ndarray = field(default_factory=lambda: np.array([0.0]))
    _information: float = 0.0
    _used: float = 0.0

    def point(self, share: float, information: float) -> float:
        """z of the next look.

        Args:
            share: of the planned N; rising, the last is 1. information: 1 / se^2 in any unit, rising.
        """
        from scipy.optimize import brentq

        step = math.sqrt(information - self._information)
        wanted, root = spent(share, self.level) - self._used, math.sqrt(information)
        z = float(brentq(lambda z: self._crossing(z * root, step) - wanted, 0.0, 12.0))
        nodes, weights = _nodes()
        sums = z * root * nodes
        steps = (sums[:, None] - self._sums) / step
        density = np.exp(-(steps**2) / 2) @ self._mass / (step * math.sqrt(2 * math.pi))
        self._mass, self._sums = density * weights * z * root, sums
        self._information, self._used = information, spent(share, self.level)
        return z

    def _crossing(self, edge: float, step: float) -> float:
        """Chance that the sum is inside until the last look and leaves +- edge at this one."""
        from scipy.special import ndtr

        return float(self._mass @ (ndtr((self._sums - edge) / step) + ndtr((-edge - self._sums) / step)))


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    return np.polynomial.legendre.leggauss(_NODES)


def group_sequential(
    at: Callable[[int], Difference], looks: Sequence[int], tolerance: float, level: float = LEVEL
) -> list[Look]:
    """Looks at growing numbers of samples until one decides, or the last is done.

    Args:
        at: n -> the difference from the first n samples. looks: rising numbers of samples, the last is the planned N.
    """
    from evalbench.stats import reach, t_quantile

    spending, information, before = Spending(level), 0.0, looks[0]
    done: list[Look] = []
    for n in looks:
        found, half = at(n), 0.0
        if found.se > 0:
            # it grows at least as N does, whatever the noise of an error says
            information = max(1 / found.se**2, information * n / before)
            t = t_quantile(_two_sided(spending.point(n / looks[-1], information)), found.df)
            half, before = reach(abs(found.slope), found.se, t), n
        done.append(Look(n, found.value, half, decision_of(found.value, half, tolerance)))
        if done[-1].decision != "open":
            break
    return done


def _two_sided(z: float) -> float:
    from scipy.stats import norm

    return float(2 * norm.sf(z))


def frechet_looks(planned: int, dims: int, most: int = 5) -> tuple[int, ...]:
    """Numbers of samples at which a Frechet difference is looked at: equal steps of at least 8 d, ending at N."""
    count = max(1, min(most, planned // (8 * dims)))
    return tuple(round(planned * k / count) for k in range(1, count + 1))


def score_sequence(gaps: np.ndarray, looks: Sequence[int], tolerance: float, level: float = LEVEL) -> list[Look]:
    """A confidence sequence on the mean of paired per-sample differences, until a look decides.

    Args:
        gaps: new - base of each sample, (N,), N the planned number. looks: rising numbers of samples.
    """
    done: list[Look] = []
    for n in looks:
        seen = gaps[:n]
        half = sequence_half(float(seen.std(ddof=1)), n, len(gaps), level)
        mean = float(seen.mean())
        done.append(Look(n, mean, half, decision_of(mean, half, tolerance)))
        if done[-1].decision != "open":
            break
    return done
