"""Latency: warm-up of the exact configuration, device-synchronised, competitors interleaved, raw samples kept.

The clock is a parameter, so that the arithmetic is tested with one that knows the truth. What becomes of the raw
seconds (median, percentiles) is `evalbench.stats`; the line over NFE is `evalbench.cost.line`, ratios are
`evalbench.cost.ratio`, fresh processes `evalbench.cost.processes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from evalbench.cost.clock import Clock, clock_for


@dataclass(frozen=True)
class Steady:
    """Warm-up until it is over, not for a fixed time (pitfall P35).

    A competitor is steady when the median of its last `window` calls is within `tolerance` of the median of the
    `window` before them; rounds go on until all are and each has run for `seconds`, or `most` rounds are done.

    Attributes:
        window: calls per median, at least 1. tolerance: relative. most: rounds, at least 1.
        seconds: warm-up of each competitor at least, for clocks that take time to rise.
    """

    window: int = 5
    tolerance: float = 0.05
    most: int = 50
    seconds: float = 0.0

    def reached(self, seconds: Sequence[float]) -> bool:
        """Whether the calls of one competitor, in order, have settled."""
        if len(seconds) < 2 * self.window or sum(seconds) < self.seconds:
            return False
        before, last = median(seconds[-2 * self.window : -self.window]), median(seconds[-self.window :])
        return abs(last - before) <= self.tolerance * last


def timed(call: Callable[[], object], device: torch.device, clock: Clock | None = None) -> float:
    """Seconds of one call, between two synchronisations (pitfall P34), by the device's own clock unless told."""
    return (clock or clock_for(device)).time(call)


def turns(names: Sequence[str], round_: int) -> list[str]:
    """The order of the competitors in a round: A B, B A, B A, A B; with more of them the first place goes round.

    Over 2 n rounds of n competitors each stands in every place twice, so no place is anybody's advantage.
    """
    first = round_ // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if round_ % 2 else order


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    clock: Clock | None = None,
    steady: Steady | None = None,
    samples: int = 1,
    seconds: float = 0.0,
    most: int = 1000,
    before: Callable[[str], object] | None = None,
    failed: Callable[[str, Exception], object] | None = None,
) -> Iterator[tuple[str, float, bool]]:
    """Time the calls in rounds in which all take turns, after warm-up rounds of the exact configuration.

    Args:
        calls: one per competitor, by name. rounds: measured rounds at least, >= 1. device: synchronised around each
            call. clock: the device's own unless told.
        steady: when warm-up ends; None is one round. samples: calls of each competitor in a measured round, in turns.
        seconds: measured time that every competitor gets at least (pitfall P36). most: measured rounds at most, which
            bounds what `seconds` adds and never cuts `rounds`.
        before: what is done before each call of a competitor, untimed: its inputs.
        failed: told of a call that raised; that competitor is out. None: the exception goes on to the caller.

    Yields:
        (name, seconds, whether it counts) for each call, as it ends.
    """
    race = _Race(dict(calls), clock or clock_for(device), before, failed)
    warm: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 if steady is None else steady.most):
        for name, spent in race.round():
            warm[name].append(spent)
            yield name, spent, False
        if steady is not None and all(steady.reached(warm[name]) for name in race.calls):
            break
    totals, done = dict.fromkeys(calls, 0.0), 0
    while race.calls and (done < rounds or (min(totals[name] for name in race.calls) < seconds and done < most)):
        for _ in range(samples):
            for name, spent in race.round():
                totals[name] += spent
                yield name, spent, True
        done += 1


@dataclass
class _Race:
    """Competitors that are still in, and whose turn it is."""

    calls: dict[str, Callable[[], object]]
    clock: Clock
    before: Callable[[str], object] | None
    failed: Callable[[str, Exception], object] | None
    rounds: int = 0

    def round(self) -> Iterator[tuple[str, float]]:
        if not self.calls:
            return
        order = turns(list(self.calls), self.rounds)
        self.rounds += 1
        for name in order:
            try:
                if self.before is not None:
                    self.before(name)
                spent = self.clock.time(self.calls[name])
            except Exception as error:
                if self.failed is None:
                    raise
                del self.calls[name]
                self.failed(name, error)
            else:
                yield name, spent
