"""Verdicts on timed cells: the ratio of the medians of two arms against a margin, processes as the unit of resampling.

The logarithm of the ratio is the difference; its standard error is that of the hierarchical bootstrap over processes,
rounds and samples (cost/ratio.py), with one degree of freedom less than the arm with fewer processes has. Two run
folders were timed at different times: processes are drawn apart, and what changed on the machine in between counts as
a difference. Cells of one folder that were timed together (one session) are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from evalbench.compare.runs import Key, NotComparable, Run, key_of
from evalbench.compare.words import Effect, Verdict
from evalbench.cost.ratio import MARGIN, MIN_PROCESSES, median_ratio
from evalbench.spec import Latency, Record

LATENCY = "latency"  # what `--tolerance latency=0.05` names: a relative margin
# What makes two timings of one cell incomparable: facts of `Latency` by name, in the words of a reason.
_SAME: Mapping[str, str] = {
    "device": "hardware",
    "variant": "execution",
    "clock": "clock",
    "threads": "threads",
    "embedded": "kind of model",
}


class TimedKey(NamedTuple):
    """What makes two timings partners."""

    key: Key
    variant: str
    batch: int


class Timed(NamedTuple):
    """A latency record and one of its timings; None where it failed."""

    record: Record
    latency: Latency | None


def timed_cells(run: Run, method: str | None) -> dict[TimedKey, Timed]:
    """Timings of a run by key; a record without any stands under batch 0."""
    found: dict[TimedKey, Timed] = {}
    for record in run.records:
        if record.kind != "latency" or method not in (None, record.cell.method):
            continue
        key = key_of(record.cell)
        key = key if method is None else key._replace(method="")
        for latency in record.latency or (None,):
            found[TimedKey(key, record.variant, latency.batch if latency else 0)] = Timed(record, latency)
    return found


def latency_verdicts(
    runs: tuple[Run, Run], methods: tuple[str | None, str | None], tolerances: Mapping[str, float]
) -> list[Verdict]:
    """One verdict, its word still open, per timed cell of BASE; none where nothing was timed in both."""
    olds, news = (timed_cells(run, method) for run, method in zip(runs, methods, strict=True))
    if not olds.keys() & news.keys():
        return []
    margin = tolerances.get(LATENCY, MARGIN)
    return [_verdict(key, olds[key], news.get(key), margin) for key in sorted(olds)]


def _verdict(key: TimedKey, old: Timed, new: Timed | None, margin: float) -> Verdict:
    cell = old.record.cell
    variant = f":{key.variant}" if key.variant else ""
    facts: dict[str, Any] = {
        "suite": cell.suite,
        "suite_version": cell.suite_version,
        "base_method": cell.method,
        "method": new.record.cell.method if new else cell.method,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "metric": f"{LATENCY}@{key.batch}{variant}",
    }
    try:
        if new is None:
            raise NotComparable("not timed in NEW")
        effect = latency_effect(facts["metric"], *_comparable(old, new), margin)
        return Verdict(**facts, word="undecided", effect=effect, notes=_notes(old, new))
    except NotComparable as error:
        return Verdict(**facts, word="not comparable", reason=str(error), gates=old.latency is not None)


def _comparable(old: Timed, new: Timed) -> tuple[Latency, Latency]:
    """Both timings; raises NotComparable with the first reason against them."""
    for side, timed in (("BASE", old), ("NEW", new)):
        if timed.latency is None:
            failure = timed.record.failure
            raise NotComparable(f"{timed.record.status} row in {side}: {failure.message if failure else 'not timed'}")
        if timed.latency.doubt:
            raise NotComparable(f"timed outputs are not those of the quality run in {side}: {timed.latency.doubt}")
    a, b = old.record.cell, new.record.cell
    if a.suite_version != b.suite_version:
        raise NotComparable(f"suite version differs: {a.suite_version} in BASE, {b.suite_version} in NEW")
    if a.method == b.method and a.settings != b.settings:
        raise NotComparable("method version or settings differ under one text; name both methods to compare them")
    if a.generation != b.generation:
        raise NotComparable("generation facts differ")
    assert old.latency is not None
    assert new.latency is not None
    for name, word in _SAME.items():
        x, y = getattr(old.latency, name), getattr(new.latency, name)
        if x != y:
            raise NotComparable(f"{word} differs: {x} in BASE, {y} in NEW")
    few = min(len(old.latency.seconds), len(new.latency.seconds))
    if few < MIN_PROCESSES:
        raise NotComparable(
            f"timed in {few} fresh process{'' if few == 1 else 'es'}: a verdict takes {MIN_PROCESSES} (--processes)"
        )
    return old.latency, new.latency


def latency_effect(metric: str, old: Latency, new: Latency, margin: float = MARGIN) -> Effect:
    """The logarithm of the ratio of medians, new over old; both have `MIN_PROCESSES` or more."""
    arms = [np.array(one.seconds) for one in (new, old)]
    together = bool(old.session) and old.session == new.session and arms[0].shape[:2] == arms[1].shape[:2]
    found = median_ratio(arms[0], arms[1], paired=together)
    assert found.spread is not None
    return Effect(
        metric=metric,
        unit="ms per call",
        higher_is_better=False,
        statistic="ratio of process medians, hierarchical bootstrap",
        base=1e3 * float(np.median(arms[1])),
        new=1e3 * float(np.median(arms[0])),
        difference=math.log(found.value),
        se=found.spread,
        n=found.processes,
        df=found.processes - 1,
        tolerance=math.log1p(margin),
        relative=True,
    )


def _notes(old: Timed, new: Timed) -> tuple[str, ...]:
    assert old.latency is not None
    assert new.latency is not None
    notes = [] if old.latency.session == new.latency.session else ["not timed together"]
    notes += [f"flagged: {flag}" for flag in dict.fromkeys((*old.latency.flags, *new.latency.flags))]
    if old.record.environment.get("class") != new.record.environment.get("class"):
        notes.append("other fingerprint class")
    if old.latency.embedded:
        notes.append("protocol check: one of evalbench's own small models")
    return tuple(notes)
