"""Pages that are made from the registry are current, and what the README says can be typed."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from evalbench import api, runner
from evalbench.registry import parse_methods

ROOT = Path(__file__).resolve().parent.parent


def test_made_pages_are_current(tmp_path: Path) -> None:
    # in a process of its own: other tests register methods
    command = [sys.executable, str(ROOT / "docs" / "make.py"), "lists", "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    made = sorted(tmp_path.iterdir())
    assert [page.name for page in made] == ["methods.md", "suites.md"]
    for page in made:
        assert (ROOT / "docs" / page.name).read_text() == page.read_text(), "run: python docs/make.py lists"


def test_what_the_pandas_page_prints(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "make.py"), "pandas", "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    found, page = (tmp_path / "pandas.md").read_text(), (ROOT / "docs" / "pandas.md").read_text()
    number = re.compile(r"-?\d+\.\d+")
    assert len(number.findall(page)) > 30
    assert number.sub("#", found) == number.sub("#", page), "run: python docs/make.py pandas"
    # another processor may round the last digit otherwise
    assert [float(n) for n in number.findall(found)] == pytest.approx(
        [float(n) for n in number.findall(page)], abs=0.02
    )


def test_pitfalls_are_all_there_and_name_tests_that_exist() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text()
    assert [int(n) for n in re.findall(r"^\| [PD](\d+) \|", page, re.MULTILINE)] == list(range(1, 34))
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"docs/pitfalls.md names {file}::{test}"


def test_relative_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_the_curves_of_the_baselines() -> None:
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- baselines:begin -->\n")[2].partition("\n<!-- baselines:end -->")[0]
    make = runpy.run_path(str(ROOT / "docs" / "make.py"))
    assert shown == make["baselines_table"](), "run `python docs/make.py baselines`"


def test_commands_of_the_readme_can_be_planned() -> None:
    lines = re.findall(r"^    evalbench run (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    planned = 0
    for line in lines:
        suite = line.split()[0]
        if suite.endswith(".toml") or "--plugin" in line:
            continue
        methods = re.search(r"--methods '?([^' ]+)'?", line)
        request = api.make_request(suite, methods=parse_methods(methods.group(1)) if methods else None)
        assert runner.make_plan(request).cells
        planned += 1
    assert planned >= 2
