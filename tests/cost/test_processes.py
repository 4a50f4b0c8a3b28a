"""The protocol over processes in virtual time: exact timings, cold starts, failures, kept answers; then real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from real_bench import RealBench, truth
from virtual_time import UNIT, VirtualClock

from evalbench.cost import measured, memory, processes
from evalbench.cost.bench import Bench, Rules, Sitting, Stand
from evalbench.cost.breakdown import Stopwatch, span
from evalbench.cost.latency import Steady
from evalbench.cost.nvml import Absent
from evalbench.cost.ratio import median_ratio, verdict
from evalbench.errors import EvalbenchError

CPU = torch.device("cpu")
RULES = Rules(processes=5, rounds=3, samples=2, steady=Steady(window=2), pin=False)
LOAD, LAUNCH = 700 * UNIT, 300 * UNIT


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting the garbage of a whole test run before each first call takes most of the time otherwise."""
    monkeypatch.setattr(memory, "_give_back", lambda: None)


@dataclass
class World:
    """What all processes of a test share: the clock, and what was asked of them."""

    clock: VirtualClock = field(default_factory=VirtualClock)
    asked: list[tuple[str, range]] = field(default_factory=list)
    starts: int = 0


@dataclass
class Arm:
    """A method in virtual time.

    Attributes:
        units: of one call, for one sample and the whole batch alike. slow: extra units of the first calls in a process.
        caches: it answers every call with its first answer, at once. fails: the number of the call that raises.
    """

    units: int
    slow: tuple[int, ...] = ()
    caches: bool = False
    fails: int | None = None


class VirtualStand(Stand):
    def __init__(self, world: World, arms: dict[str, Arm]) -> None:
        self.world, self.arms, self.clock = world, arms, world.clock
        self.device, self.gpu = CPU, Absent("none here")
        self.calls = dict.fromkeys(arms, 0)
        self.remembered: dict[str, Any] = {}
        self.stopwatch: Stopwatch | None = None

    def call(self, arm: str, indices: range) -> Callable[[], Any]:
        self.world.asked.append((arm, indices))
        self.clock.now += 50 * UNIT  # conditions: no part of the call

        def run() -> torch.Tensor:
            facts, number = self.arms[arm], self.calls[arm]
            self.calls[arm] += 1
            if number == facts.fails:
                raise RuntimeError(f"{arm} broke\nand more")
            if facts.caches and arm in self.remembered:
                self.clock.now += UNIT
                return self.remembered[arm][: len(indices)]
            with span(self.stopwatch, "denoiser"):
                self.clock.now += facts.units * UNIT
            self.clock.now += (facts.slow[number] if number < len(facts.slow) else 0) * UNIT
            self.remembered[arm] = torch.tensor(np.stack([truth(i) for i in indices]))
            return self.remembered[arm]

        return run

    def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
        return np.stack([truth(i) for i in indices])

    def meter(self, stopwatch: Stopwatch | None) -> None:
        self.stopwatch = stopwatch


class VirtualBench(Bench):
    def __init__(self, arms: dict[str, Arm], batches: tuple[int, ...] = (4,)) -> None:
        self.facts, self.arms, self.batches = arms, tuple(arms), batches
        self.world = World()

    def build(self) -> Stand:
        self.world.clock.now += LOAD
        return VirtualStand(self.world, self.facts)


def run(bench: VirtualBench, rules: Rules = RULES) -> list[Sitting]:
    clock = bench.world.clock

    def launch(function: Callable[..., Any], order: Any) -> Any:
        bench.world.starts += 1
        clock.now += LAUNCH
        return function(order, clock)

    return list(processes.sittings(bench, rules, launch, clock))


def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


# --- timings --------------------------------------------------------------------------------------------------------


def test_timings_and_breakdown_are_the_truth() -> None:
    bench = VirtualBench({"a": Arm(20), "b": Arm(10)}, batches=(1, 4))
    found = measured.collect(run(bench))
    assert set(found) == {("a", 1), ("a", 4), ("b", 1), ("b", 4)}
    for (arm, batch), one in found.items():
        units = {"a": 20, "b": 10}[arm]
        assert (one.arm, one.batch) == (arm, batch)
        np.testing.assert_array_equal(one.seconds, np.full((5, 3, 2), units / 512))
        assert one.breakdown is not None
        assert (one.breakdown.denoiser, one.breakdown.overhead, one.breakdown.excess) == (units / 512, 0.0, 0.0)
        assert one.breakdown.calls == 5
        assert one.first == (units / 512,) * 5
        assert one.build == ((LAUNCH + LOAD) / 1e9,) * 5
        assert one.energy.note == "none here"
    ratio = median_ratio(found["a", 4].seconds, found["b", 4].seconds, resamples=50)
    assert (ratio.value, ratio.interval.low, ratio.interval.high) == (2.0, 2.0, 2.0)
    assert (verdict(ratio), bench.world.starts) == ("slower", 5)


