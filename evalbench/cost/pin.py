"""Which cores a timed process stays on: the least busy ones, as many as it has threads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

STAT = Path("/proc/stat")
_WINDOW = 0.1  # seconds over which the cores are compared


def pin(threads: int) -> tuple[int, ...]:
    """Hold this process on as many cores as it has threads; which they are, or () where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return ()
    before = busy(STAT)
    time.sleep(_WINDOW)
    cores = quietest(os.sched_getaffinity(0), threads, before, busy(STAT))
    os.sched_setaffinity(0, cores)
    return cores


def busy(stat: Path) -> dict[int, int]:
    """Ticks since boot in which each core was neither idle nor waiting; empty where the system does not say."""
    try:
        lines = [line.split() for line in stat.read_text("ascii").splitlines()]
    except OSError:
        return {}
    cores = [words for words in lines if words and words[0][:3] == "cpu" and words[0][3:].isdigit()]
    return {int(name[3:]): sum(map(int, [*ticks[:3], *ticks[5:8]])) for name, *ticks in cores}


def quietest(allowed: set[int], threads: int, before: Mapping[int, int], after: Mapping[int, int]) -> tuple[int, ...]:
    """The cores with least work between two looks; of equal ones the last, since systems put their own on the first."""
    order = sorted(allowed, key=lambda core: (after.get(core, 0) - before.get(core, 0), -core))
    return tuple(sorted(order[:threads]))
