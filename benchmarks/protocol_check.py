"""Does a FLOP ratio become a latency ratio? Caches, skips, stitches and low resolutions beside the plain model.

Each method draws the same samples as its baseline, DDIM at the same budget, in interleaved rounds on one thread. Its
FLOPs are those of the ledger, over the baseline's; its seconds are medians of the same rounds, over the baseline's.

    python benchmarks/protocol_check.py [--suite fashion-dit] [--nfe 20] [--batch 8] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch

from evalbench import registry, sampling
from evalbench.cost.latency import interleaved
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported
from evalbench.runner import make_cell
from evalbench.spec import load_suite

BASELINE = "ddim"
METHODS = (
    "ddim+interval-cache(every=2)",
    "ddim+faster-diffusion(keys=uniform:4)",
    "ddim+faster-diffusion(keys=uniform:4,parallel=true)",
    "ddim+layer-skip",
    "ddim+t-stitch(r=0.4)",
    "ddim+bottleneck",
)
GOAL = 0.15  # a latency ratio is at most this above its FLOP ratio


def sampler(setup: sampling.Setup, method: str, nfe: int) -> Callable[[], Ledger]:
    """Draws one batch and returns its ledger."""
    indices, chain = range(setup.suite.sampling.batch), registry.build_method(method)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    cell = make_cell(setup.suite, method, nfe, 1.0, 0)

    def call() -> Ledger:
        ledger = Ledger(len(indices), nfe)
        sampling.sample(setup, chain, cell, indices, cond, ledger)
        return ledger

    return call


def main() -> None:
    """Count, then time, and print both ratios of each method side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", default="fashion-dit")
    for name, value in (("--nfe", 20), ("--batch", 8), ("--rounds", 7)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = sampling.build(load_suite(options.suite).override(batch=options.batch))
    calls, counts = {}, {}
    for method in (BASELINE, *METHODS):
        calls[method] = sampler(setup, method, options.nfe)
        try:
            counts[method] = calls[method]()
        except Unsupported as reason:
            print(f"{method}: {reason}")
            del calls[method]
    setup.door.counting = False
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for method, spent, kept in interleaved(calls, options.rounds, setup.device):
        if kept:
            seconds[method].append(spent)
    medians = {method: float(np.median(values)) for method, values in seconds.items()}
    flops = {method: float(ledger.flops.mean()) for method, ledger in counts.items()}

    print(f"protocol check: {options.suite}, NFE {options.nfe}, batch {options.batch}, {setup.device}, one thread")
    print(f"{'method':<55} {'FLOP ratio':>10} {'latency ratio':>13} {'ms':>8}")
    worst = -1.0
    for method in calls:
        counted, timed = flops[method] / flops[BASELINE], medians[method] / medians[BASELINE]
        if method != BASELINE:
            worst = max(worst, timed - counted)
        print(f"{method:<55} {counted:10.3f} {timed:13.3f} {1e3 * medians[method]:8.1f}")
    result = {"value": round(worst, 3), "unit": "latency ratio above FLOP ratio, worst", "goal": f"<= {GOAL}"}
    print(json.dumps({"name": "protocol_check", **result, "holds": worst <= GOAL}))


if __name__ == "__main__":
    main()
