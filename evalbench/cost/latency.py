"""Latency: warm-up of the exact configuration, device-synchronised, competitors interleaved, raw samples kept.

The clock is a parameter, so that the arithmetic is tested with one that knows the truth. What becomes of the raw
seconds (median, percentiles, the line over NFE) is `evalbench.stats`; ratios are `evalbench.cost.ratio`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import torch

Clock: TypeAlias = Callable[[], int]  # nanoseconds, monotonic


@dataclass(frozen=True)
class Steady:
    """Warm-up until it is over, not for a fixed time (pitfall P35).

    A competitor is steady when the median of its last `window` calls is within `tolerance` of the median of the
    `window` before them; rounds go on until all are, or `most` rounds are done.

    Attributes:
        window: calls per median, at least 1. tolerance: relative. most: rounds, at least 1.
    """

    window: int = 5
    tolerance: float = 0.05
    most: int = 50

    def reached(self, seconds: Sequence[float]) -> bool:
        """Whether the calls of one competitor, in order, have settled."""
        if len(seconds) < 2 * self.window:
            return False
        before, last = median(seconds[-2 * self.window : -self.window]), median(seconds[-self.window :])
        return abs(last - before) <= self.tolerance * last


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter_ns) -> float:
    """Seconds of one call, between two synchronisations (pitfall P34)."""
    synchronise(device)
    started = clock()
    call()
    synchronise(device)
    return (clock() - started) / 1e9


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    clock: Clock = time.perf_counter_ns,
    steady: Steady | None = None,
    seconds: float = 0.0,
    most: int = 1000,
) -> Iterator[tuple[str, float, bool]]:
    """Time the calls in A B C A B C order, after warm-up rounds of the exact configuration in the same order.

    Args:
        calls: one per competitor, by name. rounds: measured rounds at least, >= 1. device: synchronised around each
            call. clock: nanoseconds.
        steady: when warm-up ends; None is one round.
        seconds: measured time that every competitor gets at least (pitfall P36). most: measured rounds at most, which
            bounds what `seconds` adds and never cuts `rounds`.

    Yields:
        (name, seconds, whether it counts) for each call, as it ends.
    """
    if not calls:
        return
    warm: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 if steady is None else steady.most):
        for name, spent in _round(calls, device, clock):
            warm[name].append(spent)
            yield name, spent, False
        if steady is not None and all(steady.reached(values) for values in warm.values()):
            break
    totals, done = dict.fromkeys(calls, 0.0), 0
    while done < rounds or (min(totals.values()) < seconds and done < most):
        for name, spent in _round(calls, device, clock):
            totals[name] += spent
            yield name, spent, True
        done += 1


def _round(
    calls: Mapping[str, Callable[[], object]], device: torch.device, clock: Clock
) -> Iterator[tuple[str, float]]:
    for name, call in calls.items():
        yield name, timed(call, device, clock)
