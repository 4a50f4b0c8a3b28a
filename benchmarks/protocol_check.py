"""Does a FLOP ratio become a latency ratio? Caches, exits, skips, stitches and low resolutions beside the plain model.

Each method draws the same samples as its baseline, DDIM at the same budget, in interleaved rounds on one thread. Its
FLOPs are those of the ledger, over the baseline's; its seconds are medians of the same rounds, over the baseline's.
What a method prepares is made before the clock starts and with little effort: how well it is trained or calibrated
changes what is computed, and both ratios are of that.

    python benchmarks/protocol_check.py [--suite fashion-dit fashion-sd] [--nfe 20] [--batch 8] [--rounds 7]
        [--cpu-seconds]

`--cpu-seconds` times by the CPU time of this process in place of the wall: for a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evalbench import registry, sampling
from evalbench.cost.clock import HostClock
from evalbench.cost.latency import interleaved
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported
from evalbench.preparation import prepare
from evalbench.runner import make_cell
from evalbench.spec import Suite, load_suite

BASELINE = "ddim"
METHODS = (
    "ddim+interval-cache(every=2)",
    "ddim+faster-diffusion(keys=uniform:4)",
    "ddim+faster-diffusion(keys=uniform:4,parallel=true)",
    "ddim+harmonica(batch=2)",
    "ddim+tfmq-cache(bits=w32a32,samples=2)",  # its table alone: fake quantisation takes time and saves none
    "ddim+diffusers-cache:FirstBlockCache(threshold=0.1)",
    "ddim+diffusers-cache:TaylorSeer(cache_identifiers=.*transformer_blocks.*attn1)",
    "ddim+diffusers-cache:MagCache(threshold=0.1)",
    "ddim+diffusers-cache:FasterCache",
    "ddim+diffusers-cache:PAB",
    "ddim+deediff(images=16,iterations=2)",
    "ddim+layer-skip",
    "autodiffusion(population=4,epochs=1,samples=8,layers=0.8)",
    "ddim+t-stitch(r=0.4)",
    "ddim+bottleneck",
)
GOAL = 0.15  # a latency ratio is at most this above its FLOP ratio


class CpuClock(HostClock):
    """CPU time of this process, which other processes do not lengthen; it says nothing of a device."""

    name = "process_time_ns"

    def mark(self) -> int:
        return time.process_time_ns()


@dataclass(frozen=True)
class Found:
    """What a call of a method took: operations of a sample, and seconds of a batch."""

    flops: float
    seconds: float


def sampler(setup: sampling.Setup, method: str, nfe: int) -> Callable[[], Ledger]:
    """Draws one batch and returns its ledger; what the method prepares is made here.

    Raises:
        Unsupported: the model lacks what the method needs.
    """
    indices, chain = range(setup.suite.sampling.batch), registry.build_method(method)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    cell = make_cell(setup.suite, method, nfe, 1.0, 0)
    if chain.prepares:
        chain = chain.equipped(prepare(setup, chain, cell).artifacts)

    def call() -> Ledger:
        ledger = Ledger(len(indices), nfe)
        sampling.sample(setup, chain, cell, indices, cond, ledger)
        return ledger

    return call


def measure(
    suite: Suite, methods: Sequence[str], nfe: int, rounds: int, *, cpu_seconds: bool = False
) -> tuple[dict[str, Found], dict[str, str]]:
    """What each method took, and why some could not run."""
    setup = sampling.build(suite)
    calls: dict[str, Callable[[], Ledger]] = {}
    flops: dict[str, float] = {}
    refused: dict[str, str] = {}
    for method in (BASELINE, *methods):
        try:
            call = sampler(setup, method, nfe)
            flops[method] = float(call().flops.mean())
            calls[method] = call
        except Unsupported as reason:
            refused[method] = str(reason)
    setup.door.counting = False
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    clock = CpuClock(setup.device) if cpu_seconds else None
    for method, spent, kept in interleaved(calls, rounds, setup.device, clock=clock):
        if kept:
            seconds[method].append(spent)
    return {method: Found(flops[method], float(np.median(seconds[method]))) for method in calls}, refused


def ratios(found: Mapping[str, Found]) -> dict[str, tuple[float, float]]:
    """Of FLOPs and of seconds, each method's over the baseline's."""
    base = found[BASELINE]
    return {name: (one.flops / base.flops, one.seconds / base.seconds) for name, one in found.items()}


def main() -> None:
    """Count, then time, and print both ratios of each method side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", nargs="+", default=["fashion-dit", "fashion-sd"])
    for name, value in (("--nfe", 20), ("--batch", 8), ("--rounds", 7)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--cpu-seconds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst, where, clock = -1.0, "nothing", "CPU seconds" if options.cpu_seconds else "seconds"
    for name in options.suite:
        suite = load_suite(name).override(batch=options.batch)
        found, refused = measure(suite, METHODS, options.nfe, options.rounds, cpu_seconds=options.cpu_seconds)
        print(f"protocol check: {name}, NFE {options.nfe}, batch {options.batch}, {clock}, one thread")
        print(f"{'method':<78} {'FLOP ratio':>10} {'latency ratio':>13} {'ms':>8}")
        for method, (counted, timed) in ratios(found).items():
            print(f"{method:<78} {counted:10.3f} {timed:13.3f} {1e3 * found[method].seconds:8.1f}")
            if method != BASELINE and timed - counted > worst:
                worst, where = timed - counted, f"{method} on {name}"
        for method, reason in refused.items():
            print(f"{method:<78} {reason}")
        print()
    print(f"furthest above its FLOP ratio: {where}")
    result = {"value": round(worst, 3), "unit": f"ratio of {clock} above FLOP ratio, worst", "goal": f"<= {GOAL}"}
    print(json.dumps({"name": "protocol_check", **result, "holds": worst <= GOAL}))


if __name__ == "__main__":
    main()
