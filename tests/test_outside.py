"""Programs of others as methods: the same images as in this process, declared counts, and every way to go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import request, run_serial, small_suite

from evalbench import outside, registry
from evalbench.api import make_request
from evalbench.errors import BadSamples, EvalbenchError, Unsupported, UserError
from evalbench.interfaces import Program
from evalbench.outside import Task
from evalbench.plan import Request, make_plan
from evalbench.report.content import full_table
from evalbench.report.frames import cells_frame
from evalbench.report.view import blocks
from evalbench.spec import Solution, Suite
from evalbench.store import Store

# One rule twice, in this process and in a program: exact in float32, so that not a bit may differ.
BY_RULE = """
from evalbench.interfaces import Solver
from evalbench.registry import register


@register("by-rule")
class ByRule(Solver):
    def sample(self, denoiser, x_T, cond, nfe, noise):
        return 0.25 * x_T + 0.0625 * cond.labels.to(x_T.dtype).view(-1, 1, 1, 1)
"""
THEIRS = """
import json, os, sys
import numpy as np

noise, labels, out = np.load(sys.argv[1]), json.load(open(sys.argv[2])), sys.argv[3]
assert len(noise) == int(os.environ["COUNT"]) and os.environ["NFE"] == "5"
x = np.float32(0.25) * noise + np.float32(0.0625) * np.array(labels, np.float32)[:, None, None, None]
images = np.clip(np.round((x + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)
np.savez(out + "/images.npz", images.transpose(0, 2, 3, 1))
"""
ARM = """
run = ["{python}", "theirs.py", "{{noise}}", "{{labels}}", "{{out}}"]
files = ["theirs.py"]
cost = 7.5
env = {{ COUNT = "{{count}}", NFE = "{{nfe}}" }}
"""
METRICS = ("align@tiny-fashion", "accuracy@fashion-classifier", "paired-median@pixels")
SHAPE = (1, 4, 4)


@pytest.fixture
def arm(tmp_path: Path) -> Path:
    folder = tmp_path / "their clone"
    folder.mkdir()
    (folder / "theirs.py").write_text(THEIRS)
    (folder / "arm.toml").write_text(ARM.format(python=sys.executable))
    return folder / "arm.toml"


def images_suite() -> Suite:
    suite = small_suite("fashion-mixture", samples=28, batch=8, chunk=16)  # the last batch is short
    return suite.model_copy(update={"solution": Solution(method="ddim", nfe=1)})


def asked(methods: list[str], **changes: object) -> Request:
    content = {"metrics": METRICS, "plugins": {"by_rule.py": BY_RULE}, "trust_remote_code": True}
    return request(images_suite(), methods, **(content | changes))


def test_a_program_makes_what_the_same_rule_makes_in_this_process(arm: Path, tmp_path: Path) -> None:
    theirs, run = f'command:"{arm}"', tmp_path / "run"
    (ours, found), computed = run_serial(asked(["by-rule", theirs]), run)
    store = Store(run)
    assert ours.status == found.status == "ok"
    np.testing.assert_array_equal(store.images(found.cell.id), store.images(ours.cell.id))
    for metric in METRICS[:2]:
        assert found.metrics[metric].value == ours.metrics[metric].value
        assert "NFE 5 declared, not counted" in found.metrics[metric].note
        assert "declared" not in ours.metrics[metric].note
    assert "makes finished images, and this reads states" in found.missing["paired-median@pixels"]
    assert found.counts == {"nfe_declared": 5.0, "cost_declared": 7.5}  # nothing of it was counted
    # a lost chunk is the only one that is made again
    assert len(computed.jobs) == 6
    chunk = sorted(store.present_chunks(found.cell.id))[1]
    store.remove_chunk(chunk)
    again, computed = run_serial(asked(["by-rule", theirs]), run)
    assert [job.chunk for job in computed.jobs] == [chunk]
    assert again[1].metrics == found.metrics


@pytest.mark.slow
def test_workers_find_a_file_where_its_name_was_typed(arm: Path, tmp_path: Path) -> None:
    words = [
        "--samples",
        "16",
        "--batch",
        "8",
        "--metrics",
        "accuracy@fashion-classifier",
        "--workers",
        "2",
        "--out",
        "run",
    ]
    line = ["run", "fashion-mixture", "--method", "command:arm.toml", "--nfe", "5", "--trust-remote-code", *words]
    done = subprocess.run(
        [sys.executable, "-m", "evalbench", *line], cwd=arm.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (record,) = Store(arm.parent / "run").records()
    assert record.counts["nfe_declared"] == 5.0


def test_tables_keep_declared_counts_apart(arm: Path, tmp_path: Path) -> None:
    wanted = asked(["by-rule", f'command:"{arm}"'], metrics=("accuracy@fashion-classifier",))
    records, _ = run_serial(wanted, tmp_path / "run")
    frame = cells_frame(records, wanted.suite).set_index("method").sort_index()
    assert frame["nfe_measured"].isna().tolist() == [False, True]
    assert frame["nfe_declared"].isna().tolist() == [True, False]
    (block,) = blocks(records, wanted.suite)
    table = full_table(block)
    rows = {row[0].text.partition(":")[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["command"]["declared"].text == "nfe 5, cost 7.5"
    assert rows["command"]["NFE used"].text == rows["by-rule"]["declared"].text == "–"
    assert rows["by-rule"]["NFE used"].text == "0"


def test_another_script_is_another_cell(arm: Path) -> None:
    first = registry.build_method(f'command:"{arm}"')
    (arm.parent / "theirs.py").write_text(THEIRS + "\n")
    second = registry.build_method(f'command:"{arm}"')
    assert first.settings() != second.settings()
    with pytest.raises(UserError, match="or one of its files has changed"):
        first.solver.check(5, 0)
    arm.unlink()
    assert registry.build_method(second.text).text == second.text  # reports are read where the file is not


def test_it_runs_only_where_the_user_trusts_it_and_is_not_timed(arm: Path) -> None:
    method = f'command:"{arm}"'
    with pytest.raises(UserError, match="runs somebody's program; if you trust it: --trust-remote-code"):
        make_plan(make_request("fashion-mixture", methods=[method]))
    with pytest.raises(UserError, match="cannot be timed"):
        make_plan(make_request("fashion-mixture", methods=[method], measure=["latency"], trust_remote_code=True))
    with pytest.raises(UserError, match="nothing stands around it; leave out cfg"):
        registry.build_method(f"{method}+cfg(scale=2)")


@pytest.mark.parametrize(
    ("changes", "nfe", "guidance", "reason"),
    [
        ("nfe = 20", 10, 1.0, "declares 20 evaluations, the budget is 10"),
        ("nfe = 10", 10, 3.0, "runs at guidance 1, the cell is at 3"),
        ("nfe = 10\nguidance = 3", 10, 1.0, "runs at guidance 3, the cell is at 1"),
    ],
)
def test_a_cell_that_it_does_not_run_at_is_not_supported(
    changes: str, nfe: int, guidance: float, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "arm.toml"
    file.write_text(f'run = ["x", "{{noise}}", "{{out}}"]\n{changes}\n')
    solver = registry.build_method(f"command:{file}").solver
    with pytest.raises(Unsupported, match=reason):
        solver.program(nfe, guidance)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("run = [", "is not valid TOML"),
        ("", "key 'run': field required"),
        ('run = ["x"]\nnef = 3', "unknown key 'nef' in command:.*did you mean 'nfe'"),
        ('run = ["x"]\ntimeout = -1', "key 'timeout': input should be greater than 0"),
        ('run = ["x"]\nfiles = ["gone.py"]', "gone.py' does not exist"),
        ('run = ["x", "{noise}", "{outt}"]', "unknown placeholder 'outt'.*did you mean 'out'"),
        ('run = ["x", "{noise}"]\nnfe = 3', r"reads no \{out\}"),
        ('run = ["x", "{seed}", "{out}"]\nnfe = 3', r"read \{noise\}, or \{seed\} and \{start\}"),
        ('run = ["x", "{noise}", "{out}"]', "say what it evaluates"),
        ('run = ["x", "{noise}", "{out}", "{nfe}"]\nnfe = 3', "say what it evaluates"),
    ],
)
def test_a_file_that_does_not_say_enough_is_one_line(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "arm.toml"
    file.write_text(content)
    with pytest.raises(UserError, match=reason) as raised:
        registry.build_method(f"command:{file}").solver.check(5, 0)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no such file"):
        registry.build_method(f"command:{tmp_path}/other.toml")


# --- running one ----------------------------------------------------------------------------------------------------


def program(line: str, folder: Path, timeout: float = 60.0) -> Program:
    """A line of shell whose $0 is the folder for images."""
    return Program(("sh", "-c", line, "{out}"), folder, {}, timeout, {"nfe": 5.0})


def task(n: int = 3, **changes: object) -> Task:
    content: dict[str, object] = {"name": "command:arm.toml", "seed": 0, "start": 8, "nfe": 5, "guidance": 1.0}
    return Task(**(content | {"noise": np.zeros((n, *SHAPE), np.float32), "shape": SHAPE} | changes))  # type: ignore[arg-type]


@pytest.fixture
def made(tmp_path: Path) -> np.ndarray:
    """Three images, in a folder as PNGs whose names sort otherwise than their numbers, and as an npz."""
    images = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (3, 4, 4, 1), np.uint8)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(tmp_path / "pngs" / f"sample{i + 9}.png")
    np.savez(tmp_path / "images.npz", images)
    return images.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("line", ['cp pngs/*.png "$0"', 'cp images.npz "$0"'])
def test_images_come_as_numbered_pngs_or_as_an_npz(line: str, made: np.ndarray, tmp_path: Path) -> None:
    np.testing.assert_array_equal(outside.images_of(program(line, tmp_path), task()), made)


@pytest.mark.parametrize(
    ("line", "asked_for", "error", "reason"),
    [
        ("echo starting >&2; echo 'no GPU' >&2; echo >&2; exit 3", task(), EvalbenchError, "exit code 3: no GPU$"),
        ("exit 1", task(), EvalbenchError, "exit code 1: it said nothing on stderr"),
        ("sleep 60", task(), EvalbenchError, "ran longer than 0.5 s and was ended"),
        ("true", task(), BadSamples, r"folder '\{out\}' holds no images"),
        ('cp images.npz "$0"', task(4), BadSamples, r"made 3 images, not 4 \(samples 8, 9, 10, 11\)"),
        ('cp images.npz "$0"', task(shape=(3, 4, 4)), BadSamples, r"size \(1, 4, 4\), not \(3, 4, 4\) \(sample 8\)"),
        ('cp images.npz "$0"; cp images.npz "$0/b.npz"', task(), BadSamples, "2 .npz files"),
        ('cp pngs/*.png "$0"; rm "$0/sample10.png"', task(2), BadSamples, "do not follow each other"),
        ('cp pngs/sample9.png "$0/nine.png"', task(1), BadSamples, "'nine.png' has no number in its name"),
        ('echo > "$0/1.npz"', task(), BadSamples, "is no readable zip"),
        ('cp images.npz "$0"', task(labels=[1, 2, 3]), Unsupported, r"reads neither \{labels\} nor \{prompts\}"),
        ('cp images.npz "$0"', task(prompts=["a"] * 3), Unsupported, r"does not read \{prompts\}"),
        ('cp images.npz "$0" # {labels}', task(), Unsupported, r"reads \{labels\}, and the suite has none"),
    ],
)
def test_what_goes_wrong_is_one_line_that_says_so(
    line: str, asked_for: Task, error: type[Exception], reason: str, made: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason) as raised:
        outside.images_of(program(line, tmp_path, timeout=0.5 if "sleep" in line else 60), asked_for)
    assert "\n" not in str(raised.value)
    assert str(tmp_path.parent.parent) not in str(raised.value)


def test_a_command_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot run 'no-such-program' in .*: No such file"):
        outside.images_of(Program(("no-such-program", "{out}"), tmp_path, {}, 1.0, {}), task())


def test_whatever_it_started_ends_with_it(tmp_path: Path) -> None:
    with pytest.raises(EvalbenchError, match="was ended"):
        outside.images_of(program("sleep 60 & echo $! > child; wait", tmp_path, timeout=1.0), task())
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("the program's child outlived it")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
