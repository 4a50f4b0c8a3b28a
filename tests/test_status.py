"""How far a run is, asked from another process: while it runs, after a kill, after its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import MISBEHAVING, request, run_serial, small_suite

from evalbench import registry, status
from evalbench.store import Store

EVALBENCH = Path(sys.executable).with_name("evalbench")
SLOW = '''
import time
from evalbench.interfaces import Solver
from evalbench.registry import register


@register("slow")
class Slow(Solver):
    """Takes its time."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        time.sleep(1.0)
        return denoiser(x_T, 0.5, cond)
'''


def asked(folder: Path) -> str:
    """What the command says."""
    done = subprocess.run([EVALBENCH, "status", str(folder)], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_run_is_asked_while_it_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    folder = tmp_path / "r"
    options = ["--serial", "--methods", "slow", "--nfe", "1,2", "--samples", "4096", "--allow-small-n"]
    command = [EVALBENCH, "run", "gmm-smooth", *options, "--plugin", str(tmp_path / "slow.py"), "--out", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
        try:
            deadline = time.monotonic() + 120
            while not list(folder.glob("chunks/*/*.npz")):
                assert time.monotonic() < deadline
                assert running.poll() is None
                time.sleep(0.2)
            said = asked(folder)
            assert f"process {running.pid}: quality" in said
            assert "0 of 2 cells" in said
        finally:
            running.send_signal(signal.SIGKILL)
    said = asked(folder)
    assert "not running, 0 records, the last process was killed" in said
    assert "`evalbench run` command continues" in said


def test_a_run_that_ended_says_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry.load_plugin(MISBEHAVING, "misbehaving.py")
    run_serial(request(small_suite(), ["ddim", "raises"]), tmp_path / "r")
    status.status_command(tmp_path / "r", json_=False)
    out = capsys.readouterr().out
    assert "not running" in out
    assert "the last process finished" in out
    assert "error: raises at NFE" in out
    assert "the method broke" in out
    status.status_command(tmp_path / "r", json_=True)
    said = json.loads(capsys.readouterr().out)
    assert not said["running"]
    one = said["processes"][0]
    assert one["cells"] == one["cells_planned"] == len(Store(tmp_path / "r").records())
    assert one["errors"] == said["errors"] > 0
