"""Results on disk. Chunks are content-addressed and atomic, records are append-only; killing anything loses only the
chunks in flight.

    manifest.json            the suite's facts, plug-in sources, versions
    records.jsonl            one record per line; the last one of a (cell, kind, variant) counts
    chunks/CELL/START-STOP.npz
    artifacts/KEY.npz        what methods prepared, with its bill
    table.csv, timings.csv, report/
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import __version__
from evalbench.errors import EvalbenchError, UserError
from evalbench.spec import Chunk, Record, Suite, record_from_json


class Store:
    """A run folder, for reading. `open_run` creates and locks one for writing.

    Args:
        folder: the run folder.

    Raises:
        UserError: not a run folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").is_file():
            raise UserError(
                f"'{folder}' is not a run folder (no manifest.json); give the --out folder of `evalbench run`"
            )

    def manifest(self) -> dict[str, Any]:
        """The manifest: suite (facts), suite_id, plugins, evalbench, created."""
        try:
            content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except json.JSONDecodeError as error:
            raise EvalbenchError(f"{self.folder / 'manifest.json'} cannot be read: {error}") from None
        return content

    # --- records ---

    def records(self) -> list[Record]:
        """The latest record of each (cell, kind, variant), in the order they were first written."""
        latest: dict[tuple[str, str, str], Record] = {}
        for number, line in enumerate(self._lines(), start=1):
            record = record_from_json(line, where=f"{self.folder / 'records.jsonl'}, line {number}")
            latest[record.cell.id, record.kind, record.variant] = record
        return list(latest.values())

    def _lines(self) -> list[str]:
        file = self.folder / "records.jsonl"
        if not file.is_file():
            return []
        text = file.read_text(encoding="utf-8")
        lines = text.split("\n")
        # a line without its end is a write that was cut off by a kill: that record is simply not there
        return [line for line in lines[:-1] if line]

    def append(self, record: Record) -> None:
        """Add a record, durably."""
        file = self.folder / "records.jsonl"
        with file.open("ab+") as stream:
            _cut_torn_line(stream)
            stream.write(record.to_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    # --- chunks ---

    def chunk_file(self, chunk: Chunk) -> Path:
        """Where a chunk lies."""
        return self.folder / "chunks" / chunk.cell_id / f"{chunk.start:08d}-{chunk.stop:08d}.npz"

    def write_chunk(self, chunk: Chunk, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write a chunk atomically: a reader sees the whole chunk or none."""
        _write_npz(self.chunk_file(chunk), arrays, facts)

    def read_chunk(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """All arrays of a chunk but its facts.

        Raises:
            EvalbenchError: missing or damaged.
        """
        file = self.chunk_file(chunk)
        try:
            # numpy leaves a file of its own open when it is damaged
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                return {name: content[name] for name in content.files if name != "facts"}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise EvalbenchError(f"chunk {file} cannot be read ({error}); delete it and run again") from None

    def chunk_facts(self, chunk: Chunk) -> dict[str, Any] | None:
        """Facts of a chunk with the names of its arrays under `arrays`; None when missing or damaged."""
        try:
            with self.chunk_file(chunk).open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                facts: dict[str, Any] = json.loads(str(content["facts"]))
                facts["arrays"] = [name for name in content.files if name != "facts"]
                return facts
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None

    # --- what methods prepared ---

    def artifact_file(self, key: str) -> Path:
        """Where a preparation lies."""
        return self.folder / "artifacts" / f"{key}.npz"

    def write_artifacts(self, key: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write what a preparation made, atomically."""
        _write_npz(self.artifact_file(key), arrays, facts)

    def read_artifacts(self, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and facts of a preparation; None when missing or damaged (it is then made again)."""
        try:
            with self.artifact_file(key).open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files if name != "facts"}
                return arrays, json.loads(str(content["facts"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None

    def images(self, cell_id: str) -> np.ndarray | None:
        """The kept uint8 images of a cell from sample 0 on, (n, C, H, W); None when there are none."""
        found = []
        for file in sorted((self.folder / "chunks" / cell_id).glob("*.npz")):
            with np.load(file, allow_pickle=False) as content:
                if "images" in content.files and len(content["images"]):
                    found.append(content["images"])
        return np.concatenate(found) if found else None

    def per_sample(self, cell_id: str) -> dict[str, np.ndarray]:
        """What a cell has one number of per sample: `sample` (its index), scores, `count:NAME`; each (n,).

        Rows of features and images are left on disk. Empty when the folder has no chunk of the cell.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for file in sorted((self.folder / "chunks" / cell_id).glob("*.npz")):
            start, stop = map(int, file.stem.split("-"))
            parts.setdefault("sample", []).append(np.arange(start, stop))
            with np.load(file, allow_pickle=False) as content:
                for name in content.files:
                    if name not in ("facts", "images") and (values := content[name]).shape == (stop - start,):
                        parts.setdefault(name, []).append(values)
        # a column that some chunks lack (a metric that came later) would be shorter than the index
        whole = {name: found for name, found in parts.items() if len(found) == len(parts["sample"])}
        return {name: np.concatenate(found) for name, found in whole.items()}


def _write_npz(file: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Arrays and JSON facts in one file: a reader sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays, facts=np.array(json.dumps(facts, sort_keys=True)))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise EvalbenchError(f"disk full while writing {file}; free space and run the same command again") from None
        raise


def _cut_torn_line(stream: Any) -> None:
    """Drop an unfinished last line left by a kill, so that the next record starts on a line of its own."""
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return
    stream.seek(0)
    content = stream.read()
    if not content.endswith(b"\n"):
        stream.truncate(content.rfind(b"\n") + 1)
        stream.seek(0, os.SEEK_END)


@contextlib.contextmanager
def open_run(folder: Path | str, suite: Suite, plugins: Mapping[str, str]) -> Iterator[Store]:
    """Create or reopen a run folder for writing, locked against a second writer.

    Raises:
        UserError: the folder cannot be made, holds another suite or suite version, or is being written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to --out '{folder}': {error.strerror}; choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another evalbench is writing to '{folder}'; wait for it or choose another --out"
            ) from None
        _check_manifest(folder, suite, plugins)
        yield Store(folder)


def _check_manifest(folder: Path, suite: Suite, plugins: Mapping[str, str]) -> None:
    file = folder / "manifest.json"
    if not file.is_file():
        if any(entry.name != ".lock" for entry in folder.iterdir()):
            raise UserError(f"--out '{folder}' is not empty and not a run folder; choose another")
        _write_manifest(file, suite, plugins, created=datetime.datetime.now(datetime.UTC).isoformat())
        return
    manifest = Store(folder).manifest()
    stored = manifest["suite"]
    if (stored["name"], stored["version"]) != (suite.name, suite.version):
        raise UserError(
            f"run folder '{folder}' holds suite {stored['name']} version {stored['version']}, "
            f"not {suite.name} version {suite.version}; choose another --out"
        )
    if stored["model"] != suite.content()["model"] or stored["path"] != suite.content()["path"]:
        raise UserError(
            f"run folder '{folder}' was made with another model or path under the name {suite.name} "
            f"version {suite.version}; raise the suite's version or choose another --out"
        )
    _write_manifest(file, suite, manifest["plugins"] | dict(plugins), created=manifest["created"])


def _write_manifest(file: Path, suite: Suite, plugins: Mapping[str, str], created: str) -> None:
    content = {
        "schema": 1,
        "suite": suite.content(),
        "suite_id": suite.id,
        "plugins": dict(plugins),
        "evalbench": __version__,
        "created": created,
    }
    write_atomic(file, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_atomic(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never half."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
