"""Ray with real processes: the same bits as serial, dying workers, plug-ins that travel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import MISBEHAVING, descends, request, run_serial, small_suite

from evalbench import runner
from evalbench.cluster import RayExecutor, _Packer, _Supply, _unpacked, ray
from evalbench.failures import Policy
from evalbench.report import build_report
from evalbench.store import Store
from evalbench.timing import Effort
from evalbench.worker import ChunkResult, Job, JobFailure


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


# A method that leaves a file for every chunk it made.
MARKS = '''
from pathlib import Path

from evalbench.interfaces import Solver
from evalbench.registry import register


@register("marks")
class Marks(Solver):
    """Leaves a mark."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        (Path("FOLDER") / str(noise.samples[0])).touch()
        return denoiser(x_T, 0.5, cond)
'''
KILLS_AT_FIRST = '''
import os

from evalbench.interfaces import Solver
from evalbench.registry import register


@register("kills-at-first")
class KillsAtFirst(Solver):
    """Takes its process down on the first chunk."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        if 0 in noise.samples:
            os._exit(1)
        return denoiser(x_T, 0.5, cond)
'''


def _jobs(method: str, plugin: str, chunks: int) -> list[Job]:
    """The jobs of one cell."""
    plugins = {f"{method}.py": plugin}
    wanted = request(small_suite(samples=32 * chunks), [method], metrics=("fd@identity",), plugins=plugins)
    plan = runner.make_plan(wanted)
    (cell,) = plan.cells
    return [Job(wanted.suite, cell, chunk, plan.parts[cell.id], plugins=plugins) for chunk in plan.chunks(cell)]


def _wait_until_all_have_started(executor: RayExecutor) -> None:
    executor.environment()
    while any(slot.environment is None for slot in executor._slots):
        executor.environment()


def test_what_all_jobs_share_travels_once(ray_two: RayExecutor) -> None:
    first, second = (replace(job, keep_images=True) for job in _jobs("ddim", MISBEHAVING, 2))
    packer = _Packer()
    light, common = packer.packed(first)
    assert light == replace(first, suite=None, plugins={}), "it stays out of what is sent for each job"  # type: ignore[arg-type]
    assert packer.packed(second)[1] == common
    assert _unpacked(light, common) == first
    other = replace(first, suite=first.suite.override(samples=7))
    assert _unpacked(*packer.packed(other)) == other


def test_the_last_jobs_are_kept_for_workers_that_are_free() -> None:
    supply = _Supply(iter("abcd"))  # type: ignore[arg-type]
    assert [supply.next(2), supply.next(2), supply.next(2)] == ["a", "b", None]
    assert supply.holds(2)
    assert not supply.holds(3)
    assert [supply.next(), supply.next(), supply.next()] == ["c", "d", None]


def test_workers_go_on_while_the_driver_is_busy(ray_two: RayExecutor, tmp_path: Path) -> None:
    """A chunk lies ahead at every worker; one that landed while the driver was away does not count as hanging."""
    _wait_until_all_have_started(ray_two)
    outcomes = ray_two.map(iter(_jobs("marks", MARKS.replace("FOLDER", str(tmp_path)), 8)))
    found = [next(outcomes)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(tmp_path.iterdir())) == 4, "two chunks at each worker, the driver saw one of them"
    given = [reference for slot in ray_two._slots for reference, _ in slot.jobs]
    ray.wait(given, num_returns=len(given), timeout=60)
    made = ray_two._made
    for slot in ray_two._slots:
        slot.since -= 2 * ray_two._policy.timeout
    found += outcomes
    assert ray_two._made == made, "no worker was ended"
    assert sorted(outcome.job.chunk.start for outcome in found) == list(range(0, 256, 32))  # type: ignore[union-attr]
    assert all(isinstance(outcome, ChunkResult) for outcome in found)


def test_only_the_chunk_that_ran_is_blamed(ray_two: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay ahead at the worker that it took down is computed elsewhere, and is not counted as a try."""
    _wait_until_all_have_started(ray_two)
    monkeypatch.setattr(ray_two, "_policy", Policy(tries=1))
    found = list(ray_two.map(iter(_jobs("kills-at-first", KILLS_AT_FIRST, 6))))
    (failure,) = [outcome for outcome in found if isinstance(outcome, JobFailure)]
    assert failure.failure.message == "worker died 1 times on samples 0-31"
    assert len(found) == 6


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
