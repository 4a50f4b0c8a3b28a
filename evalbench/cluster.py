"""The Ray executor: warm actors that compute jobs. The only module that imports ray."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import ray

from evalbench import timing, warm, worker
from evalbench.errors import EvalbenchError, UserError, unknown
from evalbench.failures import Policy, Retries
from evalbench.spec import Suite
from evalbench.timing import LatencyJob, LatencyResult, Timing
from evalbench.worker import Job, JobFailure, Outcome, PrepareJob

_LOOK = 5.0  # seconds between looks at which nodes there are
_START = 120.0  # seconds that the first workers have to start
_ANSWER = 5.0  # seconds that a hanging worker has to say where it stands
# one thread each (design, section 5); set before torch is imported
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives the memory of large tensors back to the kernel, which hands it out again, cleared page by page, at the
# next operation. A worker computes the same shapes over and over: it keeps up to a gigabyte, for tensors of up to 32 MB
# (the most that glibc takes), in the one arena whose memory does not go back with a thread's heap.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}


def worker_variables() -> dict[str, str]:
    """The environment variables of a worker; those of the allocator and of what it keeps loaded are yours to set.

    Raises:
        UserError: see `warm.asked`.
    """
    keep = {warm.VARIABLE: os.environ[warm.VARIABLE]} if warm.asked() is not None else {}
    return _THREADS | keep | {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}


def _enter(folder: str) -> None:
    """Work where the driver does, if this node has that folder: files that a method names are looked up there."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


class _Packer:
    """Jobs as they travel. The suite and the plug-ins, the same in all jobs of a run, go to Ray's store once."""

    def __init__(self) -> None:
        self._suite: Suite | None = None
        self._plugins: Mapping[str, str] | None = None
        self._common: Any = None

    def packed(self, job: Job | PrepareJob) -> tuple[Job | PrepareJob, list[Any]]:
        """A job without what is common, and the reference of that; in a list, or Ray would fetch it for every call."""
        if job.suite is not self._suite or job.plugins is not self._plugins:
            self._suite, self._plugins = job.suite, job.plugins
            self._common = ray.put((job.suite, dict(job.plugins)))
        return replace(job, suite=None, plugins={}), [self._common]  # type: ignore[arg-type]


def _unpacked(job: Job | PrepareJob, common: list[Any]) -> Job | PrepareJob:
    """The job that `_Packer.packed` was given."""
    suite, plugins = _common(*common)
    return replace(job, suite=suite, plugins=plugins)


@lru_cache(maxsize=4)
def _common(reference: Any) -> tuple[Suite, dict[str, str]]:
    found: tuple[Suite, dict[str, str]] = ray.get(reference)
    return found


@ray.remote(concurrency_groups={"watch": 1})  # type: ignore[call-overload]
class _Worker:
    """What runs in an actor: the worker module, kept warm. It answers `stack` while `run` runs."""

    def __init__(self, folder: str) -> None:
        self._thread = 0
        _enter(folder)

    def environment(self) -> tuple[str, dict[str, Any]]:
        """The node this runs on, and what it computes with."""
        return ray.get_runtime_context().get_node_id(), worker.describe()

    def run(self, job: Job | PrepareJob, common: list[Any]) -> Outcome:
        import threading

        self._thread = threading.get_ident()
        # the driver has the job already: it does not travel back
        return replace(worker.run_job(_unpacked(job, common)), job=None)  # type: ignore[arg-type]

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        import sys
        import traceback

        frame = sys._current_frames().get(self._thread)
        return "".join(traceback.format_stack(frame)) if frame else ""


