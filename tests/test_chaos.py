"""Faults on real processes: whatever is killed, filled or damaged, the same command completes to the same table.

`make chaos` tries 20 of each kind, `make test-slow` three. Every fault comes at a random moment from a printed seed.
Counts of faults injected and survived are printed at the end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import SLOW, SMALL_CHUNKS, Faults, descends, landed, request, run_serial, small_suite

from evalbench import runner
from evalbench.cluster import RayExecutor
from evalbench.failures import Policy
from evalbench.report import build_report
from evalbench.runner import Request
from evalbench.store import Store

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("EVALBENCH_CHAOS", "3"))
EVALBENCH = [sys.executable, "-m", "evalbench"]


def _wanted() -> Request:
    return request(small_suite(samples=320), ["slow", "ddim"], plugins={"slow.py": SLOW}, metrics=("fd@identity",))


def _table(folder: Path) -> bytes:
    store = Store(folder)
    build_report(store, folder / "report", ("csv",))
    return (folder / "table.csv").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_serial(_wanted(), folder / "r")
    return _table(folder / "r")


def _children(name: str) -> list[int]:
    """Processes whose command line begins with a name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(name.encode()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_workers_killed_at_random_moments(tmp_path: Path, undisturbed: bytes, faults: Faults) -> None:
    """SIGKILL of a worker of a local Ray; one Ray for all of them."""
    seed = random.SystemRandom().randrange(1000)
    rng, done, killed = random.Random(seed), threading.Event(), []
    executor = RayExecutor(workers=2, policy=Policy(tries=TIMES + 3, backoff=0.1))
    mine = os.getpid()

    def kill() -> None:
        while not done.wait(rng.uniform(0.2, 1.5)) and len(killed) < TIMES:
            workers = [pid for pid in _children("ray::_Worker.run") if descends(pid, mine)]
            if workers:
                victim = rng.choice(workers)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for i in range(20):
            runner.run(_wanted(), tmp_path / str(i), lambda: executor)
            assert _table(tmp_path / str(i)) == undisturbed, f"seed {seed}"
            if len(killed) >= TIMES:
                break
    finally:
        done.set()
        killer.join()
        executor.shutdown()
    assert len(killed) >= TIMES, f"seed {seed}"
    faults("worker killed", len(killed))


def _command(folder: Path, plugin: Path, *more: str) -> list[str]:
    grid = ["--methods", "slow,ddim", "--nfe", "5", "--samples", "320", "--metrics", "fd@identity", "--batch", "32"]
    return [*EVALBENCH, "run", str(plugin.with_name("chaos.toml")), *grid, "--plugin", str(plugin), "--allow-small-n",
            "--out", str(folder), *more]  # fmt: skip


def _inputs(folder: Path) -> Path:
    (folder / "slow.py").write_text(SLOW)
    (folder / "chaos.toml").write_text(SMALL_CHUNKS)
    return folder / "slow.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The slow method, and a suite with small chunks."""
    return _inputs(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of a command that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(_command(folder / "r", _inputs(folder), "--serial"), check=True, capture_output=True)
    return (folder / "r" / "table.csv").read_bytes()


def _start(command: list[str], errors: Path | None = None) -> subprocess.Popen[bytes]:
    """A command in a process group of its own; what it complains about goes to a file."""
    with Path(errors or os.devnull).open("wb") as stream:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # tests that run in the background of a script inherit that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def _kill_after_chunks(process: subprocess.Popen[bytes], folder: Path, count: int, how: int) -> None:
    """Let a run land some chunks, then signal its whole group."""
    deadline = time.monotonic() + 120
    while len(landed(folder)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, how)
    process.wait(60)


def test_drivers_killed_at_random_moments(tmp_path: Path, plugin: Path, whole: bytes, faults: Faults) -> None:
    """SIGKILL of a serial driver in the middle, again and again; then the run is finished and compared."""
    seed = random.SystemRandom().randrange(1000)
    rng, folder = random.Random(seed), tmp_path / "killed"
    steps = sorted(rng.sample(range(1, 19), min(TIMES, 18)))
    for step in steps:
        process = _start(_command(folder, plugin, "--serial"))
        before = landed(folder)
        _kill_after_chunks(process, folder, max(step, len(before) + 1), signal.SIGKILL)
        after = landed(folder)
        assert {file: after[file] for file in before} == before, f"seed {seed}: a landed chunk was computed again"
        faults("driver killed", process.returncode == -signal.SIGKILL)
    subprocess.run(_command(folder, plugin, "--serial"), check=True, capture_output=True)
    assert (folder / "table.csv").read_bytes() == whole, f"seed {seed}"


def test_an_interrupt_ends_cleanly_with_a_line(tmp_path: Path, plugin: Path, faults: Faults) -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        errors = tmp_path / f"{how.name}.txt"
        process = _start(_command(tmp_path / how.name, plugin, "--serial"), errors)
        _kill_after_chunks(process, tmp_path / how.name, 2, how)
        assert process.returncode == 130
        assert "interrupted; run the same command again to continue" in errors.read_text()
        faults("interrupt")


def test_shards_of_a_job_array_killed_at_random(tmp_path: Path, plugin: Path, whole: bytes, faults: Faults) -> None:
    """Eight shards at once, some of them killed; the array again finishes the run."""
    seed = random.SystemRandom().randrange(1000)
    rng, folder = random.Random(seed), tmp_path / "array"
    shards = [_start(_command(folder, plugin, "--shard", f"{i}/8", "--lease", "4")) for i in range(1, 9)]
    deadline = time.monotonic() + 120
    while not landed(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    for victim in rng.sample(shards, min(TIMES, 7)):
        time.sleep(rng.uniform(0.0, 0.3))
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
            faults("shard killed")
    for shard in shards:
        shard.wait(180)
    subprocess.run(_command(folder, plugin, "--shard", "1/8", "--lease", "4"), check=True, capture_output=True)
    assert (folder / "table.csv").read_bytes() == whole, f"seed {seed}"
    assert len((folder / "records.jsonl").read_text().splitlines()) == 2, "each cell is recorded once"


def test_a_shard_whose_method_hangs_leaves_and_the_chunk_is_quarantined(
    tmp_path: Path, plugin: Path, faults: Faults
) -> None:
    plugin.write_text(SLOW.replace("time.sleep(0.15)", "time.sleep(3600)"))
    command = _command(tmp_path / "r", plugin, "--shard", "1/1", "--lease", "1", "--timeout", "8")
    for _ in range(3):
        ended = subprocess.run(command, capture_output=True, timeout=60)
        assert ended.returncode == 4
        assert b"did not answer for 8 s; shard 1/1 leaves, run it again" in ended.stderr
        faults("shard hung")
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 5
    rows = {record.cell.method: record for record in Store(tmp_path / "r").records()}
    assert rows["ddim"].status == "ok"
    assert "time.sleep(3600)" in rows["slow"].failure.traceback  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["hang", "out of memory"])
def test_calls_that_hang_or_find_no_memory_at_random(tmp_path: Path, plugin: Path, fault: str, faults: Faults) -> None:
    """Two workers of Ray; each chunk's calls go wrong at most once. What else landed is written once."""
    seed = random.SystemRandom().randrange(1000)
    chunks, folder = 10 + 2 * TIMES, tmp_path / "r"
    samples, count = str(32 * chunks), tmp_path / "count"
    count.mkdir()
    moments = random.Random(seed).sample(range(1, chunks - 2), TIMES)
    chaos = {"CHAOS_FOLDER": str(count), "CHAOS_FAULT": fault, "CHAOS_MOMENTS": ",".join(map(str, sorted(moments)))}
    command = _command(folder, plugin, "--samples", samples, "--workers", "2", "--timeout", "8")
    ended = subprocess.run(command, env=os.environ | chaos, capture_output=True, timeout=60 * (TIMES + 3))
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr.decode()}"
    hit = len(list(count.glob("hit-*")))
    assert hit >= TIMES, f"seed {seed}"
    faults(f"{fault} in a call", hit)
    calls = len(list(count.glob("call-*")))
    assert calls <= chunks + 2 * hit, "no chunk again but those that were in flight"
    serial = _command(tmp_path / "serial", plugin, "--samples", samples, "--serial")
    subprocess.run(serial, check=True, capture_output=True)
    assert (folder / "table.csv").read_bytes() == (tmp_path / "serial" / "table.csv").read_bytes(), f"seed {seed}"


def test_two_drivers_at_once(tmp_path: Path, plugin: Path, whole: bytes, faults: Faults) -> None:
    """One computes, the other leaves with a line, whenever it comes; nothing is computed twice."""
    seed = random.SystemRandom().randrange(1000)
    rng = random.Random(seed)
    for i in range(TIMES):
        folder = tmp_path / str(i)
        errors = [tmp_path / f"{i}-{name}.txt" for name in "ab"]
        first = _start(_command(folder, plugin, "--serial"), errors[0])
        time.sleep(rng.uniform(0.0, 1.0))
        second = _start(_command(folder, plugin, "--serial"), errors[1])
        codes = [first.wait(120), second.wait(120)]
        assert sorted(codes) in ([0, 0], [0, 2]), f"seed {seed}: {codes}"
        if 2 in codes:
            assert "another evalbench is writing" in errors[codes.index(2)].read_text()
            faults("second driver refused")
        then = landed(folder)
        again = subprocess.run(_command(folder, plugin, "--serial"), capture_output=True)
        assert again.returncode == 0
        assert landed(folder) == then, "the same command again computes nothing"
        assert (folder / "table.csv").read_bytes() == whole, f"seed {seed}"
        assert len((folder / "records.jsonl").read_text().splitlines()) == 2, "each cell is recorded once"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damaged_chunks_are_named_and_computed_again(
    tmp_path: Path, plugin: Path, whole: bytes, damage: str, faults: Faults
) -> None:
    """All of a run's chunks are there, some of them broken, and the records are gone."""
    seed = random.SystemRandom().randrange(1000)
    rng, folder = random.Random(seed), tmp_path / "r"
    subprocess.run(_command(folder, plugin, "--serial"), check=True, capture_output=True)
    victims = rng.sample(sorted(landed(folder)), min(TIMES, 20))
    for victim in victims:
        content = bytearray(victim.read_bytes())
        if damage == "deleted":
            victim.unlink()
            continue
        if damage == "truncated":
            victim.write_bytes(content[: rng.randrange(len(content))])
            continue
        place = content.index(b"\x93NUMPY") + rng.randrange(128)  # of an array: a zip's own dates may be anything
        content[place] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    before = landed(folder)
    (folder / "records.jsonl").unlink()
    (folder / "table.csv").unlink()
    ended = subprocess.run(_command(folder, plugin, "--serial"), capture_output=True)
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr.decode()}"
    after = landed(folder)
    assert all(after[victim] != before.get(victim) for victim in victims), f"seed {seed}: computed again"
    if damage != "deleted":
        said = ended.stderr.decode()
        assert all(f"{victim.parent.name}/{victim.name} is damaged" in said for victim in victims), (
            f"seed {seed}: {said}"
        )
    untouched = before.keys() - set(victims)
    assert {file: after[file] for file in untouched} == {file: before[file] for file in untouched}
    assert (folder / "table.csv").read_bytes() == whole, f"seed {seed}"
    faults(f"chunk {damage}", len(victims))


def test_a_full_disk_stops_the_run_and_it_resumes(tmp_path: Path, plugin: Path, whole: bytes, faults: Faults) -> None:
    """A tmpfs of half a megabyte."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (small / "filler").write_bytes(b"x" * 440_000)
        ended = subprocess.run(_command(small / "r", plugin, "--serial"), capture_output=True)
        assert ended.returncode == 4
        assert b"disk full while writing" in ended.stderr
        kept = landed(small / "r")
        (small / "filler").unlink()
        shutil.copytree(small / "r", tmp_path / "r")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    subprocess.run(_command(tmp_path / "r", plugin, "--serial"), check=True, capture_output=True)
    assert kept
    assert (tmp_path / "r" / "table.csv").read_bytes() == whole
    faults("disk full")
