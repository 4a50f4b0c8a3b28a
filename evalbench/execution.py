"""Where jobs are computed: what an executor offers, and the one without Ray."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from evalbench import timing, worker
from evalbench.cost.processes import Launch, fresh
from evalbench.failures import no_memory
from evalbench.timing import LatencyJob, LatencyResult, Timing
from evalbench.worker import Job, JobFailure, Outcome, PrepareJob


class Executor(Protocol):
    """Computes jobs somewhere.

    Attributes:
        workers: jobs that are computed at a time. apart: other processes compute them, so this one has time meanwhile.
    """

    workers: int
    apart: bool

    def environment(self, preferred: Collection[str] = ()) -> dict[str, Any]:
        """The environment that jobs are computed in, see `environment.describe`.

        Args:
            preferred: fingerprint classes, the best first; asked for once, before anything is computed. An executor
                with devices of several classes computes all chunks in one of them.
        """
        ...

    def states(self) -> dict[str, str]:
        """What each worker does, by its name."""
        ...

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes as they land, in any order; draws few more jobs than there are workers."""
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
    apart = False
    launch: Launch = staticmethod(fresh)

    def environment(self, preferred: Collection[str] = ()) -> dict[str, Any]:
        """This process's."""
        return worker.describe()

    def states(self) -> dict[str, str]:
        """None: what there is, it does."""
        return {}

    def map(self, jobs: Iterator[Job | PrepareJob]) -> Iterator[Outcome]:
        """Outcomes in order. A job that finds no memory is tried once more, with nothing else loaded."""
        for job in jobs:
            outcome = worker.run_job(job)
            if isinstance(outcome, JobFailure) and outcome.out_of_memory:
                worker.forget()
                outcome = worker.run_job(job)
                if isinstance(outcome, JobFailure) and outcome.out_of_memory:
                    outcome = no_memory(outcome)
            yield outcome

    def latency(self, job: LatencyJob) -> Iterator[Timing | LatencyResult]:
        """Time in fresh processes, one after the other."""
        return timing.run_latency(job, self.launch)

    def shutdown(self) -> None:
        """Nothing to let go of."""
