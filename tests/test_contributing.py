"""The examples in CONTRIBUTING.md run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text("utf-8")


def example(language: str) -> str:
    """The one example in a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)
    return block


@pytest.mark.parametrize(
    ("language", "check"),
    [
        (
            "python",  # registering is for good: so in a process of its own
            "from evalbench.engine import Plan\n"
            "from evalbench.paths import make_path\n"
            "from evalbench.registry import build_method, load_plugin, read_plugin\n"
            "name, source = read_plugin(FILE)\n"
            "load_plugin(source, name)\n"
            "solver = build_method('example-euler').solver\n"
            "assert solver.plan_for(make_path('flow'), 'time', 5).nfe == 5\n",
        ),
        (
            "toml",
            "from evalbench.spec import load_suite\n"
            "suite = load_suite(FILE)\n"
            "assert suite.name == 'example-narrow' and suite.model.options['std'] == 0.1, suite\n"
            "assert suite.model.options['dim'] == load_suite('gmm-smooth').model.options['dim']\n",
        ),
    ],
)
def test_example_works(language: str, check: str, tmp_path: Path):
    file = tmp_path / f"example.{'py' if language == 'python' else language}"
    file.write_text(example(language), "utf-8")
    code = f"FILE = {str(file)!r}\n{check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
