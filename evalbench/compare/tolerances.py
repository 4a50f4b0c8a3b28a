"""Which differences do not matter: what the user says, and the default of each metric (docs/compare.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from evalbench.compare.latency import LATENCY
from evalbench.errors import UserError, unknown
from evalbench.spec import Floor, MetricValue, Suite

RELATIVE = 0.02  # of the base value: the default tolerance of what has no other
ABSOLUTE: Mapping[str, float] = {"accuracy": 0.01, "align": 0.005}  # default tolerances in the metric's own unit


def default_tolerance(metric: str, base: MetricValue, suite: Suite) -> float:
    """The tolerance of a metric that the user gave none for; the table in docs/compare.md.

    `accuracy` 0.01, `align` 0.005; the others 2 % of the base value without its estimated bias, and for set distances
    at least the standard deviation of what a perfect sampler scores, at the N nearest to this one that the suite lists.
    """
    name = metric.partition("@")[0]
    if name in ABSOLUTE:
        return ABSOLUTE[name]
    relative = RELATIVE * abs(base.value - (base.bias or 0.0))
    floors = [(abs(math.log(f.samples / base.n)), f.sd) for f in suite.floors if f.metric == metric and _is_floor(f)]
    return max(relative, min(floors)[1] or 0.0) if floors else relative


def _is_floor(floor: Floor) -> bool:
    return floor.what == "floor" and floor.sd is not None


def parse_tolerances(text: str | None) -> dict[str, float]:
    """`fd@fashion64=0.2,kid@fashion64=1` as numbers by metric id.

    Raises:
        UserError: not of that form.
    """
    found: dict[str, float] = {}
    for entry in (text or "").split(",") if text else []:
        metric, equals, number = (part.strip() for part in entry.partition("="))
        try:
            found[metric] = float(number)
        except ValueError:
            equals = ""
        if not metric or not equals:
            raise UserError(f"--tolerance '{entry}': write METRIC=NUMBER, such as fd@fashion64=0.2")
    return found


def check_tolerances(tolerances: Mapping[str, float], suites: Iterable[Suite]) -> None:
    """Whether tolerances name metrics of the suites and are numbers of 0 or more.

    Raises:
        UserError: they do not.
    """
    known = {name for suite in suites for name in (*suite.metrics.names, *suite.metrics.optional)} | {LATENCY}
    for name, value in tolerances.items():
        if name not in known:
            raise unknown("metric", name, known, where="--tolerance")
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--tolerance {name}={value}: a tolerance is a number of 0 or more")
