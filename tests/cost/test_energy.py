"""Energy with a GPU that knows the truth, and the reasons where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from virtual_time import MS, VirtualClock

from evalbench.cost import nvml
from evalbench.cost.energy import Energy, energy_of
from evalbench.cost.nvml import Absent, Nvml, open_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class VirtualGpu:
    """Its calls are queued; each takes 10 ms and 3 joules when it runs."""

    def __init__(self) -> None:
        self.clock, self.counter = VirtualClock(), 1_000_000

    def launch(self) -> None:
        self.clock.queue(10 * MS, self._spend)

    def _spend(self) -> None:
        self.counter += 3000

    def millijoules(self) -> int:
        return self.counter


def test_the_energy_of_a_call_is_the_truth() -> None:
    gpu = VirtualGpu()
    gpu.launch()  # somebody's work from before is not the cell's
    assert energy_of(gpu.launch, gpu.clock, gpu) == Energy(3.0, calls=100, seconds=pytest.approx(1.0))


def test_a_window_closed_before_the_work_is_done_would_see_nothing() -> None:
    gpu = VirtualGpu()
    opened = gpu.millijoules()
    gpu.launch()
    assert gpu.millijoules() - opened == 0  # pitfall P42
    gpu.clock.wait()
    assert gpu.millijoules() - opened == 3000


def test_a_window_too_short_for_the_counter_is_missing() -> None:
    gpu = VirtualGpu()
    found = energy_of(gpu.launch, gpu.clock, gpu, most=5)
    assert (found.joules, found.note) == (None, "5 calls took 0.05 s, too short for the counter's steps")


def test_without_a_gpu_it_is_missing_with_the_reason() -> None:
    clock = VirtualClock()
    assert energy_of(lambda: None, clock, Absent("no driver")) == Energy(None, note="no driver")
    absent = open_gpu(CPU)
    assert absent == Absent("no NVIDIA GPU: this runs on cpu")


def test_without_pynvml_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu(CUDA) == Absent("pynvml is not installed: pip install nvidia-ml-py")


class NVMLError(Exception):
    """As pynvml names it."""


class NVMLError_NotSupported(NVMLError):
    """As pynvml names it."""


def library(**changes: Any) -> SimpleNamespace:
    """The part of pynvml that is used, for one GPU."""
    facts = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "nvmlClocksThrottleReasonSwPowerCap": 4,
        "nvmlClocksThrottleReasonHwThermalSlowdown": 64,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: {"GPU-7": 12}[handle],
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=3), SimpleNamespace(pid=9)],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [SimpleNamespace(pid=3)],
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1000 + kind,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 1 | 4,
    }
    return SimpleNamespace(**(facts | changes))


def opened(monkeypatch: pytest.MonkeyPatch, pynvml: Any) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(nvml, "_uuid", lambda device: "GPU-7")
    return open_gpu(CUDA)


def test_a_gpu_is_asked_through_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = opened(monkeypatch, library())
    assert isinstance(gpu, Nvml)
    assert (gpu.millijoules(), gpu.processes(), gpu.megahertz()) == (12, {3, 9}, 1001)
    assert gpu.held_down() == {"power cap"}  # idle, bit 1, holds nothing down


def test_a_library_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise NVMLError_NotSupported("driver not loaded")

    assert opened(monkeypatch, library(nvmlInit=broken)) == Absent("NVML: driver not loaded")
    gpu = opened(monkeypatch, library(nvmlDeviceGetTotalEnergyConsumption=broken))
    found = energy_of(lambda: None, VirtualClock(), gpu)
    assert (found.joules, found.note) == (None, "NVML: driver not loaded")


def test_what_the_call_raises_is_raised() -> None:
    gpu = VirtualGpu()
    with pytest.raises(ZeroDivisionError):
        energy_of(lambda: 1 / 0, gpu.clock, gpu)


@pytest.mark.gpu
def test_the_gpu_of_this_machine() -> None:
    pytest.importorskip("pynvml")
    gpu = open_gpu(CUDA)
    assert not isinstance(gpu, Absent), gpu
    assert gpu.megahertz() > 0
    first = gpu.millijoules()
    assert gpu.millijoules() >= first > 0
    assert isinstance(gpu.held_down(), frozenset)
