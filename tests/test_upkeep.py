"""verify names what is damaged, gc drops what can go, and the same command makes a run whole again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import request, run_serial, small_suite

from evalbench import upkeep
from evalbench.durable import read_npz
from evalbench.report import build_report
from evalbench.store import Store


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_serial(request(small_suite(), ["ddim"]), tmp_path / "r")
    build_report(Store(tmp_path / "r"), tmp_path / "r" / "report", ("csv",))
    return tmp_path / "r"


def test_a_sound_run_is_said_to_be_sound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upkeep.verify_command(run, repair=False) == 0
    assert "6 chunks and every record as they were written" in capsys.readouterr().out


def test_damaged_chunks_are_named_removed_and_computed_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "table.csv").read_bytes()
    cut, flipped, deleted, *_ = sorted((run / "chunks").rglob("*.npz"))
    cut.write_bytes(cut.read_bytes()[:200])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 16
    flipped.write_bytes(content)
    assert upkeep.verify_command(run, repair=False) == 4
    out = capsys.readouterr().out
    assert f"{cut} is damaged" in out
    assert f"{flipped} is damaged" in out
    assert f"evalbench verify {run} --repair" in out
    assert upkeep.verify_command(run, repair=True) == 0
    deleted.unlink()
    _, computed = run_serial(request(small_suite(), ["ddim"]), run)
    files = {Store(run).chunk_file(job.chunk) for job in computed.jobs}
    assert files == {cut, flipped, deleted}, "and nothing else"
    build_report(Store(run), run / "report", ("csv",))
    assert (run / "table.csv").read_bytes() == before


def test_a_table_that_is_not_the_records_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run / "table.csv"
    table.write_text(table.read_text().replace("ddim", "unipc"))
    assert upkeep.verify_command(run, repair=True) == 4
    assert "is not the table of the records" in capsys.readouterr().out


def test_a_flipped_chunk_is_found_while_reducing_and_computed_again(run: Path) -> None:
    (run / "records.jsonl").unlink()
    flipped = sorted((run / "chunks").rglob("*.npz"))[0]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 16
    flipped.write_bytes(content)
    before = (run / "table.csv").read_bytes()
    _, computed = run_serial(request(small_suite(), ["ddim"]), run)
    assert [Store(run).chunk_file(job.chunk) for job in computed.jobs] == [flipped]
    build_report(Store(run), run / "report", ("csv",))
    assert (run / "table.csv").read_bytes() == before


def test_gc_drops_leftovers_and_features_when_asked(run: Path) -> None:
    leftover = next((run / "chunks").rglob("*.npz")).with_name(".00000000-00000032.npz.0123456789ab")
    leftover.write_bytes(b"x" * 100)
    records = (run / "records.jsonl").read_bytes()
    upkeep.gc_command(run, features=False)
    assert not leftover.exists()
    chunk = next(upkeep.chunks_in(Store(run)))
    assert "identity" in Store(run).read_chunk(chunk)
    arrays, facts = read_npz(Store(run).chunk_file(chunk))
    with_score = facts | {"features": facts["features"] | {"score": "score/1"}}
    Store(run).write_chunk(chunk, arrays | {"score": np.ones(32)}, with_score)
    upkeep.gc_command(run, features=True)
    assert {"count:nfe", "score"} <= Store(run).read_chunk(chunk).keys()
    assert "identity" not in Store(run).read_chunk(chunk)
    assert Store(run).chunk_facts(chunk)["features"] == {"score": "score/1"}, "a run knows what it need not compute"
    assert (run / "records.jsonl").read_bytes() == records
    assert run_serial(request(small_suite(), ["ddim"]), run)[1].jobs == [], "the run stays finished"
    assert upkeep.verify_command(run, repair=False) == 0