@ray.remote
class _Timer:
    """What runs in the actor of a latency run: it starts the timed processes, and holds the device for them."""

    def __init__(self, folder: str) -> None:
        _enter(folder)

    def run(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        yield from timing.run_latency(job)


@dataclass
class _Slot:
    """A worker: its actor, what it said of its environment, and the jobs it was given, the running one first."""

    number: int
    actor: Any
    asked: Any  # reference of its environment, until that is known
    environment: dict[str, Any] | None = None
    node: str = ""
    jobs: deque[tuple[Any, Job | PrepareJob]] = field(default_factory=deque)
    since: float = 0.0  # when the running job began

    @property
    def is_free(self) -> bool:
        return self.environment is not None and not self.jobs

    def state(self, now: float) -> str:
        """In words."""
        if self.environment is None:
            return "starting"
        if not self.jobs:
            return "idle"
        job = self.jobs[0][1]
        return f"{job.cell.method} at NFE {job.cell.nfe}, {job}, for {now - self.since:.0f} s"


class _Supply:
    """Jobs that no worker was given yet; some of them are drawn early, to know how many are left.

    Args:
        jobs: where they come from.
    """

    def __init__(self, jobs: Iterator[Job | PrepareJob]) -> None:
        self._jobs, self._drawn = jobs, deque[Job | PrepareJob]()

    def holds(self, count: int) -> bool:
        """Whether so many are left, or more."""
        self._drawn.extend(itertools.islice(self._jobs, max(0, count - len(self._drawn))))
        return len(self._drawn) >= count

    def next(self, spare: int = 0) -> Job | PrepareJob | None:
        """The next one; None when none is left but `spare` ones."""
        return self._drawn.popleft() if self.holds(1 + spare) else None


class RayExecutor:
    """Warm actors on a local or a running Ray; for latency runs they make room.

    Nodes may come and go: without `workers` there is always one actor per device that the cluster has. Chunks are
    computed in one fingerprint class; actors of other classes are let go.

    Args:
        workers: number of actors; None takes one per GPU, or one per CPU core without GPUs. More than there are GPUs
            share them.
        address: a running Ray cluster; None starts a local one on loopback.
        device: only on this kind of device: a custom resource of the cluster, or Ray's name of an accelerator type.
        policy: what happens to jobs whose worker dies or hangs.
    """

    apart = True

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        device: str = "",
        policy: Policy | None = None,
    ) -> None:
        self._runtime = {"env_vars": worker_variables()}
        self._started = _connect(address, workers)
        self._asked, self._policy = workers, policy or Policy()
        self._kind = _resource(device)
        self.workers = workers or self._devices()
        self._slots: list[_Slot] = []
        self._packer = _Packer()
        self._class = ""
        self._looked = 0.0
        self._made = 0

    # --- devices ---

    def _devices(self) -> int:
        """Devices of the kind asked for that the cluster has now."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._kind:
            nodes = [resources for resources in nodes if self._kind in resources]
        gpus = sum(resources.get("GPU", 0) for resources in nodes)
        cores = sum(resources.get("CPU", 0) for resources in nodes)
        return int(gpus or cores) or 1

    def _share(self) -> float:
        """GPUs per worker."""
        gpus = int(ray.cluster_resources().get("GPU", 0))
        return min(1.0, gpus / self.workers)

    def _open_slot(self) -> _Slot:
        placed = {self._kind: 0.001} if self._kind else None
        actor = _Worker.options(  # type: ignore[attr-defined]
            num_cpus=1,
            num_gpus=self._share(),
            resources=placed,
            runtime_env=self._runtime,
        ).remote(os.getcwd())
        self._made += 1
        return _Slot(self._made, actor, actor.environment.remote())

    def _start(self) -> list[_Slot]:
        if not self._slots:
            self._slots = [self._open_slot() for _ in range(self.workers)]
        return self._slots

    def _replace(self, slot: _Slot) -> None:
        """A fresh actor in the place of one that died or was ended."""
        ray.kill(slot.actor)
        fresh = self._open_slot()
        slot.actor, slot.asked, slot.environment = fresh.actor, fresh.asked, None
        slot.jobs.clear()

    def _follow_cluster(self) -> None:
        """One worker per device: more when nodes joined, fewer when they left."""
        now = time.monotonic()
        if self._asked is not None or now - self._looked < _LOOK:
            return
        self._looked = now
        wanted = self._devices()
        for slot in [slot for slot in self._slots if slot.environment is None][: max(0, len(self._slots) - wanted)]:
            self._close(slot)  # it waits for a device that is gone
        self._slots += [self._open_slot() for _ in range(wanted - len(self._slots))]
        self.workers = wanted

    def _close(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        self._slots.remove(slot)

    def environment(self, preferred: Collection[str] = ()) -> dict[str, Any]:
        """The environment of the workers; those of another fingerprint class are let go.

        Raises:
            EvalbenchError: no worker started.
        """
        waiting = [slot.asked for slot in self._start() if slot.environment is None]
        started, _ = ray.wait(waiting, num_returns=1, timeout=_START) if waiting else ([], [])
        if len(waiting) > 1 and started:
            ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK)  # the others have a moment to join the vote
        for slot in list(self._slots):
            self._greet(slot)
        found = [slot.environment for slot in self._slots if slot.environment is not None]
        if not found:  # none in time, or those that were faster have died since
            raise EvalbenchError(
                f"no Ray worker started in {_START:g} s; see `ray status`, or try --serial or fewer --workers"
            )
        classes = Counter(str(one["class"]) for one in found)
        self._class = next((c for c in preferred if c in classes), min(classes, key=lambda c: (-classes[c], c)))
        self._dismiss_others()
        return next(one for one in found if one["class"] == self._class)

    def _greet(self, slot: _Slot) -> bool:
        """Learn the environment of a worker that has started; False while it has not."""
        if slot.environment is None and ray.wait([slot.asked], timeout=0)[0]:
            try:
                slot.node, slot.environment = ray.get(slot.asked)
            except ray.exceptions.RayError:  # its node left before it began
                self._replace(slot)
        return slot.environment is not None

    def _dismiss_others(self) -> None:
        """Let go of workers outside the class of the run: bits are the same within a class only."""
        for slot in list(self._slots):
            if self._class and slot.environment is not None and slot.environment["class"] != self._class:
                self._close(slot)

    # --- jobs ---

    def states(self) -> dict[str, str]:
        """What each worker does, by number and device."""
        now = time.monotonic()
        return {f"worker {slot.number}": slot.state(now) for slot in self._slots}

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes as they land. A worker that dies or hangs is replaced and its job tried again, later each time."""
        self._start()
        if not self._class:
            self.environment()
        supply, retries = _Supply(jobs), Retries(self._policy)
        while True:
            self._follow_cluster()
            for slot in self._slots:
                self._greet(slot)
            self._dismiss_others()
            self._feed(supply, retries)
            running = [slot for slot in self._slots if slot.jobs]
            if not running and not retries and not supply.holds(1):
                return
            for slot in self._landed(running, retries):
                yield from self._take(slot, retries)
            yield from self._end_hanging(retries)

    def _feed(self, supply: _Supply, retries: Retries) -> None:
        """Give free workers a job each, and all of them another one ahead, so that none waits for the driver.

        The last jobs, one per worker, wait for workers that are free: none lies behind a long one while others idle.
        """
        workers = [slot for slot in self._slots if slot.environment is not None]
        for depth, spare in ((0, 0), (1, len(workers) - 1)):
            for slot in workers:
                if len(slot.jobs) != depth:
                    continue
                now = time.monotonic()
                job = retries.due(now) or supply.next(spare)
                if job is None:
                    return
                if not slot.jobs:
                    slot.since = now
                slot.jobs.append((slot.actor.run.remote(*self._packer.packed(job)), job))

    def _landed(self, running: list[_Slot], retries: Retries) -> list[_Slot]:
        """Workers whose job is done, or lost; waits for one, but not past what is due."""
        now = time.monotonic()
        patience = [_LOOK, *(slot.since + self._policy.timeout - now for slot in running)]
        due = retries.next_due()
        if due is not None and any(slot.is_free for slot in self._slots):
            patience.append(due - now)
        heads = {slot.jobs[0][0]: slot for slot in running}
        starting = [slot.asked for slot in self._slots if slot.environment is None]
        if not heads and not starting:
            time.sleep(max(0.0, min(patience)))
            return []
        ready, _ = ray.wait([*heads, *starting], num_returns=1, timeout=max(0.0, min(patience)))
        if len(heads) > 1:
            ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        return [heads[reference] for reference in ready if reference in heads]

    def _take(self, slot: _Slot, retries: Retries) -> Iterator[Outcome]:
        """The outcome of a worker's running job, unless it is tried again."""
        reference, job = slot.jobs.popleft()
        slot.since = time.monotonic()
        try:
            outcome = replace(ray.get(reference), job=job)
        except ray.exceptions.RayError as error:
            left = not any(node["NodeID"] == slot.node and node["Alive"] for node in ray.nodes())
            yield from self._lose(slot, job, retries, type(error).__name__, "died", str(error), innocent=left)
            return
        if isinstance(outcome, JobFailure):
            failure = retries.failed(outcome, time.monotonic())
            if outcome.out_of_memory:
                self._give_back(slot, retries)
                self._replace(slot)
            if failure is None:
                return
            outcome = failure
        retries.done(job)
        yield outcome

    def _lose(
        self, slot: _Slot, job: Job | PrepareJob, retries: Retries, type_: str, why: str, place: str, *, innocent: bool
    ) -> Iterator[Outcome]:
        """A worker is gone with its running job; what it had been given ahead goes to others.

        Args:
            innocent: the job is not to blame: the node left.
        """
        self._give_back(slot, retries)
        self._replace(slot)
        if innocent:
            retries.again(job)
            return
        failure = retries.lost(job, type_, why, place, time.monotonic())
        if failure is not None:
            yield failure

    def _give_back(self, slot: _Slot, retries: Retries) -> None:
        for _, ahead in slot.jobs:
            retries.again(ahead)
        slot.jobs.clear()

    def _end_hanging(self, retries: Retries) -> Iterator[Outcome]:
        """End workers that have not answered for too long, after asking them where they stand."""
        limit = self._policy.timeout
        for slot in list(self._slots):
            if not slot.jobs or time.monotonic() - slot.since < limit:
                continue
            if ray.wait([slot.jobs[0][0]], timeout=0)[0]:  # it is done: the driver was away
                continue
            _, job = slot.jobs.popleft()
            try:
                place = str(ray.get(slot.actor.stack.remote(), timeout=_ANSWER))
            except ray.exceptions.RayError:
                place = "it did not say where it stands"
            why = f"did not answer for {limit:g} s (see --timeout)"
            yield from self._lose(slot, job, retries, "TimeoutError", why, place, innocent=False)

    # --- latency ---

    def latency(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        """Time alone: the workers, their models and their hold on the GPU go first, and come back when they are needed.

        Waits until another job of the cluster has left the device.

        Raises:
            UserError: the cluster has devices of several kinds and none was named.
        """
        self._refuse_mixed_devices()
        self._let_go()
        placed = {self._kind: 0.001} if self._kind else None
        # the whole GPU, and a node's cores: no other Ray job can be placed beside it
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [resources for resources in nodes if not self._kind or self._kind in resources]
        whole = max(1, int(max((resources.get("CPU", 0) for resources in nodes), default=1)))
        gpus = min(1, int(max((resources.get("GPU", 0) for resources in nodes), default=0)))
        timer = _Timer.options(  # type: ignore[attr-defined]
            num_cpus=whole, num_gpus=gpus, resources=placed, runtime_env={"env_vars": _THREADS}
        ).remote(os.getcwd())
        try:
            for reference in timer.run.options(num_returns="streaming").remote(job):
                yield ray.get(reference)
        finally:
            ray.kill(timer)

    def _refuse_mixed_devices(self) -> None:
        kinds = sorted({name for node in ray.nodes() if node["Alive"] for name in _kinds(node["Resources"])})
        if not self._kind and len(kinds) > 1:
            raise UserError(
                f"the cluster has devices of several kinds ({', '.join(kinds)}) and latency holds on one: "
                f"add --device {kinds[0]}"
            )

    def _let_go(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []

    def shutdown(self) -> None:
        """Stop the actors, and Ray when this executor started it."""
        self._let_go()
        if self._started:
            ray.shutdown()


_TYPE = "accelerator_type:"


def _kinds(resources: dict[str, float]) -> set[str]:
    """Kinds of devices of a node: accelerator types by their short name, and custom resources."""
    usual = ("CPU", "GPU", "memory", "object_store_memory", "bundle_group")
    named = {name.removeprefix(_TYPE) for name in resources}
    return {name for name in named if not name.startswith(("node:", *usual))}


def _resource(device: str) -> str:
    """The cluster's resource for a kind of device; empty for any.

    Raises:
        UserError: the cluster has none of that kind.
    """
    if not device:
        return ""
    found = ray.cluster_resources()
    for name in (device, _TYPE + device):
        if name in found:
            return name
    raise unknown("device", device, _kinds(found), where="this Ray cluster")


def _connect(address: str | None, workers: int | None) -> bool:
    """Connect to Ray; True when this call started it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        _stay_on_loopback()
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                "local",  # never one that happens to run on this machine, somebody else's perhaps
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EvalbenchError(
            f"cannot start or reach Ray ({str(error).splitlines()[0]}); try --serial, or check --address"
        ) from error
    return True


def _stay_on_loopback() -> None:
    """Let a Ray that starts now listen on 127.0.0.1 alone.

    `ray.init` turns a loopback address into one that others can reach, and listens on all interfaces. Where Ray knows
    no clusters (its switch for Windows and macOS, read when it is imported and by every process it starts) it stays
    on loopback.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
