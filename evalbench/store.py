"""Results on disk. Chunks are content-addressed and atomic, records are append-only; killing anything loses only the
chunks in flight.

    manifest.json            the suite's facts, plug-in sources, versions
    records.jsonl            one record per line; the last one of a (cell, kind, variant) counts
    chunks/CELL/START-STOP.npz
    artifacts/KEY.npz        what methods prepared, with its bill
    references/HASH.npz      what the suite's model computed of its own distribution, for verdicts
    table.csv, timings.csv, report/
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import __version__
from evalbench.durable import Group, append_line, opened, read_facts, read_npz, write_atomic, write_npz
from evalbench.errors import DamagedFile, EvalbenchError, UserError
from evalbench.spec import Chunk, Imported, MetricValue, Record, Suite, content_id, record_from_json

IMPORTS = "imports.jsonl"  # scores of other programs, one a line
TABLE_OF = ("manifest.json", "records.jsonl", IMPORTS)  # the files of a run folder that its table is made of
_COUNT, _COUNTS = "count:", "counts"  # what names of counts begin with; the array that holds all of a chunk
_CHUNK = re.compile(r"(\d+)-(\d+)\.npz")


class DamagedChunk(DamagedFile):
    """A chunk is missing or is not what was written."""

    def __init__(self, message: str, chunk: Chunk) -> None:
        super().__init__(message)
        self.chunk = chunk


@contextlib.contextmanager
def _named(chunk: Chunk) -> Iterator[None]:
    """A damaged file as the chunk that it holds."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedChunk(f"chunk {error}; delete it and run again", chunk) from None


