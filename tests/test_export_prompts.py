"""Layouts of GenEval and DPG-Bench: which image lands under which prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evalbench.errors import UserError
from evalbench.export import _by_prompt
from evalbench.prompts import Prompt
from evalbench.spec import Cell

PROMPTS = (Prompt("a1", "one", "x", '{"prompt": "one"}'), Prompt("b2", "two", "x", '{"prompt": "two"}'))


def record() -> Any:
    cell = Cell(suite="s", suite_version=1, generation="g", method="ddim", settings="", nfe=5)
    return SimpleNamespace(cell=cell, protocol="p")


def images(n: int) -> np.ndarray:
    """Sample i is all i."""
    return np.stack([np.full((3, 4, 4), i, dtype=np.uint8) for i in range(n)])


def value(file: Any, at: tuple[int, int] = (0, 0)) -> int:
    return int(np.asarray(Image.open(file))[at][0])


def test_geneval_has_a_folder_per_prompt(tmp_path):
    target = _by_prompt(record(), images(8), PROMPTS, "geneval", tmp_path)
    assert (target / "00001" / "metadata.jsonl").read_text() == '{"prompt": "two"}\n'
    assert [value(target / "00001" / "samples" / f"{k:04d}.png") for k in range(4)] == [1, 3, 5, 7]
    assert target.with_suffix(".json").is_file()


def test_dpg_has_four_images_in_one(tmp_path):
    target = _by_prompt(record(), images(8), PROMPTS, "dpg", tmp_path)
    assert np.asarray(Image.open(target / "b2.png")).shape == (8, 8, 3)
    assert [value(target / "b2.png", at) for at in ((0, 0), (0, 4), (4, 0), (4, 4))] == [1, 3, 5, 7]


def test_numbers_that_do_not_divide_and_names_that_leave_are_refused(tmp_path):
    with pytest.raises(UserError, match="--samples 8"):
        _by_prompt(record(), images(7), PROMPTS, "geneval", tmp_path)
    with pytest.raises(UserError, match="no file name"):
        _by_prompt(record(), images(4), (Prompt("../x", "one"),), "dpg", tmp_path)
