"""Pairs of samplers without a difference, for every route of a verdict: `verdict_rates.py` counts its false alarms.

Set distances on samplers of `_nulls.py` and on features of real images; scores and errors on numbers of known law;
posteriors, tokens and timings on draws of an exact model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from _nulls import Case, equally_far, twins

from evalbench.cost.ratio import median_ratio
from evalbench.looks import frechet_looks, group_sequential, score_sequence
from evalbench.metrics.differences import MEAN, ROUTES, Difference, Plan, Route
from evalbench.metrics.estimate import from_influence
from evalbench.stats import Interval, t_interval

Generator = np.random.Generator
Verdict = Callable[[Generator], int]


@dataclass(frozen=True)
class Null:
    """Two samplers that do not differ.

    Attributes:
        route: of `ROUTES`, or `latency`, or `looks`. name: in words.
        draw: one comparison -> 1 it says that new is larger, -1 smaller, 0 nothing.
        strict: a null of the quality issue, which asks for at most 7 %.
    """

    route: str
    name: str
    draw: Verdict
    strict: bool = False


def side(interval: Interval) -> int:
    """Which side of 0 an interval lies on."""
    return int(interval.low > 0) - int(interval.high < 0)


# Metrics without a route of their own, by the route that they take (`differences.route_of`).
LIKE = dict.fromkeys(("fd_to_converged", "fid", "sfid"), "fd") | dict.fromkeys(
    ("accuracy", "align", "clip", "mode-distance", "reward", "shortfall"), MEAN
)


def route_named(name: str) -> Route:
    """The route of a metric's name."""
    return ROUTES[LIKE.get(name, name)]


def of_case(case: Case, *, strict: bool = False) -> Null:
    """A pair of `_nulls`."""
    route = route_named(case.route)

    def draw(rng: Generator) -> int:
        return side(route.compute(*case.draw(rng), case.reference).interval)

    return Null(case.route, case.name.removeprefix(f"{case.route}, "), draw, strict)


def of_rows(route: str, name: str, rows: Callable[[Generator], tuple[Any, ...]], reference: Mapping[str, Any]) -> Null:
    """`rows` gives (base, new) and, where samples are planned, a Plan."""

    def draw(rng: Generator) -> int:
        base, new, *plan = rows(rng)
        return side(route_named(route).compute(base, new, reference, *plan).interval)

    return Null(route, name, draw)


# --- numbers per sample ----------------------------------------------------------------------------------------------

SCORES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": lambda z: (z > -1).astype(np.float64),
    "align": np.tanh,
    "clip": np.tanh,
    "mode-distance": np.exp,
    "reward": lambda z: -np.exp(z),
    "shortfall": lambda z: -np.exp(z),
    "paired-median": np.exp,
    "paired-p90": np.exp,
    "paired-rms": lambda z: np.exp(z / 3),
}  # of a normal number: bounded, skew, or 0 and 1, as the real ones are


def per_sample(n: int = 512, prompts: int = 64) -> Iterator[Null]:
    """Scores and errors whose normal numbers have correlation 0 or 0.9; one with prompts, one with classes."""
    for route, score in SCORES.items():
        for rho in (0.0, 0.9):

            def rows(rng: Generator, score: Any = score, rho: float = rho) -> tuple[np.ndarray, np.ndarray]:
                a, own = rng.standard_normal((2, n))
                return score(a), score(rho * a + math.sqrt(1 - rho**2) * own)

            yield of_rows(route, f"scores, correlation {rho:g}, N = {n}", rows, {})

    def clustered(rng: Generator) -> tuple[Any, ...]:
        names = np.arange(n) % prompts
        a, b = (rng.standard_normal(prompts)[names] + rng.standard_normal(n) for _ in range(2))
        return np.tanh(a), np.tanh(b), Plan(names)

    def classes(rng: Generator) -> tuple[Any, ...]:
        labels = np.arange(n) % 10
        a, b = (labels / 3 + rng.standard_normal(n) for _ in range(2))
        return np.tanh(a), np.tanh(b), Plan(None, labels)

    yield of_rows("clip", f"{prompts} prompts of {n // prompts} samples that are alike, N = {n}", clustered, {})
    yield of_rows("align", f"10 classes, as many of each, N = {n}", classes, {})


# --- features --------------------------------------------------------------------------------------------------------


def set_distances(*, full: bool) -> Iterator[Null]:
    """The equal-distance nulls of the quality issue, and twins."""
    for kind, dims, n in (("flat", 64, 512), ("power-law", 256, 2048)):
        if full or dims == 64:
            for shared in (1.0, 0.0):
                yield of_case(equally_far("fd", kind, dims, n, shared), strict=True)
    for kind, dims in (("flat", 64), ("power-law", 256)):
        for shared in (1.0, 0.0):
            yield of_case(equally_far("kid", kind, dims, 512, shared), strict=True)
    for route in ("fd", "fd_to_converged", "fid", "sfid"):  # one statistic under four names
        for dims, shared, shift in (
            ((16, 0.9, 0.4),) if route != "fd" else ((4, 0.0, 0.0), (16, 0.9, 0.0), (16, 0.9, 0.4))
        ):
            case = twins("fd", dims, 8 * dims, shared, shift)
            null = of_case(case)
            yield Null(route, null.name, null.draw)
    for shift in (0.0, 0.4):
        yield of_case(twins("kid", 4, 64, 0.9, shift))
    yield from (of_rows("cmmd", *mirrored(shared)) for shared in (1.0, 0.0))


