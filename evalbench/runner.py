"""plan -> chunks -> reduce -> records: one loop over an executor, serial or Ray.

The plan drops what the run folder already holds, so the same command continues an interrupted run and a finished run
computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from evalbench import environment, registry, sampling, timing, worker
from evalbench.artifacts import Artifacts
from evalbench.cost.budget import BudgetUnit
from evalbench.cost.processes import Launch, fresh
from evalbench.cost.variants import Variant
from evalbench.errors import UserError
from evalbench.interfaces import Metric, Parts
from evalbench.reduce import paired_parts, parts_of, reduce_counts, reduce_metrics
from evalbench.spec import Cell, Chunk, Failure, Record, Solution, Suite, chunks_of, content_id
from evalbench.store import Store, open_run
from evalbench.timing import LIGHT, Effort, LatencyJob, LatencyResult, Timing
from evalbench.worker import (
    ChunkResult,
    Job,
    JobFailure,
    Outcome,
    PreparedResult,
    PrepareJob,
)


class Executor(Protocol):
    """Computes jobs somewhere. `workers` chunks are in flight at a time."""

    workers: int

    def environment(self) -> dict[str, Any]:
        """The environment that jobs are computed in, see `environment.describe`."""
        ...

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes as they land, in any order; pulls a job only when a worker is free."""
        ...

    def latency(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        """Run a latency job alone, nothing else in flight: a Timing per piece, the result last."""
        ...

    def shutdown(self) -> None:
        """Let go of processes."""
        ...


class SerialExecutor:
    """Everything in this process, one thread; for debuggers and small runs."""

    workers = 1
    launch: Launch = staticmethod(fresh)

    def environment(self) -> dict[str, Any]:
        """This process's."""
        return worker.describe()

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes in order."""
        return map(worker.run_job, jobs)

    def latency(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        """Time in fresh processes, one after the other."""
        return timing.run_latency(job, self.launch)

    def shutdown(self) -> None:
        """Nothing to let go of."""


class Observer(Protocol):
    """Told what happens, for progress bars.

    Work comes in phases (`quality`, `latency`) and is counted in forwards: evaluations of the field over all samples.
    """

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """Work of a phase, announced before anything runs."""

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """A piece of it is done, after `seconds` on its worker."""

    def note(self, line: str) -> None:
        """Something worth a line."""


class Silent:
    """An observer that says nothing."""

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """Nothing."""

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved against a suite.

    Attributes:
        suite: with overrides applied. methods: chain texts as written. nfe, guidance, seeds: the grid of cells.
        budget_unit: what `nfe` counts: evaluations of the field, network rows (`evals`), or steps of the grid.
        metrics: metric ids. measure: `quality`, `latency`.
        effort: how much a latency run measures. variant: text of how it executes networks; empty is as quality runs.
        save_samples: keep every image. allow_small_n: see `reduce_metrics`.
        plugins: file name -> source.
    """

    suite: Suite
    methods: tuple[str, ...]
    nfe: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    budget_unit: BudgetUnit = "nfe"
    measure: frozenset[str] = frozenset({"quality"})
    effort: Effort = field(default_factory=Effort)
    variant: str = ""
    save_samples: bool = False
    allow_small_n: bool = False
    plugins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Cells to measure, and the fine solutions that their paired metrics need.

    Attributes:
        metrics: what can be computed here. unavailable: the other metrics asked for, by id, with the reason.
    """

    request: Request
    cells: tuple[Cell, ...]
    metrics: tuple[Metric[Any], ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def solutions(self) -> dict[str, Cell]:
        """Fine solution of each cell, by cell id; empty when no metric is paired or the suite names none."""
        solution = self.request.suite.solution
        if solution is None or not paired_parts(self.metrics):
            return {}
        return {cell.id: self._solution(cell, solution) for cell in self.cells}

    def _solution(self, cell: Cell, solution: Solution) -> Cell:
        """The fine solution of the field that the cell solves; a method that guides itself has a field of its own."""
        guidance = registry.build_method(cell.method).guidance
        method = f"{solution.method}+{guidance}" if guidance else solution.method
        return make_cell(self.request.suite, method, solution.nfe, cell.guidance, cell.seed)

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Extractors to run, by cell id (fine solutions included)."""
        wanted = {cell.id: set(parts_of(self.metrics)) for cell in self.cells}
        for cell in self.solutions.values():
            wanted.setdefault(cell.id, set()).update(paired_parts(self.metrics))
        return {cell_id: tuple(sorted(parts)) for cell_id, parts in wanted.items()}

    @cached_property
    def work(self) -> tuple[Cell, ...]:
        """Every cell to sample once: fine solutions first, since others wait for them."""
        return tuple({cell.id: cell for cell in (*self.solutions.values(), *self.cells)}.values())

    def chunks(self, cell: Cell) -> list[Chunk]:
        """Chunks of a cell, in order."""
        sampling = self.request.suite.sampling
        return chunks_of(cell.id, sampling.samples, sampling.chunk)


def make_cell(suite: Suite, method: str, nfe: int, guidance: float, seed: int) -> Cell:
    """The cell of a method text; the id covers every setting, so two spellings of one method are one cell."""
    chain = registry.build_method(method)
    return Cell(
        suite=suite.name,
        suite_version=suite.version,
        generation=content_id(suite.generation()),
        method=chain.text,
        settings=content_id(chain.settings()),
        nfe=nfe,
        guidance=guidance,
        seed=seed,
    )


def make_plan(request: Request) -> Plan:
    """Check a request and lay out its cells.

    Raises:
        UserError: anything wrong with the suite, a method, a metric, or the grid.
    """
    for name, source in request.plugins.items():
        registry.load_plugin(source, name)
    worker.check_suite(request.suite)
    metrics = tuple(registry.build_metric(metric) for metric in request.metrics)
    for values, option in (
        (request.nfe, "--nfe"),
        (request.methods, "--methods"),
        (request.seeds, "--seeds"),
    ):
        if not values:
            raise UserError(f"{option} is empty; name at least one")
    for nfe in request.nfe:
        if nfe < 1:
            raise UserError(f"--nfe {nfe}: a budget is at least 1 evaluation")
    for seed in request.seeds:
        if seed < 0:
            raise UserError(f"--seeds {seed}: a seed is 0 or more")
    cells = {
        cell.id: cell
        for seed in request.seeds
        for guidance in request.guidance
        for method in request.methods
        for nfe in request.nfe
        for cell in [make_cell(request.suite, method, _nfe(request, method, nfe, guidance), guidance, seed)]
    }
    reasons = {metric.id: _why_unavailable(metric) for metric in metrics}
    usable = tuple(metric for metric in metrics if not reasons[metric.id])
    return Plan(request, tuple(cells.values()), usable, {name: why for name, why in reasons.items() if why})


def _nfe(request: Request, method: str, budget: int, guidance: float) -> int:
    """A budget in evaluations of the field."""
    if request.budget_unit == "nfe":
        return budget
    return sampling.nfe_of(request.suite, method, request.budget_unit, budget, guidance)


def _why_unavailable(metric: Metric[Any]) -> str:
    """Why a metric's features cannot be had on this machine; empty when they can."""
    return "; ".join(why for part in metric.needs if (why := registry.get("extractor", part).missing()))


def run(
    request: Request,
    out: Path | str,
    executor: Callable[[], Executor],
    observer: Observer | None = None,
) -> list[Record]:
    """Run a request into a run folder, resuming what is there.

    Args:
        request: what to measure. out: the run folder.
        executor: makes the executor; called only when something must be computed.
        observer: told of progress.

    Returns:
        The latest record of every cell of this request, quality first, then latency.
    """
    plan = make_plan(request)
    with open_run(out, request.suite, request.plugins) as store:
        loop = _Loop(plan, store, executor, observer or Silent())
        loop.announce()
        if "quality" in request.measure:
            loop.quality()
        if "latency" in request.measure:
            loop.latency()
        return loop.records()


class _Loop:
    """The state of one run: which chunks are there, which cells failed."""

    def __init__(self, plan: Plan, store: Store, executor: Callable[[], Executor], observer: Observer) -> None:
        self.plan, self.store, self.observer = plan, store, observer
        self._make_executor = executor
        self._references: dict[str, Parts | None] = {}
        self._artifacts = Artifacts(store, plan.request.suite, plan.request.plugins)
        self._failed: dict[str, JobFailure] = {}
        self._seconds: dict[str, float] = {}
        self._fingerprints: dict[str, str] = {}

    @cached_property
    def executor(self) -> Executor:
        return self._make_executor()

    def records(self) -> list[Record]:
        """Latest records of the plan's cells."""
        wanted = {cell.id for cell in self.plan.cells}
        found = [record for record in self.store.records() if record.cell.id in wanted]
        return sorted(found, key=lambda record: record.kind, reverse=True)

    def announce(self) -> None:
        """Tell the observer all the work there is, so that its estimate covers the whole run."""
        if "quality" in self.plan.request.measure:
            _, waiting = self._open_quality()
            budgets = {cell.id: cell.nfe for cell in self.plan.work}
            samples = {cell_id: sum(c.stop - c.start for c in chunks) for cell_id, chunks in waiting.items()}
            forwards = sum(count * budgets[cell_id] for cell_id, count in samples.items())
            if forwards:
                self.observer.planned("quality", forwards, sum(samples.values()), self.executor.workers)
        if "latency" in self.plan.request.measure:
            job = self._latency_job()
            if job.cells:
                work, size = self._latency_piece(job)
                self.observer.planned("latency", job.pieces * work, job.pieces * size, 1)

    # --- quality ---

    def quality(self) -> None:
        """Compute the missing chunks, reduce each cell as soon as its last chunk lands."""
        pending, waiting = self._open_quality()
        self._prepare([cell for cell in self.plan.work if waiting.get(cell.id)], waiting)
        self._reduce_ready(pending, waiting)
        if any(waiting.values()):
            for outcome in self.executor.map(self._jobs(waiting)):
                self._land(outcome, waiting)
                self._reduce_ready(pending, waiting)

    def _prepare(self, cells: Sequence[Cell], waiting: dict[str, list[Chunk]]) -> None:
        """Let the methods of these cells search, calibrate or train; a failure is that of all cells that need it."""
        jobs = self._artifacts.missing(cells)
        if not jobs:
            return
        self.observer.note(f"preparing {len(jobs)} method(s), billed apart")
        for outcome in self.executor.map(iter(jobs)):
            if isinstance(outcome, PreparedResult):
                self._artifacts.land(outcome)
            elif isinstance(outcome, JobFailure) and isinstance(outcome.job, PrepareJob):
                for cell in cells:
                    if self._artifacts.key(cell) == outcome.job.key:
                        self._fail(cell, outcome, waiting)

    def _fail(self, cell: Cell, failure: JobFailure, waiting: dict[str, list[Chunk]]) -> None:
        self._failed.setdefault(cell.id, failure)
        waiting[cell.id] = []
        self.observer.note(f"{cell.method} at NFE {cell.nfe}: {failure.failure.message}")

    def _open_quality(self) -> tuple[dict[str, Cell], dict[str, list[Chunk]]]:
        """Cells without a current record, and the missing chunks of them and of their fine solutions, by cell id."""
        done = {r.cell.id for r in self.store.records() if self._is_current(r)}
        pending = {cell.id: cell for cell in self.plan.cells if cell.id not in done}
        needed = {self.plan.solutions[i].id for i in pending if i in self.plan.solutions} | pending.keys()
        cells = [cell for cell in self.plan.work if cell.id in needed]
        waiting = {cell.id: self._missing_chunks(cell) for cell in cells}
        if any(waiting.values()):  # something is computed now: all chunks of a cell must come from that environment
            here = self._workers_class
            waiting = {cell.id: self._missing_chunks(cell, here) for cell in cells}
        return pending, waiting

    @cached_property
    def _workers_class(self) -> str:
        return str(self.executor.environment()["class"])

    def _is_current(self, record: Record) -> bool:
        if record.kind != "quality" or record.status == "error":
            return False
        wanted = {metric.id for metric in self.plan.metrics} | self.plan.unavailable.keys()
        known = record.metrics.keys() | record.missing.keys()
        protocol = content_id(self._protocol(record.cell))
        return record.protocol == protocol and (record.status == "unsupported" or wanted <= known)

    def _missing_chunks(self, cell: Cell, fingerprint_class: str | None = None) -> list[Chunk]:
        """Chunks that are not there, or not with these feature networks, or not of this fingerprint class."""
        features = {name: self._fingerprint(name) for name in self.plan.parts[cell.id]}
        chunks = {chunk: self.store.chunk_facts(chunk) for chunk in self.plan.chunks(cell)}
        usable = {chunk: facts for chunk, facts in chunks.items() if facts and self._is_usable(facts, features)}
        classes = {facts["environment"]["class"] for facts in usable.values()}
        if fingerprint_class is None and len(classes) == 1:
            (fingerprint_class,) = classes
        return [c for c in chunks if c not in usable or usable[c]["environment"]["class"] != fingerprint_class]

    def _is_usable(self, facts: Mapping[str, Any], features: Mapping[str, str]) -> bool:
        if self.plan.request.save_samples and not facts["all_images"]:
            return False
        return bool(features.items() <= facts["features"].items())

    def _jobs(self, waiting: Mapping[str, list[Chunk]]) -> Iterator[Job]:
        """One chunk of every cell, then cell by cell.

        So a method that fails is found out early, and the estimate of the time left knows every kind of cell.
        """
        request = self.plan.request
        todo = [(cell, list(waiting.get(cell.id, ()))) for cell in self.plan.work]
        first = [(cell, chunk) for cell, chunks in todo for chunk in chunks[:1]]
        rest = [(cell, chunk) for cell, chunks in todo for chunk in chunks[1:]]
        for cell, chunk in (*first, *rest):
            if cell.id not in self._failed:
                yield Job(
                    request.suite,
                    cell,
                    chunk,
                    self.plan.parts[cell.id],
                    request.save_samples,
                    request.plugins,
                    self._artifacts.of(cell),
                )

    def _land(self, outcome: Outcome, waiting: dict[str, list[Chunk]]) -> None:
        if isinstance(outcome, JobFailure):
            self._fail(outcome.job.cell, outcome, waiting)
            return
        assert isinstance(outcome, ChunkResult)
        job = outcome.job
        facts = outcome.facts | {"all_images": job.keep_images}
        self.store.write_chunk(job.chunk, outcome.arrays, facts)
        if job.chunk in waiting[job.cell.id]:
            waiting[job.cell.id].remove(job.chunk)
        seconds = float(outcome.facts["seconds"])
        self._seconds[job.cell.id] = self._seconds.get(job.cell.id, 0.0) + seconds
        samples = job.chunk.stop - job.chunk.start
        self.observer.landed("quality", samples * job.cell.nfe, samples, seconds)

    def _reduce_ready(self, pending: dict[str, Cell], waiting: Mapping[str, list[Chunk]]) -> None:
        for cell in list(pending.values()):
            solution = self.plan.solutions.get(cell.id)
            if waiting[cell.id] or (solution is not None and waiting[solution.id]):
                continue
            self.store.append(self._record(cell, solution))
            del pending[cell.id]

    def _record(self, cell: Cell, solution: Cell | None) -> Record:
        facts = self._protocol(cell)
        base = {
            "kind": "quality",
            "cell": cell,
            "samples": self.plan.request.suite.sampling.samples,
            "protocol": content_id(facts),
            "protocol_facts": facts,
            "seconds": self._seconds.get(cell.id, 0.0),
        }
        failed = self._failed.get(cell.id)
        if failed is not None:
            status = "unsupported" if failed.unsupported else "error"
            return Record(**base, status=status, failure=failed.failure)
        chunks = self.plan.chunks(cell)
        fine = None if solution is None or solution.id in self._failed else self.plan.chunks(solution)
        made_in = (self.store.chunk_facts(chunks[0]) or {}).get("environment", {})
        metrics, missing = reduce_metrics(
            self.store,
            chunks,
            fine,
            self.plan.metrics,
            lambda key: self._reference(cell, key),
            allow_small_n=self.plan.request.allow_small_n,
        )
        missing |= self.plan.unavailable
        counts = reduce_counts(self.store, chunks)
        return Record(
            **base,
            status="ok",
            metrics=metrics,
            missing=missing,
            counts=counts,
            bill=self._artifacts.bill(cell),
            environment=made_in,
        )

    def _reference(self, cell: Cell, key: str) -> Parts | None:
        """A reference of the suite; the converged ones hold at the suite's own guidance alone."""
        request = self.plan.request
        guided = cell.guidance != request.suite.sampling.guidance or registry.build_method(cell.method).guidance
        if key.startswith("converged/") and guided:
            return None
        if key not in self._references:
            self._references[key] = worker.load_reference(request.suite, key, request.plugins)
        return self._references[key]

    def _protocol(self, cell: Cell) -> dict[str, Any]:
        """All that makes two numbers comparable, method and budget left out."""
        suite = self.plan.request.suite
        return {
            "generation": suite.generation(),
            "samples": suite.sampling.samples,
            "guidance": cell.guidance,
            "seed": cell.seed,
            "references": {key: ref.sha256 or "model" for key, ref in suite.references.items()},
            "solution": suite.solution.model_dump() if suite.solution else None,
            "features": self._protocol_features,
            "allow_small_n": self.plan.request.allow_small_n,
        }

    @cached_property
    def _protocol_features(self) -> dict[str, str]:
        """Feature networks of all the suite's metrics: a run with `--metrics` stays comparable with one without.

        Networks that cannot be had here are left out, and so are their metrics.
        """
        facts = self.plan.request.suite.metrics
        suites = [registry.build_metric(metric_id) for metric_id in (*facts.names, *facts.optional)]
        names = parts_of([*suites, *self.plan.metrics])
        return {name: self._fingerprint(name) for name in names if not registry.get("extractor", name).missing()}

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = registry.extractor_fingerprint(name)
        return self._fingerprints[name]

    # --- latency ---

    def latency(self) -> None:
        """Time the cells together, where one of them has no latency record on this hardware yet.

        Only what was timed in the same rounds can be compared, so a method that is added has all timed again.
        """
        job = self._latency_job()
        if self._artifacts.missing(job.cells):
            self._prepare(job.cells, {})
            for cell in (cell for cell in job.cells if cell.id in self._failed):
                self.store.append(self._unprepared(cell))
            job = self._latency_job()
        if not job.cells:
            return
        self.observer.note(_announcement(job))
        for event in self.executor.latency(job):
            if isinstance(event, LatencyResult):
                for cell in job.cells:
                    self.store.append(self._latency_record(cell, event))
            else:
                self.observer.landed("latency", *self._latency_piece(job), event.seconds)

    def _latency_piece(self, job: LatencyJob) -> tuple[float, int]:
        """Forwards and samples of a piece, for estimates."""
        return sum(c.nfe for c in job.cells) * job.samples, len(job.cells) * job.samples

    def _latency_job(self) -> LatencyJob:
        records = self.store.records()
        failed = {r.cell.id for r in records if r.kind == "quality" and r.status != "ok"} | self._failed.keys()
        timed = {r.cell.id for r in records if self._is_timed_here(r)}
        once = {(c.method, c.settings, c.nfe, c.guidance): c for c in reversed(self.plan.cells)}  # seeds cost the same
        cells = tuple(c for c in self.plan.cells if c in once.values() and c.id not in failed)
        if all(cell.id in timed for cell in cells):
            cells = ()
        request = self.plan.request
        artifacts = {cell.id: self._artifacts.of(cell) for cell in cells}
        return LatencyJob(request.suite, cells, request.effort, self._variant, request.plugins, artifacts)

    @cached_property
    def _variant(self) -> str:
        """Canonical text of the variant."""
        wanted, suite = self.plan.request.variant, self.plan.request.suite
        return (Variant.parse(wanted) if wanted else sampling.default_variant(suite)).text

    def _is_timed_here(self, record: Record) -> bool:
        """Whether a record holds what this request asks for, measured on this kind of device."""
        effort = self.plan.request.effort
        if record.kind != "latency" or record.variant != self._variant or not self._is_this_device(record):
            return False
        if record.status == "unsupported":
            return True
        enough = {one.batch for one in record.latency if len(one.seconds) >= effort.processes}
        return enough >= set(effort.batches_of(self.plan.request.suite))

    def _is_this_device(self, record: Record) -> bool:
        return bool(record.environment.get("device") == environment.device_name(environment.pick_device()))

    def _unprepared(self, cell: Cell) -> Record:
        found = self._failed[cell.id]
        status = "unsupported" if found.unsupported else "error"
        return Record(kind="latency", status=status, cell=cell, failure=found.failure, variant=self._variant)

    def _latency_record(self, cell: Cell, result: LatencyResult) -> Record:
        outcome = result.outcomes[cell.id]
        base = {"kind": "latency", "cell": cell, "environment": result.environment, "variant": self._variant}
        if isinstance(outcome, Failure):
            return Record(**base, status="unsupported" if result.unsupported else "error", failure=outcome)
        return Record(**base, status="ok", latency=outcome)


def _announcement(job: LatencyJob) -> str:
    """What is about to be timed."""
    sizes = " and ".join(map(str, job.effort.batches_of(job.suite)))
    return (
        f"timing {len(job.cells)} cells alone, batch {sizes}, {job.variant}: {job.effort.processes} fresh process(es), "
        f"at least {job.effort.rounds} rounds each"
    )


def light(request: Request) -> Request:
    """The same request with the least that a latency run can measure."""
    return replace(request, effort=LIGHT)


def needs_attention(records: Iterable[Record]) -> bool:
    """Whether a run finished with error rows (exit code 5)."""
    return any(record.status == "error" for record in records)


def unique(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values without repeats, order kept."""
    return tuple(dict.fromkeys(values))
