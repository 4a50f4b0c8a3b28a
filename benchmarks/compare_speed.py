"""10,000 records compared: seconds and peak memory of one `evalbench compare`, all renderings written.

Two runs of 5,000 cells (50 methods x 100 seeds) of an image suite whose primary is a per-sample score, one chunk of 256
samples per cell with its score and its first images; every second cell of the new run has other scores. The time of a
suite whose primary is a Frechet distance is that of its eigenvalues instead (0.02 s per cell at d = 64).

    python benchmarks/compare_speed.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evalbench.spec import Cell, Chunk, MetricValue, Record, Suite, content_id, load_suite
from evalbench.store import open_run

CELLS, SAMPLES = 5_000, 256
SECONDS, MEGABYTES = 20.0, 500.0
METRIC, SCORE = "accuracy@fashion-classifier", "fashion-classifier"


def make_suite() -> Suite:
    """The embedded image suite with a per-sample score as its primary."""
    suite = load_suite("fashion-mixture").override(samples=SAMPLES, chunk=SAMPLES)
    return suite.model_copy(
        update={"metrics": suite.metrics.model_copy(update={"primary": METRIC, "names": (METRIC,)})}
    )


def write_run(folder: Path, suite: Suite, shift: float) -> None:
    """A run of as many cells; half of them shifted."""
    facts = {"generation": suite.generation(), "samples": SAMPLES, "guidance": 1.0, "features": {SCORE: "f" * 16}}
    protocol = content_id(facts)
    with open_run(folder, suite, {}) as store, (folder / "records.jsonl").open("w") as lines:
        for k in range(CELLS):
            cell = Cell(
                suite=suite.name,
                suite_version=suite.version,
                generation="g" * 16,
                method=f"ddim(eta={k // 100 / 100:g})",
                settings=content_id(k // 100),
                nfe=10,
                seed=k % 100,
            )
            rng = np.random.default_rng(k)
            scores = rng.random(SAMPLES) + shift * (k % 2)
            images = np.zeros((0, 1, 28, 28), np.uint8)
            store.write_chunk(Chunk(cell.id, 0, SAMPLES), {SCORE: scores, "images": images}, {"features": {}})
            mean = float(scores.mean())
            value = MetricValue(value=mean, n=SAMPLES, higher_is_better=True)
            made = Record(
                kind="quality",
                status="ok",
                cell=cell,
                samples=SAMPLES,
                protocol=protocol,
                protocol_facts=facts,
                metrics={METRIC: value},
                environment={"class": "c" * 16, "torch": "2", "device": "cpu"},
            )
            lines.write(made.to_json() + "\n")


def main() -> None:
    """Write both runs, compare them in a process of its own."""
    suite = make_suite()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, shift in (("base", 0.0), ("new", -0.5)):
            write_run(folder / name, suite, shift)
        files = ["--junit", str(folder / "x.xml"), "--json", str(folder / "x.json"), "--format", "md"]
        code = "from evalbench.cli import main; main()"
        command = [sys.executable, "-c", code, "compare", str(folder / "base"), str(folder / "new"), *files]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        counts = json.loads((folder / "x.json").read_text())["counts"]
    megabytes = usage.ru_maxrss / 1024
    print(f"exit {os.waitstatus_to_exitcode(status)}, {counts}, {megabytes:.0f} MB at the peak")
    right = counts["worse"] == CELLS // 2 and os.waitstatus_to_exitcode(status) == 1
    holds = right and seconds < SECONDS and megabytes < MEGABYTES
    verdict = {"value": round(seconds, 1), "unit": "s for 10,000 records", "goal": f"< {SECONDS:g}, < {MEGABYTES:g} MB"}
    print(json.dumps({"name": "compare-speed", **verdict, "holds": holds}))


if __name__ == "__main__":
    main()
