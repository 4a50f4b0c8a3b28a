"""A run as one file: equal bytes, what is in it, and that everything that was changed is named."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import request, run_serial, small_suite

from evalbench import bundle
from evalbench.errors import EvalbenchError, UserError
from evalbench.metrics.frechet import moments
from evalbench.store import Store

Content = dict[str, bytes]
EVALBENCH = Path(sys.executable).with_name("evalbench")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "r"
    run_serial(request(small_suite(), ["ddim", "heun"]), folder)
    return folder


@pytest.fixture(scope="module")
def packed(run: Path) -> Path:
    return bundle.pack(run, run.parent / "r.zip")


def unzipped(file: Path) -> Content:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(content: Content, file: Path, *, honest: bool = True) -> Path:
    """A bundle of other content; `honest` gives it the digests of that content, as a forger would."""
    if honest:
        facts = json.loads(content["bundle.json"])
        facts["files"] = {n: hashlib.sha256(c).hexdigest() for n, c in content.items() if n != "bundle.json"}
        content = content | {"bundle.json": json.dumps(facts).encode()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, one in content.items():
            archive.writestr(name, one)
    return file


def test_equal_runs_are_packed_to_equal_bytes_and_hold(run: Path, packed: Path, tmp_path: Path) -> None:
    assert bundle.pack(run, tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    found = bundle.check(packed)
    assert found.wrong == ()
    records = Store(run).records()
    distances = sum(name.startswith("fd") for record in records for name in record.metrics)
    counts = sum(len(record.counts) for record in records)
    assert distances
    assert counts
    assert found.computed >= distances + counts
    assert found.carried  # kernel distances and quantiles of paired errors


def test_what_is_kept_are_the_sums_and_scores_of_the_chunks(run: Path, packed: Path, tmp_path: Path) -> None:
    record = Store(run).records()[0]
    with zipfile.ZipFile(packed) as archive:
        archive.extract(f"cells/{record.cell.id}.npz", tmp_path)
    with np.load(tmp_path / "cells" / f"{record.cell.id}.npz") as kept:
        features = np.concatenate(
            [Store(run).read_chunk(c)["identity"] for c in sorted(Store(run).present_chunks(record.cell.id))]
        )
        whole = moments(features.reshape(len(features), -1))
        assert int(kept["n:identity"]) == whole.n
        np.testing.assert_allclose(kept["outer:identity"], whole.outer, rtol=1e-12)
        assert not {"identity"} & set(kept.files)


def test_an_unpacked_bundle_is_read_as_a_run_folder(run: Path, packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path)
    assert Store(tmp_path).records() == Store(run).records()


def _better(content: Content) -> Content:
    """A record with a smaller distance, and the table made to fit."""
    lines = [json.loads(line) for line in content["records.jsonl"].decode().splitlines()]
    for line in lines:
        line["metrics"]["fd@identity"]["value"] *= 0.5
    return content | {"records.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}


@pytest.mark.parametrize(
    ("change", "honest", "message"),
    [
        (
            lambda c: c | {"table.csv": c["table.csv"].replace(b"ddim", b"best")},
            False,
            "table.csv is not what was pack",
        ),
        (lambda c: c | {"table.csv": c["table.csv"].replace(b"ddim", b"best")}, True, "not the table of the records"),
        (lambda c: {n: x for n, x in c.items() if n != "timings.csv"}, False, "timings.csv is missing"),
        (lambda c: c | {"more.txt": b"x"}, False, "more.txt is not listed"),
        (lambda c: c | {"../out.txt": b"x"}, True, r"\.\./out.txt has no place in a bundle"),
        (_better, True, r"fd@identity is .* in the record, .* from what it rests on"),
    ],
)
def test_what_was_changed_is_named(
    packed: Path,
    tmp_path: Path,
    change: Callable[[Content], Content],
    honest: bool,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = rezipped(change(unzipped(packed)), tmp_path / "b.zip", honest=honest)
    assert bundle.verify_command(file) == 4
    out = capsys.readouterr().out
    assert re.search(message, out), out
    assert not (tmp_path / "out.txt").exists()


def test_the_command_packs_and_verifies(run: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "x.zip")
    for arguments in (["pack", str(run), "--out", file], ["verify", file]):
        done = subprocess.run([EVALBENCH, *arguments], capture_output=True, text=True, check=True)
    assert "values computed again and equal" in done.stdout


def test_what_is_no_bundle_is_said_in_one_line(tmp_path: Path, packed: Path) -> None:
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    for file in (text, other):
        with pytest.raises(UserError, match="is no bundle") as caught:
            bundle.check(file)
        assert "\n" not in str(caught.value)
    content = unzipped(packed)
    newer = content | {"bundle.json": content["bundle.json"].replace(b'"schema": 1', b'"schema": 2')}
    with pytest.raises(EvalbenchError, match="has schema 2, this evalbench reads 1"):
        bundle.check(rezipped(newer, tmp_path / "newer.zip", honest=False))


def test_a_bomb_is_not_unpacked(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LARGEST", 1000)
    with pytest.raises(UserError, match="unpacked"):
        bundle.check(packed)


def test_code_in_a_bundle_is_never_run(packed: Path, tmp_path: Path) -> None:
    """It is a stranger's file: a plug-in in its manifest stays text, and a model that would need it is not built."""
    content = unzipped(packed)
    manifest = json.loads(content["manifest.json"])
    witness = tmp_path / "ran"
    manifest["plugins"] = {"evil.py": f"open({str(witness)!r}, 'w')"}
    manifest["suite"]["model"]["loader"] = "evil"
    changed = content | {"manifest.json": json.dumps(manifest).encode()}
    found = bundle.check(rezipped(changed, tmp_path / "b.zip"))
    assert found.wrong == ()
    assert not witness.exists()
    assert found.computed == sum(len(record.counts) for record in Store(packed.parent / "r").records())


def test_what_cannot_be_computed_here_is_taken_as_recorded(packed: Path, tmp_path: Path) -> None:
    content = unzipped(packed)
    lines = [json.loads(line) for line in content["records.jsonl"].decode().splitlines()]
    for line in lines:
        line["metrics"]["of-a-plug-in@identity"] = line["metrics"]["fd@identity"]
    records = "".join(json.dumps(line) + "\n" for line in lines).encode()
    changed = content | {"records.jsonl": records}
    before, after = bundle.check(packed), bundle.check(rezipped(changed, tmp_path / "b.zip"))
    assert after.wrong == ("table.csv is not the table of the records",), "a column more"
    assert (after.computed, after.carried) == (before.computed, before.carried + len(lines))
