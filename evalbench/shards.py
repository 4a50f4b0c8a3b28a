"""Who may compute a chunk and who reduces: everything is this driver's, or a shard of a job array claims it by lease.

A driver (Ray or serial) holds the run folder alone. Shards share it: each computes what it can claim, first its own
stripe and then what others left, and whoever finds a cell complete reduces it, one process at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evalbench.errors import UserError
from evalbench.failures import Policy, quarantined
from evalbench.leases import Leases
from evalbench.spec import Chunk
from evalbench.worker import Job, JobFailure, PrepareJob

POLL = 0.5  # seconds between looks at what other shards did


class Claims(Protocol):
    """Which work is this process's."""

    shared: bool  # whether other processes compute chunks of the same run

    def order(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Chunks of a cell in the order in which this process asks for them."""

    def take(self, job: Job | PrepareJob) -> bool | JobFailure:
        """Whether this process computes a job now; a failure when it took down too many processes."""

    def release(self, job: Job | PrepareJob) -> None:
        """A job's result is written, or it failed."""

    def reducing(self) -> AbstractContextManager[bool]:
        """Be the only one who reduces, for a block; False while another process is."""

    def agree(self, fingerprint_class: str) -> None:
        """See that all processes compute in one fingerprint class.

        Raises:
            UserError: they do not.
        """


class Everything:
    """All work is this process's."""

    shared = False

    def order(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """As they are."""
        return chunks

    def take(self, job: Job | PrepareJob) -> bool | JobFailure:
        """Always."""
        return True

    def release(self, job: Job | PrepareJob) -> None:
        """Nothing was held."""

    def reducing(self) -> AbstractContextManager[bool]:
        """Always."""
        return contextlib.nullcontext(True)

    def agree(self, fingerprint_class: str) -> None:
        """There is one process."""


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`, counted from 1; any number of them may run, at any time.

    Attributes:
        ttl: seconds after which the lease of a process that vanished may be taken over.
    """

    index: int
    count: int
    ttl: float = 60.0

    @classmethod
    def parse(cls, text: str, ttl: float = 60.0) -> Shard:
        """From `I/N`.

        Raises:
            UserError: not of this form, or I is not in 1..N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text}: write I/N with I from 1 to N, such as 3/8")
        if ttl <= 0:
            raise UserError(f"--lease {ttl:g}: more than 0 seconds")
        return cls(int(match[1]), int(match[2]), ttl)

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count}"


class LeasedClaims:
    """Claims of one shard.

    Args:
        folder: the run folder. shard: which one. policy: when a chunk is quarantined and a process counts as hanging.
    """

    shared = True

    def __init__(self, folder: Path, shard: Shard, policy: Policy) -> None:
        self.shard, self.policy = shard, policy
        self.leases = Leases(folder / "leases", shard.ttl, str(shard))
        self.leases.on_beat = self._end_if_hanging
        self._running: tuple[str, float, int] | None = None  # lease, since, thread

    def __enter__(self) -> LeasedClaims:
        self.leases.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leases.__exit__(*exception)

    def order(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """The shard's own stripe first, so that shards that start together seldom ask for the same chunk."""
        first = len(chunks) * (self.shard.index - 1) // self.shard.count
        return [*chunks[first:], *chunks[:first]]

    def take(self, job: Job | PrepareJob) -> bool | JobFailure:
        """Take the job's lease."""
        name = _name(job)
        lease = self.leases.take(name)
        if lease is None:
            return False
        if lease.tries >= self.policy.tries:
            place = lease.traceback or "it left no traceback: it was killed"
            self.leases.abandon(name, lease.traceback)  # it stays, so that no other shard falls for it
            return quarantined(job, lease.tries, "ProcessLost", f"vanished (remove leases/{name} to try again)", place)
        self._running = (name, time.monotonic(), threading.get_ident())
        return True

    def release(self, job: Job | PrepareJob) -> None:
        """Let go of its lease."""
        self._running = None
        self.leases.release(_name(job))

    def reducing(self) -> AbstractContextManager[bool]:
        """By a lease of its own."""
        return self.leases.holding("reduce")

    def agree(self, fingerprint_class: str) -> None:
        """The first shard says which class it is; with two, each would compute the other's chunks again, for ever."""
        file = self.leases.folder / "class"
        with contextlib.suppress(FileExistsError), file.open("x") as stream:
            stream.write(fingerprint_class)
        found = file.read_text()
        if found and found != fingerprint_class:  # empty: another shard is writing it right now
            raise UserError(
                f"{self.shard} runs on another kind of device, or other library versions, than the first shard did; "
                f"run it there, or `evalbench gc {self.leases.folder.parent}` once all have ended to start over here"
            )

    def _end_if_hanging(self) -> None:
        """End this process when its chunk takes too long; called by the thread that renews leases."""
        running = self._running
        if running is None or time.monotonic() - running[1] < self.policy.timeout:
            return
        name, _, thread = running
        frame = sys._current_frames().get(thread)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        self.leases.abandon(name, f"no answer for {self.policy.timeout:g} s, at:\n{stack}")
        print(
            f"error: {name} did not answer for {self.policy.timeout:g} s; {self.shard} leaves, run it again "
            "(or raise --timeout)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(4)


def _name(job: Job | PrepareJob) -> str:
    """A file name for what is claimed."""
    if isinstance(job, PrepareJob):
        return f"prepare-{job.key}"
    return f"{job.chunk.cell_id}-{job.chunk.start}-{job.chunk.stop}"


@contextlib.contextmanager
def claims_of(folder: Path, shard: Shard | None, policy: Policy) -> Iterator[Claims]:
    """The claims of a driver, or of a shard."""
    if shard is None:
        yield Everything()
        return
    with LeasedClaims(folder, shard, policy) as claims:
        yield claims


def wait() -> None:
    """Until other shards may have done something."""
    time.sleep(POLL)
