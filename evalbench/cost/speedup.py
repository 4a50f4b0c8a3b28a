"""Speed-up at matched quality: how much longer the cheapest training-free solver takes that is no worse.

For a method at one budget, the baseline is the cheapest point on the lower-left envelope of all training-free solvers
on the same model that is no worse than it, within a margin, on every gating metric. Only points that were measured
count: nothing is interpolated or extrapolated. Where that baseline or the ratio of the two latencies is not certain,
there is no speed-up to report, and the reason stands in its place.

Pure: points in, sentences and rows out. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from evalbench.cost.ratio import MIN_PROCESSES, Ratio, median_ratio
from evalbench.stats import Interval

Impl: TypeAlias = Literal["reference", "optimised", "official"]
HEADING, EMBEDDED_HEADING = "Speed-up at matched quality", "Protocol check"


@dataclass(frozen=True)
class Score:
    """A gating metric of a point: value with its 95 % interval."""

    value: float
    low: float
    high: float
    higher_is_better: bool = False


@dataclass(frozen=True, eq=False)
class Point:
    """A method at one budget on one model, one device, one batch size.

    Attributes:
        method: chain text. nfe: evaluations that were spent. flops: per sample, NaN when they could not be counted.
        seconds: raw latency of whole calls, (processes, rounds, samples). scores: gating metrics by id.
        training_free: a plain solver on the unchanged network: a baseline. impl: whose implementation.
        variant: text of the run's `Variant`: compile, dtype, attention kernel.
        flags: doubts about the machine, which are shown. fault: why its timings count for nothing, such as outputs
            that are not the quality run's; empty when they count.
    """

    method: str
    nfe: float
    flops: float
    seconds: np.ndarray
    scores: Mapping[str, Score]
    training_free: bool
    impl: Impl = "reference"
    variant: str = ""
    flags: tuple[str, ...] = ()
    fault: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return float(np.median(self.seconds))

    def __str__(self) -> str:
        return f"{self.method} at NFE {self.nfe:g}"


Difference: TypeAlias = Callable[[Point, Point, str], Interval]


def apart(first: Point, second: Point, metric: str) -> Interval:
    """95 % interval of first - second on a metric, from intervals of their own: too wide where samples are paired."""
    a, b = first.scores[metric], second.scores[metric]
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    return Interval(a.value - b.value - half, a.value - b.value + half)


@dataclass(frozen=True)
class SpeedUp:
    """What can be said of a method, and the numbers side by side.

    Attributes:
        heading: `Protocol check` for an embedded model, whose timings are no claim. sentence: empty there; else
            `... times faster ...` or `no valid speed-up: ...`.
        valid: whether it is a speed-up. method, baseline: what is compared; baseline None when there is none.
        latency: ratio baseline / method. flops, nfe: the same ratio; None when missing.
    """

    heading: str
    sentence: str
    valid: bool
    method: Point
    baseline: Point | None = None
    latency: Ratio | None = None
    flops: float | None = None
    nfe: float | None = None

    def row(self) -> dict[str, str]:
        """A line of the table."""
        return {
            "method": str(self.method),
            "impl": self.method.impl,
            "variant": self.method.variant,
            "baseline": "" if self.baseline is None else str(self.baseline),
            "baseline impl": "" if self.baseline is None else self.baseline.impl,
            "latency ratio": _ratio_text(self.latency),
            "FLOP ratio": "" if self.flops is None else f"{self.flops:.2f}",
            "NFE ratio": "" if self.nfe is None else f"{self.nfe:.2f}",
        }


def _ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    interval = f" ({ratio.interval.low:.2f} to {ratio.interval.high:.2f})" if ratio.interval else ""
    return f"{ratio.value:.2f}{interval}"


def envelope(points: Sequence[Point], metrics: Sequence[str]) -> list[Point]:
    """The lower-left envelope, cheapest first: no other point is as cheap and as good on every metric.

    A point without one of the metrics is judged on those it shares with the other, so that it is never beaten unseen.
    """
    ordered = sorted(points, key=lambda point: point.median)
    return [one for one in ordered if not any(_beats(other, one, metrics) for other in ordered if other is not one)]


def _beats(one: Point, other: Point, metrics: Sequence[str]) -> bool:
    if not set(metrics) <= set(one.scores) & set(other.scores):
        return False
    pairs = [(one.median, other.median)]
    for metric in metrics:
        a, b = one.scores[metric], other.scores[metric]
        pairs.append((-a.value, -b.value) if a.higher_is_better else (a.value, b.value))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def speed_up(
    method: Point,
    points: Sequence[Point],
    margins: Mapping[str, float],
    *,
    embedded: bool,
    difference: Difference = apart,
    seed: int = 0,
) -> SpeedUp:
    """The speed-up of a method at matched quality.

    Args:
        points: everything measured on that model and device at that batch size; which of them are baselines is decided
            here. Other budgets of the same method are none.
        margins: gating metrics, and by how much a baseline may be worse on each, in the metric's unit.
        embedded: the model is one of this project's own small ones.
        difference: interval of two points' difference on a metric; pass one that knows the pairing of samples.
        seed: of the bootstrap.
    """
    try:
        baseline = _baseline(method, points, margins, difference)
    except _NoSpeedUp as reason:
        return _said(method, embedded, f"no valid speed-up: {reason}")
    ratio = median_ratio(baseline.seconds, method.seconds, paired=_paired(baseline, method), seed=seed)
    sentence, valid = _sentence(method, baseline, ratio)
    flops = baseline.flops / method.flops if method.flops else math.nan
    return SpeedUp(
        heading=EMBEDDED_HEADING if embedded else HEADING,
        sentence="" if embedded else sentence,
        valid=valid and not embedded,
        method=method,
        baseline=baseline,
        latency=ratio,
        flops=flops if math.isfinite(flops) else None,
        nfe=baseline.nfe / method.nfe if method.nfe else None,
    )


class _NoSpeedUp(Exception):
    """Why there is none."""


def _said(method: Point, embedded: bool, sentence: str) -> SpeedUp:
    return SpeedUp(EMBEDDED_HEADING if embedded else HEADING, "" if embedded else sentence, False, method)


def _paired(one: Point, other: Point) -> bool:
    return one.seconds.shape[:2] == other.seconds.shape[:2]


def _baseline(method: Point, points: Sequence[Point], margins: Mapping[str, float], difference: Difference) -> Point:
    """The cheapest training-free point that is no worse; raises _NoSpeedUp where none is certain to be."""
    if method.fault:
        raise _NoSpeedUp(method.fault)
    if not margins:
        raise _NoSpeedUp("no gating metric")
    absent = sorted(set(margins) - set(method.scores))
    if absent:
        raise _NoSpeedUp(f"{method} has no {absent[0]}")
    solvers = [p for p in points if p.training_free and p.method != method.method and not p.fault]
    if not solvers:
        raise _NoSpeedUp("no training-free solver was measured on this model")
    alike = [point for point in solvers if point.variant == method.variant]
    if not alike:
        raise _NoSpeedUp(f"no training-free solver was measured as '{method.variant}'")
    doubtful = None
    for point in envelope(alike, list(margins)):
        matched = _no_worse(point, method, margins, difference)
        if matched and doubtful:
            raise _NoSpeedUp(f"undecided whether {doubtful}, which is cheaper, is as good; more samples would decide")
        if matched:
            return point
        if matched is None and doubtful is None:
            doubtful = point
    if doubtful:
        raise _NoSpeedUp(f"undecided whether {doubtful} is as good; more samples would decide")
    raise _NoSpeedUp("no training-free solver reaches this quality at a budget that was measured")


def _no_worse(point: Point, method: Point, margins: Mapping[str, float], difference: Difference) -> bool | None:
    """Whether a baseline is no worse than the method on every metric; None is undecided."""
    verdicts: list[bool | None] = []
    for metric, margin in margins.items():
        if metric not in point.scores:
            verdicts.append(None)
            continue
        found = difference(point, method, metric)
        low, high = (found.low, found.high) if not point.scores[metric].higher_is_better else (-found.high, -found.low)
        verdicts.append(True if high <= margin else False if low > margin else None)
    if any(verdict is False for verdict in verdicts):
        return False
    return None if None in verdicts else True


def _sentence(method: Point, baseline: Point, ratio: Ratio) -> tuple[str, bool]:
    """What is said of the two latencies, and whether it is a speed-up."""
    if ratio.interval is None:
        return (
            f"no valid speed-up: {ratio.processes} fresh processes, an interval takes {MIN_PROCESSES}",
            False,
        )
    low, high = ratio.interval.low, ratio.interval.high
    flags = tuple(dict.fromkeys((*method.flags, *baseline.flags)))
    doubts = f"; flagged: {'; '.join(flags)}" if flags else ""
    against = f"{baseline} (impl {method.impl} against {baseline.impl}, {method.variant or 'default variant'}){doubts}"
    if low > 1:
        return f"{ratio.value:.2f} times faster ({low:.2f} to {high:.2f}) than {against}", True
    what = "slower than" if high < 1 else "not distinguishable from"
    return f"no valid speed-up: latency ratio {ratio.value:.2f} ({low:.2f} to {high:.2f}), {what} {against}", False
