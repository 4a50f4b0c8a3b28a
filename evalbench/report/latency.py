"""The latency section of a report: timings with their doubts, time per evaluation, the split, speed-ups, break-even."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evalbench.cost.ratio import MIN_PROCESSES
from evalbench.cost.speedup import EMBEDDED_HEADING, HEADING, Point, Score, SpeedUp, speed_up
from evalbench.report.figures import hardware, places
from evalbench.report.frames import PARTS
from evalbench.report.tables import Shown, Table
from evalbench.report.text import MISSING, number, significant
from evalbench.report.view import MARKS, Block, Row
from evalbench.spec import Latency

MARGIN = 0.02  # of the method's value: by how much a baseline may be worse
_WHOLE = ("nfe", "guidance", "seed", "batch", "timings", "points")


@dataclass(frozen=True)
class Noted:
    """A table and what must be read with it."""

    table: Table
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Everything about latency under one heading."""

    heading: str
    notes: tuple[str, ...]
    tables: tuple[Noted, ...]


def section(
    blocks: Sequence[Block],
    latencies: Sequence[tuple[str, Latency]],
    timings: pd.DataFrame,
    fits: pd.DataFrame,
    gating: Sequence[str],
) -> Section | None:
    """The section of a run; None where nothing was timed.

    Args:
        latencies: what was timed, with the cell's id. timings, fits: see `report.frames`.
        gating: metrics on which a faster method may not be worse.
    """
    timed = timings.dropna(subset=["image_median_ms"])
    if timed.empty:
        return None
    embedded = bool(timed["embedded"].all())
    tables = [_timings(where, found) for where, found in places(timed)]
    tables += [_fits(fits)] if len(fits) else []
    tables += [_split(where, found) for where, found in places(timed.dropna(subset=["denoiser_ms"]))]
    tables += [found for block in blocks for found in _speed_ups(block, latencies, gating)]
    return Section("Latency: protocol check" if embedded else "Latency", _general(timed, embedded), tuple(tables))


def _general(timed: pd.DataFrame, embedded: bool) -> tuple[str, ...]:
    notes = []
    if embedded:
        notes.append(
            "Protocol check: the model is one of evalbench's own small ones. These timings show that the protocol "
            "works; they are no claim about any method, and there is no speed-up among them."
        )
    least = int(timed["processes"].min())
    if least < MIN_PROCESSES:
        notes.append(
            f"Timed in {least} fresh process{'es' if least > 1 else ''}: ratios have no interval, which takes "
            f"{MIN_PROCESSES} (evalbench run ... --measure latency --processes {MIN_PROCESSES})."
        )
    notes += [f"Energy is missing: {why}." for why in sorted(set(timed["energy:note"].dropna())) if why]
    notes += [f"Peak memory of some cells: {why}." for why in sorted(set(timed["memory:note"].dropna())) if why]
    return tuple(notes)


def _timings(where: str, found: pd.DataFrame) -> Noted:
    extra = [name for name in ("guidance", "seed") if found[name].nunique() > 1]
    joules = ["J / call"] if found["joules"].notna().any() else []
    header = (
        *("method", "NFE", *extra, "ms / image", "p10", "p90", "p99", "ms / call", "calls"),
        *("cold s", "load s", "first ms", "peak MB", "weights MB", *joules),
    )
    parts = [f"image_{part}_ms" for part in ("median", "p10", "p90", "p99")]
    rest = ["call_median_ms", "timings", "cold_s", "build_s", "first_ms", "peak_mb", "weights_mb"]
    marks: dict[str, str] = {}
    rows = []
    for row in _sorted(found.assign(first_ms=1e3 * found["first_s"])):
        median, *others = (_measured(row, name) for name in (*parts, *rest, *(["joules"] if joules else [])))
        doubts = [f"outputs: {row['doubt']}"] if row["doubt"] else []
        noted = [*doubts, *(flag for flag in row["flags"].split("; ") if flag)]
        text = median.text + "".join(marks.setdefault(note, _mark(len(marks))) for note in noted)
        shown = Shown(text, median.key, "error" if doubts else "")
        rows.append((Shown(str(row["method"])), *(_measured(row, n) for n in ("nfe", *extra)), shown, *others))
    notes = tuple(f"{mark} {note}" for note, mark in marks.items())
    unchecked = int((found["checked"] == 0).sum())
    checked = f"{int(found['checked'].sum())} timed outputs were computed again"
    notes += (f"{unchecked} cells have no timed output that was computed again.",) if unchecked else (f"{checked}.",)
    return Noted(Table(f"Latency of whole sampling calls on {where}", header, tuple(rows)), notes)


