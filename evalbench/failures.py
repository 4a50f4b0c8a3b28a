"""What happens to a job whose worker died, hung or ran out of memory: tried again later, then given up.

No ray and no clock of its own: the executor says what it saw and when.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from evalbench.spec import Failure
from evalbench.worker import Job, JobFailure, PrepareJob


@dataclass(frozen=True)
class Policy:
    """How patient a run is.

    Attributes:
        tries: workers that a job may take down before it is quarantined as an error of its cell.
        backoff: seconds before the second try; they double with each one.
        timeout: seconds after which a worker that does not answer counts as hanging.
    """

    tries: int = 3
    backoff: float = 1.0
    timeout: float = 3600.0


@dataclass
class _Trouble:
    lost: int = 0
    out_of_memory: int = 0
    due: float = 0.0


class Retries:
    """The jobs that wait for another try.

    Args:
        policy: how often, how soon.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._trouble: dict[int, _Trouble] = {}  # by id of the job, which the waiting or running job keeps alive
        self._waiting: list[Job | PrepareJob] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def lost(self, job: Job | PrepareJob, type_: str, why: str, traceback: str, now: float) -> JobFailure | None:
        """The worker of a job died or was ended; None when the job is tried again.

        Args:
            type_: name of the error. why: `died`, `did not answer for 60 s`. now: seconds, of any clock.
        """
        trouble = self._trouble.setdefault(id(job), _Trouble())
        trouble.lost += 1
        if trouble.lost < self.policy.tries:
            trouble.due = now + self.policy.backoff * 2 ** (trouble.lost - 1)
            self._waiting.append(job)
            return None
        del self._trouble[id(job)]
        return quarantined(job, self.policy.tries, type_, why, traceback)

    def again(self, job: Job | PrepareJob) -> None:
        """A job that was not to blame, such as one whose node left: tried again at once."""
        self._trouble.setdefault(id(job), _Trouble()).due = 0.0
        self._waiting.insert(0, job)

    def failed(self, failure: JobFailure, now: float) -> JobFailure | None:
        """A job raised; out of memory it is tried once more, on a worker that holds nothing yet (None)."""
        if not failure.out_of_memory:
            return failure
        job = failure.job
        trouble = self._trouble.setdefault(id(job), _Trouble())
        trouble.out_of_memory += 1
        if trouble.out_of_memory < 2:
            trouble.due = now
            self._waiting.append(job)
            return None
        del self._trouble[id(job)]
        return no_memory(failure)

    def due(self, now: float) -> Job | PrepareJob | None:
        """A job whose time has come; None when there is none."""
        for i, job in enumerate(self._waiting):
            if self._trouble[id(job)].due <= now:
                return self._waiting.pop(i)
        return None

    def next_due(self) -> float | None:
        """When the next job is due; None when none waits."""
        return min((self._trouble[id(job)].due for job in self._waiting), default=None)

    def done(self, job: Job | PrepareJob) -> None:
        """A job has its result."""
        self._trouble.pop(id(job), None)


def quarantined(job: Job | PrepareJob, tries: int, type_: str, why: str, traceback: str) -> JobFailure:
    """A job that took down as many workers as it may."""
    message = f"worker {why} {tries} times on {job}"
    return JobFailure(job, Failure(type=type_, message=message, traceback=traceback), unsupported=False)


def no_memory(failure: JobFailure) -> JobFailure:
    """The failure of a job that found no memory on a fresh worker either, with the batch to use."""
    batch = failure.job.suite.sampling.batch
    advice = f"use --batch {batch // 2}" if batch > 1 else "this device is too small for the suite"
    message = f"out of memory at batch {batch}, on a fresh worker too; {advice} ({failure.failure.message})"
    return replace(failure, failure=failure.failure.model_copy(update={"message": message}))
