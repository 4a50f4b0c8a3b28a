"""Latency with a clock that knows the truth: what is reported equals it exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, cycle, repeat

import numpy as np
import pytest
import torch
from virtual_time import MS, UNIT, VirtualClock

from evalbench.cost.latency import Steady, interleaved, timed, turns
from evalbench.cost.line import time_per_evaluation
from evalbench.stats import percentiles

CPU = torch.device("cpu")


def measure(clock: VirtualClock, calls: Mapping[str, Callable[[], object]], rounds: int, **options):
    """Counted seconds by name, and the number of warm-up calls of each."""
    counted: dict[str, list[float]] = {name: [] for name in calls}
    warm = dict.fromkeys(calls, 0)
    for name, seconds, counts in interleaved(calls, rounds, CPU, clock=clock, **options):
        if counts:
            counted[name].append(seconds)
        else:
            warm[name] += 1
    return counted, warm


def test_the_reported_percentiles_are_the_truth() -> None:
    clock = VirtualClock()
    truth = [(i * 37 % 101) * MS for i in range(101)]  # 0..100 ms in some order
    counted, warm = measure(clock, {"a": clock.call("a", [999 * MS, *truth])}, 101)
    found = percentiles(np.array(counted["a"]))
    assert (found.n, warm["a"]) == (101, 1)
    assert (found.median, found.p10, found.p90, found.p99) == (0.050, 0.010, 0.090, 0.099)


def test_slope_and_intercept_over_the_evaluations_are_the_truth() -> None:
    clock, budgets = VirtualClock(), (4, 8, 16, 32)
    slope, intercept = 4 * UNIT, 9 * UNIT
    calls = {str(n): clock.call(str(n), cycle([intercept + n * slope] * 3 + [999 * MS])) for n in budgets}
    counted, _ = measure(clock, calls, 5)
    line = time_per_evaluation({n: np.array(counted[str(n)]) for n in budgets})
    assert (line.slope, line.intercept, line.r2, line.budgets) == (4 / 512, 9 / 512, 1.0, budgets)
    assert (line.slope_interval.low, line.slope_interval.high) == (4 / 512, 4 / 512)


def test_slow_first_calls_disturb_nothing() -> None:
    clock = VirtualClock()
    slow_a = [500 * MS, 200 * MS, 80 * MS, 40 * MS, 20 * MS, 12 * MS]
    calls = {"a": clock.call("a", chain(slow_a, repeat(10 * MS))), "b": clock.call("b", repeat(3 * MS))}
    counted, warm = measure(clock, calls, 7, steady=Steady(window=3))
    assert counted == {"a": [0.010] * 7, "b": [0.003] * 7}
    assert warm["a"] == warm["b"] > len(slow_a)


def test_one_round_of_warm_up_would_have_been_disturbed() -> None:
    clock = VirtualClock()
    calls = {"a": clock.call("a", chain([500 * MS, 200 * MS], repeat(10 * MS)))}
    counted, warm = measure(clock, calls, 3)
    assert (counted["a"], warm["a"]) == ([0.200, 0.010, 0.010], 1)


def test_warm_up_that_never_settles_is_bounded() -> None:
    clock = VirtualClock()
    calls = {"a": clock.call("a", (2**i for i in range(1000)))}
    counted, warm = measure(clock, calls, 2, steady=Steady(window=2, most=9))
    assert (len(counted["a"]), warm["a"]) == (2, 9)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_order_changes_no_median(names: tuple[str, ...]) -> None:
    clock = VirtualClock()
    durations = {"a": cycle([10 * MS, 14 * MS, 11 * MS]), "b": cycle([20 * MS, 21 * MS, 28 * MS])}
    counted, _ = measure(clock, {name: clock.call(name, durations[name]) for name in names}, 30)
    assert {name: percentiles(np.array(counted[name])).median for name in names} == {"a": 0.011, "b": 0.021}


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_machine_that_slows_down_slows_both(names: tuple[str, ...]) -> None:
    clock = VirtualClock()

    def drifting(base: int) -> Iterable[int]:
        return (base + base * i // 100 for i in range(1000))  # twice as slow after 100 calls

    calls = {name: clock.call(name, drifting({"a": 10 * MS, "b": 20 * MS}[name])) for name in names}
    counted, _ = measure(clock, calls, 101)
    medians = {name: percentiles(np.array(counted[name])).median for name in names}
    assert medians["b"] / medians["a"] == pytest.approx(2.0, rel=1e-12)


def test_competitors_take_turns() -> None:
    clock = VirtualClock()
    measure(clock, {name: clock.call(name, repeat(MS)) for name in "abc"}, 2, samples=2)
    assert "".join(clock.log) == "abc" + "cba" + "bca" + "acb" + "cab"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_every_competitor_stands_in_every_place_equally_often(n: int) -> None:
    names = [str(i) for i in range(n)]
    orders = [turns(names, k) for k in range(2 * n)]
    places = np.array([[order.index(name) for order in orders] for name in names])
    for row in places:
        np.testing.assert_array_equal(np.bincount(row, minlength=n), np.full(n, 2))


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_the_place_in_a_round_is_nobodys_advantage(names: str) -> None:
    clock, position = VirtualClock(), [0]

    def run() -> None:  # whoever comes first in a round pays for it
        clock.now += 10 * MS if position[0] % len(names) else 30 * MS
        position[0] += 1

    counted, _ = measure(clock, dict.fromkeys(names, run), 6 * len(names))
    sums = {name: sum(values) for name, values in counted.items()}
    assert len(set(sums.values())) == 1


def test_the_defaults_are_one_warm_up_and_the_rounds() -> None:
    events = list(interleaved({"a": lambda: None, "b": lambda: None}, 3, CPU))
    places = [("a", False), ("b", False), ("b", True), ("a", True)]
    places += [("b", True), ("a", True), ("a", True), ("b", True)]
    assert [(name, counts) for name, _, counts in events] == places
    assert list(interleaved({}, 3, CPU)) == []


def test_inputs_are_made_outside_the_clock() -> None:
    clock, made = VirtualClock(), []

    def before(name: str) -> None:
        made.append(name)
        clock.now += 500 * MS

    counted, _ = measure(clock, {name: clock.call(name, repeat(MS)) for name in "ab"}, 3, before=before)
    assert counted == {"a": [0.001] * 3, "b": [0.001] * 3}
    assert made == clock.log


def test_a_competitor_that_raises_is_out_and_the_others_go_on() -> None:
    clock, failures = VirtualClock(), []
    calls = {"a": clock.call("a", repeat(MS)), "b": clock.call("b", [MS, MS])}  # its third call raises
    counted, _ = measure(clock, calls, 4, failed=lambda *failure: failures.append(failure))
    assert (len(counted["a"]), len(counted["b"])) == (4, 1)
    assert [(name, type(error)) for name, error in failures] == [("b", StopIteration)]
    assert clock.log.count("b") == 3
    with pytest.raises(StopIteration):
        clock.call("b", [])()


def test_no_round_is_run_when_everybody_failed() -> None:
    clock, failures = VirtualClock(), {}
    for steady in (None, Steady()):
        assert (
            list(
                interleaved({"a": clock.call("a", [])}, 3, CPU, clock=clock, steady=steady, failed=failures.__setitem__)
            )
            == []
        )


@pytest.mark.parametrize(
    ("rounds", "seconds", "most", "expected"),
    [(3, 0.0, 1000, 3), (3, 0.095, 1000, 10), (20, 0.095, 1000, 20), (3, 0.095, 6, 6), (8, 0.095, 6, 8)],
    ids=["repeats", "duration", "repeats-longer", "bounded", "bound-cuts-no-repeats"],
)
def test_both_minima_hold(rounds: int, seconds: float, most: int, expected: int) -> None:
    clock = VirtualClock()
    calls = {"fast": clock.call("fast", repeat(10 * MS)), "slow": clock.call("slow", repeat(70 * MS))}
    counted, _ = measure(clock, calls, rounds, seconds=seconds, most=most)
    assert {name: len(values) for name, values in counted.items()} == {"fast": expected, "slow": expected}


def test_steady_compares_two_windows() -> None:
    rule = Steady(window=3, tolerance=0.1)
    assert not rule.reached([1.0] * 5)  # too few to say
    assert rule.reached([1.0] * 6)
    assert rule.reached([9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0])  # a stray slow call is no drift
    assert rule.reached([1.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    assert not rule.reached([1.2, 1.2, 1.2, 1.0, 1.0, 1.0])
    assert rule.reached([1.0625, 1.0625, 1.0625, 1.0, 1.0, 1.0])


def test_warm_up_lasts_its_seconds_however_steady() -> None:
    clock = VirtualClock()
    calls = {"a": clock.call("a", repeat(10 * MS)), "b": clock.call("b", repeat(40 * MS))}
    _, warm = measure(clock, calls, 1, steady=Steady(window=2, seconds=0.095))
    assert warm == {"a": 10, "b": 10}


def test_work_that_is_only_queued_is_waited_for() -> None:
    clock = VirtualClock()
    clock.queue(900 * MS)  # somebody else's, from before
    assert timed(lambda: clock.queue(7 * UNIT), CPU, clock) == 7 / 512


def test_timed_reads_the_clock_around_the_call() -> None:
    clock = VirtualClock()
    clock.now = 5
    assert timed(clock.call("a", [1_500 * MS]), CPU, clock) == 1.5


@pytest.mark.gpu
def test_a_device_is_waited_for() -> None:
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    events = list(interleaved({"big": lambda: x @ x, "none": lambda: None}, 5, device))
    spent = {name: [s for n, s, counts in events if n == name and counts] for name in ("big", "none")}
    assert np.median(spent["big"]) > 10 * np.median(spent["none"])  # launching alone takes microseconds
