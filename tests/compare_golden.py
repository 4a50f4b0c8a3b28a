"""The comparison whose renderings are kept under tests/golden/; `python tests/compare_golden.py` writes them again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from evalbench.compare import Comparison, Effect, Verdict
from evalbench.report import verdicts

FOLDER = Path(__file__).parent / "golden"


def effect(**changes: Any) -> Effect:
    content: dict[str, Any] = {
        "metric": "fd@fashion64",
        "unit": "squared feature units",
        "higher_is_better": False,
        "statistic": "half-split extrapolated paired difference",
        "base": 4.4,
        "new": 4.41,
        "difference": 0.01,
        "se": 0.02,
        "n": 2048,
        "tolerance": 0.1,
    }
    return Effect(**(content | changes))


def verdict(word: Any, found: Effect | None = None, **changes: Any) -> Verdict:
    content: dict[str, Any] = {
        "suite": "fashion-mixture",
        "suite_version": 1,
        "base_method": "unipc",
        "method": "unipc",
        "nfe": 10,
        "guidance": 1.0,
        "seed": 0,
        "metric": "fd@fashion64",
        "word": word,
        "effect": found,
        "detectable": found.detectable(4) if found else None,
    }
    return Verdict(**(content | changes))


def comparison() -> Comparison:
    """Every word once, with what Markdown and XML need escaped."""
    share = effect(metric="accuracy@fashion-classifier", unit="fraction", higher_is_better=True, base=0.88, new=0.87)
    open_ = effect(new=4.5, difference=0.09, se=0.03)
    latency = effect(
        metric="latency@64",
        unit="ms per call",
        statistic="ratio of process medians, hierarchical bootstrap",
        base=41.2,
        new=52.8,
        difference=math.log(52.8 / 41.2),
        se=0.02,
        n=5,
        df=4.0,
        tolerance=math.log1p(0.05),
        relative=True,
    )
    return Comparison(
        base="results/baselines/fashion",
        new="results/runs/a|b",
        verdicts=(
            verdict("indistinguishable", effect(), descriptive=(share,)),
            verdict("worse", effect(new=9.0, difference=4.5, se=0.4), nfe=5, notes=("other fingerprint class",)),
            verdict("better", effect(new=3.0, difference=-1.4, se=0.3), base_method="ddim", nfe=20),
            verdict("undecided", open_, seed=1, samples_to_decide=open_.samples_to_decide(4)),
            verdict("worse", latency, metric="latency@64", notes=("not timed together",)),
            verdict("not comparable", seed=2, reason="error row in NEW: <x> & \x1b[31m|y|"),
            verdict("not comparable", seed=3, reason="unsupported row in BASE: needs split", gates=False),
        ),
        only_new=("fashion-mixture: my_*method*, NFE 5, guidance 1, seed 0",),
    )


def renderings() -> dict[str, str]:
    """File name -> content."""
    found = comparison()
    return {
        "compare.md": verdicts.to_markdown(found),
        "compare.json": verdicts.to_json(found),
        "compare.xml": verdicts.to_junit(found),
    }


if __name__ == "__main__":
    for name, content in renderings().items():
        (FOLDER / name).write_text(content, encoding="utf-8", newline="\n")
