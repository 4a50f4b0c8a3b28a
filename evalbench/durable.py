"""Writing so that a reader sees all or nothing, and a crash loses at most what was written last.

A chunk is written under a temporary name and renamed. Large files are on the disk before they get their name. Small
ones share their trips to the disk: their names come first and a group is made durable together, at least once a
second while chunks land. A killed process loses nothing that has its name; a power cut at most that group, and a torn
file is found by the digest inside it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from evalbench.errors import DamagedFile, EvalbenchError

LARGE = 1 << 20  # bytes; from here on a file is worth its own trip to the disk
GROUP = 64  # files made durable together, at most
SECONDS = 1.0  # that they may wait
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Group:
    """Small files that wait for their trip to the disk."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._since = 0.0

    def add(self, file: Path) -> None:
        """A file that has its name; flushes when the group is large or old enough."""
        if not self._files:
            self._since = time.monotonic()
        self._files.append(file)
        if len(self._files) >= GROUP or time.monotonic() - self._since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make everything added so far durable."""
        files, self._files = self._files, []
        if not files:
            return
        folders = {file.parent for file in files}
        with ThreadPoolExecutor(min(16, len(files))) as pool:  # side by side they share the file system's commits
            list(pool.map(_sync, files))
            list(pool.map(_sync, folders))


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # a shard that was slower has replaced it, or the folder was cleared
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_npz(
    file: Path,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    *,
    group: Group | None = None,
) -> None:
    """Arrays, JSON facts, and the digest of both, in one file. Equal content is equal bytes.

    Args:
        group: where the file may wait for the disk when it is small; None writes it through.

    Raises:
        EvalbenchError: the disk is full.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, sort_keys=True)
    digest = np.array(digest_of(arrays, text))
    small = group is not None and sum(a.nbytes for a in arrays.values()) < LARGE

    def write(stream: IO[bytes]) -> None:
        np.savez(stream, allow_pickle=False, **arrays, facts=np.array(text), sha256=digest)

    if small and group is not None:
        whole = io.BytesIO()  # one trip to the file system: zipfile makes dozens, and each hands the interpreter over
        write(whole)
        _replace(file, lambda stream: stream.write(whole.getbuffer()), through=False)
        group.add(file)
    else:
        _replace(file, write, through=True)


def read_npz(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a file, checked against its digest.

    Raises:
        DamagedFile: missing, truncated, or not what was written.
    """
    with opened(file) as content:
        arrays = {name: content[name] for name in content.files if name not in ("facts", "sha256")}
        text, digest = str(content["facts"]), str(content["sha256"])
    if digest_of(arrays, text) != digest:
        raise DamagedFile(f"{file} is damaged (its content has another digest than it says)")
    return arrays, json.loads(text)


def read_facts(file: Path) -> dict[str, Any]:
    """Facts of a file; its arrays are not read, and not checked.

    Raises:
        DamagedFile: missing or truncated.
    """
    with opened(file) as content:
        if "sha256" not in content.files:
            raise DamagedFile(f"{file} is damaged (no digest inside)")
        facts: dict[str, Any] = json.loads(str(content["facts"]))
        return facts


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An npz as numpy gives it: its arrays are read when they are asked for, and not held against the digest.

    Raises:
        DamagedFile: missing, truncated or no npz, whenever that shows.
    """
    try:
        # numpy leaves a file of its own open when it is damaged; a small one is read at once, as it was written
        with file.open("rb") as stream:
            small = os.fstat(stream.fileno()).st_size < LARGE
            with np.load(io.BytesIO(stream.read()) if small else stream, allow_pickle=False) as content:
                yield content
    except FileNotFoundError:
        raise DamagedFile(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickled" in reason:  # what numpy takes any other file for, with advice that would be harmful
            reason = "not an npz file"
        raise DamagedFile(f"{file} is damaged ({reason})") from None


def digest_of(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 over names, types, shapes and bytes of arrays, and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes() if values.dtype.hasobject or not values.size else values.data.cast("B"))
    return digest.hexdigest()


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a file, through to the disk: a reader sees the old or the new content, never half.

    Raises:
        EvalbenchError: the disk is full.
    """
    raw = content.encode() if isinstance(content, str) else content
    _replace(file, lambda stream: stream.write(raw), through=True)


def append_line(file: Path, line: str) -> None:
    """Add a line to a file, through to the disk; what a kill left of an unfinished line goes first.

    Raises:
        EvalbenchError: the disk is full; the file is as it was.
    """
    with file.open("ab+") as stream, _disk(file):
        end = _cut_torn_line(stream)
        try:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(end)
            raise


def _cut_torn_line(stream: Any) -> int:
    """Drop an unfinished last line; where the next one begins."""
    end = int(stream.seek(0, os.SEEK_END))
    position = end
    while position:
        step = min(position, 1 << 16)
        stream.seek(position - step)
        cut = stream.read(step).rfind(b"\n")
        if cut >= 0:
            position = position - step + cut + 1
            break
        position -= step
    if position != end:
        stream.truncate(position)
    stream.seek(0, os.SEEK_END)
    return position


def _replace(file: Path, write: Callable[[IO[bytes]], object], *, through: bool) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}")  # processes of several hosts share a folder
    with _disk(file):
        try:
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                if through:
                    os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if through:
            _sync(file.parent)


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    """A full disk as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EvalbenchError(
                f"disk full while writing {file}; free space and run the same command again, nothing is lost"
            ) from None
        raise


def is_temporary(file: Path) -> bool:
    """Whether a file is what a kill left of a write."""
    stem, _, token = file.name.rpartition(".")
    return stem.startswith(".") and len(token) == 12 and set(token) <= set("0123456789abcdef")
