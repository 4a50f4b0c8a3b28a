"""docs/your-model.md as its reader would follow it: somebody's network and checkpoint, on two Ray workers."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from evalbench.api import make_request
from evalbench.errors import UserError
from evalbench.plan import make_plan

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "your-model.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL))
COMMAND = next(line for line in PAGE.splitlines() if line.startswith("evalbench run fashion-dit"))
EVALBENCH = (sys.executable, "-c", "import sys; from evalbench.cli import main; sys.exit(main())")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and their checkpoint."""
    found = tmp_path_factory.mktemp("mine")
    for name, text in BLOCKS.items():
        (found / name).write_text(text, "utf-8")
    subprocess.run([sys.executable, "train.py"], cwd=found, check=True)
    return found


def run(folder: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EVALBENCH, *words], cwd=folder, capture_output=True, text=True, check=False)


def words_of_the_page() -> list[str]:
    return shlex.split(COMMAND)[1:]


def test_the_adapter_has_about_ten_lines() -> None:
    body = BLOCKS["my_model.py"].partition("def load")[2]
    assert (
        len([line for line in body.splitlines()[1:] if line.strip()]) <= 14
    )  # about ten, as the formatter lays them out


def test_somebodys_model_runs_on_two_ray_workers(folder: Path) -> None:
    done = run(folder, words_of_the_page())
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(folder / "run" / "table.csv").set_index("method")
    assert set(table.index) == {"ddim", "dpm-solver++"}
    assert (table["status"] == "ok").all()
    # images of clothes: noise is a hundred times as far from the data
    assert (table["fd@fashion64"] < 300).all()


def spoiled(folder: Path, old: str, new: str) -> str:
    """What is said of the page's adapter with a wrong line in it, when its run is planned."""
    text = BLOCKS["my_model.py"]
    assert old in text
    (folder / "wrong.py").write_text(text.replace(old, new), "utf-8")
    model = f"{folder}/wrong.py:load(clone={folder},checkpoint={folder}/wardrobe.safetensors)"
    with pytest.raises(UserError) as caught:
        make_plan(make_request("fashion-dit", model=model, metrics=["fd@fashion64"]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("time=lambda t: 1 - t,", "", "time that runs the other way"),
        ("time=lambda t: 1 - t,", "time=lambda t: 1 - t / 1000,", "times 1000 as large"),
        ('predicts="velocity"', 'predicts="eps"', "a prediction of velocity"),
        ("-net(labels", "net(labels", "a velocity that points at the data"),
        ("shape=(1, 32, 32)", "shape=(3, 32, 32)", "images of 1x32x32"),
        ("return Adapter(", "return [] and Adapter(", "returned list"),
        ("def load(clone, checkpoint", "def load(clone, weights", "takes no argument 'checkpoint'"),
    ],
)
def test_a_wrong_convention_is_named_before_the_first_sample(folder: Path, old: str, new: str, says: str) -> None:
    assert says in spoiled(folder, old, new)


def test_a_pickle_needs_trust(folder: Path) -> None:
    old = "    use_clone(clone)\n"
    new = "    from evalbench.models.adapter import require_trust\n\n    require_trust(checkpoint)\n" + old
    assert "--trust-remote-code" in spoiled(folder, old, new)


def test_a_wrong_convention_exits_2_in_one_line(folder: Path) -> None:
    (folder / "wrong.py").write_text(BLOCKS["my_model.py"].replace("time=lambda t: 1 - t,", ""), "utf-8")
    words = [word.replace("my_model.py", "wrong.py") for word in words_of_the_page()]
    words[words.index("--out") + 1] = "wrong"
    done = run(folder, words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "wrong" / "records.jsonl").exists()


def test_the_check_alone_prints_what_it_found(folder: Path) -> None:
    words = words_of_the_page()
    done = run(folder, ["check", "fashion-dit", "--model", words[words.index("--model") + 1]])
    assert done.returncode == 0, done.stderr
    assert "the error falls" in done.stdout
