"""What several test modules share: small suites, requests, a plug-in with methods that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evalbench import runner
from evalbench.cost.latency import Steady
from evalbench.runner import Request, SerialExecutor
from evalbench.spec import Record, Suite, load_suite
from evalbench.timing import Effort

# Methods that break the contract, each in its own way; loaded like a user's plug-in.
MISBEHAVING = '''
import os

import torch
from evalbench.interfaces import Solver
from evalbench.registry import register


@register("raises")
class Raises(Solver):
    """Raises halfway."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        denoiser(x_T, 0.5, cond)
        raise RuntimeError("the method broke")


@register("nan")
class Nan(Solver):
    """Returns NaN."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return denoiser(x_T, 0.5, cond) * float("nan")


@register("wrong-shape")
class WrongShape(Solver):
    """Returns one sample too few."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return denoiser(x_T, 0.5, cond)[1:]


@register("overspends")
class Overspends(Solver):
    """Spends twice its budget."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        for _ in range(2 * nfe):
            x = denoiser(x_T, 0.5, cond)
        return x


@register("needs-split")
class NeedsSplit(Solver):
    """Requires what no analytic model has."""

    requires = frozenset({"split"})

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return denoiser(x_T, 0.5, cond)


@register("kills-worker")
class KillsWorker(Solver):
    """Takes its process down."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        os._exit(1)
'''

# A method that needs what it prepared.
PREPARES = '''
import numpy as np
from evalbench.interfaces import Artifact, Solver
from evalbench.registry import register


@register("prepares")
class Prepares(Solver):
    """Starts from a time it was told beforehand."""

    prepares = "once"

    def prepare(self, context):
        denoiser = context.denoiser(4)
        noise = context.noise(range(4))
        denoiser(context.x_T(noise), 0.5, context.cond(range(4)))
        return Artifact({"t": np.array([0.5])})

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return denoiser(x_T, float(self.prepared().arrays["t"][0]), cond)
'''

# A method that can be killed in the middle, and a suite whose chunks land one by one. Where CHAOS_FOLDER is set, some
# of its calls go wrong, each chunk's at most once: calls are counted by files, so that all processes count together.
SLOW = '''
import hashlib
import os
import time
from pathlib import Path

import torch
from evalbench.interfaces import Solver
from evalbench.registry import register


def number(folder):
    """Which call this is, from 1 on, over all processes."""
    n = len(list(folder.glob("call-*"))) + 1
    while True:
        try:
            os.close(os.open(folder / f"call-{n}", os.O_CREAT | os.O_EXCL))
            return n
        except FileExistsError:
            n += 1


def misbehave(x_T):
    folder = Path(os.environ["CHAOS_FOLDER"])
    call = number(folder)
    due = sum(int(moment) <= call for moment in os.environ["CHAOS_MOMENTS"].split(","))
    hit = folder / ("hit-" + hashlib.sha256(x_T.numpy().tobytes()).hexdigest()[:16])
    if due <= len(list(folder.glob("hit-*"))) or hit.exists():
        return
    hit.touch()
    if os.environ["CHAOS_FAULT"] == "hang":
        time.sleep(3600)
    raise torch.OutOfMemoryError("no room, says the test")


@register("slow")
class Slow(Solver):
    """One evaluation, and time to be killed in."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        if "CHAOS_FOLDER" in os.environ:
            misbehave(x_T)
        time.sleep(0.15)
        return denoiser(x_T, 0.5, cond)
'''
SMALL_CHUNKS = 'extends = "gmm-smooth"\nname = "chaos"\nversion = 1\nsummary = "small chunks"\n[sampling]\nchunk = 32\n'

Faults = Callable[..., None]  # what the fixture `faults` gives: faults(kind, count=1)

EFFORT = Effort(processes=2, rounds=2, seconds=0.0, batches=(1, 8), steady=Steady(window=1, most=3), kept=2, pin=False)

PAIRED = ("paired-median@identity", "fd@identity")


def small_suite(name: str = "gmm-smooth", **sampling: Any) -> Suite:
    """A built-in suite cut down to seconds."""
    suite = load_suite(name).override(**{"samples": 96, "batch": 32, "chunk": 32, **sampling})
    if suite.solution is None:
        return suite
    return suite.model_copy(update={"solution": suite.solution.model_copy(update={"nfe": 64})})


def request(suite: Suite, methods: Sequence[str], nfe: Sequence[int] = (5,), **changes: Any) -> Request:
    """A request with the usual defaults."""
    content: dict[str, Any] = {
        "suite": suite,
        "methods": tuple(methods),
        "nfe": tuple(nfe),
        "guidance": (1.0,),
        "seeds": (0,),
        "metrics": PAIRED,
        "allow_small_n": True,
    }
    return Request(**(content | changes))


def timed_request(methods: Sequence[str], nfe: Sequence[int], **changes: Any) -> Request:
    """A request for latencies alone, with the least effort."""
    return request(small_suite(), methods, nfe, **({"measure": frozenset({"latency"}), "effort": EFFORT} | changes))


def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Instead of a fresh process: run here."""
    return function(*arguments)


class CountingExecutor(SerialExecutor):
    """A serial executor that remembers what it computed; it times in this process, which no real one does."""

    launch = staticmethod(inline)

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.timed: list[Any] = []

    def latency(self, job: Any) -> Any:
        self.timed.append(job)
        return super().latency(job)

    def map(self, jobs: Any) -> Any:
        for job in jobs:
            self.jobs.append(job)
            yield from super().map(iter([job]))


def run_serial(wanted: Request, out: Path) -> tuple[list[Record], CountingExecutor]:
    """Run here and say what was computed."""
    executor = CountingExecutor()
    return runner.run(wanted, out, lambda: executor), executor


def landed(folder: Path) -> dict[Path, int]:
    """The chunks of a run folder, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob("chunks/*/*.npz")}


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process belongs to this test's Ray, and not to somebody else's on the machine."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
