"""Simple latency: warm-up of the exact configuration, device-synchronised, competitors interleaved, raw samples kept.

(Fresh processes, hierarchical intervals and the split into parts are a later step; see the cost issue.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
    calls: Sequence[Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda i: None,
) -> list[list[float]]:
    """Seconds of each call in A B C A B C order, after one unmeasured round.

    Args:
        calls: one per competitor. rounds: measured rounds, at least 1.
        device: synchronised around each call. progress: told the index of each finished call, warm-up included.

    Returns:
        A list of `rounds` seconds for each call.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for i, call in enumerate(calls):
            spent = timed(call, device)
            if number:  # round 0 warms up
                seconds[i].append(spent)
            progress(i)
    return seconds
