"""The run folder: atomic chunks, append-only records, refusals."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import small_suite

from evalbench.durable import GROUP, LARGE, Group, write_npz
from evalbench.errors import EvalbenchError, UserError
from evalbench.spec import Cell, Chunk, Record
from evalbench.store import DamagedChunk, Store, open_run


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
    assert facts == {"seconds": 1.5, "chunk": ["cell", 0, 4]}
    assert not list((store.folder / "chunks" / "cell").glob(".*")), "no temporary file stays"


def test_counts_come_back_whether_they_lie_together_or_as_before(store: Store) -> None:
    arrays = {"x": np.ones((2, 3)), "count:nfe": np.array([4.0, 6.0]), "count:cost": np.array([8.0, 12.0])}
    facts = {"seconds": 1.5}
    store.write_chunk(Chunk("together", 0, 2), arrays, facts)
    before = Chunk("before", 0, 2)
    write_npz(store.chunk_file(before), arrays, {**facts, "chunk": list(before)})
    with np.load(store.chunk_file(Chunk("together", 0, 2))) as content:
        assert set(content.files) == {"x", "counts", "facts", "sha256"}
    for chunk in (Chunk("together", 0, 2), before):
        found, said = store.read_whole_chunk(chunk)
        assert said == {"seconds": 1.5, "chunk": list(chunk)}
        assert {name: values.tolist() for name, values in found.items()} == {
            name: values.tolist() for name, values in arrays.items()
        }
        assert store.per_sample(chunk.cell_id)["count:cost"].tolist() == [8.0, 12.0]


def test_equal_chunks_are_equal_bytes(store: Store) -> None:
    chunk = Chunk("a", 0, 2)
    written = []
    for _ in range(2):
        store.write_chunk(chunk, {"x": np.ones((2, 3))}, {})
        written.append(store.chunk_file(chunk).read_bytes())
    assert written[0] == written[1]


def _cut(content: bytes) -> bytes:
    return content[:-40]


def _emptied(content: bytes) -> bytes:
    return b""


def _forged(content: bytes) -> bytes:
    """Another value with a zip of its own that is sound: only the digest can tell."""
    with np.load(io.BytesIO(content), allow_pickle=False) as old:
        arrays = dict(old)
    arrays["x"] = arrays["x"] + 1
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize("damage", [_cut, _emptied, _forged])
def test_a_damaged_chunk_is_named(store: Store, damage: Callable[[bytes], bytes]) -> None:
    chunk = Chunk("cell", 0, 2)
    store.write_chunk(chunk, {"x": np.ones((2, 300))}, {})
    file = store.chunk_file(chunk)
    file.write_bytes(damage(file.read_bytes()))
    assert damage is _forged or store.chunk_facts(chunk) is None
    with pytest.raises(DamagedChunk, match=r"00000000-00000002\.npz is damaged .*; delete it and run again") as raised:
        store.read_chunk(chunk)
    assert raised.value.chunk == chunk


def test_numbers_per_sample_come_from_all_chunks_or_a_damaged_one_is_named(store: Store) -> None:
    """A torn chunk, and the leftover of a kill beside it."""
    arrays = {"score": np.arange(2.0), "count:nfe": np.ones(2), "rows": np.ones((2, 3)), "images": np.zeros(2, "u1")}
    for start in (2, 0):
        store.write_chunk(Chunk("cell", start, start + 2), arrays, {})
    last = store.chunk_file(Chunk("cell", 4, 5))
    last.with_name(f".{last.name}.0123456789ab").write_bytes(b"half")
    found = store.per_sample("cell")
    assert {name: values.tolist() for name, values in found.items()} == {
        "sample": [0, 1, 2, 3],
        "score": [0.0, 1.0, 0.0, 1.0],
        "count:nfe": [1.0] * 4,
    }
    last.write_bytes(store.chunk_file(Chunk("cell", 0, 2)).read_bytes()[:-40])
    with pytest.raises(DamagedChunk, match=r"00000004-00000005\.npz is damaged .*; delete it and run again"):
        store.per_sample("cell")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_changes_nothing(store: Store, place: float, bit: int) -> None:
    chunk, arrays = Chunk("cell", 0, 2), {"x": np.arange(60.0).reshape(2, 30), "y": np.ones(2, np.uint8)}
    store.write_chunk(chunk, arrays, {"seconds": 1.0})
    file = store.chunk_file(chunk)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        found = store.read_chunk(chunk)
    except DamagedChunk:
        return
    assert {name: values.tobytes() for name, values in found.items()} == {k: v.tobytes() for k, v in arrays.items()}


def test_a_chunk_under_another_name_is_not_that_chunk(store: Store) -> None:
    one, other = Chunk("cell", 0, 2), Chunk("cell", 2, 4)
    store.write_chunk(one, {"x": np.ones((2, 3))}, {})
    store.chunk_file(one).rename(store.chunk_file(other))
    assert store.chunk_facts(other) is None
    with pytest.raises(DamagedChunk, match="holds another chunk"):
        store.read_chunk(other)


def test_small_chunks_are_made_durable_in_groups_and_before_a_record(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    flush = Group.flush
    monkeypatch.setattr(Group, "flush", lambda self: (synced.append(len(self._files)), flush(self)))
    monkeypatch.setattr("evalbench.durable.SECONDS", 3600.0)
    for i in range(GROUP + 3):
        store.write_chunk(Chunk("cell", i, i + 1), {"x": np.ones(1)}, {})
    assert synced == [GROUP]
    store.append(_record())
    assert synced == [GROUP, 3]
    store.write_chunk(Chunk("cell", 0, 4), {"x": np.ones(LARGE // 8)}, {})
    assert store._group._files == [], "a large chunk goes to the disk by itself"


def test_a_full_disk_is_one_line_and_leaves_what_was_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(_record())
    before = (store.folder / "records.jsonl").read_bytes()
    chunk = Chunk("cell", 0, 2)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EvalbenchError, match=r"disk full while writing .*records\.jsonl; free space and run the same"):
        store.append(_record(nfe=6))
    assert (store.folder / "records.jsonl").read_bytes() == before
    with pytest.raises(EvalbenchError, match="disk full"):
        store.write_chunk(chunk, {"x": np.ones(LARGE // 8)}, {})
    assert not [file for file in store.chunk_file(chunk).parent.iterdir() if file.is_file()]


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
