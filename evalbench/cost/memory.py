"""Memory of a cell: the peak of one call after a reset, what stood there before it, and the weights (pitfall P41).

On a GPU torch's allocator says what it allocated and what it reserved. On a CPU the resident set of the process is all
that can be seen; Linux lets a process reset its peak, elsewhere the peak is that of the process so far and says so.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evalbench.cost.clock import synchronise

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """Bytes around one call.

    Attributes:
        before: in use when the call began: weights, and what the process keeps. On a CPU resident, None where the
            system does not say.
        peak: most that was in use during the call: allocated on a GPU, resident on a CPU.
        reserved: most that torch's allocator held on a GPU; None on a CPU.
        weights: of the networks alone; None where the model does not say.
        note: what the peak really is where it could not be reset; empty otherwise.
    """

    before: int | None
    peak: int
    reserved: int | None
    weights: int | None = None
    note: str = ""


def weights_bytes(thing: Any) -> int | None:
    """Bytes of the tensors that a model holds, in modules, dataclasses and containers; None where there are none.

    What several of them share counts once.
    """
    tensors = _tensors(thing, set())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) or None


def _tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, torch.nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, Mapping | list | tuple):
        for value in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _tensors(value, seen)
    elif type(thing).__module__.partition(".")[0] not in ("builtins", "torch", "numpy") and hasattr(thing, "__dict__"):
        for value in vars(thing).values():
            yield from _tensors(value, seen)


def measured(call: Callable[[], object], device: torch.device, weights: int | None = None) -> Memory:
    """The memory of one call, after a reset of the peak. Whatever the call raises is raised here."""
    return _on_gpu(call, device, weights) if device.type == "cuda" else _on_cpu(call, weights)


def _on_gpu(call: Callable[[], object], device: torch.device, weights: int | None) -> Memory:
    gc.collect()
    synchronise(device)
    torch.cuda.empty_cache()  # or what an earlier cell freed still counts as reserved
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return Memory(
        before, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), weights=weights
    )


def _on_cpu(call: Callable[[], object], weights: int | None, proc: Path = PROC) -> Memory:
    _give_back()
    was_reset = _reset_peak(proc)
    before = _resident(proc, "VmRSS")
    call()
    peak = _resident(proc, "VmHWM")
    if was_reset and peak is not None:
        return Memory(before, peak, None, weights)
    unit = 1 if sys.platform == "darwin" else 1024
    so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Memory(before, so_far, None, weights, note="peak of the process so far: this system cannot reset it")


def _give_back() -> None:
    """Return freed memory to the system as far as the C library can, so that an earlier cell's is not counted."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # no glibc: the memory stays counted


def _reset_peak(proc: Path) -> bool:
    try:
        (proc / "clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _resident(proc: Path, key: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        text = (proc / "status").read_text("ascii", errors="replace")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None
