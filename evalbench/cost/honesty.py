"""Was the machine quiet, and did the timed calls compute what they claim? Doubts become flags: plain sentences.

Machine: what is seen just before and just after the measured rounds. Answers: a random subset of the timed outputs is
computed again in another process, as the quality run computes them; every timed call has noise of its own, so a method
that keeps an answer returns a wrong one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evalbench.cost.nvml import Absent, Gpu

PROC, CPUS = Path("/proc"), Path("/sys/devices/system/cpu")
# Largest root-mean-square difference between a timed sample and the quality run's, relative to that of the samples:
# another batch size changes last bits, which a solver's steps amplify.
TOLERANCE: Mapping[str, float] = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Limits:
    """What is tolerated.

    Attributes:
        foreign: share of the machine's CPU time that other processes use. clock: relative change of a clock.
    """

    foreign: float = 0.10
    clock: float = 0.10


@dataclass(frozen=True)
class Observation:
    """One look at the machine; None is what this system does not say.

    Attributes:
        wall, own: seconds: of the clock, and of CPU time of this process. busy: CPU seconds of everybody.
        cores: logical CPUs. megahertz: mean clock of the CPUs.
        gpu_processes, gpu_megahertz, gpu_held_down: see `nvml.Gpu`; empty or None without one.
    """

    wall: float
    own: float
    busy: float | None
    cores: int
    megahertz: float | None
    gpu_processes: frozenset[int] = frozenset()
    gpu_megahertz: int | None = None
    gpu_held_down: frozenset[str] = field(default_factory=frozenset)


def observe(gpu: Gpu | Absent, proc: Path = PROC, cpus: Path = CPUS) -> Observation:
    """Look at the machine now."""
    seen = Observation(
        wall=time.monotonic(),
        own=time.process_time(),
        busy=_busy_seconds(proc / "stat"),
        cores=os.cpu_count() or 1,
        megahertz=_megahertz(proc, cpus),
    )
    if isinstance(gpu, Absent):
        return seen
    on_gpu = {
        "gpu_processes": gpu.processes(),
        "gpu_megahertz": gpu.megahertz(),
        "gpu_held_down": gpu.held_down(),
    }
    return Observation(**{**vars(seen), **on_gpu})


def _busy_seconds(stat: Path) -> float | None:
    """CPU seconds since boot that somebody used: the first line of /proc/stat without idle and iowait."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text("ascii").split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _megahertz(proc: Path, cpus: Path) -> float | None:
    """Mean clock of the CPUs, from cpufreq where there is one, else from /proc/cpuinfo."""
    found = [int(file.read_text("ascii")) / 1e3 for file in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not found:
        try:
            lines = (proc / "cpuinfo").read_text("ascii", errors="replace").splitlines()
        except OSError:
            return None
        found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return sum(found) / len(found) if found else None


def machine_flags(
    before: Observation, after: Observation, ours: frozenset[int] = frozenset(), limits: Limits | None = None
) -> tuple[str, ...]:
    """What disturbed, or could have disturbed, a measurement between two looks.

    Args:
        ours: ids of the processes that belong to the run and may hold the GPU.
    """
    limits = limits or Limits()
    found = [
        _foreign_load(before, after, limits.foreign),
        _moved("CPU clock", before.megahertz, after.megahertz, limits.clock),
        _moved("GPU clock", before.gpu_megahertz, after.gpu_megahertz, limits.clock),
    ]
    foreign = (before.gpu_processes | after.gpu_processes) - ours
    if foreign:
        found.append(f"{len(foreign)} foreign process{'es' if len(foreign) > 1 else ''} on the GPU")
    found += [f"GPU clocks held down: {why}" for why in sorted(before.gpu_held_down | after.gpu_held_down)]
    return tuple(flag for flag in found if flag)


def _foreign_load(before: Observation, after: Observation, most: float) -> str:
    if before.busy is None or after.busy is None:
        return "load of other processes unknown: no /proc/stat"
    available = (after.wall - before.wall) * after.cores
    foreign = (after.busy - before.busy) - (after.own - before.own)
    if available <= 0 or foreign <= most * available:
        return ""
    return f"other processes used {foreign / available:.0%} of the CPUs"


def _moved(what: str, before: float | None, after: float | None, most: float) -> str:
    if not before or not after or abs(after - before) <= most * max(before, after):
        return ""
    return f"{what} went from {before:.0f} to {after:.0f} MHz"


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Timed outputs that were kept for checking.

    Attributes:
        indices: global sample indices (n,), all different. rows: the samples, (n, *S).
    """

    indices: tuple[int, ...]
    rows: np.ndarray


def keep_which(rng: np.random.Generator, calls: int, batch: int, rows: int) -> dict[int, tuple[int, ...]]:
    """Rows to keep of the calls of one competitor: a random subset, {call: rows of its batch}.

    Args:
        calls: to choose from. batch: rows of a call. rows: wanted; fewer where there are fewer.
    """
    drawn = rng.choice(calls * batch, size=min(rows, calls * batch), replace=False)
    which: dict[int, tuple[int, ...]] = {}
    for flat in sorted(int(value) for value in drawn):
        which[flat // batch] = (*which.get(flat // batch, ()), flat % batch)
    return which


def recheck(kept: Kept, again: np.ndarray, tolerance: float) -> str:
    """Why the timed outputs are not what they should be; empty when they are.

    Args:
        again: the same samples computed anew, (n, *S). tolerance: see `TOLERANCE`.
    """
    if kept.rows.shape != again.shape:
        return f"timed outputs have shape {kept.rows.shape[1:]}, computed again {again.shape[1:]}"
    if not kept.indices:
        return "no timed output was kept: nothing was checked"
    timed, fresh = (np.asarray(rows, dtype=np.float64).reshape(len(kept.indices), -1) for rows in (kept.rows, again))
    scale = float(np.sqrt(np.mean(fresh**2)))
    error = np.sqrt(np.mean((timed - fresh) ** 2, axis=1))
    wrong = int(np.sum(~(error <= tolerance * scale)))  # NaN is wrong
    if not wrong:
        return ""
    worst = float(np.max(error)) / scale if scale > 0 else float("inf")
    return (
        f"{wrong} of {len(error)} timed outputs differ from the same samples computed again "
        f"(worst {worst:.2g}, tolerance {tolerance:g})"
    )


def joined(kept: Sequence[Kept]) -> Kept:
    """Kept outputs of several processes as one; at least one."""
    return Kept(tuple(i for one in kept for i in one.indices), np.concatenate([one.rows for one in kept]))
