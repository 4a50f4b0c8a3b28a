"""What scoring more images costs in memory: anonymous memory at its peak, 50,000 images against 2,000.

Each size runs in a process of its own, which watches RssAnon of /proc/self/status while it scores an uncompressed npz
of random 32 x 32 images with `fd` and `kid` of the tiny extractor `fashion64`. Linux only.

    python benchmarks/score_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

SMALL, LARGE = 2_000, 50_000
GOAL = 150  # MB


def write_npz(file: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    np.savez(file, arr_0=rng.integers(0, 256, (count, 32, 32, 1), dtype=np.uint8))


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no RssAnon in /proc/self/status")


def score(file: str) -> None:
    """Score and print the peak, sampled every 5 ms."""
    from evalbench.models.references import make
    from evalbench.score import score_images

    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    reference = make.FOLDER / "fashion-mixture-draws.fashion64.safetensors"
    result = score_images(file, reference=reference, metrics=["fd@fashion64", "kid@fashion64"])
    done.set()
    watcher.join()
    print(json.dumps({"n": result.n, "peak": peak[0]}))


def measured(count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npz"
        write_npz(file, count)
        command = [sys.executable, __file__, "--score", str(file)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["n"] == count
    print(f"{count:>6} images: peak RssAnon {found['peak']:.0f} MB")
    return float(found["peak"])


def main() -> None:
    if sys.argv[1:2] == ["--score"]:
        score(sys.argv[2])
        return
    small, large = measured(SMALL), measured(LARGE)
    verdict = {"value": round(large - small, 1), "unit": "MB", "goal": f"<= {GOAL}", "holds": large - small <= GOAL}
    print(json.dumps({"name": "score-memory", **verdict}))


if __name__ == "__main__":
    main()
