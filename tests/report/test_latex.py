"""LaTeX tables: the numbers of the records, what is bold and underlined, and that text from outside stays text."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from report.synthetic import make_records, quality

from evalbench.report import build_report
from evalbench.report.latex import render, tex
from evalbench.report.view import blocks
from evalbench.spec import Record, Suite
from evalbench.store import Store

HOSTILE = r"<script>alert(1)</script>\input{/etc/passwd}\write18{x} %&$#_{}~^\"`'--é中"


def rows(text: str) -> dict[str, list[str]]:
    found = [line.strip().removesuffix("\\\\").split(" & ") for line in text.splitlines() if " & " in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in found}


def test_the_best_is_bold_and_what_the_tests_cannot_tell_from_it_underlined(suite: Suite) -> None:
    found = [quality("best", 10, 1.0), quality("like", 10, 1.02), quality("worse", 10, 3.0)]
    table = rows(render(blocks(found, suite), "fd@fashion64"))
    assert table[r"\texttt{best}"] == [r"\textbf{1.000 $\pm$ 0.050}"]
    assert table[r"\texttt{like}"] == [r"\underline{1.020 $\pm$ 0.051}"]
    assert table[r"\texttt{worse}"] == [r"3.00 $\pm$ 0.11"]


def test_errors_floor_and_protocol_are_there(records: list[Record], suite: Suite) -> None:
    text = render(blocks(records, suite), "fd@fashion64")
    assert rows(text)[r"\texttt{heun}"][0] == "error"
    assert rows(text)["floor at N = 4096"][0] == r"0.420 $\pm$ 0.013"
    caption = re.search(r"\\caption\{(.*)\}", text)
    assert caption
    for fact in (
        "suite fashion-{}synthetic v1",
        "N = 4096",
        "guidance 1",
        "seed 0",
        "noise philox",
        "5 \\% after Holm",
    ):
        assert fact in caption[1]
    assert "bias-{}dominated: N below 10 dimensions" in caption[1]
    assert text.isascii()


def test_text_from_outside_is_no_command() -> None:
    shown = tex(HOSTILE + "\n\n\x00end")
    assert shown.isascii()
    assert "\n" not in shown
    ours = r"\\(textbackslash|textless|textgreater|textasciitilde|textasciicircum|ttfamily|char34|[&%$#_{}`])"
    assert "\\" not in re.sub(ours, "", shown)
    assert "[U+00E9][U+4E2D]" in shown


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="needs pdflatex: apt-get install texlive-latex-recommended"
)
def test_it_compiles_and_hostile_names_are_printed(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store([*make_records(), *make_records(guidance=3.0), quality(HOSTILE, 10, 2.0)])
    paths = build_report(store, tmp_path, ("latex",))
    assert set(paths) == {"latex"}
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{report.tex}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-1500:]
    if shutil.which("pdftotext"):
        subprocess.run(["pdftotext", "-layout", "page.pdf"], cwd=tmp_path, check=True, timeout=60)
        assert "<script>alert(1)</script>" in (tmp_path / "page.txt").read_text()
