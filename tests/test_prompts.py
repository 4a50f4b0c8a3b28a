"""Prompt sets: read from the user's folder, by digest; the public ones where a folder with them is given."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from evalbench.errors import UserError
from evalbench.prompts import read_prompts
from evalbench.spec import Prompts, load_suite, suite_names

# a folder with the public files; beside the checkout on the machines of the project
DATA = Path(os.environ.get("EVALBENCH_TEST_PROMPTS", Path(__file__).resolve().parents[2] / "shared/data/prompts"))
SETS = [name for name in suite_names() if load_suite(name).conditions.prompts]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    return tmp_path / "prompts"


def prompts(folder: Path, name: str, content: str, **facts: object) -> Prompts:
    (folder / name).write_text(content, "utf-8")
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Prompts(file=name, sha256=digest, source="a test", licence="none", **facts)  # type: ignore[arg-type]


def test_every_format_gives_ids_texts_and_categories(folder):
    tsv = prompts(
        folder, "a.tsv", 'P\tC\na "dog\tAnimals\ntwo\tNumbers\n', format="tsv", text="P", category="C", rows=2
    )
    assert [(p.id, p.text, p.category) for p in read_prompts(tsv)] == [
        ("0", 'a "dog', "Animals"),
        ("1", "two", "Numbers"),
    ]
    csv = prompts(folder, "a.csv", 'P,C\n"a, b",X\n', format="csv", text="P", category="C", rows=1)
    assert read_prompts(csv)[0].text == "a, b"
    pairs = prompts(folder, "pairs.tsv", "COCOval-7\tone\tmore\n", format="pairs", rows=1)
    assert [(p.id, p.text) for p in read_prompts(pairs)] == [("COCOval-7", "one\tmore")]
    line = json.dumps({"tag": "counting", "prompt": "two dogs", "include": []})
    geneval = prompts(folder, "a.jsonl", line + "\n", format="jsonl", text="prompt", category="tag", rows=1)
    (found,) = read_prompts(geneval)
    assert (found.text, found.category, found.facts) == ("two dogs", "counting", line)
    lines = prompts(folder, "a.txt", "x\ny\n", format="lines", rows=2)
    assert [p.text for p in read_prompts(lines)] == ["x", "y"]
    notes = [{"image_id": 9, "id": 5, "caption": "later"}, {"image_id": 9, "id": 2, "caption": "first "}]
    notes.append({"image_id": 3, "id": 8, "caption": "other"})
    coco = prompts(folder, "c.json", json.dumps({"annotations": notes}), format="coco", rows=2)
    assert [(p.id, p.text) for p in read_prompts(coco)] == [("3", "other"), ("9", "first")]


def test_what_is_wrong_with_a_file_is_said_in_one_line(folder):
    good = prompts(folder, "a.txt", "x\ny\n", format="lines", rows=2)
    cases = [
        (good.model_copy(update={"file": "absent.txt"}), "prompts not found; put absent.txt"),
        (good.model_copy(update={"sha256": "0" * 64}), "has SHA-256"),
        (good.model_copy(update={"rows": 3}), "holds 2 prompts, the suite says 3"),
        (good.model_copy(update={"format": "tsv", "text": "P"}), "is no tsv file"),
    ]
    for spoiled, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read_prompts(spoiled)
        assert "\n" not in str(caught.value)


def test_standard_suites_name_source_and_digest_of_their_prompts():
    assert {"coco30k", "coco2014-mlperf", "coco2017-5k", "partiprompts", "drawbench", "geneval", "dpg-bench"} == set(
        SETS
    )
    for name in SETS:
        found = load_suite(name).conditions.prompts
        assert found is not None
        assert found.source
        assert len(found.sha256) == 64


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no public prompt files in {DATA}; set EVALBENCH_TEST_PROMPTS")
@pytest.mark.parametrize("name", SETS)
def test_the_public_files_load_whole(name, folder):
    folder.rmdir()
    folder.symlink_to(DATA)
    wanted = load_suite(name).conditions.prompts
    assert wanted is not None
    found = read_prompts(wanted)
    assert len(found) == wanted.rows
    assert len({prompt.id for prompt in found}) == len(found)
    assert sum(not prompt.text.strip() for prompt in found) == {"coco30k": 21}.get(name, 0)  # as in the file
    categories = Counter(prompt.category for prompt in found)
    kinds = {"partiprompts": 12, "drawbench": 11, "geneval": 6}
    assert len(categories) == kinds.get(name, 1)
    if name == "geneval":
        assert categories["single_object"] == 80
        assert json.loads(found[0].facts)["include"]
    if name == "coco2014-mlperf":
        assert found[0].id == "70"
    if name == "dpg-bench":
        assert sum(len(prompt.text.split()) > 60 for prompt in found) > 300  # dense
