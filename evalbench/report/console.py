"""The table at the end of a run, for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evalbench.report.text import MISSING, number
from evalbench.report.view import Block, Row, Trouble, blocks, floor_text, troubles
from evalbench.spec import Record, Suite

_NAME = 28  # characters of a method's name beside the other metrics; the rest folds
_DETAILED = 2  # with more blocks the other metrics are left to the report
_WORDS = {"error": "error", "unsupported": "not supp.", "ok": "no value"}


def print_table(records: Sequence[Record], suite: Suite, console: Console) -> None:
    """Print methods x NFE for the primary metric, the other metrics and counts, and what failed and why."""
    found = blocks(records, suite)
    latency = _milliseconds(records)
    for block in found:
        console.print(_primary(block, suite))
        for note, mark in block.marks.items():
            console.print(Text(f"{mark} {note}", style="dim"))
        if len(found) <= _DETAILED:
            console.print(_fitting(block, suite, latency, console))
    if len(found) > _DETAILED:
        console.print(Text("other metrics and costs: table.csv and the report", style="dim"))
    _print_troubles(troubles(records), console)


def _primary(block: Block, suite: Suite) -> Table:
    metric = suite.metrics.primary
    table = _table(f"{block.heading(metric)}  {suite.name} v{suite.version}, {block.title}")
    table.add_column("method", overflow="fold")
    for nfe in block.budgets:
        table.add_column(f"NFE {nfe}", justify="right", no_wrap=True)
    best = {nfe: block.best(metric, [r for r in block.rows if r.nfe == nfe]) for nfe in block.budgets}
    for method in block.methods:
        cells = [_cell(block, metric, block.row(method, nfe), best[nfe]) for nfe in block.budgets]
        table.add_row(Text(method), *cells)
    if metric in block.floors:
        floor = block.floors[metric]
        table.add_row(*(Text(t, style="dim") for t in ["floor", *[floor_text(floor)] * len(block.budgets)]))
    return table


def _cell(block: Block, metric: str, row: Row | None, best: Row | None) -> Text:
    if row is None:
        return Text(MISSING)
    if metric not in row.numbers:
        return Text(_WORDS[row.status], style="red")
    found = row.numbers[metric]
    return Text(f"{found}{block.mark(found)}", style="bold" if row is best else "")


def _fitting(block: Block, suite: Suite, latency: Mapping[str, float], console: Console) -> Table:
    """The details with as many metrics as the console is wide."""
    others = [name for name in block.metrics if name != suite.metrics.primary]
    tables = [_details(block, others[:n], len(others) - n, latency) for n in range(len(others), -1, -1)]
    options = console.options.update(max_width=1000)
    fits = (table for table in tables if Measurement.get(console, options, table).maximum <= console.width)
    return next(fits, tables[-1])


def _details(block: Block, shown: Sequence[str], hidden: int, latency: Mapping[str, float]) -> Table:
    table = _table(f"other metrics and costs{f'; {hidden} more in table.csv' if hidden else ''}")
    table.add_column("method", overflow="fold", max_width=_NAME)
    table.add_column("NFE", justify="right")
    for metric in shown:
        table.add_column(Text(block.direction(metric).replace("@", "\n@", 1)), justify="right", no_wrap=True)
    for name in ("used", "cost", *(["ms/image"] if latency else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for method in block.methods:
        for i, row in enumerate(r for r in block.of(method) if r.status == "ok"):
            table.add_row(Text(method if i == 0 else ""), *_detail_cells(block, row, shown, latency))
    if any(metric in block.floors for metric in shown):
        floors = [number(block.floors[m].value) if m in block.floors else "" for m in shown]
        table.add_row(*(Text(t, style="dim") for t in ["floor", "", *floors]))
    return table


def _detail_cells(block: Block, row: Row, metrics: Sequence[str], latency: Mapping[str, float]) -> list[Text]:
    cells = [Text(str(row.nfe))]
    for metric in metrics:
        found = row.numbers.get(metric)
        cells.append(Text(f"{number(found.value)}{block.mark(found)}" if found else MISSING))
    cells += [Text(number(row.mean_count("nfe"))), Text(number(row.mean_count("cost")))]
    timed = [latency[r.cell.id] for r in row.records if r.cell.id in latency]
    return [*cells, Text(number(float(np.median(timed))) if timed else MISSING)] if latency else cells


def _milliseconds(records: Sequence[Record]) -> dict[str, float]:
    """Median milliseconds per image by cell id: of the largest batch, of the variant timed last."""
    largest = {r.cell.id: max(r.latency, key=lambda one: one.batch) for r in records if r.latency}
    return {cell: 1e3 * float(np.median(one.calls)) / one.batch for cell, one in largest.items() if one.calls}


def _print_troubles(found: Sequence[Trouble], console: Console) -> None:
    """What failed, in red; what has no value, in yellow."""
    for t in found:
        if t.status == "missing":
            console.print(Text(f"{t.what} has no value for {t.where}: {t.reason}", style="yellow"))
        else:
            timed = " (latency)" if t.what == "latency" else ""
            word = "error: " if t.status == "error" else ""
            console.print(Text(f"{t.where}{timed}: {word}{t.reason}", style="red"))


def _table(title: str) -> Table:
    return Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_style="bold"
    )
