"""`evalbench status RUN`: how far a run is, asked from another shell or another host.

Every process that computes a run keeps status/HOST-PID.json in its folder, rewritten at most once a second. Whether it
still lives shows in the lock of the folder, not in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evalbench.errors import UserError
from evalbench.observer import Observer
from evalbench.progress import Tracker, human
from evalbench.store import Store, hold_run

FOLDER = "status"
_EVERY = 1.0  # seconds between writings


class StatusFile(Tracker):
    """An observer that writes what it is told to a file, and passes it on.

    Args:
        folder: the run folder. inner: whom to pass everything on to.
    """

    def __init__(self, folder: Path, inner: Observer) -> None:
        super().__init__()
        self.file = folder / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json"
        self._inner, self._started, self._written = inner, time.time(), 0.0

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        self._inner.planned(phase, forwards, samples, workers)
        super().planned(phase, forwards, samples, workers)

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        self._inner.landed(phase, forwards, samples, seconds)
        super().landed(phase, forwards, samples, seconds)

    def cells(self, done: int, total: int, errors: int) -> None:
        self._inner.cells(done, total, errors)
        super().cells(done, total, errors)

    def workers(self, states: Mapping[str, str]) -> None:
        self._inner.workers(states)
        super().workers(states)

    def note(self, line: str) -> None:
        self._inner.note(line)

    def changed(self) -> None:
        now = time.monotonic()
        if now - self._written >= _EVERY:
            self._written = now
            self.write("running")

    def write(self, state: str) -> None:
        """Replace the file. It is a courtesy: a full disk is not reported here."""
        content = {
            "state": state,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "updated": time.time(),
            "phase": self.phase,
            "fraction": self.fraction,
            "cells": self.done,
            "cells_planned": self.cells_planned,
            "errors": self.errors,
            "chunks_per_second": self.rate,
            "seconds_left": self.eta,
            "workers": self.states,
        }
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(exist_ok=True)
            new = self.file.with_name(f".{self.file.name}")
            new.write_text(json.dumps(content), encoding="utf-8")
            new.replace(self.file)


@contextlib.contextmanager
def kept(folder: Path, inner: Observer) -> Iterator[StatusFile]:
    """Keep the status of this process in a run folder, for a block."""
    status = StatusFile(folder, inner)
    try:
        yield status
    except BaseException:
        status.write("stopped")
        raise
    status.write("finished")


def processes(store: Store) -> list[dict[str, Any]]:
    """What every process that computed this run last said, the newest first."""
    found = []
    for file in (store.folder / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return sorted(found, key=lambda one: float(one["updated"]), reverse=True)


def is_running(store: Store) -> bool:
    """Whether a process holds the run folder."""
    try:
        with hold_run(store.folder):
            return False
    except UserError:
        return True


def status_command(folder: Path, *, json_: bool) -> None:
    """Print how far a run is.

    Raises:
        UserError: not a run folder.
    """
    store = Store(folder)
    running, said = is_running(store), processes(store)
    records = store.records()
    failed = [record for record in records if record.status == "error"]
    if json_:
        print(json.dumps({"running": running, "records": len(records), "errors": len(failed), "processes": said}))
        return
    alive = [one for one in said if one["state"] == "running"] if running else []
    for one in alive:
        print("\n".join(_lines(one)))
    if not alive and running:
        print(f"{folder}: a process has just begun, or reduces")
    if not running:
        last = f", the last process {_ended(said[0])}" if said else ""
        print(f"{folder}: not running, {len(records)} records{last}; the same `evalbench run` command continues")
    for record in failed:
        first = (record.failure.message if record.failure else "").split("\n")[0]
        print(f"error: {record.cell.method} at NFE {record.cell.nfe}: {first}")


def _lines(one: Mapping[str, Any]) -> list[str]:
    """A process, and a line for each of its workers."""
    ago = max(0.0, time.time() - one["updated"])
    facts = [f"{one['cells']} of {one['cells_planned']} cells", f"{one['errors']} errors"]
    if one["chunks_per_second"] is not None:
        facts.append(f"{one['chunks_per_second']:.3g} chunks/s")
    if one["seconds_left"] is not None:
        facts.append(f"about {human(max(0.0, one['seconds_left'] - ago))} left")
    head = f"{one['host']}, process {one['pid']}: {one['phase']} {one['fraction']:.0%}, {', '.join(facts)}"
    return [f"{head} (heard {human(ago)} ago)", *(f"  {name}: {state}" for name, state in one["workers"].items())]


def _ended(one: Mapping[str, Any]) -> str:
    """How a process that no longer holds the folder ended."""
    how = {"finished": "finished", "stopped": "was stopped"}.get(one["state"], "was killed")
    return f"{how} {human(max(0.0, time.time() - one['updated']))} ago"
