"""plan -> chunks -> reduce -> records: one loop over an executor, serial or Ray.

The plan drops what the run folder already holds, so the same command continues an interrupted run and a finished run
computes nothing. A chunk that is found damaged is named and computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from evalbench import environment, registry, sampling, shards, starts, status, worker
from evalbench.artifacts import Artifacts
from evalbench.beside import Beside, at_once
from evalbench.cost.variants import Variant
from evalbench.errors import BadSamples, EvalbenchError
from evalbench.execution import Executor, SerialExecutor
from evalbench.failures import Policy
from evalbench.interfaces import Parts
from evalbench.observer import Observer, Silent
from evalbench.plan import Plan, Request, make_cell, make_plan, unique
from evalbench.reduce import parts_of, reduce_cell
from evalbench.shards import Claims, Shard
from evalbench.spec import DECLARED, Cell, Chunk, Failure, MetricValue, Record, content_id
from evalbench.store import DamagedChunk, Store, open_run
from evalbench.timing import LIGHT, LatencyJob, LatencyResult
from evalbench.worker import ChunkResult, Job, JobFailure, Outcome, PreparedResult, PrepareJob

# What callers of a run need, whichever module it lives in.
__all__ = [
    "Executor",
    "Observer",
    "Plan",
    "Policy",
    "Request",
    "SerialExecutor",
    "Shard",
    "Silent",
    "light",
    "make_cell",
    "make_plan",
    "needs_attention",
    "run",
    "unique",
]

_Reduce = Callable[[Callable[[], Record]], Future[Record]]
_DAMAGES = 3  # times that one chunk may be found damaged in a run before the disk is to blame


def run(
    request: Request,
    out: Path | str,
    executor: Callable[[], Executor],
    observer: Observer | None = None,
    *,
    shard: Shard | None = None,
    policy: Policy | None = None,
) -> list[Record]:
    """Run a request into a run folder, resuming what is there.

    Args:
        request: what to measure. out: the run folder.
        executor: makes the executor; called only when something must be computed.
        observer: told of progress.
        shard: compute only what this process of a job array can claim; None holds the folder alone.
        policy: when a process of a job array counts as hanging, and a chunk as the cause.

    Returns:
        The latest record of every cell of this request, quality first, then latency.
    """
    plan = make_plan(request)
    request = plan.request
    with (
        open_run(out, request.suite, request.plugins, shared=shard is not None) as store,
        shards.claims_of(store.folder, shard, policy or Policy()) as claims,
        status.kept(store.folder, observer or Silent()) as told,
    ):
        loop = _Loop(plan, store, executor, told, claims)
        loop.announce()
        if "quality" in request.measure:
            loop.quality()
        if "latency" in request.measure:
            loop.latency()
        return loop.records()


class _Loop:
    """The state of one run: which chunks are there, which cells failed."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        executor: Callable[[], Executor],
        observer: Observer,
        claims: Claims,
    ) -> None:
        self.plan, self.store, self.observer, self.claims = plan, store, observer, claims
        self._make_executor = executor
        self._references: dict[str, Parts | None] = {}
        self._artifacts = Artifacts(store, plan.request.suite, plan.request.plugins)
        self._failed: dict[str, JobFailure] = {}
        self._seconds: dict[str, float] = {}
        self._fingerprints: dict[str, str] = {}
        self._damages: dict[Chunk, int] = {}
        self._reducing: dict[str, Future[Record]] = {}  # by cell id, in the order in which records are appended
        self._known = len(store.records_after(0))  # lines of records.jsonl that were there when this process began

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
            budgets = {cell.id: cell.nfe for cell in self.plan.work}
            samples = {cell_id: sum(c.stop - c.start for c in chunks) for cell_id, chunks in self._waiting.items()}
            forwards = sum(count * budgets[cell_id] for cell_id, count in samples.items())
            if forwards:
                self.observer.planned("quality", forwards, sum(samples.values()), self.executor.workers)
            self._tell_cells()
        if "latency" in self.plan.request.measure:
            job = self._latency_job()
            if job.cells:
                work, size = self._latency_piece(job)
                self.observer.planned("latency", job.pieces * work, job.pieces * size, 1)

    # --- quality ---

    def quality(self) -> None:
        """Compute the missing chunks, reduce each cell as soon as its last chunk lands."""
        self._prepare([cell for cell in self.plan.work if self._waiting.get(cell.id)])
        self._reduce_ready()
        with Beside(environment.prepare_process) as beside:
            while self._pending:
                landed = 0
                if any(self._waiting.values()):
                    reduce = beside if self.executor.apart else at_once
                    for outcome in self.executor.map(self._jobs()):
                        landed += 1
                        self._land(outcome)
                        self._reduce_ready(reduce)
                if self.claims.shared:
                    self._look_around()
                self._reduce_ready()
                if self.claims.shared and self._pending and not landed:
                    shards.wait()

    @cached_property
    def _pending(self) -> dict[str, Cell]:
        """Cells without a current record, or with a chunk that is gone, by id."""
        done = {r.cell.id for r in self.store.records() if self._is_current(r) and self._has_chunks(r)}
        return {cell.id: cell for cell in self.plan.cells if cell.id not in done}

    @cached_property
    def _waiting(self) -> dict[str, dict[Chunk, None]]:
        """Missing chunks of pending cells and of their fine solutions, by cell id, in order."""
        needed = {self.plan.solutions[i].id for i in self._pending if i in self.plan.solutions} | self._pending.keys()
        cells = [cell for cell in self.plan.work if cell.id in needed]
        waiting = {cell.id: self._missing_chunks(cell) for cell in cells}
        if any(waiting.values()):  # something is computed now: all chunks of a cell must come from that environment
            here = self._workers_class
            begun = [cell for cell in cells if self.store.present_chunks(cell.id)]
            waiting |= {cell.id: self._missing_chunks(cell, here) for cell in begun}
        return {cell_id: dict.fromkeys(chunks) for cell_id, chunks in waiting.items()}

    def _tell_cells(self) -> None:
        total = len(self.plan.cells)
        errors = sum(1 for cell in self.plan.cells if cell.id in self._failed and cell.id not in self._pending)
        self.observer.cells(total - len(self._pending), total, errors)

    def _look_around(self) -> None:
        """See what other shards computed, recorded, or found to fail."""
        for record in self.store.records_after(self._known):
            cell = self._pending.get(record.cell.id)
            if cell is None or record.kind != "quality":
                continue
            if record.status == "error" or self._is_current(record):
                del self._pending[cell.id]
                self._waiting[cell.id] = {}
        for cell in self.plan.work:
            if self._waiting.get(cell.id):
                self._waiting[cell.id] = dict.fromkeys(self._missing_chunks(cell, self._workers_class))
        self._tell_cells()

    def _prepare(self, cells: Sequence[Cell]) -> None:
        """Let the methods of these cells search, calibrate or train; a failure is that of all cells that need it."""
        while jobs := self._artifacts.missing([cell for cell in cells if cell.id not in self._failed]):
            mine = [job for job in jobs if self._may_prepare(job, cells)]
            if mine:
                self.observer.note(f"preparing {len(mine)} method(s), billed apart")
            elif self.claims.shared:
                shards.wait()
            for outcome in self.executor.map(iter(mine)):
                if isinstance(outcome, PreparedResult):
                    self._artifacts.land(outcome)
                    self.claims.release(outcome.job)
                elif isinstance(outcome, JobFailure):
                    self.claims.release(outcome.job)
                    self._fail_prepared(outcome, cells)

    def _may_prepare(self, job: PrepareJob, cells: Sequence[Cell]) -> bool:
        """Whether this process prepares a method: no other does, and none has."""
        taken = self.claims.take(job)
        if isinstance(taken, JobFailure):
            self._fail_prepared(taken, cells)
            return False
        if taken and not self._artifacts.missing([job.cell]):
            self.claims.release(job)
            return False
        return taken

    def _fail_prepared(self, failure: JobFailure, cells: Sequence[Cell]) -> None:
        assert isinstance(failure.job, PrepareJob)
        for cell in cells:
            if self._artifacts.key(cell) == failure.job.key:
                self._fail(cell, failure)

    def _fail(self, cell: Cell, failure: JobFailure) -> None:
        self._failed.setdefault(cell.id, failure)
        self._waiting[cell.id] = {}
        self.observer.note(f"{cell.method} at NFE {cell.nfe}: {failure.failure.message}")

    @cached_property
    def _workers_class(self) -> str:
        """The fingerprint class that this run computes in: one that has chunks here, where there is a choice."""
        found = str(self.executor.environment(self._classes_here())["class"])
        self.claims.agree(found)
        return found

    def _classes_here(self) -> Collection[str]:
        """Fingerprint classes of the first chunk of each cell, the most common first."""
        facts = (self.store.chunk_facts(self.plan.chunks(cell)[0]) for cell in self.plan.work)
        classes = Counter(one["environment"]["class"] for one in facts if one)
        return [name for name, _ in classes.most_common()]

    def _has_chunks(self, record: Record) -> bool:
        """Whether every chunk behind a record has a file; `gc` keeps those, without their features."""
        if record.status == "unsupported":
            return True
        behind = [record.cell, *filter(None, [self.plan.solutions.get(record.cell.id)])]
        return all(self.store.present_chunks(cell.id).issuperset(self.plan.chunks(cell)) for cell in behind)

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
        chunks, usable = self.plan.chunks(cell), {}
        for chunk in self.store.present_chunks(cell.id).intersection(chunks):
            facts = self.store.chunk_facts(chunk)
            if facts is None:
                self._drop(chunk, f"{self.store.chunk_file(chunk)} is damaged")
            elif self._is_usable(facts, features):
                usable[chunk] = facts["environment"]["class"]
        if fingerprint_class is None and len(set(usable.values())) == 1:
            fingerprint_class = next(iter(usable.values()))
        return [chunk for chunk in chunks if usable.get(chunk, "none") != fingerprint_class]

    def _drop(self, chunk: Chunk, why: str) -> None:
        """Forget a damaged chunk, and say so."""
        self._damages[chunk] = self._damages.get(chunk, 0) + 1
        if self._damages[chunk] >= _DAMAGES:
            raise EvalbenchError(
                f"{why}, for the {_DAMAGES}rd time in this run; check the disk under {self.store.folder}"
            )
        self.store.remove_chunk(chunk)
        self.observer.note(f"{why}: computed again")

    def _is_usable(self, facts: Mapping[str, Any], features: Mapping[str, str]) -> bool:
        if self.plan.request.save_samples and not facts["all_images"]:
            return False
        return bool(features.items() <= facts["features"].items())

    def _jobs(self) -> Iterator[Job]:
        """One chunk of every cell, then cell by cell, those of the largest budget first.

        So a method that fails is found out early, the estimate of the time left knows every kind of cell, and at the
        end no worker has a long chunk before it while the others have none.
        """
        given: set[Chunk] = set()
        longest_first = sorted(self.plan.work, key=lambda cell: -cell.nfe)
        for most in (1, None):
            for cell in longest_first:
                chunks = self.claims.order([c for c in self._waiting.get(cell.id, ()) if c not in given])
                for chunk in chunks[:most]:
                    if cell.id in self._failed:
                        break
                    if most == 1:
                        given.add(chunk)
                    job = self._claimed(cell, chunk)
                    if job is not None:
                        yield job

    def _claimed(self, cell: Cell, chunk: Chunk) -> Job | None:
        """The job of a chunk; None when another process has it, or has done it."""
        request = self.plan.request
        parts, artifacts = self.plan.parts[cell.id], self._artifacts.of(cell)
        job = Job(request.suite, cell, chunk, parts, request.save_samples, request.plugins, artifacts)
        taken = self.claims.take(job)
        if isinstance(taken, JobFailure):
            self._fail(cell, taken)
            return None
        if not taken:
            return None
        if self.claims.shared and self._has_landed(cell, chunk):
            self.claims.release(job)
            self._waiting[cell.id].pop(chunk, None)
            return None
        return job

    def _has_landed(self, cell: Cell, chunk: Chunk) -> bool:
        """Whether another shard wrote a chunk since this process looked."""
        facts = self.store.chunk_facts(chunk)
        features = {name: self._fingerprint(name) for name in self.plan.parts[cell.id]}
        return bool(facts and self._is_usable(facts, features) and facts["environment"]["class"] == self._workers_class)

    def _land(self, outcome: Outcome) -> None:
        self.observer.workers(self.executor.states())
        if isinstance(outcome, JobFailure):
            self.claims.release(outcome.job)
            self._fail(outcome.job.cell, outcome)
            return
        assert isinstance(outcome, ChunkResult)
        job = outcome.job
        facts = outcome.facts | {"all_images": job.keep_images}
        self.store.write_chunk(job.chunk, outcome.arrays, facts)
        self.claims.release(job)
        self._waiting[job.cell.id].pop(job.chunk, None)
        seconds = float(outcome.facts["seconds"])
        self._seconds[job.cell.id] = self._seconds.get(job.cell.id, 0.0) + seconds
        samples = job.chunk.stop - job.chunk.start
        self.observer.landed("quality", samples * job.cell.nfe, samples, seconds)

    def _reduce_ready(self, reduce: _Reduce = at_once) -> None:
        """Record the pending cells whose chunks are all there, unless another process is doing that.

        Args:
            reduce: makes the record of a cell. Where it takes its time, the record is appended at a later call.
        """
        ready = [cell for cell in self._pending.values() if cell.id not in self._reducing and self._is_ready(cell)]
        if not ready and not self._reducing:
            return
        with self.claims.reducing() as mine:
            if not mine:
                return
            if self.claims.shared:
                self._look_around()
            for cell in ready:
                if cell.id in self._pending and self._is_ready(cell):
                    self._reducing[cell.id] = reduce(partial(self._record, cell, self.plan.solutions.get(cell.id)))
                if reduce is at_once:
                    self._append_reduced(wait=True)
            self._append_reduced(wait=reduce is at_once)
        self._tell_cells()

    def _is_ready(self, cell: Cell) -> bool:
        solution = self.plan.solutions.get(cell.id)
        return not self._waiting.get(cell.id) and (solution is None or not self._waiting.get(solution.id))

    def _append_reduced(self, *, wait: bool) -> None:
        """Append the records that are made, in the order in which their cells became ready.

        When a chunk turns out to be damaged, it is computed first, and what is being reduced is reduced again later.
        """
        while self._reducing:
            cell_id, future = next(iter(self._reducing.items()))
            if not wait and not future.done():
                return
            try:
                record = future.result()
            except DamagedChunk as damage:
                self._stop_reducing()
                self._repair(damage)
                return
            self.store.append(record)
            del self._pending[cell_id], self._reducing[cell_id]

    def _stop_reducing(self) -> None:
        """Until nothing reads a chunk any more."""
        running = [future for future in self._reducing.values() if not future.cancel()]
        wait_for(running)
        self._reducing.clear()

    def _repair(self, damage: DamagedChunk) -> None:
        """Let a damaged chunk be computed again."""
        self._drop(damage.chunk, str(damage).split(";")[0])
        for owner in self.plan.work:
            if owner.id == damage.chunk.cell_id:
                missing = self._missing_chunks(owner, self._workers_class)
                self._waiting[owner.id] = dict.fromkeys(missing)

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
        metrics, missing = self.plan.metrics_of(cell)
        fine = None if solution is None or solution.id in self._failed else self.plan.chunks(solution)
        made_in = (self.store.chunk_facts(chunks[0]) or {}).get("environment", {})
        try:
            found = reduce_cell(
                self.store,
                chunks,
                fine,
                metrics,
                lambda key: self._reference(cell, key),
                allow_small_n=self.plan.request.allow_small_n,
            )
        except BadSamples as error:
            failure = Failure(type=type(error).__name__, message=str(error))
            return Record(**base, status="error", failure=failure)
        return Record(
            **base,
            status="ok",
            metrics=_noted(found.metrics, found.counts),
            missing={**found.missing, **missing},
            counts=found.counts,
            bill=self._artifacts.bill(cell),
            footprint=self._artifacts.footprint(cell),
            environment=made_in,
        )

    def _reference(self, cell: Cell, key: str) -> Parts | None:
        """A reference of the suite; the converged ones hold at the suite's own guidance alone."""
        request = self.plan.request
        guided = cell.guidance != request.suite.sampling.guidance or registry.build_method(cell.method).guidance
        if key.startswith("converged/") and guided:
            return None
        if key not in self._references:
            found = worker.load_reference(request.suite, key, request.plugins)
            if found is not None and request.suite.references[key].model:
                self.store.write_reference(key, found)
            self._references[key] = found
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
            **starts.facts(suite.sampling.noise),
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
            self._prepare(job.cells)
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


def _noted(metrics: Mapping[str, MetricValue], counts: Mapping[str, float]) -> dict[str, MetricValue]:
    """Metrics of a cell; beside those of one whose evaluations nobody counted, in every table, stands that."""
    if f"nfe{DECLARED}" not in counts:
        return dict(metrics)
    said = f"NFE {counts[f'nfe{DECLARED}']:g} declared, not counted"
    return {
        name: value.model_copy(update={"note": "; ".join(filter(None, (value.note, said)))})
        for name, value in metrics.items()
    }


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
