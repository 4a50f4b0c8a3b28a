"""The Ray executor: warm actors that compute jobs. The only module that imports ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from evalbench import timing, worker
from evalbench.errors import EvalbenchError
from evalbench.spec import Failure
from evalbench.timing import LatencyJob, LatencyResult, Timing
from evalbench.worker import Job, JobFailure, Outcome, PrepareJob

_RETRIES = 3  # a chunk whose worker died this often is quarantined as an error of its cell


class _Worker:
    """What runs in an actor: the worker module, kept warm."""

    def environment(self) -> dict[str, Any]:
        return worker.describe()

    def run(self, job: Job | PrepareJob) -> Outcome:
        return worker.run_job(job)


class _Timer:
    """What runs in the actor of a latency run: it starts the timed processes, and holds the device for them."""

    def run(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        yield from timing.run_latency(job)


class RayExecutor:
    """One warm actor per worker on a local or a running Ray; for latency runs they make room.

    Args:
        workers: number of actors; None takes one per GPU, or one per CPU core without GPUs.
        address: a running Ray cluster; None starts a local one on loopback.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        self._started = _connect(address, workers)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.workers = workers or gpus or cores
        share = min(1.0, gpus / self.workers)
        # one thread each (design, section 5); the environment is set before torch is imported
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = {"env_vars": threads}
        self._actor_class: Any = ray.remote(_Worker).options(num_cpus=1, num_gpus=share, runtime_env=environment)
        # the whole GPU, and a node's cores: no other Ray job can be placed beside it
        whole = max(1, int(max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)))
        self._timer_class: Any = ray.remote(_Timer).options(
            num_cpus=whole, num_gpus=min(1, gpus), runtime_env=environment
        )
        self._made: list[Any] = []

    @property
    def _actors(self) -> list[Any]:
        if not self._made:
            self._made = [self._actor_class.remote() for _ in range(self.workers)]
        return self._made

    def environment(self) -> dict[str, Any]:
        """The environment of the workers (of the first: a cluster of several kinds is not told apart yet)."""
        found: dict[str, Any] = ray.get(self._actors[0].environment.remote())
        return found

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes as they land. A worker that dies is replaced and its job tried again."""
        idle = list(range(self.workers))
        running: dict[Any, tuple[int, Job | PrepareJob, int]] = {}  # reference -> (actor, job, tries)
        again: list[tuple[Job | PrepareJob, int]] = []
        while True:
            while idle:
                job, tries = again.pop() if again else (next(jobs, None), 0)
                if job is None:
                    break
                slot = idle.pop()
                running[self._actors[slot].run.remote(job)] = (slot, job, tries + 1)
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            slot, job, tries = running.pop(ready)
            idle.append(slot)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                self._actors[slot] = self._actor_class.remote()
                if tries < _RETRIES:
                    again.append((job, tries))
                else:
                    yield _quarantined(job, error)

    def latency(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        """Time alone: the workers, their models and their hold on the GPU go first, and come back when they are needed.

        Waits until another job of the cluster has left the device.
        """
        self._let_go()
        timer = self._timer_class.remote()
        try:
            for reference in timer.run.options(num_returns="streaming").remote(job):
                yield ray.get(reference)
        finally:
            ray.kill(timer)

    def _let_go(self) -> None:
        for actor in self._made:
            ray.kill(actor)
        self._made = []

    def shutdown(self) -> None:
        """Stop the actors, and Ray when this executor started it."""
        self._let_go()
        if self._started:
            ray.shutdown()


def _connect(address: str | None, workers: int | None) -> bool:
    """Connect to Ray; True when this call started it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EvalbenchError(
            f"cannot start or reach Ray ({str(error).splitlines()[0]}); try --serial, or check --address"
        ) from error
    return True


def _quarantined(job: Job | PrepareJob, error: Exception) -> JobFailure:
    message = f"worker died {_RETRIES} times on {job}"
    return JobFailure(job, Failure(type=type(error).__name__, message=message, traceback=str(error)), unsupported=False)
