"""Memory: what is allocated in a call is seen, what came before is not; without a reset it says so."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evalbench.cost import memory
from evalbench.cost.memory import Memory, measured, weights_bytes

CPU = torch.device("cpu")
MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")


def allocate(megabytes: int) -> None:
    """Touch every page and let go."""
    np.ones(megabytes * MB, dtype=np.uint8).sum()


@linux
def test_the_peak_is_that_of_the_call() -> None:
    allocate(200)  # an earlier cell
    found = measured(lambda: allocate(64), CPU)
    assert found.note == ""
    assert found.before is not None
    assert 60 * MB <= found.peak - found.before < 100 * MB  # the kernel counts pages in lots
    assert (found.reserved, found.weights) == (None, None)


@linux
def test_a_later_cell_does_not_inherit_the_peak() -> None:
    large, small = measured(lambda: allocate(200), CPU), measured(lambda: allocate(16), CPU)
    assert large.peak - small.peak > 100 * MB


def status(folder: Path, text: str, writable: bool = True) -> Path:
    (folder / "status").write_text(text, encoding="ascii")
    if not writable:
        (folder / "clear_refs").mkdir()
    return folder


def test_what_is_read_and_reset(tmp_path: Path) -> None:
    proc = status(tmp_path, "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    found = memory._on_cpu(lambda: status(tmp_path, "VmHWM:\t 4096 kB\nVmRSS:\t 10 kB\n"), 77, proc)
    assert found == Memory(before=1 * MB, peak=4 * MB, reserved=None, weights=77)
    assert (tmp_path / "clear_refs").read_text() == "5"


@pytest.mark.parametrize("text", ["VmHWM:\t 1 kB\nVmRSS:\t 1 kB\n", ""])
def test_without_a_reset_the_peak_is_the_processs_and_says_so(tmp_path: Path, text: str) -> None:
    found = memory._on_cpu(lambda: None, None, status(tmp_path, text, writable=False))
    assert found.note == "peak of the process so far: this system cannot reset it"
    assert found.peak > 10 * MB  # not the kilobyte that the file speaks of
    nothing = memory._on_cpu(lambda: None, None, tmp_path / "nowhere")
    assert (nothing.before, nothing.note) == (None, found.note)


def test_what_the_call_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        measured(lambda: 1 / 0, CPU)


def test_weights_are_parameters_and_buffers_and_shared_ones_count_once() -> None:
    norm, linear = nn.BatchNorm1d(4), nn.Linear(3, 5).half()
    assert weights_bytes([linear]) == 2 * (3 * 5 + 5)
    assert weights_bytes([norm]) == 4 * 4 * 4 + 8  # weight, bias, mean, variance, and how many batches
    tied = nn.Linear(3, 5, bias=False).half()
    tied.weight = nn.Parameter(linear.weight.detach())  # another tensor, the same memory
    assert weights_bytes([linear, tied, linear]) == 2 * (3 * 5 + 5)
    assert weights_bytes([]) is None


@pytest.mark.gpu
def test_a_gpu_says_what_it_allocated_and_reserved() -> None:
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device)  # graphs of other tests keep theirs
    weights = torch.ones(16 * MB, dtype=torch.uint8, device=device)
    torch.ones(256 * MB, dtype=torch.uint8, device=device)  # an earlier cell, freed
    found = measured(lambda: torch.ones(64 * MB, dtype=torch.uint8, device=device), device, weights.nbytes)
    assert found.before >= 16 * MB
    assert found.peak == found.before + 64 * MB
    assert found.peak <= found.reserved < held + 128 * MB
    assert found.weights == 16 * MB
