"""What stays loaded in this process: models and feature networks, within a memory limit, the latest used ones."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from evalbench import environment
from evalbench.cost.memory import weights_bytes
from evalbench.errors import UserError

VARIABLE = "EVALBENCH_KEEP_GB"  # gigabytes that a worker keeps loaded
T = TypeVar("T")


@dataclass
class _Kept:
    thing: Any
    size: int
    job: int  # that used it last


class Warm:
    """Things that are dear to load, by key.

    What the running job uses always stays: a limit that is too small for one job has nothing loaded twice in it.

    Args:
        limit: bytes that all may hold together, asked when something was loaded.
    """

    def __init__(self, limit: Callable[[], float]) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()  # the least recently used first
        self._job = 0

    def __len__(self) -> int:
        return len(self._kept)

    def next_job(self) -> None:
        """Another job begins: what only earlier ones used may go."""
        self._job += 1

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """A thing, loaded when it is not there; its size is that of the tensors it holds."""
        if key not in self._kept:
            thing = self._loaded(load)
            self._kept[key] = _Kept(thing, weights_bytes(thing) or 0, self._job)
            self._drop(self._limit())
        kept = self._kept[key]
        kept.job = self._job
        self._kept.move_to_end(key)
        return kept.thing  # type: ignore[no-any-return]

    def _loaded(self, load: Callable[[], T]) -> T:
        """Loaded again, when there was no room beside what earlier jobs used."""
        try:
            return load()
        except torch.OutOfMemoryError:
            if not self._drop(0.0):
                raise
            torch.cuda.empty_cache()
        return load()

    def _drop(self, limit: float) -> int:
        """Let things of earlier jobs go until the others fit; how many went."""
        before = len(self._kept)
        for key in [key for key, kept in self._kept.items() if kept.job < self._job]:
            if sum(kept.size for kept in self._kept.values()) <= limit:
                break
            del self._kept[key]
        return before - len(self._kept)

    def forget(self) -> None:
        """Let go of everything."""
        self._kept.clear()


def limit() -> float:
    """Bytes that this process keeps loaded: as EVALBENCH_KEEP_GB says, else half of what the device has for it.

    On a GPU that is half of what other processes leave; on a CPU half of the memory, shared by as many workers as there
    are cores.

    Raises:
        UserError: see `asked`.
    """
    wanted = asked()
    if wanted is not None:
        return wanted
    device = environment.pick_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / 2 / (os.cpu_count() or 1)


def asked() -> float | None:
    """Bytes of EVALBENCH_KEEP_GB; None where it is not set.

    Raises:
        UserError: it is no number of gigabytes.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise UserError(f"{VARIABLE}={text}: set it to the gigabytes that a worker keeps loaded, such as 8")
    return gigabytes * 1e9


kept = Warm(limit)  # by this process
