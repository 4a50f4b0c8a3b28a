"""The one NVIDIA GPU that a run uses, as its management library (NVML) sees it. Optional: without it, a reason."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# nvmlClocksEventReasons* that mean: something held the clocks down. Idle and clocks set by the user are none of these.
_HELD_DOWN: Mapping[str, str] = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
}


class Gpu(Protocol):
    """What the meters ask of a GPU."""

    def millijoules(self) -> int:
        """Energy since the driver was loaded; moves in steps."""

    def processes(self) -> frozenset[int]:
        """Ids of the processes that hold a context on it."""

    def megahertz(self) -> int:
        """Clock of the multiprocessors now."""

    def held_down(self) -> frozenset[str]:
        """Why the clocks are held down now; empty when they are not."""


@dataclass(frozen=True)
class Absent:
    """No GPU can be asked."""

    reason: str


def open_gpu(device: torch.device) -> Gpu | Absent:
    """The device by its UUID, which `CUDA_VISIBLE_DEVICES` cannot shift; or why it cannot be asked."""
    if device.type != "cuda":
        return Absent(f"no NVIDIA GPU: this runs on {device.type}")
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return Absent("pynvml is not installed: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(_uuid(device)))
    except pynvml.NVMLError as error:
        return Absent(f"NVML: {error}")


def _uuid(device: torch.device) -> str:
    found = str(torch.cuda.get_device_properties(device).uuid)
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


class Nvml:
    """A GPU behind pynvml."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml, self._handle = pynvml, handle

    def millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def processes(self) -> frozenset[int]:
        listed = [
            *self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle),
            *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle),
        ]
        return frozenset(int(process.pid) for process in listed)

    def megahertz(self) -> int:
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def held_down(self) -> frozenset[str]:
        bits = int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        names = {name: getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0) for name in _HELD_DOWN}
        return frozenset(_HELD_DOWN[name] for name, bit in names.items() if bits & bit)
