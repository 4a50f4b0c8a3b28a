"""The code of docs/writing-a-method.md runs, as a newcomer would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from evalbench import registry

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "writing-a-method.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
METHODS = ("my-sampler", "my-noisy(strength=0.3)", "ddim+my-shrink", "ddim+my-stop-early", "my-centred")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of a run of every example, from the command line."""
    folder = tmp_path_factory.mktemp("newcomer")
    files = [f"mine{i}.py" for i in range(len(METHODS))]
    for file, block in zip(files, BLOCKS, strict=False):
        (folder / file).write_text(block, "utf-8")
    plugins = [word for file in files for word in ("--plugin", file)]
    options = ["--nfe", "5,10", "--samples", "256", "--allow-small-n", "--serial", "--out", "run"]
    done = subprocess.run(
        [
            *(sys.executable, "-c", "import sys; from evalbench.cli import main; sys.exit(main())"),
            *("run", "gmm-smooth", "--methods", ",".join(METHODS), *plugins, *options),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return pd.read_csv(folder / "run" / "table.csv")


def test_the_first_sampler_has_fifteen_lines_of_code() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert 'register("my-sampler")' in BLOCKS[0]


def test_every_example_makes_its_rows(table: pd.DataFrame) -> None:
    assert set(table["method"]) == set(METHODS)
    assert len(table) == 2 * len(METHODS)
    assert (table["status"] == "ok").all()


def test_the_first_sampler_converges(table: pd.DataFrame) -> None:
    errors = table.set_index(["method", "nfe"])["paired-median@identity"]
    assert errors["my-sampler", 10] < errors["my-sampler", 5]


def test_the_claim_builds() -> None:
    assert registry.load_plugin(BLOCKS[5], "claim.py").CLAIM.nfe == 20


def test_no_example_is_left_out() -> None:
    assert len(BLOCKS) == len(METHODS) + 1
