"""What a report says, independent of its format: headline, tables as text, footnotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evalbench.report.latency import Section, section
from evalbench.report.published import published_tables
from evalbench.report.styles import Drawn
from evalbench.report.tables import Shown, Table
from evalbench.report.text import MISSING, count, number
from evalbench.report.view import (
    Block,
    Row,
    Trouble,
    blocks,
    environments,
    flat,
    floor_text,
    troubles,
)
from evalbench.spec import Floor, Record, Suite

# Rows under the floor: how far a metric moves for what one can see, and for copies that one cannot.
SPOILED = {
    "blur": "perfect, blurred by 1 pixel",
    "jpeg": "perfect, JPEG at quality 75",
    "duplicated": "perfect, half of them copies",
    "itself": "the reference itself",
}
_FOOTPRINT = ("weight bits", "activation bits", "weight MB", "BOPs")
STATUS_WORDS = {"error": "error", "unsupported": "not supported", "ok": ""}


@dataclass(frozen=True)
class Content:
    """All of a report.

    Attributes:
        blocks: comparable rows. primary, full: one table per block. notes: footnotes per block; general_notes: for all.
        latency: None without latencies. troubles: what has no value, and why.
        protocol: fact -> text. figures: on disk. grids: (heading, PNG).
        published: numbers from papers beside ours, one table per block that has any.
    """

    suite: Suite
    created: str
    version: str
    headline: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    primary: tuple[Table, ...]
    full: tuple[Table, ...]
    notes: tuple[tuple[str, ...], ...]
    general_notes: tuple[str, ...]
    latency: Section | None
    troubles: tuple[Trouble, ...]
    protocols: tuple[tuple[str, Mapping[str, str]], ...]
    environments: tuple[tuple[str, Mapping[str, str]], ...]
    figures: tuple[Drawn, ...] = ()
    grids: tuple[tuple[str, Path], ...] = ()
    published: tuple[Table, ...] = ()


def gather(
    records: Sequence[Record],
    suite: Suite,
    manifest: Mapping[str, Any],
    timings: pd.DataFrame,
    fits: pd.DataFrame,
    figures: Sequence[Drawn],
    grids: Sequence[tuple[str, Path]],
    found: Sequence[Block] | None = None,
) -> Content:
    """Everything a report says about these records; `found` are their blocks where they have been made already."""
    found = blocks(records, suite) if found is None else found
    primary, latencies = suite.metrics.primary, [(r.cell.id, one) for r in records for one in r.latency]
    return Content(
        suite=suite,
        created=str(manifest.get("created", "")),
        version=str(manifest.get("evalbench", "")),
        headline=_headline(records, suite, found, manifest),
        blocks=tuple(found),
        primary=tuple(primary_table(block, primary) for block in found),
        full=tuple(full_table(block) for block in found),
        notes=tuple(footnotes(block) for block in found),
        general_notes=general_notes(found),
        latency=section(found, latencies, timings, fits, suite.metrics.gating or (primary,)),
        troubles=tuple(troubles(records)),
        protocols=tuple((f"{b.title}: {b.protocol or 'none recorded'}", flat(b.facts)) for b in found),
        environments=tuple((f"{n} records", flat(facts)) for facts, n in environments(records)),
        figures=tuple(figures),
        grids=tuple(grids),
        published=published_tables(found),
    )


def primary_table(block: Block, metric: str) -> Table:
    """Methods x NFE for one metric, the best of each column marked, the floor as the last row."""
    best = {nfe: block.best(metric, [r for r in block.rows if r.nfe == nfe]) for nfe in block.budgets}
    rows = [
        (Shown(method), *(_primary_cell(block, metric, block.row(method, nfe), best[nfe]) for nfe in block.budgets))
        for method in block.methods
    ]
    floor = block.floors.get(metric)
    if floor:
        cell = Shown(floor_text(floor), floor.value, "floor")
        rows.append((Shown(f"floor at N = {floor.samples}", None, "floor"), *[cell] * len(block.budgets)))
    header = ("method", *(f"NFE {nfe}" for nfe in block.budgets))
    return Table(f"{block.heading(metric)}, {block.title}{_seeds(block)}", header, tuple(rows))


def _seeds(block: Block) -> str:
    return f", mean of seeds {', '.join(map(str, block.seeds))}" if len(block.seeds) > 1 else ""


def _primary_cell(block: Block, metric: str, row: Row | None, best: Row | None) -> Shown:
    if row is None:
        return Shown(MISSING)
    if metric in row.numbers:
        found = row.numbers[metric]
        return Shown(f"{found}{block.mark(found)}", found.value, "best" if row is best else "")
    return Shown(STATUS_WORDS[row.status] or "no value", None, "error")


def full_table(block: Block) -> Table:
    """Every row with its counts and all metrics; the last rows hold the floors and what spoiled samples score."""
    declared, quantised = any(row.declared for row in block.rows), any(row.footprint for row in block.rows)
    extra = (*(("declared",) if declared else ()), *(_FOOTPRINT if quantised else ()))
    counts = ("NFE used", "evals", "depth", "cost", "FLOPs", *extra)
    header = ("method", "NFE", *map(block.heading, block.metrics), *counts, "status")
    rows = [
        (
            Shown(row.method),
            Shown(str(row.nfe), row.nfe),
            *(_metric_cell(block, row, metric) for metric in block.metrics),
            *_count_cells(row),
            *([_declared_cell(row)] if declared else []),
            *(_footprint_cells(row) if quantised else ()),
            Shown(STATUS_WORDS[row.status] or "ok", None, "" if row.status == "ok" else "error"),
        )
        for row in block.rows
    ]
    spoiled = {SPOILED.get(what, what): floors for what, floors in block.spoiled.items()}
    for name, floors in ({"floor": block.floors} | spoiled).items():
        if floors:
            cells = [_floor_cell(floors.get(metric)) for metric in block.metrics]
            empty = _floor_cell(None)
            rows.append((Shown(name, None, "floor"), empty, *cells, *[empty] * (len(counts) + 1)))
    return Table(f"All metrics and counts, {block.title}{_seeds(block)}", header, tuple(rows))


def _floor_cell(floor: Floor | None) -> Shown:
    return Shown("", None, "floor") if floor is None else Shown(floor_text(floor), floor.value, "floor")


def _metric_cell(block: Block, row: Row, metric: str) -> Shown:
    if metric not in row.numbers:
        return Shown(MISSING)
    found = row.numbers[metric]
    return Shown(f"{found}{block.mark(found)}", found.value)


def _count_cells(row: Row) -> list[Shown]:
    used, p95 = row.mean_count("nfe"), row.mean_count("nfe_p95")
    adaptive = used is not None and p95 is not None and p95 > used
    nfe = f"{number(used)} (p95 {number(p95)})" if adaptive else number(used)
    depth, cost, flops = (row.mean_count(name) for name in ("depth", "cost", "flops"))
    return [
        Shown(nfe, used),
        Shown(number(row.evals), row.evals),
        Shown(number(depth), depth),
        Shown(number(cost), cost),
        Shown(count(flops), flops),
    ]


def _declared_cell(row: Row) -> Shown:
    """What its authors say that a program spends: never in a column of what was counted."""
    said = [f"{name} {number(value)}" for name, value in row.declared.items()]
    return Shown(", ".join(said) if said else MISSING)


def _footprint_cells(row: Row) -> list[Shown]:
    found = row.footprint
    size = found.get("weight_bytes")
    return [
        *(Shown(number(found.get(name)), found.get(name)) for name in ("weight_bits", "activation_bits")),
        Shown(MISSING) if size is None else Shown(number(size / 1e6), size),
        Shown(count(found.get("bops")), found.get("bops")),
    ]


def footnotes(block: Block) -> tuple[str, ...]:
    """What must be read with the numbers of one block."""
    marks = [f"{mark} {note}" for note, mark in block.marks.items()]
    no_floor = [] if block.floors else [f"The suite has no floor at N = {block.samples}."]
    return (*marks, *no_floor)


def general_notes(found: Sequence[Block]) -> tuple[str, ...]:
    """What must be read with the numbers of all blocks."""
    numbers = [(metric, n) for block in found for row in block.rows for metric, n in row.numbers.items()]
    lines = []
    if any(n.half is not None for _, n in numbers):
        lines.append("± is half of the 95 % interval of the value.")
    if any(block.floors for block in found):
        lines.append("Floor: what a perfect sampler scores at the same N.")
    if any(block.spoiled for block in found):
        lines.append("Rows under the floor: what perfect samples score at the same N once they are spoiled.")
    lines.append(
        "Bold: best value of its column, which is not a verdict; evalbench compare says whether a difference is real."
    )
    biased = sorted({metric for metric, n in numbers if n.bias})
    if biased:
        lines.append(f"The finite-sample bias of {', '.join(biased)} is not subtracted; table.csv has its estimate.")
    return tuple(lines)


def _headline(
    records: Sequence[Record], suite: Suite, found: Sequence[Block], manifest: Mapping[str, Any]
) -> tuple[tuple[str, str], ...]:
    quality = [r for r in records if r.kind == "quality"]
    sizes = sorted({b.samples for b in found if b.samples})
    statuses = {word: sum(r.status == word for r in quality) for word in ("ok", "error", "unsupported")}
    facts = {
        "Suite": f"{suite.name}, version {suite.version}",
        "Samples per cell": ", ".join(f"N = {n}" for n in sizes),
        "Methods": str(len({r.cell.method for r in quality})),
        "Cells": ", ".join(f"{n} {word}" for word, n in statuses.items() if n),
        "Seeds": ", ".join(map(str, sorted({r.cell.seed for r in quality}))),
        "Run begun": str(manifest.get("created", ""))[:10],
        "evalbench": str(manifest.get("evalbench", "")),
    }
    return tuple((key, value) for key, value in facts.items() if value)
