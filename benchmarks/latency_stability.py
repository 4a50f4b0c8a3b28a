"""Does the same pair get the same verdict every time? Two real methods, the protocol of latency runs, ten times.

Each time five fresh processes load the model, warm up until steady and time both methods in interleaved rounds; the
ratio of their medians has a hierarchical bootstrap interval, and the interval a verdict. Value: (largest - smallest) /
median of the ten ratios; it holds when that is below the goal and the verdicts are all the same.

    python benchmarks/latency_stability.py [--times 10]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from evalbench.cost.latency import Steady
from evalbench.cost.ratio import median_ratio, verdict
from evalbench.runner import make_cell
from evalbench.spec import Failure, load_suite
from evalbench.timing import Effort, LatencyJob, LatencyResult, run_latency

GOAL = 0.05
SUITE = "gmm-smooth"
ARMS = (("dpm-solver++", 6), ("ddim", 10))
BATCH = 64  # calls of some milliseconds: on a busy machine most of them fit between two interruptions
EFFORT = Effort(rounds=40, seconds=0.0, batches=(BATCH,), steady=Steady(window=8, most=40), kept=2)


def main() -> None:
    """Measure the pair again and again; print every verdict, then how far the ratios spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    suite = load_suite(SUITE)
    cells = tuple(make_cell(suite, method, nfe, suite.sampling.guidance, 0) for method, nfe in ARMS)
    verdicts, ratios, doubts, started = [], [], set[str](), time.perf_counter()
    for i in range(times):
        *_, result = run_latency(LatencyJob(suite, cells, EFFORT))
        assert isinstance(result, LatencyResult)
        timed = []
        for cell in cells:
            outcome = result.outcomes[cell.id]
            assert not isinstance(outcome, Failure), outcome
            timed.append(outcome[0])
        a, b = (np.array(one.seconds) for one in timed)
        ratio = median_ratio(a, b)
        assert ratio.interval is not None
        verdicts.append(verdict(ratio))
        ratios.append(ratio.value)
        doubts |= {one.doubt for one in timed if one.doubt}
        interval = f"({ratio.interval.low:.3f} to {ratio.interval.high:.3f})"
        flags = "; ".join(timed[0].flags) or "no flags"
        print(f"{i + 1:>2}: {ratio.value:.4f} {interval} {verdicts[-1]}; {flags}", flush=True)
    first, second = (f"{method} at NFE {nfe}" for method, nfe in ARMS)
    print(f"{first} over {second}, {a[0].size} calls in each of {len(a)} processes")
    answers = "; ".join(sorted(doubts)) or "the same when computed again"
    print(f"answers: {answers}; {time.perf_counter() - started:.0f} s in all")
    spread = (max(ratios) - min(ratios)) / float(np.median(ratios))
    holds = spread < GOAL and len(set(verdicts)) == 1 and not doubts
    result_line = {"value": round(spread, 4), "unit": "relative spread of the ratio", "goal": f"< {GOAL}"}
    print(json.dumps({"name": "latency_stability", **result_line, "holds": holds, "verdicts": sorted(set(verdicts))}))


if __name__ == "__main__":
    main()
