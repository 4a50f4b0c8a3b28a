"""One side of a comparison: the records of a run folder by key, and the rows of its chunks. Only read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from evalbench import registry
from evalbench.errors import EvalbenchError, UserError, unknown
from evalbench.metrics.common import CLUSTER, Array
from evalbench.spec import SCHEMA, Cell, Chunk, Record, Suite, chunks_of, content_id, parse_suite
from evalbench.store import Store
from evalbench.suite_references import check_reference_file, read_reference

_CELLS_HELD = 3  # of each run, in memory at a time: a cell and its fine solution, for all metrics


class Key(NamedTuple):
    """What makes two cells partners. The suite's version and the method's settings are reasons, not parts of it."""

    suite: str
    method: str
    nfe: int
    guidance: float
    seed: int


class NotComparable(Exception):
    """The message is the reason."""


@dataclass(frozen=True)
class Run:
    """One side of a comparison: a run folder that is only read."""

    store: Store
    _held: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # the cells used last, oldest first
    _built: dict[str, dict[str, str]] = field(default_factory=dict)  # parts of a cell's id by method text
    _references: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def suite(self) -> Suite:
        """The suite's facts, from the manifest.

        Raises:
            EvalbenchError: the manifest is damaged, or from a newer evalbench.
        """
        manifest, where = self.store.manifest(), f"manifest of {self.store.folder}"
        if not isinstance(manifest, dict) or not isinstance(manifest.get("suite"), dict):
            raise EvalbenchError(f"{where} names no suite; the file is corrupt, move the folder away and run again")
        if manifest.get("schema") != SCHEMA:
            raise EvalbenchError(f"{where} has schema {manifest.get('schema')}, this evalbench reads {SCHEMA}; upgrade")
        try:
            return parse_suite(manifest["suite"], "", where=where)
        except UserError as error:
            raise EvalbenchError(str(error)) from None

    @cached_property
    def records(self) -> list[Record]:
        """All records.

        Raises:
            EvalbenchError: a record is damaged, or from a newer evalbench.
        """
        return self.store.records()

    def cells(self, method: str | None) -> dict[Key, Record]:
        """Quality records by key; with `method`, that method's alone, under the key of any method.

        Raises:
            UserError: no cell of that method.
        """
        records = [record for record in self.records if record.kind == "quality"]
        if method is None:
            return {key_of(record.cell): record for record in records}
        found = {key_of(record.cell)._replace(method=""): record for record in records if record.cell.method == method}
        if not found and not any(record.cell.method == method for record in self.records):
            raise unknown(
                "method", method, {record.cell.method for record in self.records}, where=str(self.store.folder)
            )
        return found

    def rows(self, cell_id: str, samples: int, size: int, name: str) -> Array:
        """An array of a cell's chunks as float64 (N, D).

        Raises:
            NotComparable: chunks or the array are missing. EvalbenchError: a chunk is damaged.
        """
        arrays = self._arrays(cell_id, samples, size)
        if name not in arrays:
            raise NotComparable(f"feature arrays missing: '{name}' is not in the chunks of {self.store.folder}")
        return arrays[name].reshape(len(arrays[name]), -1).astype(np.float64)

    def clusters(self, cell_id: str, samples: int, size: int) -> np.ndarray | None:
        """The prompt of each sample of a cell as its chunks number them, int (N,); None where they do not say."""
        found = self._arrays(cell_id, samples, size).get(CLUSTER)
        return None if found is None else found.astype(np.int64)

    def reference(self, key: str) -> dict[str, np.ndarray]:
        """A reference of the suite: its file, or what the model computed and the run stored.

        Raises:
            NotComparable: the suite has none, its file is not the suite's, or the run did not store it.
        """
        if key not in self._references:
            self._references[key] = self._read_reference(key)
        return self._references[key]

    def _read_reference(self, key: str) -> dict[str, np.ndarray]:
        if key not in self.suite.references:
            raise NotComparable(f"the suite has no reference '{key}'")
        if self.suite.references[key].model:
            found = self.store.read_reference(key)
            if found is None:
                raise NotComparable(
                    f"reference '{key}' is computed by the model and not stored in {self.store.folder}; "
                    "run again into a fresh --out"
                )
            return found
        try:
            check_reference_file(self.suite, key)
        except UserError as error:
            raise NotComparable(str(error)) from None
        return read_reference(self.suite, key)

    def _arrays(self, cell_id: str, samples: int, size: int) -> dict[str, np.ndarray]:
        """All per-sample arrays of a cell but its images, in their own type."""
        key = f"{cell_id}/{samples}/{size}"
        if key not in self._held:
            chunks = [self.chunk(chunk) for chunk in chunks_of(cell_id, samples, size)]
            names = set.intersection(*(set(chunk) for chunk in chunks)) - {"images"}
            self._held[key] = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
            if len(self._held) > _CELLS_HELD:
                del self._held[next(iter(self._held))]
        self._held[key] = self._held.pop(key)
        return self._held[key]

    def chunk(self, chunk: Chunk) -> dict[str, np.ndarray]:
        if not self.store.chunk_file(chunk).is_file():
            raise NotComparable(f"feature arrays missing: {self.store.chunk_file(chunk)} does not exist")
        return self.store.read_chunk(chunk)

    def errors(self, record: Record, name: str) -> Array:
        """Error of each sample against the fine solution from the same noise, RMS per coordinate, (N,)."""
        size, cell = chunk_size(record), self.solution_cell(record)
        samples = self.rows(record.cell.id, record.samples, size, name)
        try:
            fine = self.rows(cell.id, record.samples, size, name)
        except NotComparable as error:
            raise NotComparable(f"of the fine solution: {error}") from None
        return np.asarray(np.sqrt(np.mean((samples - fine) ** 2, axis=1)))

    def solution_cell(self, record: Record) -> Cell:
        facts = record.protocol_facts.get("solution")
        if not facts:
            raise NotComparable("the suite has no fine solution to pair with")
        method = facts["method"]
        if method not in self._built:
            try:
                chain = registry.build_method(method)
            except UserError as error:
                raise NotComparable(f"the fine solution's method cannot be built here: {error}") from None
            self._built[method] = {"method": chain.text, "settings": content_id(chain.settings())}
        return record.cell.model_copy(update={**self._built[method], "nfe": facts["nfe"]})


def chunk_size(record: Record) -> int:
    """Samples of each chunk; raises NotComparable where the record does not say it."""
    if record.chunk is None:
        raise NotComparable("the record does not say its protocol")
    return record.chunk


def key_of(cell: Cell) -> Key:
    """What a cell is joined by."""
    return Key(cell.suite, cell.method, cell.nfe, cell.guidance, cell.seed)


def title_of(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.suite}: {cell.method}, NFE {cell.nfe}, guidance {cell.guidance:g}, seed {cell.seed}"
