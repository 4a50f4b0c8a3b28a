"""Does NFE matter on the embedded networks? DDIM at 5 evaluations against 50, in standard errors of the difference.

Paired samples, each distance without its bias (what verdicts use). Reads run folders with their chunks:

    evalbench run SUITE --methods ddim --nfe 5,50 --out results/runs/SUITE        (for each suite)
    python benchmarks/nfe_matters.py results/runs/fashion-dit results/runs/fashion-sd ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evalbench.compare.pairs import Pairs
from evalbench.spec import Record
from evalbench.store import Store

GOAL = 5.0
METRIC = "fd@fashion64"  # the suites' primary
LEAST, MOST = 5, 50


def ddim(store: Store, nfe: int) -> Record:
    """The quality record of DDIM at a budget.

    Raises:
        SystemExit: there is none.
    """
    for record in store.records():
        if (record.kind, record.status, record.cell.method, record.cell.nfe) == ("quality", "ok", "ddim", nfe):
            return record
    raise SystemExit(f"{store.folder} holds no ddim at NFE {nfe}; run the first line of --help")


def main() -> None:
    """Print the difference per suite; the value is the smallest in standard errors."""
    folders = [Path(text) for text in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    least = []
    for folder in folders:
        store = Store(folder)
        few, many = ddim(store, LEAST), ddim(store, MOST)
        found = Pairs(store).difference(few, many, METRIC)
        if found is None:
            raise SystemExit(f"{folder}: {METRIC} cannot be paired; are the chunks there?")
        least.append(found.value / found.se)
        print(
            f"{few.cell.suite}: {METRIC} {few.metrics[METRIC].value:.1f} at {LEAST} and "
            f"{many.metrics[METRIC].value:.1f} at {MOST} NFE; difference {found.value:.2f} (se {found.se:.2f}), "
            f"{least[-1]:.1f} standard errors"
        )
    value = min(least)
    print(
        json.dumps({"name": "nfe-matters", "value": round(value, 1), "unit": "se", "goal": GOAL, "holds": value > GOAL})
    )


if __name__ == "__main__":
    main()
