"""Arms on the host's clock, in a module of its own that a fresh process can import."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evalbench.cost.bench import Bench, Stand
from evalbench.cost.breakdown import Stopwatch
from evalbench.cost.clock import HostClock
from evalbench.cost.nvml import Absent


def truth(index: int) -> np.ndarray:
    """The sample of a global index."""
    return np.sin(np.arange(1, 5) * (index % 999_983))


class RealStand(Stand):
    """Every arm returns the true samples at once."""

    def __init__(self) -> None:
        self.device, self.gpu = torch.device("cpu"), Absent("none here")
        self.clock = HostClock(self.device)

    def call(self, arm: str, indices: range) -> Callable[[], torch.Tensor]:
        return lambda: torch.tensor(self.witness(arm, indices))

    def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
        return np.stack([truth(i) for i in indices])

    def meter(self, stopwatch: Stopwatch | None) -> None:
        pass


@dataclass(frozen=True)
class RealBench(Bench):
    arms: tuple[str, ...] = ("a",)
    batches: tuple[int, ...] = (2,)
    dies: bool = False

    def build(self) -> Stand:
        if self.dies:
            os._exit(7)
        return RealStand()
