"""Scores of external judges: added to their cell, marked, replaced by a second import, refused in one line."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support import request, run_serial, small_suite

import evalbench
from evalbench.bundle import check, pack
from evalbench.errors import UserError
from evalbench.imports import import_command, import_scores
from evalbench.report import build_report
from evalbench.store import Store
from evalbench.upkeep import verify_command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_serial(request(small_suite(), ["ddim", "unipc"], [3, 5], metrics=("paired-median@identity",)), tmp_path / "run")
    return tmp_path / "run"


def scores(run: Path, *entries: dict[str, Any], **changes: Any) -> Path:
    (run.parent / "results.jsonl").write_text("what the evaluator printed\n")
    content = {
        "evaluator": "geneval",
        "version": "abc123",
        "log": "results.jsonl",
        "unit": "fraction",
        "scores": entries,
    }
    file = run.parent / "scores.json"
    file.write_text(json.dumps(content | changes))
    return file


ONE = {"method": "ddim", "nfe": 5, "value": 0.625, "n": 64, "se": 0.06}


def test_a_score_stands_in_the_table_and_says_where_it_comes_from(run: Path) -> None:
    import_scores(run, scores(run, ONE))
    frame = evalbench.load(run)
    row = frame[(frame["method"] == "ddim") & (frame["nfe"] == 5)].iloc[0]
    assert row["geneval@abc123"] == 0.625
    digest = hashlib.sha256(b"what the evaluator printed\n").hexdigest()[:16]
    assert row["geneval@abc123:note"] == f"imported: geneval abc123, log sha256 {digest}"
    assert frame["geneval@abc123"].notna().sum() == 1
    report = build_report(Store(run), run / "report", ("md", "html"))
    assert "geneval@abc123" in report["md"].read_text()
    assert all("geneval@abc123" not in record.metrics for record in Store(run).records()), "records stay as measured"


def test_the_table_is_made_anew_and_holds_in_verify_and_in_a_bundle(run: Path, capsys: Any) -> None:
    build_report(Store(run), run / "report", ("csv",))
    import_command(run, scores(run, ONE))
    assert "geneval@abc123" in (run / "table.csv").read_text().splitlines()[0]
    assert verify_command(run, repair=False) == 0, capsys.readouterr().out
    bundle = pack(run, run.with_suffix(".zip"))
    assert check(bundle).wrong == ()
    with zipfile.ZipFile(bundle) as archive:
        assert b"geneval@abc123" in archive.read("table.csv")
    (run / "imports.jsonl").write_text("{")
    assert verify_command(run, repair=False) == 4
    assert "imports.jsonl cannot be read" in capsys.readouterr().out


def test_a_second_import_replaces_the_first_and_a_resumed_run_keeps_it(run: Path) -> None:
    import_scores(run, scores(run, ONE))
    import_scores(run, scores(run, ONE | {"value": 0.75}))
    run_serial(request(small_suite(), ["ddim", "heun"], [5], metrics=("paired-median@identity",)), run)
    frame = evalbench.load(run).set_index(["method", "nfe"])
    assert frame.loc[("ddim", 5), "geneval@abc123"] == 0.75


@pytest.mark.parametrize(
    ("entry", "changes", "says"),
    [
        ({"nfe": 7}, {}, "ddim at NFE 7 fits no finished cell"),
        ({"method": "dddim"}, {}, "dddim at NFE 5 fits no finished cell"),
        ({"value": float("nan")}, {}, "value"),
        ({"n": 0}, {}, "n"),
        ({"extra": 1}, {}, "extra"),
        ({}, {"log": "absent.jsonl"}, "absent.jsonl' is not there"),
        ({}, {"evaluator": "a b"}, "'a b' must be letters"),
        ({}, {"scores": []}, "scores"),
    ],
)
def test_what_is_wrong_is_one_line_and_changes_nothing(
    run: Path, entry: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as raised:
        import_scores(run, scores(run, ONE, ONE | entry, **changes) if entry else scores(run, ONE, **changes))
    assert "\n" not in str(raised.value)
    assert not (run / "imports.jsonl").exists()


def test_a_score_that_fits_two_cells_asks_for_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = request(small_suite(), ["ddim"], [5], seeds=(0, 1), metrics=("paired-median@identity",))
    run_serial(wanted, run)
    with pytest.raises(UserError, match="fits 2 cells; give guidance and seed"):
        import_scores(run, scores(run, ONE))
    import_scores(run, scores(run, ONE | {"seed": 1}))
    assert evalbench.load(run)["geneval@abc123"].notna().sum() == 1
