"""Throughput of two Ray workers of one thread each over that of one, on two cores.

Each executor is warm first: workers up, model and feature networks loaded by a small run. They take turns, and the
ratio is that of the medians. A run covers everything: plan, samples, features, chunks on disk, metrics, records.

    python benchmarks/scaling.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from evalbench import runner
from evalbench.cluster import RayExecutor
from evalbench.runner import Request
from evalbench.spec import load_suite

GOAL = 1.8
METHODS, NFE, SAMPLES = ("ddim", "unipc"), (10, 20), 4096


def seconds(executor: RayExecutor, seed: int, samples: int) -> float:
    """Wall seconds of a run into an empty folder."""
    suite = load_suite("fashion-mixture").override(samples=samples)
    metrics = ("fd@fashion64", "kid@fashion64", "accuracy@fashion-classifier")
    request = Request(suite=suite, methods=METHODS, nfe=NFE, guidance=(1.0,), seeds=(seed,), metrics=metrics)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        runner.run(request, Path(folder) / "run", lambda: executor)
        return time.perf_counter() - started


def timed(workers: int, seed: int) -> float:
    """Seconds of a warm run with so many workers, on a Ray of its own."""
    executor = RayExecutor(workers)
    try:
        seconds(executor, 1000 + seed, 1024)
        return seconds(executor, seed, SAMPLES)
    finally:
        executor.shutdown()


def main() -> None:
    """Take turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    one, two = [], []
    for seed in range(rounds):
        one.append(timed(1, seed))
        two.append(timed(2, seed))
        print(f"round {seed + 1}: one worker {one[-1]:.1f} s, two {two[-1]:.1f} s")
    ratio = statistics.median(one) / statistics.median(two)
    print(json.dumps({"name": "scaling", "value": round(ratio, 2), "unit": "x", "goal": GOAL, "holds": ratio >= GOAL}))


if __name__ == "__main__":
    main()
