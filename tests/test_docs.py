"""Pages that are made from the registry are current, and what the README says can be typed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from evalbench import api, runner
from evalbench.registry import parse_methods

ROOT = Path(__file__).resolve().parent.parent


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["methods.md", "suites.md"])
def test_made_pages_are_current(name: str) -> None:
    maker = _maker()
    assert (ROOT / "docs" / name).read_text() == maker.PAGES[name](), "run: python docs/make.py lists"


def test_relative_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
