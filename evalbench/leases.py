"""Who computes what, without a scheduler: one file per claim in a folder that all processes see.

A lease is a file made exclusively (O_EXCL). Its owner renews it (its modification time); one that was not renewed for
its time to live is stale, and may be taken over by renaming it away. Two processes that believe to own one lease,
which takes a stall of a whole life time, compute the same bits twice: leases save work, they guard no result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lease:
    """What stands in a lease file.

    Attributes:
        owner: host, process and a random token. tries: processes that held this lease before and vanished.
        traceback: where the last of them stood, when it could still say so.
    """

    owner: str
    tries: int = 0
    traceback: str = ""


class Leases:
    """The leases of one process.

    Args:
        folder: shared by all processes; made when needed. ttl: seconds after which a lease that was not renewed is
            stale. name: what other processes see as the owner.
    """

    def __init__(self, folder: Path, ttl: float = 60.0, name: str = "") -> None:
        self.folder, self.ttl = folder, ttl
        self.token = uuid.uuid4().hex[:12]
        self.owner = f"{name or 'process'} {socket.gethostname()} pid {os.getpid()} {self.token}"
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None
        self.on_beat: Callable[[], None] | None = None

    def __enter__(self) -> Leases:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._renewer = threading.Thread(target=self._beat, name="leases", daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._renewer:
            self._renewer.join()
        for name in list(self._held):
            self.release(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> Lease | None:
        """Own a lease; None while another process does. `tries` says how many vanished while they held it."""
        file = self.folder / name
        lease = Lease(self.owner)
        if not self._create(file, lease):
            stale = self._take_stale(file)
            if stale is None:
                return None
            lease = Lease(self.owner, stale.tries + 1, stale.traceback)
            if not self._create(file, lease):
                return None
        with self._lock:
            self._held.add(name)
        return lease

    def release(self, name: str) -> None:
        """Let go of a lease. One that another process has taken over stays."""
        with self._lock:
            if name not in self._held:
                return
            self._held.remove(name)
        found = read_lease(self.folder / name)
        if found is not None and found.owner == self.owner:
            (self.folder / name).unlink(missing_ok=True)

    def abandon(self, name: str, traceback: str) -> None:
        """Leave a lease stale, with the place where its owner stood: the next one knows that this one vanished."""
        file = self.folder / name
        found = read_lease(file)
        with self._lock:
            self._held.discard(name)
        if found is not None and found.owner == self.owner:
            file.write_text(json.dumps(asdict(Lease(self.owner, found.tries, traceback))))
            os.utime(file, (0, 0))

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Own a lease for a block; False while another process does."""
        mine = self.take(name) is not None
        try:
            yield mine
        finally:
            if mine:
                self.release(name)

    def _create(self, file: Path, lease: Lease) -> bool:
        """Whether the lease file is ours: it appears whole, by a link, or not at all."""
        draft = self.folder / f".{file.name}.{self.token}"
        draft.write_text(json.dumps(asdict(lease)))
        try:
            os.link(draft, file)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _take_stale(self, file: Path) -> Lease | None:
        """Move a stale lease away and say what stood in it; None when it is fresh, or another process was faster."""
        if not self._is_stale(file):
            return None
        aside = self.folder / f".{file.name}.{self.token}.stale"
        try:
            os.rename(file, aside)
        except FileNotFoundError:
            return None
        found = read_lease(aside)
        if not self._is_stale(aside):
            # between the look and the rename another process had made a new one: give it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, file)
            aside.unlink()
            return None
        aside.unlink()
        return found or Lease("unknown")

    def _is_stale(self, file: Path) -> bool:
        """By the clock of the shared folder, which may differ from this host's."""
        try:
            age = self._now() - file.stat().st_mtime
        except FileNotFoundError:
            return False
        return age > self.ttl

    @property
    def _clock(self) -> Path:
        return self.folder / f".clock.{self.token}"

    def _now(self) -> float:
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _beat(self) -> None:
        """Renew what is held, four times per life time, for as long as this process lives."""
        while not self._stop.wait(self.ttl / 4):
            if self.on_beat is not None:
                self.on_beat()
            with self._lock:
                names = list(self._held)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.folder / name)


def read_lease(file: Path) -> Lease | None:
    """What stands in a lease; None when it is gone or no lease."""
    try:
        return Lease(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