def test_slow_first_calls_disturb_no_timing_and_are_said() -> None:
    slow = (400, 90, 30, 9)
    found = measured.collect(run(VirtualBench({"a": Arm(10, slow=slow), "b": Arm(10)})))
    np.testing.assert_array_equal(found["a", 4].seconds, found["b", 4].seconds)
    assert found["a", 4].first == (410 / 512,) * 5
    assert found["b", 4].first == (10 / 512,) * 5


def test_a_warm_up_that_never_settles_is_flagged() -> None:
    slow = tuple(2 ** (20 - i) for i in range(20))
    rules = Rules(processes=5, rounds=1, samples=1, steady=Steady(window=2, most=4), pin=False)
    found = measured.collect(run(VirtualBench({"a": Arm(1, slow=slow), "b": Arm(1)}), rules))
    assert "warm-up did not settle in 4 calls (5 of 5 processes)" in found["a", 4].flags
    assert (found["a", 4].steady, found["a", 4].warmup) == (False, (4,) * 5)
    assert found["b", 4].steady
    assert not any("settle" in flag for flag in found["b", 4].flags)


def test_a_flag_stands_at_the_batch_size_at_which_it_arose() -> None:
    sittings = run(VirtualBench({"a": Arm(3)}, batches=(1, 4)))
    flagged = [replace(one, flags=((4, "a storm"),)) for one in sittings]
    found = measured.collect(flagged)
    assert (found["a", 1].flags, found["a", 4].flags) == ((), ("a storm",))


def test_cold_start_is_from_asking_to_the_first_samples_and_everybody_opens_in_turn() -> None:
    sittings = run(VirtualBench({"a": Arm(20, slow=(7,)), "b": Arm(10)}))
    inputs = 50 * UNIT
    cold = [(LAUNCH + LOAD + inputs + units * UNIT) / 1e9 for units in (27, 10, 27, 10, 27)]
    assert [one.cold for one in sittings] == pytest.approx(cold, rel=1e-12)
    assert [one.runs[0].arm for one in sittings] == ["a", "b", "a", "b", "a"]
    found = measured.collect(sittings)
    assert (len(found["a", 4].cold), len(found["b", 4].cold)) == (3, 2)


def test_the_first_process_finds_how_many_rounds_the_seconds_take_and_all_do_as_many() -> None:
    rules = Rules(processes=5, rounds=2, samples=2, seconds=100 / 512, steady=Steady(window=2), pin=False)
    found = measured.collect(run(VirtualBench({"a": Arm(20), "b": Arm(10)}), rules))
    assert found["a", 4].seconds.shape == found["b", 4].seconds.shape == (5, 5, 2)  # 10 calls of 10 units


