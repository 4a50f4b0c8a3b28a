"""Ray with real processes: the same bits as serial, dying workers, plug-ins that travel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MISBEHAVING, descends, request, run_serial, small_suite

from evalbench import runner
from evalbench.cluster import RayExecutor
from evalbench.report import build_report
from evalbench.store import Store
from evalbench.timing import Effort


@pytest.fixture(scope="module")
def ray_two() -> Iterator[RayExecutor]:
    """Two actors for the whole module: starting Ray takes longer than any test here."""
    executor = RayExecutor(workers=2)
    yield executor
    executor.shutdown()


def _table(folder: Path) -> bytes:
    store = Store(folder)
    build_report(store, folder / "report", ("csv",))
    return (folder / "table.csv").read_bytes()


METHODS = ["ddim", "unipc", "ddim(eta=1)"]


def test_two_workers_give_the_bytes_of_serial(ray_two: RayExecutor, tmp_path: Path) -> None:
    wanted = request(small_suite(), METHODS, [3, 6], guidance=(1.0, 2.0))
    runner.run(wanted, tmp_path / "ray", lambda: ray_two)
    run_serial(wanted, tmp_path / "serial")
    assert _table(tmp_path / "ray") == _table(tmp_path / "serial")
    chunks = sorted(file.relative_to(tmp_path / "serial") for file in (tmp_path / "serial").rglob("*.npz"))
    assert chunks
    for chunk in chunks:
        ours, theirs = tmp_path / "ray" / chunk, tmp_path / "serial" / chunk
        assert _arrays(ours) == _arrays(theirs), chunk


def _arrays(file: Path) -> dict[str, bytes]:
    import numpy as np

    with np.load(file) as content:
        return {name: content[name].tobytes() for name in content.files if name not in ("facts", "sha256")}


def test_a_local_ray_listens_on_loopback_alone(ray_two: RayExecutor) -> None:
    import os

    ray_two.environment()
    mine, ours, listening = os.getpid(), set(), {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[f"socket:[{fields[9]}]"] = fields[1].split(":")[0]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or not descends(int(entry.name), mine):
            continue
        for handle in os.listdir(entry / "fd"):
            try:
                ours.add(os.readlink(entry / "fd" / handle))
            except OSError:
                continue
    found = {listening[socket] for socket in ours if socket in listening}
    assert found, "Ray listens"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert found <= loopback


def test_a_dying_worker_is_an_error_row_and_the_rest_is_complete(ray_two: RayExecutor, tmp_path: Path) -> None:
    wanted = request(small_suite(), ["kills-worker", "ddim"], plugins={"bad.py": MISBEHAVING})
    records = runner.run(wanted, tmp_path, lambda: ray_two)
    rows = {record.cell.method: record for record in records}
    assert rows["kills-worker"].status == "error"
    assert "worker died 3 times" in rows["kills-worker"].failure.message  # type: ignore[union-attr]
    assert rows["ddim"].status == "ok"


def test_latency_runs_on_a_worker(ray_two: RayExecutor, tmp_path: Path) -> None:
    effort = Effort(processes=1, rounds=2, seconds=0.0, batches=(4,))
    wanted = request(small_suite(), ["ddim"], [2], measure=frozenset({"latency"}), effort=effort)
    (record,) = runner.run(wanted, tmp_path, lambda: ray_two)
    (timed,) = record.latency
    assert (timed.threads, timed.batch, timed.doubt, timed.checked) == (1, 4, "", 4)
    more = request(small_suite(), ["ddim"], [3])  # the workers left the device and come back
    assert runner.run(more, tmp_path / "more", lambda: ray_two)[0].status == "ok"


@pytest.mark.slow
def test_one_worker_gives_the_same_table_as_two(tmp_path: Path) -> None:
    import subprocess
    import sys

    evalbench = str(Path(sys.executable).with_name("evalbench"))
    tables = []
    for how in (["--workers", "1"], ["--workers", "2"], ["--serial"]):
        out = tmp_path / how[-1]
        command = [evalbench, "run", "fashion-mixture", "--methods", "ddim,unipc", "--nfe", "5,10"]
        subprocess.run([*command, "--samples", "256", "--out", str(out), *how], check=True, capture_output=True)
        tables.append((out / "table.csv").read_bytes())
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.slow
def test_every_method_has_the_same_bits_on_ray(ray_two: RayExecutor, tmp_path: Path) -> None:
    from evalbench import registry
    from evalbench.interfaces import Solver

    names = [name for name in registry.names("method") if not name.endswith(":*")]
    solvers = [name for name in names if issubclass(registry.get("method", name), Solver)]
    wanted = request(small_suite(), [*solvers, "diffusers:UniPCMultistepScheduler"], [7], guidance=(1.0, 2.5))
    runner.run(wanted, tmp_path / "ray", lambda: ray_two)
    records, _ = run_serial(wanted, tmp_path / "serial")
    refused = {r.cell.method for r in records if r.status == "unsupported"}
    assert {r.status for r in records} == {"ok", "unsupported"}
    assert all(registry.get("method", name).requires for name in refused), "what needs another kind of suite"
    assert _table(tmp_path / "ray") == _table(tmp_path / "serial")


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_table(tmp_path: Path) -> None:
    """SIGKILL of the whole process group in the middle, twice; then the same command finishes the run."""
    import os
    import signal
    import subprocess
    import sys
    import time

    evalbench = str(Path(sys.executable).with_name("evalbench"))
    command = [evalbench, "run", "fashion-mixture", "--methods", "ddim,unipc", "--nfe", "5,10", "--samples", "1024"]

    def chunks(out: Path) -> int:
        return len(list((out / "chunks").rglob("*.npz")))

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for wanted in (2, 6):
        process = subprocess.Popen(
            [*command, "--out", str(killed), "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while chunks(killed) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "killed while it still ran"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert chunks(killed) >= wanted
    landed = {file: file.stat().st_mtime_ns for file in (killed / "chunks").rglob("*.npz")}
    for out in (killed, whole):
        subprocess.run([*command, "--out", str(out), "--serial"], check=True, capture_output=True)
    assert (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in landed} == landed, "what had landed was not computed again"
