"""The split of a call: exact in virtual time, where operators, networks and Python take what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from virtual_time import UNIT, VirtualClock

from evalbench.cost.breakdown import Breakdown, Stopwatch, breakdown, metered, span
from evalbench.cost.clock import HostClock
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.interfaces import Cond, Model
from evalbench.noise import NoiseSource
from evalbench.paths import VPLinear


class Machine(TorchDispatchMode):
    """Every torch operator takes the same virtual time."""

    def __init__(self, clock: VirtualClock, nanoseconds: int) -> None:
        super().__init__()
        self.clock, self.nanoseconds, self.operators = clock, nanoseconds, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.clock.now += self.nanoseconds
        return func(*args, **(kwargs or {}))


def whole_call(clock: VirtualClock, stopwatch: Stopwatch, queued: bool = False) -> Callable[[], None]:
    """2 texts of 3 units, 4 networks of 10 with 5 units of Python each, 3 operators between them, a decoder of 7."""
    spend = clock.queue if queued else lambda nanoseconds: setattr(clock, "now", clock.now + nanoseconds)
    x = torch.zeros(2, 3)

    def call() -> None:
        for _ in range(2):
            with span(stopwatch, "conditioning"):
                spend(3 * UNIT)
        for _ in range(4):
            clock.now += 5 * UNIT
            with span(stopwatch, "denoiser"):
                spend(10 * UNIT)
                torch.add(x, 1.0)  # the network's own: no arithmetic of the sampler
        torch.add(x, x)
        torch.mul(x, 2.0)
        x.sum()
        with span(stopwatch, "decoder"):
            spend(7 * UNIT)

    return call


def test_every_part_is_the_truth() -> None:
    clock = VirtualClock()
    stopwatch, machine = Stopwatch(clock), Machine(clock, UNIT)
    call = whole_call(clock, stopwatch)
    with machine:
        latency = clock.time(call)
        parts = metered(call, stopwatch)
    found = breakdown([parts], latency)
    expected = {"conditioning": 6, "denoiser": 4 * 11, "decoder": 7, "arithmetic": 3, "overhead": 20}
    assert found == Breakdown(**{name: units / 512 for name, units in expected.items()}, excess=0.0, calls=1)
    assert latency == sum(expected.values()) / 512
    assert parts["outside"] == 20 / 512


def test_work_that_a_span_queued_is_its_own() -> None:
    clock = VirtualClock()
    stopwatch = Stopwatch(clock)
    call = whole_call(clock, stopwatch, queued=True)
    latency = clock.time(call)
    found = breakdown([metered(call, stopwatch)], latency)
    assert (found.conditioning, found.denoiser, found.decoder) == (6 / 512, 40 / 512, 7 / 512)
    assert (found.arithmetic, found.overhead) == (0.0, 20 / 512)


def test_a_span_inside_another_stops_its_watch() -> None:
    clock = VirtualClock()
    stopwatch = Stopwatch(clock)

    def call() -> None:
        with stopwatch.span("decoder"):
            clock.now += 2 * UNIT
            with stopwatch.span("denoiser"):
                clock.now += 3 * UNIT
            clock.now += 4 * UNIT

    assert metered(call, stopwatch) == {"outside": 0.0, "decoder": 6 / 512, "denoiser": 3 / 512}


def test_a_call_that_raises_leaves_the_stopwatch_usable() -> None:
    clock = VirtualClock()
    stopwatch = Stopwatch(clock)

    def broken() -> None:
        with stopwatch.span("denoiser"):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        metered(broken, stopwatch)
    assert metered(whole_call(clock, stopwatch), stopwatch)["denoiser"] == 40 / 512


def test_the_latency_is_that_of_a_call_without_borders() -> None:
    clock = VirtualClock()
    stopwatch = Stopwatch(clock)
    call = whole_call(clock, stopwatch)
    before = clock.now
    call()  # spans of a stopwatch that does not run, or none at all, read no clock
    assert stopwatch.seconds == {}
    whole_call(clock, None)()
    assert clock.now - before == 2 * (6 + 4 * 15 + 7) * UNIT


def test_parts_beyond_the_latency_are_said_not_hidden() -> None:
    found = breakdown([{"denoiser": 3.0, "arithmetic": 1.0}], latency=3.5)
    assert (found.overhead, found.excess) == (0.0, 0.5)


def test_parts_are_medians_over_the_passes() -> None:
    found = breakdown([{"denoiser": 1.0}, {"denoiser": 9.0}, {"denoiser": 2.0}], latency=3.0)
    assert (found.denoiser, found.overhead, found.calls) == (2.0, 1.0, 3)


def test_an_unknown_part_and_a_second_run_are_errors() -> None:
    stopwatch = Stopwatch(VirtualClock())
    with pytest.raises(ValueError, match="unknown part 'sampler'; known: denoiser, decoder, conditioning"):
        metered(lambda: stopwatch.span("sampler").__enter__(), stopwatch)
    with pytest.raises(RuntimeError, match="runs already"):
        metered(lambda: metered(lambda: None, stopwatch), stopwatch)


class Slow(Model):
    """A network whose call takes a stated virtual time."""

    native = "x0"
    shape = (3,)

    def __init__(self, clock: VirtualClock, stopwatch: Stopwatch) -> None:
        self.clock, self.stopwatch = clock, stopwatch

    def predict(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        with span(self.stopwatch, "denoiser"):
            self.clock.now += 16 * UNIT
            return x * 0.5


@pytest.mark.parametrize("nfe", [3, 8])
def test_a_solver_spends_its_operators_and_nothing_else_on_arithmetic(nfe: int) -> None:
    from exact_model import solver

    clock = VirtualClock()
    stopwatch, machine = Stopwatch(clock), Machine(clock, UNIT)
    door = NetworkDoor(Slow(clock, stopwatch), VPLinear(), "logsnr")
    noise = NoiseSource(0, range(4), (3,))

    def call() -> None:
        door.ledger = Ledger(4)
        solver("ddim").sample(Field(door, door.ledger), noise.start(), Cond(), nfe, noise)

    with torch.no_grad():
        call()  # counts FLOPs once, which is not part of the call
        with machine:
            latency, operators = clock.time(call), machine.operators
            found = breakdown([metered(call, stopwatch)], latency)
    assert found.denoiser == nfe * 17 / 512  # its own operator is the network's
    assert found.arithmetic == (operators - nfe) / 512
    assert found.arithmetic > 0
    assert (found.overhead, found.excess) == (0.0, 0.0)


def test_on_this_machine_the_parts_are_found_where_they_are() -> None:
    import time

    stopwatch = Stopwatch(HostClock(torch.device("cpu")))

    def call() -> None:
        with stopwatch.span("denoiser"):
            time.sleep(0.02)
        time.sleep(0.01)

    parts = metered(call, stopwatch)
    assert parts["denoiser"] >= 0.02
    assert parts["outside"] >= 0.01


@pytest.mark.gpu
def test_kernels_that_a_span_launched_are_charged_to_it() -> None:
    from evalbench.cost.clock import CudaClock

    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    for clock in (HostClock(device), CudaClock(device)):
        stopwatch = Stopwatch(clock)

        def call(stopwatch: Stopwatch = stopwatch) -> None:
            with stopwatch.span("denoiser"):
                x @ x
            with stopwatch.span("decoder"):
                pass

        metered(call, stopwatch)
        found = metered(call, stopwatch)
        assert found["denoiser"] > 10 * found["decoder"]
        np.testing.assert_array_less(0.0, found["denoiser"])
