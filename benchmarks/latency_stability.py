"""Does the same pair get the same verdict every time? Two real methods, the whole protocol, ten times.

Each time five fresh processes load the model, warm up until steady and time both methods in interleaved rounds; the
ratio of their medians has a hierarchical bootstrap interval, and the interval a verdict. Value: (largest - smallest) /
median of the ten ratios; it holds when that is below the goal and the verdicts are all the same.

    python benchmarks/latency_stability.py [--times 10]
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
from evalbench.cost.bench import Bench, Rules, Stand
from evalbench.cost.breakdown import Stopwatch
from evalbench.cost.clock import clock_for
from evalbench.cost.honesty import TOLERANCE
from evalbench.cost.latency import Steady
from evalbench.cost.ledger import Ledger
from evalbench.cost.measured import collect, failures
from evalbench.cost.nvml import open_gpu
from evalbench.cost.processes import recheck_answers, sittings
from evalbench.cost.ratio import median_ratio, verdict
from evalbench.spec import Cell, load_suite

GOAL = 0.05
SUITE = "gmm-smooth"
ARMS = {"dpm-solver++, NFE 8": ("dpm-solver++", 8), "ddim, NFE 10": ("ddim", 10)}
BATCH = 64  # calls of some milliseconds: on a busy machine most of them fit between two interruptions
RULES = Rules(rounds=40, samples=2, steady=Steady(window=8, most=40), kept=2, metered=0)


@dataclass(frozen=True)
class SuiteBench(Bench):
    """Methods on a suite's model."""

    cells: Mapping[str, Cell]
    batches: tuple[int, ...] = (BATCH,)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.cells)

    def build(self) -> Stand:
        return SuiteStand(self.cells)


class SuiteStand(Stand):
    """The suite's model and the chains, loaded."""

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self.cells = cells
        self.setup = sampling.setup_of(load_suite(SUITE), {})
        self.device = self.setup.device
        self.clock, self.gpu = clock_for(self.device), open_gpu(self.device)
        self.chains = {arm: registry.build_method(cell.method) for arm, cell in cells.items()}

    def call(self, arm: str, indices: Sequence[int]) -> Callable[[], torch.Tensor]:
        suite, cell = self.setup.suite, self.cells[arm]
        cond = sampling.conditions(suite, self.setup.model, indices, self.device)

        def run() -> torch.Tensor:
            ledger = Ledger(len(indices), budget=cell.nfe)
            return sampling.sample(self.setup, self.chains[arm], cell, indices, cond, ledger)

        return run

    def witness(self, arm: str, indices: Sequence[int]) -> np.ndarray:
        batch = self.setup.suite.sampling.batch
        self.chains[arm] = registry.build_method(self.cells[arm].method)
        rows = []
        for first in range(0, len(indices), batch):
            wanted = [*indices[first : first + batch]]
            padded = [*wanted, *[indices[0]] * (batch - len(wanted))]
            rows.append(self.call(arm, padded)()[: len(wanted)].cpu().numpy())
        return np.concatenate(rows)

    def meter(self, stopwatch: Stopwatch | None) -> None:
        pass


def main() -> None:
    """Measure the pair again and again; print every verdict, then how far the ratios spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    from evalbench.runner import make_cell  # here, or every timed process imports it too

    suite = load_suite(SUITE)
    cells = {arm: make_cell(suite, method, nfe, suite.sampling.guidance, 0) for arm, (method, nfe) in ARMS.items()}
    bench, verdicts, ratios, started = SuiteBench(cells), [], [], time.perf_counter()
    for i in range(times):
        found = list(sittings(bench, RULES))
        assert not failures(found), failures(found)
        arms = collect(found)
        a, b = (arms[arm, BATCH] for arm in ARMS)
        ratio = median_ratio(a.seconds, b.seconds)
        verdicts.append(verdict(ratio))
        ratios.append(ratio.value)
        assert ratio.interval is not None
        interval = f"({ratio.interval.low:.3f} to {ratio.interval.high:.3f})"
        print(
            f"{i + 1:>2}: {ratio.value:.4f} {interval} {verdicts[-1]}; {'; '.join(a.flags) or 'no flags'}", flush=True
        )
    doubts = recheck_answers(bench, found, TOLERANCE[suite.sampling.dtype])
    first, second = ARMS
    print(f"{first} over {second}, {a.seconds.size // len(a.seconds)} calls in each of {len(a.seconds)} processes")
    print(f"answers: {doubts or 'the same when computed again'}; {time.perf_counter() - started:.0f} s in all")
    spread = (max(ratios) - min(ratios)) / float(np.median(ratios))
    holds = spread < GOAL and len(set(verdicts)) == 1 and not doubts
    result = {"value": round(spread, 4), "unit": "relative spread of the ratio", "goal": f"< {GOAL}", "holds": holds}
    print(json.dumps({"name": "latency_stability", **result, "verdicts": sorted(set(verdicts))}))


if __name__ == "__main__":
    main()
