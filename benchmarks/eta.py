"""How right the progress bar is: the quickstart's estimate against the time it really took.

From one quarter of the run on, each time a chunk lands, the estimated rest is held against the true rest (rests under
two seconds are left out: they are one chunk). Prints the worst factor. Takes as long as `evalbench quickstart`.

    python benchmarks/eta.py [--serial]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console

from evalbench import api, runner
from evalbench.progress import ProgressBar

GOAL = 1.5


class Watched(ProgressBar):
    """The real progress bar, which notes what it says."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.said: list[tuple[float, float]] = []  # (clock, estimated seconds left)

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        super().landed(phase, forwards, samples, seconds)
        if self.eta is not None:
            self.said.append((time.perf_counter(), self.eta))


def main() -> None:
    """Run the quickstart into a fresh folder and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serial", action="store_true")
    serial = parser.parse_args().serial
    request = api.make_request("fashion-mixture", measure=("quality", "latency"))
    executors = []

    def executor() -> runner.Executor:
        executors.append(api.Placement(serial=serial).executor())
        return executors[0]

    with tempfile.TemporaryDirectory() as folder, Watched() as bar:
        started = time.perf_counter()
        runner.run(request, Path(folder) / "run", executor, bar)
        ended = time.perf_counter()
    for one in executors:
        one.shutdown()
    quarter = started + (ended - started) / 4
    factors = [
        (max(eta, true) / max(min(eta, true), 1e-9), clock - started, eta, true)
        for clock, eta in bar.said
        if clock >= quarter and (true := ended - clock) >= 2.0
    ]
    worst, clock, eta, true = max(factors)
    print(f"run {ended - started:.1f} s; worst at {clock:.1f} s: said {eta:.1f} s, took {true:.1f} s")
    verdict = {"value": round(worst, 2), "unit": "factor", "goal": f"<= {GOAL}", "holds": worst <= GOAL}
    print(json.dumps({"name": "eta", **verdict}))


if __name__ == "__main__":
    main()
