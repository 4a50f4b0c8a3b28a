"""What the harness adds: a `--serial` run over a bare loop of the same forwards and features.

Both use one thread, the same model and feature networks, loaded and warm before the clock starts; they alternate,
and the ratio is that of the medians. The run covers everything after start-up: planning, noise, sampling, features,
checks, chunks on disk, metrics, records. (Warm includes the reference's own kernel mean, which KID needs once a
process.)

    python benchmarks/overhead.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from evalbench import registry, runner, sampling
from evalbench.interfaces import SampleBatch
from evalbench.metrics.images import to_uint8
from evalbench.noise import NoiseSource
from evalbench.paths import grid
from evalbench.predictions import convert
from evalbench.runner import Request, SerialExecutor
from evalbench.spec import load_suite

GOAL = 1.10
ROUNDS = 5
NFE = 10
SAMPLES = 2048
METRICS = ("fd@fashion64", "kid@fashion64", "accuracy@fashion-classifier", "align@tiny-fashion")
PARTS = ("fashion64", "fashion-classifier", "tiny-fashion")


def harness(suite_name: str) -> float:
    """Seconds of a serial run of DDIM into an empty folder."""
    suite = load_suite(suite_name).override(samples=SAMPLES)
    request = Request(suite=suite, methods=("ddim",), nfe=(NFE,), guidance=(1.0,), seeds=(0,), metrics=METRICS)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        runner.run(request, Path(folder) / "run", SerialExecutor)
        return time.perf_counter() - started


def bare(suite_name: str) -> float:
    """Seconds of what a researcher would write by hand: DDIM by its formula, then the features."""
    suite = load_suite(suite_name)
    setup = sampling.setup_of(suite.override(samples=SAMPLES), {})
    model, path, batch = setup.model, setup.path, suite.sampling.batch
    extractors = [registry.build_extractor(name) for name in PARTS]
    times = grid(path, suite.sampling.grid, NFE)
    started = time.perf_counter()
    with torch.no_grad():
        for first in range(0, SAMPLES, batch):
            indices = range(first, first + batch)
            cond = sampling.conditions(suite, model, indices, setup.device)
            x = NoiseSource(0, indices, model.shape).start() * float(path.sigma(path.t_start))
            for s, t in pairwise(times):
                out = model.predict(x, s, float(path.alpha(s)), float(path.sigma(s)), cond.labels)
                eps = convert(out, x, path, s, model.native, "eps")
                ratio = float(path.alpha(t) / path.alpha(s))
                x = ratio * x + float(path.sigma(t) - ratio * path.sigma(s)) * eps
            samples = SampleBatch(x, to_uint8(x), cond, model)
            for extract in extractors:
                extract(samples)
    return time.perf_counter() - started


def main() -> None:
    """Alternate the two, print the ratio of their medians."""
    suite = "fashion-mixture"
    harness(suite)
    bare(suite)
    seconds = [(harness(suite), bare(suite)) for _ in range(ROUNDS)]
    with_harness, without = (statistics.median(column) for column in zip(*seconds, strict=True))
    for one, other in seconds:
        print(f"harness {one:.2f} s   bare loop {other:.2f} s")
    ratio = with_harness / without
    verdict = {"value": round(ratio, 3), "unit": "ratio", "goal": f"<= {GOAL}", "holds": ratio <= GOAL}
    print(json.dumps({"name": "overhead", **verdict}))


if __name__ == "__main__":
    main()
