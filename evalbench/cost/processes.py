"""The latency protocol over fresh processes: timings of one process share its memory layout, clocks and luck.

Each process builds the model, calls every arm once (cold start, memory), warms up until steady, measures interleaved
rounds at every batch size, then measures energy and the breakdown. Every call has samples of its own, the same ones for
every arm, so a method that keeps an answer gives wrong ones: a random subset is computed again by one more process.

    bench = SomeBench(...)                               # facts; crosses process borders
    found = list(sittings(bench, Rules()))               # one Sitting per fresh process
    doubts = recheck_answers(bench, found, tolerance)    # flags by arm
    arms = collect(found)                                # {(arm, batch): Measured}
    median_ratio(arms["a", 64].seconds, arms["b", 64].seconds)

How a process is made is a parameter (`launch`), and so is every clock: the tests run all of this in virtual time.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from evalbench.cost.bench import Bench, Order, Rules, Sitting
from evalbench.cost.honesty import Kept, joined, recheck
from evalbench.cost.measured import failures
from evalbench.cost.session import sit
from evalbench.errors import EvalbenchError

Launch: TypeAlias = Callable[..., Any]  # (function, *arguments) -> what the function returns in a process of its own


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new interpreter and return what it returns; what it raises is raised here.

    The caller's main script is not run again there: it is no part of a cold start, and need not guard itself.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            with _no_main():
                future = pool.submit(function, *arguments)
            return future.result()
        except BrokenProcessPool:
            raise EvalbenchError("a timed process died (out of memory?); time fewer methods at once") from None


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the main module from `multiprocessing`, which else tells the new process to import it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def sittings(
    bench: Bench, rules: Rules, launch: Launch = fresh, now: Callable[[], int] = time.perf_counter_ns
) -> Iterator[Sitting]:
    """One sitting after the other, each in a process of its own. Arms that fail are out of the next ones.

    Args:
        launch: makes the process. now: nanoseconds of the clock that `sit` reads too, in the other process.
    """
    arms, rounds = bench.arms, dict[int, int]()
    for process in range(rules.processes):
        if not arms:
            return
        first = process % len(arms)  # everybody opens a process in turn: cold starts, memory of a fresh process
        found = launch(sit, Order(bench, rules, (*arms[first:], *arms[:first]), process, rounds, now()))
        rounds = rounds or {run.batch: len(run.seconds) for run in found.runs}
        arms = tuple(arm for arm in arms if arm not in found.failures)
        yield found


def witness(bench: Bench, indices: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Samples of each arm as the quality run computes them; run it in a process of its own."""
    stand = bench.build()
    return {arm: stand.witness(arm, wanted) for arm, wanted in indices.items()}


def recheck_answers(
    bench: Bench, found: Sequence[Sitting], tolerance: float, launch: Launch = fresh, seed: int = 0
) -> dict[str, str]:
    """Doubts about the outputs of timed calls, by arm; an arm whose kept outputs are right is not named.

    Args:
        tolerance: see `honesty.TOLERANCE`. seed: of the order in which samples are computed again.
    """
    failed = failures(found)
    kept: dict[str, list[Kept]] = {}
    for run in (run for sitting in found for run in sitting.runs if run.arm not in failed):
        if run.kept.indices:
            kept.setdefault(run.arm, []).append(run.kept)
    timed = {arm: _shuffled(joined(parts), seed) for arm, parts in kept.items()}
    again = launch(witness, bench, {arm: one.indices for arm, one in timed.items()}) if timed else {}
    doubts = {arm: recheck(one, again[arm], tolerance) for arm, one in timed.items()}
    return {arm: doubt for arm, doubt in doubts.items() if doubt}


def _shuffled(kept: Kept, seed: int) -> Kept:
    """In another order than they were timed, for a method that remembers the order."""
    order = np.random.default_rng(seed).permutation(len(kept.indices))
    return Kept(tuple(kept.indices[i] for i in order), kept.rows[order])