def mirrored(shared: float, dims: int = 16, n: int = 256) -> tuple[Any, ...]:
    """Unit vectors off to one side and to the other, equally far from a reference that is its own mirror image."""
    y = np.random.default_rng(dims).standard_normal((1000, dims))
    y = unit(np.concatenate([y, -y]))
    shift = np.zeros(dims)
    shift[0] = 0.5

    def rows(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        a, own = rng.standard_normal((2, n, dims))
        b = a if shared == 1 else own
        return unit(a + shift), unit(b - shift)

    return f"unit vectors off to either side, d = {dims}, N = {n}, noise shared by {shared:g}", rows, {"features": y}


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


@cache
def real_features() -> tuple[np.ndarray, np.ndarray]:
    """fashion64 of the 10,000 test images of Fashion-MNIST, (M, 64), and their classes."""
    import torch

    from evalbench.interfaces import Cond, SampleBatch
    from evalbench.models.data import fashion_test
    from evalbench.registry import build_extractor

    torch.set_num_threads(1)
    images, labels = fashion_test()
    extract = build_extractor("fashion64")
    blocks = [torch.from_numpy(images[i : i + 256]) for i in range(0, len(images), 256)]
    with torch.no_grad():
        rows = [extract(SampleBatch(x / 127.5 - 1, x, Cond(), None)).numpy() for x in blocks]
    return np.concatenate(rows).astype(np.float64), np.asarray(labels)


def real(n: int = 640) -> Iterator[Null]:
    """Two draws of one population of real features, far from the reference: apart, half in common, by a label plan."""
    x, labels = real_features()
    mean, cov = x.mean(axis=0), np.cov(x, rowvar=False)
    reference = {"mean": mean + 0.2, "cov": 1.1 * cov, "features": x[::7][:1000] + 0.2}
    by_class = [np.flatnonzero(labels == k) for k in range(10)]

    def apart(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        return x[rng.integers(len(x), size=n)], x[rng.integers(len(x), size=n)]

    def half(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        a, b = rng.integers(len(x), size=(2, n))
        return x[a], x[np.where(np.arange(n) % 2, a, b)]

    def planned(rng: Generator) -> tuple[Any, ...]:
        plan = np.arange(n) % 10
        a, b = (np.array([rng.choice(by_class[k]) for k in plan]) for _ in range(2))
        return x[a], x[np.where(np.arange(n) % 20 < 10, a, b)], Plan(None, plan)

    for route in ("fd", "kid"):
        yield of_rows(route, f"real features, N = {n}, other images", apart, reference)
        yield of_rows(route, f"real features, N = {n}, half of the images the same", half, reference)
        yield of_rows(route, f"real features, N = {n}, as many of each class, half the same", planned, reference)


# --- posteriors ------------------------------------------------------------------------------------------------------

MEASUREMENTS, SHARED, DIMS = 24, 4, 3


def posterior_rows(rng: Generator, z: np.ndarray) -> np.ndarray:
    """Rows of the extractor `posterior` for whitened samples z, whose exact posterior is N(0, I)."""
    key = np.repeat(np.arange(MEASUREMENTS), SHARED)
    w = rng.standard_normal((MEASUREMENTS, 32, DIMS))
    own = np.mean([np.linalg.norm(w - np.roll(w, shift, 1), axis=2).mean(1) for shift in range(1, 9)], axis=0)
    square = (z**2).mean(1)
    distance = 2 * np.linalg.norm(z[:, None] - w[key], axis=2).mean(1) - own[key]
    return np.column_stack([key, square, square + 1, np.full(len(z), 2.0), square, distance, z])


def posteriors() -> Iterator[Null]:
    """Exact posterior samples, correlated by 0 or 0.9, of the same measurements."""
    for route in ("posterior-energy", "posterior-rmse", "recovery-snr"):
        for rho in (0.0, 0.9):

            def rows(rng: Generator, rho: float = rho) -> tuple[np.ndarray, np.ndarray]:
                a, own = rng.standard_normal((2, MEASUREMENTS * SHARED, DIMS))
                key = int(rng.integers(2**31))  # the exact draws are the same for both cells
                found = [
                    posterior_rows(np.random.default_rng(key), z) for z in (a, rho * a + math.sqrt(1 - rho**2) * own)
                ]
                return found[0], found[1]

            yield of_rows(route, f"{MEASUREMENTS} measurements of {SHARED}, correlation {rho:g}", rows, {})


# --- tokens ----------------------------------------------------------------------------------------------------------

SYMBOLS, LENGTH = 4, 16
EXACT = {"pairs": np.full((SYMBOLS, SYMBOLS), 1 / SYMBOLS**2)}
ONE, OTHER = (0.31, 0.19, 0.25, 0.25), (0.25, 0.25, 0.19, 0.31)  # equally far from the exact chain


def chains(rng: Generator, n: int, first: tuple[float, ...] = (0.25,) * SYMBOLS) -> np.ndarray:
    """Sequences whose symbol after 0 has probabilities `first`, all others 1 / SYMBOLS."""
    table = np.cumsum([first, *[[0.25] * SYMBOLS] * (SYMBOLS - 1)], axis=1)
    x, u = np.zeros((n, LENGTH), int), rng.random((n, LENGTH))
    x[:, 0] = SYMBOLS * u[:, 0]
    for place in range(1, LENGTH):
        x[:, place] = np.minimum((u[:, place, None] > table[x[:, place - 1]]).sum(1), SYMBOLS - 1)
    return x.astype(float)


def tokens(n: int = 256) -> Iterator[Null]:
    """Frequencies of pairs, and likelihoods at the entropy, on one side of it, on either side."""
    pairs: Mapping[str, Callable[[Generator], tuple[np.ndarray, np.ndarray]]] = {
        "twins": lambda rng: (chains(rng, n), chains(rng, n)),
        "equally far": lambda rng: (chains(rng, n, ONE), chains(rng, n, OTHER)),
        "copies in new": lambda rng: (chains(rng, n), np.repeat(chains(rng, n // 2), 2, axis=0)[rng.permutation(n)]),
    }
    for name, draw in pairs.items():
        yield of_rows("pair-tv", f"{name}, N = {n}", draw, EXACT)
    for name, shift, rho, flip in (
        ("at", 0.0, 0.9, 1),
        ("on one side of", 0.3, 0.9, 1),
        ("either side of", 0.3, 0.5, -1),
    ):

        def rows(rng: Generator, shift: float = shift, rho: float = rho, flip: int = flip) -> tuple[Any, ...]:
            a, own = rng.standard_normal((2, n))
            return a + shift + 2, rho * a + math.sqrt(1 - rho**2) * own + flip * shift + 2

        yield of_rows("nll-gap", f"{name} the entropy, N = {n}", rows, {"entropy": np.array([2.0])})


# --- timings, and looks ----------------------------------------------------------------------------------------------


def timings() -> Iterator[Null]:
    """Two arms whose processes, rounds and samples differ by some percent, timed together and apart."""
    for together in (True, False):
        for process, rounds, sample in ((0.02, 0.01, 0.02), (0.0, 0.0, 0.02), (0.05, 0.0, 0.01)):

            def draw(rng: Generator, together: bool = together, sd: Any = (process, rounds, sample)) -> int:
                shape = (5, 4, 5)

                def effect(axes: int, size: float) -> np.ndarray:
                    return size * rng.standard_normal(shape[:axes] + (1,) * (3 - axes))

                both = effect(1, 0.03) if together else 0.0
                a, b = (np.exp(both + sum(effect(k + 1, size) for k, size in enumerate(sd))) for _ in range(2))
                found = median_ratio(a, b, paired=together, resamples=400)
                assert found.spread is not None
                return side(t_interval(math.log(found.value), found.spread, found.processes - 1))

            how = "together" if together else "apart"
            what = ", ".join(f"{word} {100 * sd:g} %" for word, sd in (("processes", process), ("rounds", rounds)))
            yield Null("latency", f"5 processes timed {how}: {what}, samples {100 * sample:g} %", draw)


def looks() -> Iterator[Null]:
    """Ten looks and a confidence sequence at scores, five looks at a Frechet difference; no tolerance stops them."""
    n = 1000

    def ten(rng: Generator) -> int:
        gaps = rng.standard_normal(n)
        steps = [n * k // 10 for k in range(1, 11)]
        return _said(
            group_sequential(lambda m: from_influence(float(gaps[:m].mean()), gaps[:m]), steps, 0.0)[-1].decision
        )

    def sequence(rng: Generator) -> int:
        return _said(score_sequence(rng.standard_normal(n), [n * k // 100 for k in range(2, 101)], 0.0)[-1].decision)

    yield Null("looks", f"ten looks at scores, N = {n}", ten)
    yield Null("looks", f"confidence sequence of scores, N = {n}", sequence)
    for shared in (1.0, 0.0):
        case = equally_far("fd", "flat", 16, 2048, shared)

        def five(rng: Generator, case: Case = case) -> int:
            base, new = case.draw(rng)

            def at(m: int) -> Difference:
                return ROUTES["fd"].compute(base[:m], new[:m], case.reference)

            return _said(group_sequential(at, frechet_looks(2048, 16), 0.0)[-1].decision)

        yield Null("looks", f"five looks, {case.name}", five)


def _said(decision: str) -> int:
    return {"above": 1, "below": -1}.get(decision, 0)


def nulls(*, full: bool = False) -> list[Null]:
    """All of them; `full` adds what takes minutes."""
    return [
        *set_distances(full=full),
        *real(),
        *per_sample(),
        *posteriors(),
        *tokens(),
        *timings(),
        *looks(),
    ]
