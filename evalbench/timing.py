"""Latency of a suite's cells: the protocol of `evalbench.cost.processes` with methods, models and records around it.

Nothing here loads a model: that is what the fresh processes do. No ray; the executor says where they run.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from evalbench import environment, registry
from evalbench.cost.bench import Bench, Rules, Sitting, Stand
from evalbench.cost.breakdown import Stopwatch
from evalbench.cost.clock import Clock, clock_for
from evalbench.cost.honesty import TOLERANCE
from evalbench.cost.latency import Steady
from evalbench.cost.ledger import Ledger
from evalbench.cost.measured import Measured, collect, failures
from evalbench.cost.memory import weights_bytes
from evalbench.cost.nvml import open_gpu
from evalbench.cost.processes import Launch, fresh, recheck_answers, sittings
from evalbench.cost.variants import Variant
from evalbench.errors import Unsupported
from evalbench.interfaces import Artifact, Model
from evalbench.registry import Chain
from evalbench.sampling import conditions, default_variant, images_of, sample, setup_of
from evalbench.spec import Cell, EnergyUse, Failure, Latency, MemoryUse, Split, Suite, content_id

MOST_SAMPLES = 64  # of a timed call; a suite's own batch may be larger


@dataclass(frozen=True)
class Effort:
    """How much a latency run measures.

    Attributes:
        processes: fresh ones; below 5 ratios have no interval. rounds: per process, at least.
        seconds: measured time of each cell per process, at least. batches: samples per call; empty is 1 and the
            suite's, `MOST_SAMPLES` at most. steady: when warm-up ends. kept: outputs of each cell, batch size and
            process that are computed again. pin: see `Rules`.
    """

    processes: int = 5
    rounds: int = 5
    seconds: float = 0.2
    batches: tuple[int, ...] = ()
    steady: Steady = field(default_factory=Steady)
    kept: int = 4
    pin: bool = True

    def batches_of(self, suite: Suite) -> tuple[int, ...]:
        """Batch sizes to time, rising."""
        return tuple(sorted({*self.batches} or {1, min(MOST_SAMPLES, suite.sampling.batch)}))

    def rules(self) -> Rules:
        """For the engine."""
        return Rules(
            processes=self.processes,
            rounds=self.rounds,
            seconds=self.seconds,
            steady=self.steady,
            metered=3,
            kept=self.kept,
            pin=self.pin,
        )


# Enough to see every table and figure of a report: no interval, and a warm-up that may be too short, which is flagged.
LIGHT = Effort(processes=1, rounds=3, seconds=0.0, batches=(MOST_SAMPLES,), steady=Steady(window=3, most=8), kept=2)


@dataclass(frozen=True)
class LatencyJob:
    """Cells to time against each other, interleaved, alone on a device.

    Attributes:
        variant: text of how networks are executed; empty is as quality runs do. artifacts: by cell id.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    effort: Effort = field(default_factory=Effort)
    variant: str = ""
    plugins: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, tuple[Artifact | None, ...]] = field(default_factory=dict)

    @property
    def pieces(self) -> int:
        """Parts in which the work lands: the processes, and the check of their answers."""
        return self.effort.processes + 1

    @property
    def samples(self) -> int:
        """Samples of each cell in a process, at least; for estimates of the time left."""
        calls = 2 * self.effort.steady.window + 2 * self.effort.rounds + 2
        return calls * sum(self.effort.batches_of(self.suite))


@dataclass(frozen=True)
class Timing:
    """A piece of a latency job is done, after `seconds`; for progress."""

    seconds: float


@dataclass(frozen=True)
class LatencyResult:
    """Timings by cell id, one per batch size, or why a cell could not be timed.

    Attributes:
        unsupported: the device cannot run the variant.
    """

    outcomes: dict[str, tuple[Latency, ...] | Failure]
    environment: dict[str, Any]
    unsupported: bool = False


def run_latency(
    job: LatencyJob, launch: Launch = fresh, now: Callable[[], int] = time.perf_counter_ns
) -> Iterator[Timing | LatencyResult]:
    """Time whole sampling calls, from x_T to finished images, without feature extraction, in fresh processes.

    Args:
        launch: makes a process. now: nanoseconds of the clock that processes read too.

    Yields:
        A Timing after each piece, and the LatencyResult last.
    """
    environment.prepare_process()
    registry.load_plugins(job.plugins)  # a Ray worker that times has loaded none
    described = environment.describe(environment.pick_device())
    bench = CellBench.of(job)
    found: list[Sitting] = []
    try:
        started = now()
        for sitting in sittings(bench, job.effort.rules(), launch, now):
            found.append(sitting)
            yield Timing((now() - started) / 1e9)
            started = now()
        # as the quality run computes them: another execution or dtype is held against that
        doubts = recheck_answers(replace(bench, variant=""), found, TOLERANCE[bench.executed.dtype], launch)
        yield Timing((now() - started) / 1e9)
    except Exception as error:  # the processes themselves failed: nothing was measured
        failure = _failure(error)
        yield LatencyResult({cell.id: failure for cell in job.cells}, described, isinstance(error, Unsupported))
        return
    yield LatencyResult(_outcomes(job, bench, found, doubts, described), described)


def _failure(error: Exception) -> Failure:
    text = str(error).strip()
    message = text.splitlines()[0] if text else type(error).__name__
    return Failure(type=type(error).__name__, message=message, traceback="".join(traceback.format_exception(error)))


