"""Anonymous memory of the driver and of a worker at its peak: a run of 50,000 samples against one of 2,000.

Each size is an `evalbench run` of its own with one Ray worker; RssAnon of the driver and of the worker's process is
read from /proc every 20 ms. The features are those of the tiny extractor `fashion64`. Linux only.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL, LARGE = 2_048, 50_176  # multiples of the suite's chunk
GOAL = 64.0  # MB
EVALBENCH = Path(sys.executable).with_name("evalbench")


def anonymous_mb(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def worker_pids(driver: int) -> list[int]:
    """Processes of Ray actors below the driver."""
    parents: dict[int, int] = {}
    actors = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, facts = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(facts.rpartition(")")[2].split()[1])
        if command.startswith(b"ray::_Worker"):
            actors.append(int(folder.name))
    return [pid for pid in actors if driver in ancestors(pid, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid in parents:
        pid = parents[pid]
        found.append(pid)
    return found


def peaks(samples: int) -> tuple[float, float]:
    """Peak of the driver and of the worker, MB."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--methods",
            "ddim",
            "--nfe",
            "5",
            "--samples",
            str(samples),
            "--metrics",
            "fd@fashion64,kid@fashion64",
        ]
        command = [EVALBENCH, "run", "fashion-mixture", *options, "--workers", "1", "--out", f"{folder}/run"]
        driver = worker = 0.0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            while running.poll() is None:
                driver = max(driver, anonymous_mb(running.pid))
                worker = max([worker, *map(anonymous_mb, worker_pids(running.pid))])
                time.sleep(0.02)
        if running.returncode:
            raise SystemExit(f"the run of {samples} samples left with {running.returncode}")
    print(f"{samples:>6} samples: driver {driver:.0f} MB, worker {worker:.0f} MB")
    return driver, worker


def main() -> None:
    """Both sizes, and the larger of the two differences."""
    small, large = peaks(SMALL), peaks(LARGE)
    growth = max(b - a for a, b in zip(small, large, strict=True))
    verdict = {"value": round(growth, 1), "unit": "MB", "goal": GOAL, "holds": growth <= GOAL}
    print(json.dumps({"name": "memory", **verdict}))


if __name__ == "__main__":
    main()
