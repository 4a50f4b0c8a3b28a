"""What a latency run is told, and what it finds: plain facts that cross process borders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evalbench.cost.breakdown import Stopwatch
from evalbench.cost.clock import Clock
from evalbench.cost.energy import Energy
from evalbench.cost.honesty import Kept
from evalbench.cost.latency import Steady
from evalbench.cost.memory import Memory
from evalbench.cost.nvml import Absent, Gpu
from evalbench.cost.ratio import MIN_PROCESSES
from evalbench.spec import Failure


class Stand(ABC):
    """Arms that are ready to run in this process.

    Attributes:
        clock: of the device. device: where. gpu: whom to ask about energy and clocks, or why nobody can be asked.
        weights: bytes of the networks, None where the model does not say.
    """

    clock: Clock
    device: torch.device
    gpu: Gpu | Absent
    weights: int | None = None

    @abstractmethod
    def call(self, arm: str, indices: range) -> Callable[[], torch.Tensor]:
        """A call to time: from x_T to finished samples (B, *S) of the global indices.

        What a timed call must not hold (conditions) is made here, before the clock starts.
        """

    @abstractmethod
    def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
        """The same samples as the quality run computes them: its batch size, a method built anew."""

    @abstractmethod
    def meter(self, stopwatch: Stopwatch | None) -> None:
        """Give later calls a stopwatch for their spans, or take it away."""


class Bench(ABC):
    """Facts from which any process builds its stand. It is sent to processes, so it holds no network.

    Attributes:
        arms: names of the competitors. batches: samples per call; 1 and the suite's.
    """

    arms: tuple[str, ...]
    batches: tuple[int, ...]

    @abstractmethod
    def build(self) -> Stand:
        """Load what all arms share."""


@dataclass(frozen=True)
class Rules:
    """How much is measured.

    Attributes:
        processes: fresh ones; below `ratio.MIN_PROCESSES` there is no interval. rounds: per process, at least.
        samples: calls of each arm in a round. seconds: measured time of each arm per process, at least: the first
            process finds out how many rounds that takes, the others do as many.
        most: rounds at most. steady: when warm-up ends. metered: calls per process for the breakdown.
        kept: samples of each arm, batch size and process that are computed again. pin: on a CPU, hold the process on
            as many cores as it has threads. seed: of the random choices.
    """

    processes: int = MIN_PROCESSES
    rounds: int = 5
    samples: int = 2
    seconds: float = 0.0
    most: int = 1000
    steady: Steady = field(default_factory=Steady)
    metered: int = 1
    kept: int = 4
    pin: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Order:
    """What one process is asked to do.

    Attributes:
        arms: those still in. process: its number. rounds: by batch size, as the first process found; empty for it.
        launched: nanoseconds of the host's clock when the process was asked for.
    """

    bench: Bench
    rules: Rules
    arms: tuple[str, ...]
    process: int
    rounds: Mapping[int, int]
    launched: int


@dataclass(frozen=True)
class ArmRun:
    """What one process measured of one arm at one batch size.

    Attributes:
        first: seconds of the arm's first call in this process: lazy set-up, and compiling where the variant compiles.
        warmup: seconds of the calls before the measured ones. steady: whether they settled.
        seconds: measured, by round and sample. parts: metered passes, see `breakdown.metered`.
        kept: outputs to be checked. fresh: nothing else had run in this process before its first call.
    """

    arm: str
    batch: int
    first: float
    warmup: tuple[float, ...]
    steady: bool
    seconds: tuple[tuple[float, ...], ...]
    memory: Memory
    energy: Energy
    parts: tuple[Mapping[str, float], ...]
    kept: Kept
    fresh: bool


@dataclass(frozen=True)
class Sitting:
    """What one fresh process measured.

    Attributes:
        build: seconds from asking for the process until the model was loaded.
        cold: seconds from asking for the process to the first finished samples; the opening arm's, None without one.
        clock, threads, cores: how it was measured; cores is empty where the process was not pinned.
        failures: arms that raised. flags: doubts about the machine, each with the batch size at which they arose.
    """

    process: int
    build: float
    cold: float | None
    clock: str
    threads: int
    cores: tuple[int, ...]
    runs: tuple[ArmRun, ...]
    failures: Mapping[str, Failure]
    flags: tuple[tuple[int, str], ...]
