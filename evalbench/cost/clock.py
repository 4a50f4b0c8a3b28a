"""Clocks: where seconds come from. Every measurement of this package takes its clock as a parameter.

HostClock   `time.perf_counter_ns`; waits for the device before a reading is wanted (pitfall P34)
CudaClock   CUDA events, the device's own time line
tests       a virtual clock, which knows the truth
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch


class Clock(ABC):
    """Marks moments on a time line and says how far apart two of them are."""

    name: str = ""

    @abstractmethod
    def wait(self) -> None:
        """Return when the device has finished everything it was given."""

    @abstractmethod
    def mark(self) -> Any:
        """This moment; what it is only `seconds` knows."""

    @abstractmethod
    def seconds(self, start: Any, stop: Any) -> float:
        """Time between two marks; the device has been waited for since `stop`."""

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call, between two waits."""
        self.wait()
        start = self.mark()
        call()
        self.wait()
        stop = self.mark()
        self.wait()  # a mark on a device's own time line has to pass before it can be read
        return self.seconds(start, stop)


class HostClock(Clock):
    """The host's monotonic clock, in nanoseconds."""

    name = "perf_counter_ns"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        synchronise(self.device)

    def mark(self) -> int:
        return time.perf_counter_ns()

    def seconds(self, start: int, stop: int) -> float:
        return (stop - start) / 1e9


class CudaClock(Clock):
    """CUDA events on the current stream. The stop event follows a wait for the whole device: no stream goes unseen."""

    name = "cuda events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        synchronise(self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """CUDA events on a GPU, the host's clock elsewhere."""
    return CudaClock(device) if device.type == "cuda" else HostClock(device)


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