def _outcomes(
    job: LatencyJob, bench: CellBench, found: Sequence[Sitting], doubts: Mapping[str, str], described: dict[str, Any]
) -> dict[str, tuple[Latency, ...] | Failure]:
    measured, failed = collect(found), failures(found)
    timed = [list(map(float, one.seconds.ravel())) for one in measured.values()]
    shared = {
        "session": content_id([sorted(bench.cells), bench.executed.text, timed]),
        "variant": bench.executed.text,
        "device": described["device"],
        "embedded": is_embedded(job.suite),
    }
    checked = {arm: sum(len(r.kept.indices) for s in found for r in s.runs if r.arm == arm) for arm in bench.cells}
    outcomes: dict[str, tuple[Latency, ...] | Failure] = {}
    for arm, cell in bench.cells.items():
        if arm in failed:
            outcomes[cell.id] = failed[arm]
            continue
        chain = registry.build_method(cell.method)
        facts = shared | {"impl": _impl(chain), "training_free": is_training_free(chain)}
        answers = {"doubt": doubts.get(arm, ""), "checked": checked[arm]}
        outcomes[cell.id] = tuple(_latency(measured[arm, batch], facts | answers) for batch in bench.batches)
    return outcomes


def _latency(one: Measured, facts: Mapping[str, Any]) -> Latency:
    return Latency(
        batch=one.batch,
        seconds=one.seconds.tolist(),
        warmup=one.warmup,
        steady=one.steady,
        threads=one.threads,
        cores=one.cores if any(one.cores) else (),
        clock=one.clock,
        cold=one.cold,
        build=one.build,
        first=one.first,
        breakdown=Split(**asdict(one.breakdown)) if one.breakdown else None,
        memory=MemoryUse(**asdict(one.memory)),
        energy=EnergyUse(**asdict(one.energy)),
        flags=one.flags,
        **facts,
    )


def is_training_free(chain: Chain) -> bool:
    """A solver on the unchanged network of the suite, guided or not, with nothing prepared: a baseline."""
    unchanged = all(wrap.guides for wrap in chain.wraps)
    other = any(word.startswith("role ") or word in ("network", "blocks", "split") for word in chain.requires)
    return unchanged and not chain.prepares and not other


def _impl(chain: Chain) -> str:
    """Whose code it is: what the chain's parts say, else evalbench's own reference implementation."""
    said = [getattr(part, "impl", "reference") for part in chain.parts]
    return next((impl for impl in said if impl != "reference"), "reference")


def is_embedded(suite: Suite) -> bool:
    """Whether the suite's model is one that evalbench brings along; a loader of others says `embedded = False`."""
    loader = registry.get("model", suite.model.loader)
    return bool(getattr(loader, "embedded", loader.__module__.startswith("evalbench.models.")))


# --- in the processes -----------------------------------------------------------------------------------------------


def arm_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Cells by a name that people can read, each once."""
    guided, seeded = len({c.guidance for c in cells}) > 1, len({c.seed for c in cells}) > 1
    named: dict[str, Cell] = {}
    for cell in cells:
        extra = (f", guidance {cell.guidance:g}" if guided else "") + (f", seed {cell.seed}" if seeded else "")
        named[f"{cell.method} at NFE {cell.nfe}{extra}"] = cell
    return named if len(named) == len(cells) else {cell.id: cell for cell in cells}


@dataclass(frozen=True)
class CellBench(Bench):
    """Cells of one suite as competitors. Picklable: it holds facts and artefacts, no network.

    Attributes:
        cells: by name of the competitor. variant: its text; empty is as quality runs do.
    """

    suite: Suite
    cells: Mapping[str, Cell]
    batches: tuple[int, ...]
    variant: str = ""
    plugins: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, tuple[Artifact | None, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: LatencyJob) -> CellBench:
        """The bench of a job."""
        batches = job.effort.batches_of(job.suite)
        return cls(job.suite, arm_names(job.cells), batches, job.variant, job.plugins, job.artifacts)

    @property
    def arms(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.cells)

    @property
    def executed(self) -> Variant:
        """The variant."""
        return Variant.parse(self.variant) if self.variant else default_variant(self.suite)

    def build(self) -> Stand:
        return CellStand(self)


class CellStand(Stand):
    """The suite's model and the cells' methods, loaded."""

    def __init__(self, bench: CellBench) -> None:
        self.bench = bench
        self.setup = setup_of(bench.suite, bench.plugins, bench.executed)
        self.setup.door.counting = False  # an evaluation that only counts is no part of a first call
        self.device = self.setup.device
        self.clock: Clock = clock_for(self.device)
        self.gpu = open_gpu(self.device)
        self.weights = weights_bytes(self._models())
        self.chains = {arm: self._chain(arm) for arm in bench.cells}

    def _models(self) -> list[Model]:
        roles = self.bench.suite.roles
        return [self.setup.model, *(self.setup.door.role(name).model for name in roles)]

    def _chain(self, arm: str) -> Chain:
        cell = self.bench.cells[arm]
        return registry.build_method(cell.method).equipped(self.bench.artifacts.get(cell.id, ()))

    def call(self, arm: str, indices: Sequence[int]) -> Callable[[], torch.Tensor]:
        cell, chain = self.bench.cells[arm], self.chains[arm]
        cond = conditions(self.setup.suite, self.setup.model, indices, self.device)

        def run() -> torch.Tensor:
            x = sample(self.setup, chain, cell, indices, cond, Ledger(len(indices), budget=cell.nfe))
            images = images_of(self.setup.model, x, self.setup.door.stopwatch)
            return x if images is None else images

        return run

    def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
        batch = self.bench.suite.sampling.batch
        self.chains[arm] = self._chain(arm)
        rows = []
        for first in range(0, len(indices), batch):
            wanted = [*indices[first : first + batch]]
            padded = [*wanted, *range(batch - len(wanted))]
            rows.append(self.call(arm, padded)()[: len(wanted)].cpu().numpy())
        return np.concatenate(rows)

    def meter(self, stopwatch: Stopwatch | None) -> None:
        self.setup.door.stopwatch = stopwatch
