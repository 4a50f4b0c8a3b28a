"""Chunk results per second through plan, Ray, store and reduce, with workers that compute nothing.

A worker returns what a chunk of 16 samples with 8 features looks like; everything else is the real run: planning, jobs
over Ray, chunks written with their digests, fsync in groups, metrics, records. The clock starts when workers are up.

    python benchmarks/driver.py [--chunks 4000] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import cluster, runner, worker
from evalbench.cluster import RayExecutor, ray
from evalbench.runner import Request
from evalbench.spec import load_suite
from evalbench.worker import ChunkResult

GOAL = 300.0
SIZE, CELLS = 16, 4


@ray.remote(concurrency_groups={"watch": 1})  # type: ignore[call-overload]
class Idle:
    """A worker that returns a chunk without computing it."""

    def __init__(self, folder: str) -> None:
        """It reads no files."""

    def environment(self) -> tuple[str, dict[str, Any]]:
        return ray.get_runtime_context().get_node_id(), worker.describe()

    def run(self, job: Any, common: Any) -> ChunkResult:
        from evalbench import registry

        rng = np.random.default_rng(job.chunk.start)
        arrays = {name: rng.standard_normal((SIZE, 8)).astype(np.float32) for name in job.parts}
        arrays |= {
            f"count:{name}": np.full(SIZE, float(job.cell.nfe)) for name in ("nfe", "depth", "cost", "evals.base")
        }
        facts = {
            "seconds": 1e-3,
            "environment": worker.describe(),
            "features": {name: registry.extractor_fingerprint(name) for name in job.parts},
        }
        return ChunkResult(None, arrays, facts)  # type: ignore[arg-type]

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        return ""


class Watched(runner.Silent):
    """Notes when pieces land."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    """Run once and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    cluster._Worker = Idle
    suite = load_suite("gmm-smooth").override(samples=args.chunks // CELLS * SIZE, batch=SIZE)
    suite = suite.model_copy(update={"sampling": suite.sampling.model_copy(update={"chunk": SIZE})})
    request = Request(
        suite=suite, methods=("ddim",), nfe=(1, 2, 3, 4), guidance=(1.0,), seeds=(0,), metrics=("fd@identity",)
    )
    executor, watched = RayExecutor(args.workers), Watched()
    executor.environment()
    with tempfile.TemporaryDirectory() as folder:
        cpu = time.process_time()
        started = time.perf_counter()
        records = runner.run(request, Path(folder) / "run", lambda: executor, watched)
        seconds = time.perf_counter() - started
        cpu = time.process_time() - cpu
    executor.shutdown()
    assert all(record.status == "ok" for record in records)
    rate = len(watched.times) / seconds
    each = 1e3 * cpu / len(watched.times)
    print(f"{len(watched.times)} chunks in {seconds:.1f} s; the driver took {each:.2f} ms of CPU for each")
    print(
        json.dumps({"name": "driver", "value": round(rate, 1), "unit": "chunks/s", "goal": GOAL, "holds": rate >= GOAL})
    )


if __name__ == "__main__":
    main()