def _mark(index: int) -> str:
    return MARKS[index % len(MARKS)] * (index // len(MARKS) + 1)


def _fits(fits: pd.DataFrame) -> Noted:
    header = ("method", "guidance", "batch", "variant", "ms per NFE", "95 % interval", "fixed ms", "R²", "points")
    rows = tuple(
        (
            Shown(str(row["method"])),
            *(_measured(row, name) for name in ("guidance", "batch")),
            Shown(row["variant"]),
            _measured(row, "ms_per_nfe"),
            Shown(f"{significant(row['ms_per_nfe:low'])} to {significant(row['ms_per_nfe:high'])}"),
            *(_measured(row, name) for name in ("intercept_ms", "r2", "points")),
        )
        for row in fits.to_dict("records")
    )
    return Noted(Table("Milliseconds per call over measured NFE: robust line (Theil-Sen)", header, rows))


def _split(where: str, found: pd.DataFrame) -> Noted:
    header = ("method", "NFE", *PARTS)
    rows = tuple(
        (Shown(str(row["method"])), _measured(row, "nfe"), *(_measured(row, f"{part}_ms") for part in PARTS))
        for row in _sorted(found)
    )
    notes = ["Metered passes wait at every border: a split, no latency. Labels are made before the clock starts."]
    if (found["excess_ms"] > 0).any():
        notes.append("Excess: by how much the parts, each waited for, exceed the latency of an unmetered call.")
    return Noted(Table(f"Where the milliseconds of a call go, {where}", header, rows), tuple(notes))


def _sorted(found: pd.DataFrame) -> list[dict[Any, Any]]:
    return found.sort_values(["method", "nfe", "guidance", "seed"]).to_dict("records")


def _measured(row: Mapping[Any, Any], name: str) -> Shown:
    """Facts and counts as they are, measurements with three digits."""
    value = float(row[name])
    if not math.isfinite(value):
        return Shown(MISSING)
    return Shown(number(value) if name in _WHOLE else significant(value), value)


# --- speed-up at matched quality ------------------------------------------------------------------------------------


def _speed_ups(block: Block, latencies: Sequence[tuple[str, Latency]], gating: Sequence[str]) -> Iterator[Noted]:
    """A table per device, batch and session of the block, and the break-even of what was prepared."""
    cells = {record.cell.id: row for row in block.rows for record in row.records if row.numbers.keys() >= {*gating}}
    groups: dict[tuple[Any, ...], list[tuple[Row, Latency]]] = {}
    for cell, one in latencies:
        if cell in cells:
            key = (one.device, one.threads, one.batch, one.variant, one.session)
            groups.setdefault(key, []).append((cells[cell], one))
    for (device, threads, batch, variant, _), found in sorted(groups.items()):
        where = hardware(device, threads, batch, variant)
        points = [(row, _point(block, row, one, gating)) for row, one in found]
        embedded = any(one.embedded for _, one in found)
        all_points = [point for _, point in points]
        said = [(row, _against(row, point, all_points, gating, embedded)) for row, point in points]
        yield _speed_up_table(said, f"{where}; {block.title}", gating, embedded)
        bills = [(row, one) for row, one in said if _bill(row)]
        if bills:
            rows = {(row.method, float(_spent(row))): row for row, _ in found}
            yield _break_even(bills, rows, batch, f"{where}; {block.title}")


def _spent(row: Row) -> float:
    spent = row.mean_count("nfe")
    return float(row.nfe) if spent is None else spent


def _point(block: Block, row: Row, one: Latency, gating: Sequence[str]) -> Point:
    flops = row.mean_count("flops")
    scores = {
        metric: Score(found.value, found.low, found.high, block.higher_is_better(metric))
        for metric in gating
        if (found := row.numbers[metric]).low is not None and found.high is not None
    }
    return Point(
        method=row.method,
        nfe=_spent(row),
        flops=math.nan if flops is None else flops,
        seconds=np.array(one.seconds),
        scores=scores,
        training_free=one.training_free,
        impl=one.impl,
        variant=one.variant,
        flags=one.flags,
        fault=one.doubt,
    )


def _against(row: Row, point: Point, points: Sequence[Point], gating: Sequence[str], embedded: bool) -> SpeedUp:
    margins = {metric: MARGIN * abs(row.numbers[metric].value) for metric in gating}
    return speed_up(point, points, margins, embedded=embedded)


def _speed_up_table(said: Sequence[tuple[Row, SpeedUp]], where: str, gating: Sequence[str], embedded: bool) -> Noted:
    columns = ("impl", "baseline", "baseline impl", "latency ratio", "FLOP ratio", "NFE ratio")
    last = () if embedded else ("in words",)
    rows = []
    for _, one in sorted(said, key=lambda pair: (pair[0].method, pair[0].nfe)):
        texts = one.row()
        words = () if embedded else (Shown(one.sentence),)
        rows.append((Shown(str(one.method)), *(Shown(texts[name] or MISSING) for name in columns), *words))
    heading = EMBEDDED_HEADING if embedded else HEADING
    caption = f"{heading}: ratios of the baseline to the method, {where}"
    notes = (
        "Baseline: the cheapest training-free solver timed in the same rounds and variant that is no worse on "
        f"{' or '.join(gating)} by more than {MARGIN:.0%} (95 % interval); measured points only. A ratio above 1: the "
        "baseline takes more. Latency, FLOPs and NFE are three things; none stands for another. Without a baseline: no "
        "measured solver is certain to be no worse.",
    )
    return Noted(Table(caption, ("method", *columns, *last), tuple(rows)), notes)


def _bill(row: Row) -> dict[str, float]:
    return next((r.bill for r in row.records if r.bill), {})


def _break_even(
    said: Sequence[tuple[Row, SpeedUp]], rows: Mapping[tuple[str, float], Row], batch: int, where: str
) -> Noted:
    """After how many images a preparation has paid for itself, by the clock and by cost."""
    header = ("method", "prepare s", "prepare cost", "baseline", "images by the clock", "images by cost")
    shown = []
    for row, one in said:
        bill, baseline = _bill(row), one.baseline
        other = rows.get((baseline.method, baseline.nfe)) if baseline else None
        seconds = cost = None
        if baseline is not None and other is not None:
            seconds = _images(bill.get("seconds"), (baseline.median - one.method.median) / batch)
            cost = _images(bill.get("cost"), (other.mean_count("cost") or 0.0) - (row.mean_count("cost") or 0.0))
        shown.append(
            (
                Shown(str(one.method)),
                *(Shown(number(bill.get(name)), bill.get(name)) for name in ("seconds", "cost")),
                Shown(str(baseline) if baseline else "none that is no worse"),
                *(Shown(_count(n), n) for n in (seconds, cost)),
            )
        )
    notes = ("Images after which the preparation has paid for itself against the baseline of the table above.",)
    return Noted(Table(f"Break-even, {where}", header, tuple(shown)), notes)


def _count(images: float | None) -> str:
    return MISSING if images is None else "never" if images == math.inf else f"{images:.0f}"


def _images(paid: float | None, saved: float) -> float | None:
    """Images until what was paid is saved; infinity where nothing is."""
    if paid is None or not math.isfinite(saved):
        return None
    return math.ceil(paid / saved) if saved > 0 else math.inf
