"""What is tried again, when, and what is given up."""

from __future__ import annotations

from support import small_suite

from evalbench.failures import Policy, Retries
from evalbench.spec import Cell, Chunk, Failure
from evalbench.worker import Job, JobFailure


def _job(start: int = 0) -> Job:
    cell = Cell(suite="s", suite_version=1, generation="g", method="ddim", settings="x", nfe=5)
    return Job(small_suite(), cell, Chunk(cell.id, start, start + 32), ())


def test_a_lost_job_waits_twice_as_long_each_time_and_is_quarantined_with_its_traceback() -> None:
    retries, job = Retries(Policy(tries=4, backoff=2.0)), _job()
    now = 100.0
    for wait in (2.0, 4.0, 8.0):
        assert retries.lost(job, "ActorDiedError", "died", "where", now) is None
        assert retries.next_due() == now + wait
        assert retries.due(now + wait - 0.01) is None
        now += wait
        assert retries.due(now) is job
    failure = retries.lost(job, "ActorDiedError", "died", "where it stood", now)
    assert failure is not None
    assert failure.failure.message == "worker died 4 times on samples 0-31"
    assert failure.failure.traceback == "where it stood"
    assert len(retries) == 0


def test_a_job_that_is_not_to_blame_is_not_counted() -> None:
    retries, job = Retries(Policy(tries=2)), _job()
    for _ in range(5):
        retries.again(job)
        assert retries.due(0.0) is job
    assert retries.lost(job, "x", "died", "", 0.0) is None


def test_jobs_that_wait_do_not_hold_up_others() -> None:
    retries, late, soon = Retries(Policy(backoff=50.0)), _job(0), _job(32)
    retries.lost(late, "x", "died", "", 0.0)
    retries.again(soon)
    assert retries.due(0.0) is soon
    assert retries.due(0.0) is None
    assert retries.due(50.0) is late


def test_out_of_memory_is_tried_once_more_and_then_names_the_batch_to_use() -> None:
    retries, job = Retries(Policy()), _job()
    failed = JobFailure(job, Failure(type="OutOfMemoryError", message="no room"), unsupported=False, out_of_memory=True)
    assert retries.failed(failed, 0.0) is None
    assert retries.due(0.0) is job
    again = retries.failed(failed, 0.0)
    assert again is not None
    assert again.failure.message == "out of memory at batch 32, on a fresh worker too; use --batch 16 (no room)"
    assert retries.failed(JobFailure(job, Failure(type="x", message="y"), unsupported=False), 0.0) is not None
