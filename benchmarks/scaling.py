"""Throughput of two Ray workers of one thread each over that of one, on two cores.

Each executor is warm first: workers up, model and feature networks loaded by a small run. They take turns, and the
ratio is that of the medians. A run covers everything: plan, samples, features, chunks on disk, metrics, records.

Beside it stands what the machine gives: the throughput of two plain processes that compute such chunks, with no Ray, no
driver and no files, over that of one. Cores share caches, memory and perhaps a clock, so that is seldom 2.

    python benchmarks/scaling.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from evalbench import runner, worker
from evalbench.cluster import RayExecutor, worker_variables
from evalbench.runner import Request
from evalbench.spec import load_suite
from evalbench.worker import ChunkResult, Job

GOAL = 1.8
METHODS, NFE, SAMPLES = ("ddim", "unipc"), (10, 20), 4096
PLAIN = 1024  # samples of each cell that a plain process computes
SPAWN = multiprocessing.get_context("spawn")  # as Ray does: a fresh process, with an environment of its own


def request(seed: int, samples: int) -> Request:
    """What is run."""
    suite = load_suite("fashion-mixture").override(samples=samples)
    metrics = ("fd@fashion64", "kid@fashion64", "accuracy@fashion-classifier")
    return Request(suite=suite, methods=METHODS, nfe=NFE, guidance=(1.0,), seeds=(seed,), metrics=metrics)


def seconds(executor: RayExecutor, seed: int, samples: int) -> float:
    """Wall seconds of a run into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        runner.run(request(seed, samples), Path(folder) / "run", lambda: executor)
        return time.perf_counter() - started


def timed(workers: int, seed: int) -> float:
    """Seconds of a warm run with so many workers, on a Ray of its own."""
    executor = RayExecutor(workers)
    try:
        seconds(executor, 1000 + seed, 1024)
        return seconds(executor, seed, SAMPLES)
    finally:
        executor.shutdown()


def compute(seed: int, start: Any, times: Any) -> None:
    """What a plain process does: the chunks of all cells, one after the other, timed once all processes are warm."""
    wanted = request(seed, PLAIN)
    plan = runner.make_plan(wanted)
    jobs = [Job(wanted.suite, cell, chunk, plan.parts[cell.id]) for cell in plan.work for chunk in plan.chunks(cell)]
    worker.run_job(jobs[0])
    start.wait()
    started = time.perf_counter()
    done = [isinstance(worker.run_job(job), ChunkResult) for job in jobs]
    assert all(done)
    times.put(time.perf_counter() - started)


def plain(processes: int, seed: int) -> float:
    """Seconds until all of so many plain processes have computed their chunks."""
    start, times = SPAWN.Barrier(processes), SPAWN.SimpleQueue()
    running = [SPAWN.Process(target=compute, args=(100 * processes + i + seed, start, times)) for i in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert not any(process.exitcode for process in running)
    return max(times.get() for _ in running)


def main() -> None:
    """Take turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ.update(worker_variables())  # what plain processes inherit, Ray's workers get
    one, two, alone, both = [], [], [], []
    for seed in range(rounds):
        one.append(timed(1, seed))
        two.append(timed(2, seed))
        alone.append(plain(1, seed))
        both.append(plain(2, seed))
        print(
            f"round {seed + 1}: one worker {one[-1]:.1f} s, two {two[-1]:.1f} s; "
            f"a plain process {alone[-1]:.1f} s, two with twice the work {both[-1]:.1f} s"
        )
    ratio = statistics.median(one) / statistics.median(two)
    bound = 2 * statistics.median(alone) / statistics.median(both)
    print(f"two workers {ratio:.2f} x, two plain processes {bound:.2f} x: what the machine gives")
    print(json.dumps({"name": "scaling", "value": round(ratio, 2), "unit": "x", "goal": GOAL, "holds": ratio >= GOAL}))


if __name__ == "__main__":
    main()
