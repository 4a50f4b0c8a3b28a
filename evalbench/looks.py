"""Deciding while samples arrive: intervals that hold at every look, for verdicts and never for table values.

Two designs, one question: is the difference new - base away from 0, and in which direction, or inside +-tolerance?

- looks at growing N, each with a part of the level, by the spending function of Lan & DeMets (1983) that mimics Pocock
  (1977): level log(1 + (e - 1) share). The differences of accumulating samples have independent increments, so the
  points follow from the recursion of Armitage, McPherson & Rowe (1969). For every paired statistic that has a standard
  error, the Frechet difference included; a look there is of at least 8 d samples more than the last;
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
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, TypeAlias

import numpy as np

from evalbench.metrics.estimate import Difference

Decision: TypeAlias = Literal["above", "below", "inside", "open"]
LEVEL = 0.05
_GRID = 801  # points of the recursion over looks


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
    """Two-sided points z_k of the looks at these shares of the planned N, so that crossing any has chance `level`.

    The density of the running sum on paths that have not crossed, by recursion over looks (Armitage, McPherson & Rowe
    1969).

    Args:
        shares: rising, in (0, 1], the last is 1.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    points: list[float] = []
    density, grid, before, used = np.array([1.0]), np.array([0.0]), 0.0, 0.0
    for share in shares:
        step = math.sqrt(share - before)
        excess = partial(_excess, density, grid, step, share, spent(share, level) - used)
        points.append(float(brentq(excess, 0.0, 12.0)))
        edge = points[-1] * math.sqrt(share)
        next_grid = np.linspace(-edge, edge, _GRID)
        weights = np.full(_GRID, next_grid[1] - next_grid[0])
        weights[[0, -1]] /= 2
        density = (norm.pdf((next_grid[:, None] - grid) / step) / step @ density) * weights
        grid, before, used = next_grid, share, spent(share, level)
    return tuple(points)


def _excess(density: np.ndarray, grid: np.ndarray, step: float, share: float, wanted: float, z: float) -> float:
    """Chance that the sum leaves +- z share^1/2 at this look, from its density on a grid at the last, less `wanted`."""
    from scipy.stats import norm

    edge = z * math.sqrt(share)
    return float(density @ (norm.sf((edge - grid) / step) + norm.cdf((-edge - grid) / step))) - wanted


def group_sequential(
    at: Callable[[int], Difference], looks: Sequence[int], tolerance: float, level: float = LEVEL
) -> list[Look]:
    """Looks at growing numbers of samples until one decides, or the last is done.

    Args:
        at: n -> the difference from the first n samples. looks: rising numbers of samples, the last is the planned N.
    """
    from evalbench.stats import t_quantile

    points = boundaries(tuple(n / looks[-1] for n in looks), level)
    done: list[Look] = []
    for n, z in zip(looks, points, strict=True):
        found = at(n)
        half = t_quantile(_two_sided(z), found.df) * found.se
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
