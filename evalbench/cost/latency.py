"""Simple latency: warm-up of the exact configuration, device-synchronised, competitors interleaved, raw samples kept.

(Fresh processes, hierarchical intervals and the split into parts are a later step; see the cost issue.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, between two synchronisations (pitfall P34)."""
    synchronise(device)
    started = time.perf_counter_ns()
    call()
    synchronise(device)
    return (time.perf_counter_ns() - started) / 1e9


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> Iterator[tuple[str, float, bool]]:
    """Time the calls in A B C A B C order; the first round is warm-up of the exact configuration.

    Args:
        calls: one per competitor, by name. rounds: measured rounds, at least 1. device: synchronised around each call.

    Yields:
        (name, seconds, whether it counts) for each call, as it ends.
    """
    for number in range(rounds + 1):
        for name, call in calls.items():
            yield name, timed(call, device), number > 0
