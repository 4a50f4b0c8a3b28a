"""Time per evaluation: the robust line through the medians over the NFE grid, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evalbench.stats import Interval, line_fit


@dataclass(frozen=True)
class TimePerEvaluation:
    """seconds of a call = intercept + slope NFE (Theil-Sen; see `evalbench.stats.line_fit`).

    Attributes:
        slope: seconds per evaluation of the field, for a whole batch; its 95 % interval is `slope_interval` (Sen 1968),
            which says something from five budgets on.
        intercept: seconds of a call that no evaluation explains: noise, decoding, rounding.
        r2: share of the variance of the medians that the line explains.
        budgets: the NFE it goes through.
    """

    slope: float
    slope_interval: Interval
    intercept: float
    r2: float
    budgets: tuple[float, ...]


def time_per_evaluation(seconds: Mapping[float, np.ndarray]) -> TimePerEvaluation:
    """The line of one method at one batch size.

    Args:
        seconds: raw seconds of whole calls, in any shape, by the evaluations that were spent (not the budget).

    Raises:
        ValueError: fewer than two different NFE, or timings that are not finite.
    """
    budgets = sorted(seconds)
    medians = [float(np.median(seconds[nfe])) for nfe in budgets]
    line = line_fit(np.array(budgets, dtype=float), np.array(medians))
    return TimePerEvaluation(
        line.slope, Interval(line.slope_low, line.slope_high), line.intercept, line.r2, tuple(budgets)
    )
