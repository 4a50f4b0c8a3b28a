"""Doubts about the machine and about answers: raised where there is reason, and only there."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalbench.cost.honesty import (
    TOLERANCE,
    Kept,
    Limits,
    Observation,
    joined,
    keep_which,
    machine_flags,
    observe,
    recheck,
)
from evalbench.cost.nvml import Absent

QUIET = Observation(wall=100.0, own=5.0, busy=50.0, cores=2, megahertz=2000.0)


def later(**changes: object) -> Observation:
    """Ten seconds on: this process used 9 of CPU time, everybody together 9.5."""
    return replace(QUIET, wall=110.0, own=14.0, busy=59.5, **changes)


def test_a_quiet_machine_raises_nothing() -> None:
    assert machine_flags(QUIET, later()) == ()


@pytest.mark.parametrize(("busy", "share"), [(61.0, None), (61.01, "10%"), (69.0, "50%")])
def test_other_processes_are_noticed_beyond_a_tenth_of_the_cpus(busy: float, share: str | None) -> None:
    expected = () if share is None else (f"other processes used {share} of the CPUs",)
    assert machine_flags(QUIET, replace(later(), busy=busy)) == expected
    assert machine_flags(QUIET, replace(later(), busy=busy), limits=Limits(foreign=0.6)) == ()


def test_a_load_that_cannot_be_seen_is_said() -> None:
    assert machine_flags(replace(QUIET, busy=None), later()) == ("load of other processes unknown: no /proc/stat",)


@pytest.mark.parametrize(("after", "flags"), [(1850.0, 0), (1500.0, 1), (2600.0, 1), (None, 0)])
def test_clocks_that_change_are_noticed(after: float | None, flags: int) -> None:
    assert len(machine_flags(QUIET, later(megahertz=after))) == flags
    gpu = replace(QUIET, gpu_megahertz=2000)
    found = machine_flags(gpu, later(gpu_megahertz=None if after is None else int(after)))
    assert len(found) == flags
    assert all(flag.startswith("GPU clock went from 2000 to ") for flag in found)


def test_foreign_processes_and_throttling_on_a_gpu() -> None:
    before = replace(QUIET, gpu_processes=frozenset({7, 8}))
    after = later(gpu_processes=frozenset({7, 8, 9}), gpu_held_down=frozenset({"power cap"}))
    assert machine_flags(before, before, frozenset({7, 8})) == ()
    assert machine_flags(before, after, frozenset({7, 8})) == (
        "1 foreign process on the GPU",
        "GPU clocks held down: power cap",
    )
    assert machine_flags(before, after, frozenset({7}))[0] == "2 foreign processes on the GPU"


class Gpu:
    def processes(self) -> frozenset[int]:
        return frozenset({3})

    def megahertz(self) -> int:
        return 1500

    def held_down(self) -> frozenset[str]:
        return frozenset({"power brake"})

    def millijoules(self) -> int:
        return 0


def test_what_is_read(tmp_path: Path) -> None:
    cpus = tmp_path / "cpus"
    (tmp_path / "stat").write_text("cpu  100 20 30 9999 999 4 5 6 0 0\ncpu0 1 2 3\n", encoding="ascii")
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 1000.0\nflags\t: x\ncpu MHz\t\t: 3000.0\n", encoding="ascii")
    seen = observe(Gpu(), tmp_path, cpus)
    import os

    assert seen.busy == 165 / os.sysconf("SC_CLK_TCK")
    assert seen.megahertz == 2000.0
    assert (seen.gpu_processes, seen.gpu_megahertz, seen.gpu_held_down) == ({3}, 1500, {"power brake"})
    (cpus / "cpu0" / "cpufreq").mkdir(parents=True)
    (cpus / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("2500000\n", encoding="ascii")
    assert observe(Absent("none"), tmp_path, cpus).megahertz == 2500.0
    nothing = observe(Absent("none"), tmp_path / "nowhere", tmp_path / "nowhere")
    assert (nothing.busy, nothing.megahertz, nothing.gpu_processes) == (None, None, frozenset())


def test_this_process_is_not_foreign_to_itself() -> None:
    before = observe(Absent("none"))
    if before.busy is None:
        pytest.skip("no /proc/stat")
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    after = observe(Absent("none"))
    assert after.own - before.own >= 0.5
    assert after.busy is not None
    assert after.busy - before.busy >= 0.4  # it is among everybody


# --- answers --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 12), st.integers(0, 5))
def test_what_is_kept_is_a_subset_without_repeats(calls: int, batch: int, rows: int, seed: int) -> None:
    which = keep_which(np.random.default_rng(seed), calls, batch, rows)
    pairs = [(call, row) for call, kept in which.items() for row in kept]
    assert len(set(pairs)) == len(pairs) == min(rows, calls * batch)
    assert all(0 <= call < calls and 0 <= row < batch for call, row in pairs)


def test_every_call_may_be_chosen() -> None:
    rng = np.random.default_rng(0)
    assert {call for _ in range(50) for call in keep_which(rng, 5, 4, 3)} == set(range(5))


def kept(error: float = 0.0, n: int = 4) -> tuple[Kept, np.ndarray]:
    """Samples, and the same again; one of them off by `error` of their size."""
    again = np.random.default_rng(1).choice([-2.0, 2.0], (n, 3, 5))  # root mean square 2
    rows = again.copy()
    rows[2] += 2 * error
    return Kept(tuple(range(n)), rows), again


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_is_where_it_is_stated(dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    assert recheck(*kept(0.0), tolerance) == ""
    assert recheck(*kept(0.99 * tolerance), tolerance) == ""
    assert recheck(*kept(1.01 * tolerance), tolerance).startswith("1 of 4 timed outputs differ")


def test_nan_wrong_shapes_and_nothing_kept_are_doubts() -> None:
    assert "1 of 4" in recheck(*kept(np.nan), 1e-3)
    one, again = kept()
    assert recheck(one, again[:, :2], 1e-3) == "timed outputs have shape (3, 5), computed again (2, 5)"
    empty = Kept((), np.empty((0, 2)))
    assert recheck(empty, np.empty((0, 2)), 1e-3) == "no timed output was kept: nothing was checked"


def test_images_of_one_byte_are_compared_as_numbers() -> None:
    again = np.full((2, 1, 4, 4), 200, dtype=np.uint8)
    rows = again.copy()
    rows[0, 0, 0, 0] = 255  # 55 levels in one of 16 pixels: 6.9 % of 200
    assert recheck(Kept((0, 1), rows), again, 0.07) == ""
    assert recheck(Kept((0, 1), rows), again, 0.065).startswith("1 of 2")
    assert recheck(Kept((0, 1), again), rows, 0.065).startswith("1 of 2")  # no wrapping below 0 either


def test_processes_are_joined_in_order() -> None:
    one, two = Kept((1, 2), np.array([[1.0], [2.0]])), Kept((5,), np.array([[5.0]]))
    whole = joined([one, two])
    assert whole.indices == (1, 2, 5)
    np.testing.assert_array_equal(whole.rows, [[1.0], [2.0], [5.0]])
