"""records x records -> verdicts and exit codes. See docs/compare.md.

Cells are joined by their key (suite, method, NFE, guidance, seed), never by their row. A verdict is about the suite's
primary metric: the 95 % interval of the paired difference (metrics/differences.py) against a tolerance, Holm over the
cells of the gate; a timed cell is judged by the ratio of its process medians. What cannot be compared has a reason, and
a gate never passes on it in silence.

    runs         one side: records by key, rows of chunks          pairs      two records: comparable? the effect?
    tolerances   which differences do not matter                   latency    timed cells
    words        effect -> verdict, error control, exit codes      fast       the first 64 samples
    command      two folders -> verdicts
"""

from __future__ import annotations

from evalbench.compare.command import compare_command, compare_runs
from evalbench.compare.fast import FastComparison, Sameness, fast_compare
from evalbench.compare.pairs import Pairs
from evalbench.compare.tolerances import default_tolerance, parse_tolerances
from evalbench.compare.words import Comparison, Effect, Verdict, word_of

__all__ = [
    "Comparison",
    "Effect",
    "FastComparison",
    "Pairs",
    "Sameness",
    "Verdict",
    "compare_command",
    "compare_runs",
    "default_tolerance",
    "fast_compare",
    "parse_tolerances",
    "word_of",
]
