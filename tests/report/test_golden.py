"""The report's texts against the files under tests/golden/, which `python tests/report_golden.py` writes."""

from __future__ import annotations

import pytest
from report_golden import FILES, FOLDER, HOSTILE, texts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return texts(tmp_path_factory.mktemp("golden") / "run", backwards=True)


@pytest.mark.parametrize("name", FILES.values())
def test_files_are_the_golden_ones_in_any_order_of_the_records(name: str, made: dict[str, str]) -> None:
    assert made[name] == (FOLDER / name).read_text("utf-8"), "if meant: python tests/report_golden.py"


def test_a_hostile_name_is_text_in_markdown_and_latex(made: dict[str, str]) -> None:
    assert "<script" not in made["report.md"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made["report.md"]
    assert r"\textless{}script\textgreater{}alert(1)" in made["report.tex"]
    assert f",{HOSTILE},10," in made["table.csv"]
