"""Leases and shards: one owner at a time, vanished owners are replaced, the table is that of one process."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support import MISBEHAVING, request, run_serial, small_suite

from evalbench import runner, shards
from evalbench.errors import UserError
from evalbench.leases import Leases
from evalbench.report import build_report
from evalbench.runner import SerialExecutor, Shard
from evalbench.store import Store


def _aged(file: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as other:
        assert one.take("chunk") is not None
        assert other.take("chunk") is None
        assert one.take("chunk") is None, "not twice by the same owner either"
        one.release("chunk")
        assert other.take("chunk") is not None
        one.release("chunk")
        assert one.take("chunk") is None, "a release of what is no longer held takes nothing from its owner"
    assert list(tmp_path.iterdir()) == []


def test_a_stale_lease_is_taken_over_once_and_says_how_often_it_was_lost(tmp_path: Path) -> None:
    gone = Leases(tmp_path, ttl=5.0)
    tmp_path.mkdir(exist_ok=True)
    assert gone.take("chunk") is not None
    with Leases(tmp_path, ttl=5.0) as one, Leases(tmp_path, ttl=5.0) as other:
        assert one.take("chunk") is None
        _aged(tmp_path / "chunk", 6)
        lease = one.take("chunk")
        assert lease is not None
        assert lease.tries == 1
        assert other.take("chunk") is None
        one.abandon("chunk", "line 3")
        last = other.take("chunk")
        assert last is not None
        assert (last.tries, last.traceback) == (2, "line 3")


def test_many_processes_never_share_a_lease(tmp_path: Path) -> None:
    """Threads with leases of their own, all after one stale lease."""
    first = Leases(tmp_path, ttl=30.0)
    first.take("chunk")
    _aged(tmp_path / "chunk", 60)
    all_ = [Leases(tmp_path, ttl=30.0) for _ in range(16)]
    start, won = threading.Barrier(len(all_)), []

    def race(leases: Leases) -> None:
        start.wait()
        if leases.take("chunk"):
            won.append(leases.owner)

    threads = [threading.Thread(target=race, args=(leases,)) for leases in all_]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_lease_is_renewed_while_its_owner_lives(tmp_path: Path) -> None:
    with Leases(tmp_path, ttl=0.2) as one, Leases(tmp_path, ttl=0.2) as other:
        one.take("chunk")
        time.sleep(0.5)
        assert other.take("chunk") is None


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "a/b", "1/2/3"])
def test_shards_are_written_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="write I/N with I from 1 to N"):
        Shard.parse(text)


def _table(folder: Path) -> bytes:
    store = Store(folder)
    build_report(store, folder / "report", ("csv",))
    return (folder / "table.csv").read_bytes()


def test_shards_share_the_work_and_make_the_table_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "POLL", 0.01)
    wanted = request(small_suite(), ["ddim", "unipc"], [5, 10])
    computed: dict[int, list[object]] = {}

    class Watched(SerialExecutor):
        def __init__(self, index: int) -> None:
            self.index = index

        def map(self, jobs):  # type: ignore[no-untyped-def]
            for job in jobs:
                computed.setdefault(self.index, []).append(job.chunk)
                time.sleep(0.05)  # the others get their turn
                with lock:  # threads share the process's model, which shards do not
                    outcomes = list(super().map(iter([job])))
                yield from outcomes

    lock = threading.Lock()
    runner.make_plan(wanted)  # the registry is filled by the first who asks, which threads may not be at once

    def work(index: int) -> None:
        runner.run(wanted, tmp_path / "shards", lambda: Watched(index), shard=Shard(index, 3))

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chunks = [chunk for found in computed.values() for chunk in found]
    assert len(computed) == 3, "each did something"
    assert len(chunks) == len(set(chunks)) == 15, "and none did what another did"
    run_serial(wanted, tmp_path / "serial")
    assert _table(tmp_path / "shards") == _table(tmp_path / "serial")
    lines = (tmp_path / "shards" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 4, "each cell is recorded once"
    assert [file.name for file in (tmp_path / "shards" / "leases").iterdir()] == ["class"]


def test_a_chunk_that_three_shards_vanished_on_is_quarantined(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["ddim"])
    (cell,) = runner.make_plan(wanted).cells
    name = f"{cell.id}-0-32"
    gone = Leases(tmp_path / "r" / "leases", ttl=60.0)
    gone.folder.mkdir(parents=True)
    (tmp_path / "r").rename(tmp_path / "kept")
    run_serial(request(small_suite(), ["unipc"]), tmp_path / "r")  # the folder is a run folder
    (tmp_path / "kept" / "leases").rename(tmp_path / "r" / "leases")
    for _ in range(3):
        assert gone.take(name) is not None
        gone.abandon(name, "in solver.py")
    (record,) = runner.run(wanted, tmp_path / "r", SerialExecutor, shard=Shard(1, 1))
    assert record.status == "error"
    assert record.failure is not None
    assert record.failure.message.startswith("worker vanished (remove leases/")
    assert record.failure.traceback == "in solver.py"


def test_shards_see_the_errors_of_others_and_a_driver_keeps_them_out(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["raises", "ddim"], plugins={"bad.py": MISBEHAVING})
    records = runner.run(wanted, tmp_path / "r", SerialExecutor, shard=Shard(1, 2))
    assert {r.cell.method: r.status for r in records} == {"raises": "error", "ddim": "ok"}
    from evalbench.store import hold_run

    with hold_run(tmp_path / "r"), pytest.raises(UserError, match="another evalbench is writing"):
        runner.run(wanted, tmp_path / "r", SerialExecutor, shard=Shard(1, 2))


def test_a_shard_on_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    class Elsewhere(SerialExecutor):
        def environment(self, preferred=()):  # type: ignore[no-untyped-def]
            return super().environment(preferred) | {"class": "another"}

    runner.run(request(small_suite(), ["ddim"]), tmp_path, SerialExecutor, shard=Shard(1, 2))
    with pytest.raises(UserError, match="shard 2/2 runs on another kind of device"):
        runner.run(request(small_suite(), ["unipc"]), tmp_path, Elsewhere, shard=Shard(2, 2))