class Store:
    """A run folder, for reading. `open_run` creates and locks one for writing.

    Args:
        folder: the run folder.

    Raises:
        UserError: not a run folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._group = Group()
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

    def records_after(self, known: int) -> list[Record]:
        """Records in the order they were written, without the first `known`."""
        return [
            record_from_json(line, where=f"{self.folder / 'records.jsonl'}, line {number}")
            for number, line in enumerate(self._lines()[known:], start=known + 1)
        ]

    def _lines(self) -> list[str]:
        file = self.folder / "records.jsonl"
        if not file.is_file():
            return []
        text = file.read_text(encoding="utf-8")
        lines = text.split("\n")
        # a line without its end is a write that was cut off by a kill: that record is simply not there
        return [line for line in lines[:-1] if line]

    def shown_records(self) -> list[Record]:
        """The latest records, with the scores that other programs computed: what tables and reports show."""
        imported: dict[str, dict[str, MetricValue]] = {}
        for one in self.imported():
            imported.setdefault(one.cell, {})[one.metric] = one.value
        return [
            record.model_copy(update={"metrics": {**record.metrics, **imported[record.cell.id]}})
            if record.kind == "quality" and record.cell.id in imported
            else record
            for record in self.records()
        ]

    def imported(self) -> list[Imported]:
        """Scores that other programs computed, in the order they came; a later one of a cell and metric wins.

        Raises:
            EvalbenchError: the file is damaged.
        """
        file = self.folder / IMPORTS
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            return [Imported.model_validate_json(line) for line in lines]
        except (ValueError, UnicodeDecodeError) as error:
            raise EvalbenchError(
                f"{file} cannot be read: {str(error).splitlines()[0]}; import the scores again"
            ) from None

    def append_imported(self, scores: Iterable[Imported]) -> None:
        """Add imported scores, durably."""
        for one in scores:
            append_line(self.folder / IMPORTS, one.model_dump_json())

    def append(self, record: Record) -> None:
        """Add a record, durably, after the chunks it was made of."""
        self.flush()
        append_line(self.folder / "records.jsonl", record.to_json())

    # --- chunks ---

    def chunk_file(self, chunk: Chunk) -> Path:
        """Where a chunk lies."""
        return self.folder / "chunks" / chunk.cell_id / f"{chunk.start:08d}-{chunk.stop:08d}.npz"

    def present_chunks(self, cell_id: str) -> set[Chunk]:
        """Chunks of a cell that have a file, whatever is in it."""
        try:
            names = os.listdir(self.folder / "chunks" / cell_id)
        except FileNotFoundError:
            return set()
        found = (_CHUNK.fullmatch(name) for name in names)
        return {Chunk(cell_id, int(match[1]), int(match[2])) for match in found if match}

    def write_chunk(self, chunk: Chunk, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write a chunk atomically: a reader sees the whole chunk or none. `flush` makes it durable."""
        arrays, facts = _stacked(arrays, {**facts, "chunk": list(chunk)})
        write_npz(self.chunk_file(chunk), arrays, facts, group=self._group)

    def read_chunk(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """All arrays of a chunk but its facts, checked against the digest inside.

        Raises:
            DamagedChunk: missing, damaged, or another chunk under this name.
        """
        return self.read_whole_chunk(chunk)[0]

    def read_whole_chunk(self, chunk: Chunk) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays of a chunk and its facts, as `read_chunk`."""
        with _named(chunk):
            arrays, facts = read_npz(self.chunk_file(chunk))
        self._check_place(chunk, facts)
        return _unstacked(arrays, facts)

    def chunk_facts(self, chunk: Chunk) -> dict[str, Any] | None:
        """Facts of a chunk; None when missing or damaged. Its arrays are not read, and not checked."""
        try:
            facts = read_facts(self.chunk_file(chunk))
            self._check_place(chunk, facts)
        except DamagedFile:
            return None
        return facts

    def remove_chunk(self, chunk: Chunk) -> None:
        """Forget a chunk, so that it is computed again."""
        self.chunk_file(chunk).unlink(missing_ok=True)

    def flush(self) -> None:
        """Make every chunk written so far durable."""
        self._group.flush()

    def _check_place(self, chunk: Chunk, facts: Mapping[str, Any]) -> None:
        if facts.get("chunk") != list(chunk):
            raise DamagedChunk(f"chunk {self.chunk_file(chunk)} holds another chunk; delete it and run again", chunk)

    # --- what methods prepared ---

    def artifact_file(self, key: str) -> Path:
        """Where a preparation lies."""
        return self.folder / "artifacts" / f"{key}.npz"

    def write_artifacts(self, key: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write what a preparation made, atomically and through to the disk."""
        write_npz(self.artifact_file(key), arrays, facts)

    def read_artifacts(self, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and facts of a preparation; None when missing or damaged (it is then made again)."""
        try:
            return read_npz(self.artifact_file(key))
        except DamagedFile:
            return None

    # --- references that a model computes ---

    def _reference_file(self, key: str) -> Path:
        return self.folder / "references" / f"{content_id(key)}.npz"

    def write_reference(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what the model computed, so that verdicts need no model."""
        write_npz(self._reference_file(key), arrays, {"reference": key})

    def read_reference(self, key: str) -> dict[str, np.ndarray] | None:
        """A kept reference; None when there is none.

        Raises:
            DamagedFile: it is not what was written.
        """
        file = self._reference_file(key)
        return read_npz(file)[0] if file.is_file() else None

    def images(self, cell_id: str) -> np.ndarray | None:
        """The kept uint8 images of a cell from sample 0 on, (n, C, H, W); None when there are none."""
        blocks = (self.read_chunk(chunk).get("images", ()) for chunk in sorted(self.present_chunks(cell_id)))
        found = list(itertools.takewhile(len, blocks))
        return np.concatenate(found) if found else None

    def per_sample(self, cell_id: str) -> dict[str, np.ndarray]:
        """What a cell has one number of per sample: `sample` (its index), scores, `count:NAME`; each (n,).

        Images are left on disk and rows of features let go at once, so no digest is held against what is read. Empty
        when the folder has no chunk of the cell.

        Raises:
            DamagedChunk: a chunk is truncated.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for chunk in sorted(self.present_chunks(cell_id)):
            size = chunk.stop - chunk.start
            parts.setdefault("sample", []).append(np.arange(chunk.start, chunk.stop))
            with _named(chunk), opened(self.chunk_file(chunk)) as content:
                names = [name for name in content.files if name not in ("images", "facts", "sha256")]
                held = {name: rows for name in names if (rows := content[name]).ndim == 1 or name == _COUNTS}
                arrays, _ = _unstacked(held, json.loads(str(content["facts"])))
            for name, values in arrays.items():
                if values.shape == (size,):
                    parts.setdefault(name, []).append(values)
        # a column that some chunks lack (a metric that came later) would be shorter than the index
        whole = {name: found for name, found in parts.items() if len(found) == len(parts["sample"])}
        return {name: np.concatenate(found) for name, found in whole.items()}


def _stacked(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The ledger's counts as the rows of one array, named in the facts: an array costs as much as its bytes do here."""
    counts = {name: values for name, values in arrays.items() if name.startswith(_COUNT)}
    if len({(values.dtype.str, values.shape) for values in counts.values()}) != 1:
        return dict(arrays), dict(facts)
    others = {name: values for name, values in arrays.items() if name not in counts}
    return {**others, _COUNTS: np.stack(list(counts.values()))}, {**facts, _COUNTS: list(counts)}


def _unstacked(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `_stacked` was given; a chunk from before has its counts one by one."""
    found, said = dict(arrays), dict(facts)
    names = said.pop(_COUNTS, ())
    return found | dict(zip(names, found.pop(_COUNTS, ()), strict=True)), said


@contextlib.contextmanager
def open_run(folder: Path | str, suite: Suite, plugins: Mapping[str, str], *, shared: bool = False) -> Iterator[Store]:
    """Create or reopen a run folder for writing, locked against a second writer.

    Args:
        shared: other processes that say so too may write at the same time (shards of a job array).

    Raises:
        UserError: the folder cannot be made, holds another suite or suite version, or is being written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"cannot write to --out '{folder}': {error.strerror}; choose another folder") from None
    with hold_run(folder, shared=shared):
        _check_manifest(folder, suite, plugins)
        store = Store(folder)
        try:
            yield store
        finally:
            store.flush()


@contextlib.contextmanager
def hold_run(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other writers out of a run folder, for a block.

    Raises:
        UserError: another process writes to it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another evalbench is writing to '{folder}'; wait for it or choose another --out"
            ) from None
        yield


def _check_manifest(folder: Path, suite: Suite, plugins: Mapping[str, str]) -> None:
    file = folder / "manifest.json"
    if not file.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
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
