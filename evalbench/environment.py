"""What produced the bits: versions, device, threads, and the fingerprint class in which results are bit-identical."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from evalbench import __version__
from evalbench.spec import content_id

_LIBRARIES = ("torch", "numpy", "scipy", "diffusers", "open_clip_torch", "torchvision")


def pick_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The kind of device, without a serial number."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def prepare_process(threads: int = 1) -> None:
    """Settings of a quality run: one thread, deterministic algorithms, no TF32 (design, section 5)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    _limit_blas(threads)
    # the flag of use_deterministic_algorithms(True), which would import torch._inductor: over a second per process
    torch.set_deterministic_debug_mode("error")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@lru_cache(maxsize=1)
def _limit_blas(threads: int) -> None:
    """The same for numpy and scipy: a second thread of theirs waits by spinning, on a core that a worker needs."""
    import scipy.linalg  # noqa: F401  # its BLAS is another than numpy's, and only what is loaded can be limited

    threadpool_limits(limits=threads, user_api="blas")


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The environment of a record. `class` hashes what results are bit-identical within (all with one thread)."""
    bits = {"device": device_name(device), "versions": _versions()}
    return {
        **bits,
        "threads": torch.get_num_threads(),
        "class": content_id(bits),
        "python": sys.version.split()[0],
        "platform": platform.system(),
        "evalbench": __version__,
        "git": git_revision(),
    }


@lru_cache(maxsize=1)
def git_revision() -> str:
    """Revision of the checkout this package runs from, with `+` when files differ; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return ""
    try:
        revision = _git(folder, "rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *args: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()