def test_a_faster_process_does_no_other_number_of_rounds() -> None:
    class Faster(VirtualBench):
        def build(self) -> Stand:
            speeds = {name: Arm(arm.units // self.world.starts) for name, arm in self.facts.items()}
            return VirtualStand(self.world, speeds)

    rules = Rules(processes=5, rounds=2, samples=2, seconds=1200 / 512, steady=Steady(window=2), pin=False)
    found = measured.collect(run(Faster({"a": Arm(120), "b": Arm(240)}), rules))
    assert found["a", 4].seconds.shape == (5, 5, 2)
    np.testing.assert_array_equal(found["a", 4].seconds[:, 0, 0], [120 / 512, 60 / 512, 40 / 512, 30 / 512, 24 / 512])


@pytest.mark.parametrize("drift", [0, 1])
def test_the_order_of_the_arms_changes_no_verdict(drift: int) -> None:
    """On a machine that grows slower with every call, in which the second arm named is 2 % slower."""

    class Drifting(VirtualStand):
        def call(self, arm: str, indices: range) -> Callable[[], Any]:
            inner = super().call(arm, indices)

            def slower() -> Any:
                self.clock.now += drift * UNIT * len(self.world.asked)
                return inner()

            return slower

    class DriftingBench(VirtualBench):
        def build(self) -> Stand:
            return Drifting(self.world, self.facts)

    arms, results = {"a": Arm(10_000), "b": Arm(12_000), "c": Arm(10_000)}, {}
    for order in ("abc", "cba", "bac"):
        found = measured.collect(run(DriftingBench({name: arms[name] for name in order})))
        ratios = {
            pair: median_ratio(found[pair[0], 4].seconds, found[pair[1], 4].seconds, resamples=100)
            for pair in ("ab", "ac")
        }
        results[order] = {pair: verdict(ratio) for pair, ratio in ratios.items()}
    assert set(map(str, results.values())) == {str({"ab": "faster", "ac": "indistinguishable"})}


# --- what may go wrong ----------------------------------------------------------------------------------------------


def test_no_samples_are_drawn_twice_and_all_arms_get_the_same() -> None:
    bench = VirtualBench({"a": Arm(3), "b": Arm(2)}, batches=(1, 4))
    run(bench)
    by_arm = {arm: [i for name, indices in bench.world.asked if name == arm for i in indices] for arm in "ab"}
    assert len(set(by_arm["a"])) == len(by_arm["a"])
    assert by_arm["a"] == by_arm["b"]


@pytest.mark.parametrize("names", [("honest", "cheat"), ("cheat", "honest")])
def test_a_method_that_answers_from_a_cache_is_caught(names: tuple[str, str]) -> None:
    arms = {"honest": Arm(20), "cheat": Arm(20, caches=True)}
    bench = VirtualBench({name: arms[name] for name in names})
    sittings = run(bench)
    found = measured.collect(sittings)
    assert np.median(found["cheat", 4].seconds) == 1 / 512  # it would have been 20 times faster
    doubts = processes.recheck_answers(bench, sittings, 1e-3, inline)
    assert set(doubts) == {"cheat"}
    assert doubts["cheat"].startswith("20 of 20 timed outputs differ from the same samples computed again")


def test_a_cache_that_outlives_the_method_is_caught_too() -> None:
    """The first answer of the process is remembered outside the method, and again in the process that checks."""

    class Remembering(VirtualStand):
        def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
            rows = super().witness(arm, indices)
            return np.repeat(rows[:1], len(rows), axis=0) if self.arms[arm].caches else rows

    class RememberingBench(VirtualBench):
        def build(self) -> Stand:
            return Remembering(self.world, self.facts)

    bench = RememberingBench({"honest": Arm(20), "cheat": Arm(20, caches=True)})
    assert set(processes.recheck_answers(bench, run(bench), 1e-3, inline)) == {"cheat"}


def test_samples_are_computed_again_in_another_order_than_they_were_timed() -> None:
    bench = VirtualBench({"a": Arm(20)})
    sittings, asked = run(bench), []

    def launch(function: Callable[..., Any], *arguments: Any) -> Any:
        asked.extend(arguments[1]["a"])
        return function(*arguments)

    assert processes.recheck_answers(bench, sittings, 1e-3, launch) == {}
    timed = [i for one in sittings for i in one.runs[0].kept.indices]
    assert sorted(asked) == sorted(timed)
    assert asked != timed


def test_a_cell_that_fails_is_a_failure_and_the_others_are_measured() -> None:
    for call in (0, 4):
        bench = VirtualBench({"a": Arm(3), "b": Arm(2, fails=call)}, batches=(1, 4))
        sittings = run(bench)
        assert [sorted(one.failures) for one in sittings] == [["b"], [], [], [], []]
        failure = measured.failures(sittings)["b"]
        assert (failure.type, failure.message) == ("RuntimeError", "b broke")
        assert "RuntimeError: b broke" in failure.traceback
        found = measured.collect(sittings)
        assert {arm for arm, _ in found} == {"a"}
        assert found["a", 4].seconds.shape == (5, 3, 2)
        assert processes.recheck_answers(bench, sittings, 1e-3, inline) == {}


def test_a_cell_that_fails_late_is_not_reported_from_its_first_processes() -> None:
    class Late(VirtualBench):
        def build(self) -> Stand:
            fails = 2 if self.world.starts == 3 else None
            return VirtualStand(self.world, {"a": Arm(3), "b": Arm(2, fails=fails)})

    sittings = run(Late({"a": Arm(3), "b": Arm(2)}))
    assert [sorted(one.failures) for one in sittings] == [[], [], ["b"], [], []]
    assert {arm for arm, _ in measured.collect(sittings)} == {"a"}


def test_too_few_samples_are_a_failure() -> None:
    bench = VirtualBench({"a": Arm(3), "b": Arm(2, caches=True)}, batches=(1, 4))  # it answers 4 with its one
    assert measured.failures(run(bench))["b"].message == "b returned 1 samples, expected 4"


def test_when_everybody_failed_no_further_process_is_made() -> None:
    bench = VirtualBench({"a": Arm(3, fails=0)})
    sittings = run(bench)
    assert (len(sittings), bench.world.starts, sittings[0].cold) == (1, 1, None)
    assert measured.collect(sittings) == {}


def test_memory_is_of_a_process_of_ones_own_or_says_so() -> None:
    found = measured.collect(run(VirtualBench({"a": Arm(3), "b": Arm(2)}), Rules(processes=1, pin=False)))
    assert "after other calls in the same process" in (found["b", 4].memory.note or found["a", 4].memory.note)
    assert found["a", 4].memory.note != "after other calls in the same process"


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_fresh_processes_measure_and_are_checked() -> None:
    rules = Rules(processes=1, rounds=2, samples=1, steady=Steady(window=1))
    sittings = list(processes.sittings(RealBench(), rules))
    found = measured.collect(sittings)["a", 2]
    assert found.seconds.shape == (1, 2, 1)
    assert found.seconds.min() > 0
    assert 0 < found.build[0] < found.cold[0] < 100
    assert (sittings[0].clock, len(sittings[0].cores)) == ("perf_counter_ns", sittings[0].threads)
    assert processes.recheck_answers(RealBench(), sittings, 1e-12) == {}


@pytest.mark.timeout(120)
def test_a_process_that_dies_is_an_error_not_a_hang() -> None:
    with pytest.raises(EvalbenchError, match="a timed process died"):
        list(processes.sittings(RealBench(dies=True), Rules(processes=1)))
