"""A plan of a million chunks: seconds and memory until the first job could be given out.

What `evalbench run` does before its first chunk, on an empty run folder: cells, chunks, what is missing, the order.

    python benchmarks/plan.py [--chunks 1000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from evalbench.failures import Policy
from evalbench.forecast import forecast
from evalbench.plan import make_plan
from evalbench.runner import Request, SerialExecutor, Silent, _Loop
from evalbench.shards import claims_of
from evalbench.spec import load_suite
from evalbench.store import open_run

SECONDS, GIGABYTES = 60.0, 1.0
CELLS = 100


def main() -> None:
    """Plan once and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    wanted = parser.parse_args().chunks
    suite = load_suite("gmm-smooth")
    suite = suite.override(samples=wanted // CELLS * suite.sampling.chunk)
    request = Request(
        suite=suite, methods=("ddim",), nfe=(5,), guidance=(1.0,), seeds=tuple(range(CELLS)), metrics=("fd@identity",)
    )
    started = time.perf_counter()
    plan = make_plan(request)
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run", suite, {}) as store:
        with claims_of(store.folder, None, Policy()) as claims:
            loop = _Loop(plan, store, SerialExecutor, Silent(), claims)
            loop.announce()
            first = next(loop._jobs())
        took = time.perf_counter() - started
        found = forecast(plan, store.folder, None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{found.chunks:,} chunks of {len(plan.cells)} cells; first job: {first}; {took:.1f} s, {peak:.2f} GB at most"
    )
    holds = took < SECONDS and peak < GIGABYTES
    print(json.dumps({"name": "plan", "value": round(took, 1), "unit": "s", "goal": SECONDS, "holds": holds}))


if __name__ == "__main__":
    main()
