"""Energy of a call through NVML's counter; missing with the reason where there is none.

The counter is the whole GPU's, idle power included: it is the cell's only on a GPU of its own, which `honesty` watches.
It moves in steps, so calls are repeated until the window is long. The window opens and closes after a wait for the
device (pitfall P42: closed before the work was done, it measures the launching).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evalbench.cost.clock import Clock
from evalbench.cost.nvml import Absent, Gpu

WINDOW = 1.0  # seconds at least


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
        joules: per call; None is missing. calls, seconds: of the window.
        note: why it is missing; empty otherwise.
    """

    joules: float | None
    calls: int = 0
    seconds: float = 0.0
    note: str = ""


def energy_of(
    call: Callable[[], object], clock: Clock, gpu: Gpu | Absent, *, window: float = WINDOW, most: int = 1000
) -> Energy:
    """Joules per call, over calls that together last `window` seconds.

    Args:
        call: one timed call with inputs of its own. clock: of the device. most: calls at most.
    """
    if isinstance(gpu, Absent):
        return Energy(None, note=gpu.reason)
    try:
        return _measured(call, clock, gpu, window, most)
    except Exception as error:
        if type(error).__name__.startswith("NVMLError"):
            return Energy(None, note=f"NVML: {error}")
        raise


def _measured(call: Callable[[], object], clock: Clock, gpu: Gpu, window: float, most: int) -> Energy:
    calls, spent = 0, 0.0
    clock.wait()
    opened = gpu.millijoules()
    while spent < window and calls < most:
        spent += clock.time(call)
        calls += 1
    clock.wait()
    joules = (gpu.millijoules() - opened) / 1e3
    if spent < window:
        return Energy(None, calls, spent, f"{calls} calls took {spent:.3g} s, too short for the counter's steps")
    return Energy(joules / calls, calls, spent)
