"""The run folder: atomic chunks, append-only records, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import small_suite

from evalbench.errors import EvalbenchError, UserError
from evalbench.spec import Cell, Chunk, Record
from evalbench.store import Store, open_run


def _record(nfe: int = 5, **changes: object) -> Record:
    cell = Cell(suite="s", suite_version=1, generation="g", method="ddim", settings="x", nfe=nfe)
    return Record(**({"kind": "quality", "status": "ok", "cell": cell} | changes))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with open_run(tmp_path / "run", small_suite(), {}) as opened:
        return opened


def test_the_last_record_of_a_cell_counts(store: Store) -> None:
    store.append(_record(samples=1))
    store.append(_record(nfe=6))
    store.append(_record(samples=2))
    assert [(r.cell.nfe, r.samples) for r in store.records()] == [(5, 2), (6, 0)]


def test_records_survive_a_torn_last_line(store: Store) -> None:
    store.append(_record())
    file = store.folder / "records.jsonl"
    file.write_bytes(file.read_bytes() + b'{"schema": 1, "kind": "qua')
    assert len(store.records()) == 1
    store.append(_record(nfe=7))
    assert [r.cell.nfe for r in store.records()] == [5, 7]


def test_a_damaged_record_is_an_error_with_its_line(store: Store) -> None:
    (store.folder / "records.jsonl").write_text(_record().to_json() + "\nrubbish\n")
    with pytest.raises(EvalbenchError, match=r"records\.jsonl, line 2 is not a record"):
        store.records()


def test_a_newer_schema_is_refused(store: Store) -> None:
    content = json.loads(_record().to_json()) | {"schema": 99}
    (store.folder / "records.jsonl").write_text(json.dumps(content) + "\n")
    with pytest.raises(EvalbenchError, match="schema 99, this evalbench reads 1; upgrade"):
        store.records()


def test_chunks_come_back_as_written(store: Store) -> None:
    chunk = Chunk("cell", 0, 4)
    arrays = {"x": np.arange(8.0).reshape(4, 2), "images": np.zeros((4, 1, 2, 2), np.uint8)}
    store.write_chunk(chunk, arrays, {"seconds": 1.5})
    for name, values in store.read_chunk(chunk).items():
        np.testing.assert_array_equal(values, arrays[name])
    facts = store.chunk_facts(chunk)
    assert facts == {"seconds": 1.5, "arrays": ["x", "images"]}
    assert not list((store.folder / "chunks" / "cell").glob(".*")), "no temporary file stays"


def test_equal_chunks_are_equal_bytes(store: Store) -> None:
    one, other = Chunk("a", 0, 2), Chunk("b", 0, 2)
    for chunk in (one, other):
        store.write_chunk(chunk, {"x": np.ones((2, 3))}, {})
    assert store.chunk_file(one).read_bytes() == store.chunk_file(other).read_bytes()


def test_a_cut_chunk_is_not_there(store: Store) -> None:
    chunk = Chunk("cell", 0, 2)
    store.write_chunk(chunk, {"x": np.ones((2, 300))}, {})
    file = store.chunk_file(chunk)
    file.write_bytes(file.read_bytes()[:-40])
    assert store.chunk_facts(chunk) is None
    with pytest.raises(EvalbenchError, match="delete it and run again"):
        store.read_chunk(chunk)


def test_another_suite_or_version_is_refused(store: Store) -> None:
    other = small_suite("gmm-sharp")
    newer = small_suite().model_copy(update={"version": 2})
    for suite in (other, newer):
        with pytest.raises(UserError, match="holds suite gmm-smooth version 1, not"), open_run(store.folder, suite, {}):
            pass


def test_a_changed_model_under_the_same_version_is_refused(store: Store) -> None:
    suite = small_suite()
    changed = suite.model_copy(update={"model": suite.model.model_copy(update={"options": {"std": 0.1}})})
    with pytest.raises(UserError, match="raise the suite's version"), open_run(store.folder, changed, {}):
        pass


def test_folders_that_cannot_be_run_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to --out"), open_run(tmp_path / "file" / "r", small_suite(), {}):
        pass
    with pytest.raises(UserError, match="not empty and not a run folder"), open_run(tmp_path, small_suite(), {}):
        pass
    with pytest.raises(UserError, match="not a run folder"):
        Store(tmp_path)
