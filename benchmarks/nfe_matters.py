"""Does NFE matter on the embedded networks? DDIM at 5 evaluations against 50, in standard errors of the difference.

By the error to the fine solution from the same noise, which is the value, and by the distance to the data, without its
bias: paired samples, as in verdicts. A rectified flow is made to need few steps: there the distance hardly falls.

Runs the cells first, unless run folders with their chunks are given:

    python benchmarks/nfe_matters.py [RUN...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import evalbench
from evalbench.compare.pairs import Pairs
from evalbench.spec import Record
from evalbench.store import Store

GOAL = 5.0
METRIC = "fd@fashion64"  # the suites' primary
PAIRED = "paired-rms@pixels"  # error to the fine solution from the same noise: of the solver alone
LEAST, MOST = 5, 50
SUITES = ("fashion-dit", "fashion-sd", "fashion-flow", "fashion-flow-2rf")


def ddim(store: Store, nfe: int) -> Record:
    """The quality record of DDIM at a budget.

    Raises:
        SystemExit: there is none.
    """
    for record in store.records():
        if (record.kind, record.status, record.cell.method, record.cell.nfe) == ("quality", "ok", "ddim", nfe):
            return record
    raise SystemExit(f"{store.folder} holds no ddim at NFE {nfe}; give a folder that does")


def measured(suite: str) -> Path:
    """A run folder with both cells of a suite; what is there is not computed again."""
    folder = Path("results/runs/nfe-matters") / suite
    evalbench.run(suite, folder, methods=["ddim"], nfe=[LEAST, MOST])
    return folder


def main() -> None:
    """Print the differences per suite, and the smallest."""
    folders = [Path(text) for text in sys.argv[1:]] or [measured(suite) for suite in SUITES]
    least: dict[str, float] = {}
    for folder in folders:
        store = Store(folder)
        few, many = ddim(store, LEAST), ddim(store, MOST)
        for metric in (PAIRED, METRIC):
            found = Pairs(store).difference(few, many, metric)
            if found is None:
                raise SystemExit(f"{folder}: {metric} cannot be paired; are the chunks there?")
            ratio = found.value / found.se
            least[metric] = min(ratio, least.get(metric, ratio))
            values = " and ".join(f"{one.metrics[metric].value:.4g} at {one.cell.nfe}" for one in (few, many))
            print(f"{few.cell.suite}: {metric} {values} NFE, {found.value:.3g} (se {found.se:.2g}): {ratio:.1f} se")
    verdict = {"value": round(least[PAIRED], 1), "unit": "se", "goal": GOAL, "holds": least[PAIRED] > GOAL}
    print(json.dumps({"name": "nfe-matters", METRIC: round(least[METRIC], 1), **verdict}))


if __name__ == "__main__":
    main()
