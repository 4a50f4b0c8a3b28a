"""What the processes of a latency run found together, by arm and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evalbench.cost.bench import ArmRun, Sitting
from evalbench.cost.breakdown import Breakdown, breakdown
from evalbench.cost.energy import Energy
from evalbench.cost.memory import Memory
from evalbench.spec import Failure


@dataclass(frozen=True)
class Measured:
    """One arm at one batch size over all processes.

    Attributes:
        seconds: raw, (processes, rounds, samples). breakdown: of their median.
        cold: seconds from asking for a process to the first samples, of the processes this arm opened.
        build: seconds of loading, one per process. first: of the first call, one per process.
        memory: of a process that this arm opened, where there is one. energy: the median one.
        warmup: calls before the measured ones, one number per process. steady: whether they settled in all of them.
        clock, threads, cores: how it was measured; cores by process, empty where it was not pinned.
        flags: doubts of all processes about this arm and the machine, each once.
    """

    arm: str
    batch: int
    seconds: np.ndarray
    breakdown: Breakdown | None
    cold: tuple[float, ...]
    build: tuple[float, ...]
    first: tuple[float, ...]
    memory: Memory
    energy: Energy
    warmup: tuple[int, ...]
    steady: bool
    clock: str
    threads: int
    cores: tuple[tuple[int, ...], ...]
    flags: tuple[str, ...]


def collect(found: Sequence[Sitting]) -> dict[tuple[str, int], Measured]:
    """Measurements by arm and batch size, of the arms that failed nowhere."""
    failed = failures(found)
    runs: dict[tuple[str, int], list[tuple[Sitting, ArmRun]]] = {}
    for sitting in found:
        for run in sitting.runs:
            if run.arm not in failed:
                runs.setdefault((run.arm, run.batch), []).append((sitting, run))
    return {key: _together(key, pairs) for key, pairs in runs.items()}


def failures(found: Sequence[Sitting]) -> dict[str, Failure]:
    """Arms that failed in some process, with the first reason."""
    return {arm: failure for sitting in reversed(found) for arm, failure in sitting.failures.items()}


def _together(key: tuple[str, int], pairs: Sequence[tuple[Sitting, ArmRun]]) -> Measured:
    runs = [run for _, run in pairs]
    seconds = np.array([run.seconds for run in runs])
    passes = [one for run in runs for one in run.parts]
    return Measured(
        arm=key[0],
        batch=key[1],
        seconds=seconds,
        breakdown=breakdown(passes, float(np.median(seconds))) if passes else None,
        cold=tuple(sitting.cold for sitting, run in pairs if run.fresh and sitting.cold is not None),
        build=tuple(sitting.build for sitting, _ in pairs),
        first=tuple(run.first for run in runs),
        memory=_memory(runs),
        energy=_energy([run.energy for run in runs]),
        warmup=tuple(len(run.warmup) for run in runs),
        steady=all(run.steady for run in runs),
        clock=pairs[0][0].clock,
        threads=pairs[0][0].threads,
        cores=tuple(sitting.cores for sitting, _ in pairs),
        flags=_flags(pairs),
    )


def _flags(pairs: Sequence[tuple[Sitting, ArmRun]]) -> tuple[str, ...]:
    seen = [flag for sitting, run in pairs for batch, flag in sitting.flags if batch == run.batch]
    unsettled = [len(run.warmup) for _, run in pairs if not run.steady]
    if unsettled:
        seen.append(f"warm-up did not settle in {max(unsettled)} calls ({len(unsettled)} of {len(pairs)} processes)")
    return tuple(dict.fromkeys(seen))


def _memory(runs: Sequence[ArmRun]) -> Memory:
    """The largest peak of the processes that the arm opened; without one the largest of all, with a note."""
    opened = [run.memory for run in runs if run.fresh]
    largest = max(opened or [run.memory for run in runs], key=lambda memory: memory.peak)
    return largest if opened or largest.note else replace(largest, note="after other calls in the same process")


def _energy(found: Sequence[Energy]) -> Energy:
    known = sorted((one for one in found if one.joules is not None), key=lambda one: one.joules or 0.0)
    return known[len(known) // 2] if known else found[0]
