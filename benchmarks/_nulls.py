"""Pairs of samplers whose true difference is known, and how often a verdict's interval is wrong about them.

Used by `verdict_rates.py` and by the tests. Every pair is drawn anew from its own key; the difference is new - base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from evalbench.metrics.differences import ROUTES, Difference
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.metrics.kernel import cubic_kernel

SPREAD = 0.05  # e of the samplers (1 - e) x and (1 + e) x
SHRUNK = 0.9**0.5  # scale of a sampler with 10 % less variance
_KID_REFERENCE = 2000  # rows

Pair = tuple[np.ndarray, np.ndarray]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Two samplers.

    Attributes:
        name: in words. route: key of ROUTES. draw: random generator -> (base, new) rows. reference: of the route.
        truth: the true difference of the metric.
    """

    name: str
    route: str
    draw: Callable[[np.random.Generator], Pair]
    reference: Arrays
    truth: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Over repetitions: share of 95 % intervals that leave out the truth, that lie below 0, that lie above 0."""

    missed: float
    better: float
    worse: float


def spectrum(kind: str, dims: int) -> np.ndarray:
    """Eigenvalues of the true covariance: `flat` 1, or `power-law` 1/k."""
    return np.ones(dims) if kind == "flat" else 1 / np.arange(1.0, dims + 1)


def normal(rng: np.random.Generator, n: int, variances: np.ndarray, shared: float) -> Pair:
    """Two sets of rows of N(0, diag(variances)); entries of both have correlation `shared`."""
    a = rng.standard_normal((n, len(variances)))
    b = a if shared == 1 else shared * a + np.sqrt(1 - shared**2) * rng.standard_normal(a.shape)
    return a * np.sqrt(variances), b * np.sqrt(variances)


def equally_far(route: str, kind: str, dims: int, n: int, shared: float) -> Case:
    """Scales of one Gaussian, one too small and one too large, at exactly equal distance of the reference.

    FD of s x is (1 - s)^2 tr(S): scales 1 - e and 1 + e. MMD^2 of s x to fixed rows y is, in the cubic kernel and up to
    a constant, 3 s^4 tr(S^2) / D^2 - 6 s^2 mean(y'S y) / D^2: squared scales c (1 - 2 e) and c (1 + 2 e) about its
    least value, at c = mean(y'S y) / tr(S^2).
    """
    variances = spectrum(kind, dims)
    if route == "kid":
        y = np.random.default_rng(dims).standard_normal((_KID_REFERENCE, dims)) * np.sqrt(variances)
        centre = float(np.mean(y**2 @ variances) / (variances @ variances))
        low, high = np.sqrt(centre * (1 - 2 * SPREAD)), np.sqrt(centre * (1 + 2 * SPREAD))
        reference: Arrays = {"features": y}
    else:
        low, high = 1 - SPREAD, 1 + SPREAD
        reference = {"mean": np.zeros(dims), "cov": np.diag(variances)}

    def draw(rng: np.random.Generator) -> Pair:
        a, b = normal(rng, n, variances, shared)
        return low * a, high * b

    return Case(f"{route}, scales of one Gaussian, d = {dims} {kind}, N = {n}{_shared(shared)}", route, draw, reference)


def twins(route: str, dims: int, n: int, shared: float, shift: float) -> Case:
    """The same sampler twice, perfect (shift 0) or off by `shift` in every coordinate."""
    variances = np.ones(dims)
    rows = np.random.default_rng(dims).standard_normal((_KID_REFERENCE, dims))
    reference = {"features": rows} if route == "kid" else {"mean": np.zeros(dims), "cov": np.eye(dims)}

    def draw(rng: np.random.Generator) -> Pair:
        a, b = normal(rng, n, variances, shared)
        return a + shift, b + shift

    where = "perfect" if shift == 0 else f"shifted by {shift:g}"
    return Case(f"{route}, {where} twins, d = {dims}, N = {n}{_shared(shared)}", route, draw, reference)


def shrunk(dims: int, n: int, shared: float = 1.0) -> Case:
    """Exact samples against samples with 10 % less variance, which are worse by d (1 - 0.9^1/2)^2."""

    def draw(rng: np.random.Generator) -> Pair:
        a, b = normal(rng, n, np.ones(dims), shared)
        return a, SHRUNK * b

    reference = {"mean": np.zeros(dims), "cov": np.eye(dims)}
    truth = dims * (1 - SHRUNK) ** 2
    return Case(f"fd, exact and shrunk, d = {dims}, N = {n}{_shared(shared)}", "fd", draw, reference, truth)


def population(route: str, name: str, base: np.ndarray, new: np.ndarray, n: int, reference: Arrays) -> Case:
    """The same n members of two finite populations, (M, D) each, drawn with replacement."""
    if route == "kid":
        y = reference["features"]
        own, cross = (_mean_kernel(new, new) - _mean_kernel(base, base), _mean_kernel(new, y) - _mean_kernel(base, y))
        truth = own - 2 * cross
    else:
        target = Gaussian(reference["mean"], reference["cov"])
        found = [frechet_distance(Gaussian(x.mean(0), np.cov(x, rowvar=False, bias=True)), target) for x in (new, base)]
        truth = found[0] - found[1]

    def draw(rng: np.random.Generator) -> Pair:
        rows = rng.integers(len(base), size=n)
        return base[rows], new[rows]

    return Case(f"{route}, {name}, N = {n}", route, draw, reference, truth)


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over all pairs, those of a member with itself too: independent draws may be the same member."""
    return float(np.mean([cubic_kernel(block, y).mean() for block in np.split(x, range(500, len(x), 500))]))


def _shared(shared: float) -> str:
    return f", noise shared by {shared:g}"


def differences(case: Case, repeats: int, key: int = 0) -> list[Difference]:
    """The route's answer to each repetition."""
    route = ROUTES[case.route]
    rngs = (np.random.default_rng([key, repeat]) for repeat in range(repeats))
    return [route.compute(*case.draw(rng), case.reference) for rng in rngs]


def rates(case: Case, repeats: int, key: int = 0) -> Rates:
    """How often the intervals are wrong, and what the difference of two plug-in distances would have said."""
    found = differences(case, repeats, key)
    intervals = [d.interval for d in found]
    return Rates(
        float(np.mean([not i.low <= case.truth <= i.high for i in intervals])),
        float(np.mean([i.high < 0 for i in intervals])),
        float(np.mean([i.low > 0 for i in intervals])),
    )


def plug_in_better(case: Case, repeats: int, key: int = 0) -> float:
    """How often the difference of two plug-in Frechet distances says that new is better."""
    target = Gaussian(case.reference["mean"], case.reference["cov"])
    rngs = (np.random.default_rng([key, repeat]) for repeat in range(repeats))
    pairs = ([frechet_distance(moments(x).gaussian(), target) for x in case.draw(rng)] for rng in rngs)
    return float(np.mean([new < base for base, new in pairs]))
