"""Figures of a report: what each shows. How it is drawn stands in `drawing`, how it looks in `styles`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from evalbench.cost.speedup import EMBEDDED_HEADING
from evalbench.report.drawing import Chart, draw
from evalbench.report.frames import latency_fits
from evalbench.report.ranking import pareto_front
from evalbench.report.styles import REPORT, Drawn, Sheet, save
from evalbench.report.text import number
from evalbench.report.view import Block, Row

HARDWARE = ("device", "threads", "batch", "variant")
COUNTED = {
    "nfe": "NFE per sample (measured)",
    "cost": "cost [forwards of the base model]",
    "flops": "FLOPs per sample",
}


def draw_all(blocks: Sequence[Block], timings: pd.DataFrame, primary: str, folder: Path) -> list[Drawn]:
    """Quality over NFE, quality over latency, latency over NFE, and every other metric over NFE.

    Figures without a point are left out.
    """
    first = blocks[:1]
    others = [name for block in first for name in block.metrics if name != primary]
    where = f" ({blocks[0].title})" if blocks else ""
    check = f"{EMBEDDED_HEADING}: " if is_embedded(timings) else ""
    quality = f"{primary} over network evaluations{where if len(blocks) == 1 else ''}."
    wanted = [
        ("quality-nfe", nfe_chart(blocks, [primary]), quality),
        ("quality-latency", latency_chart(blocks, timings, primary), f"{check}{primary} over time per image."),
        ("latency-nfe", line_chart(timings), f"{check}Time of a whole call over network evaluations."),
        ("metrics-nfe", nfe_chart(first, others), f"The other metrics over network evaluations{where}."),
    ]
    return [_save(chart, name, title, folder) for name, chart, title in wanted if len(chart.points)]


def _save(chart: Chart, name: str, title: str, folder: Path) -> Drawn:
    found = sheet(chart, title)
    return save(found, name, folder, REPORT, REPORT.text if found.wide else REPORT.column)


def sheet(chart: Chart, title: str) -> Sheet:
    """A chart with its words."""
    words = {"caption": caption(chart, title), "alt": _alt(chart, title)}
    return Sheet(partial(draw, chart), chart.points, wide=len(chart.panels) > 1, **words)


def is_embedded(timings: pd.DataFrame) -> bool:
    """Whether all that was timed is evalbench's own models: their timings check the protocol and are no claim."""
    timed = timings.dropna(subset=["image_median_ms"])
    return bool(len(timed)) and bool(timed["embedded"].all())


def nfe_chart(blocks: Sequence[Block], metrics: Sequence[str]) -> Chart:
    """Metrics over measured NFE: one panel per block, or per metric."""
    one_scale = len(metrics) == 1 and _one_suite(blocks)
    chart = Chart(_frame([]), [], {}, COUNTED["nfe"], {}, {}, one_scale=one_scale)
    rows: list[dict[str, Any]] = []
    for block in blocks:
        for metric in metrics:
            panel = f"{block.title}, {metric}"
            found = [_point(block, row, metric, panel) for row in block.rows if metric in row.numbers]
            rows += found
            if found:
                heading = block.heading(metric)
                title = block.title if len(blocks) > 1 else heading if len(metrics) > 1 else ""
                _add_panel(chart, block, metric, panel, title, "" if title == heading else heading)
    return replace(chart, points=_frame(rows))


def latency_chart(blocks: Sequence[Block], timings: pd.DataFrame, primary: str) -> Chart:
    """The primary metric over median milliseconds per image: one panel per block, device and batch."""
    timed = timings.dropna(subset=["image_median_ms"])
    bars = "Bars: 95 % interval of the value; across, 10th to 90th percentile of the timed calls. Numbers: NFE budgets"
    chart = Chart(_frame([]), [], {}, "ms per image (median)", {}, {}, exact_x=False, bars=bars)
    rows: list[dict[str, Any]] = []
    for block in blocks:
        for row in (row for row in block.rows if primary in row.numbers):
            cells = timed[timed["cell"].isin([r.cell.id for r in row.records])]
            for _, group in cells.groupby(list(HARDWARE)):
                place = hardware(*(group[name].iloc[0] for name in HARDWARE))
                panel = f"{block.title}; {place}"
                x = {name: float(group[f"image_{part}_ms"].median()) for name, part in _X.items()}
                rows.append(_point(block, row, primary, panel) | x)
                if panel not in chart.panels:
                    title = f"{block.title}\n{place}" if len(blocks) > 1 else place
                    title = f"{EMBEDDED_HEADING}: {title}" if is_embedded(timings) else title
                    _add_panel(chart, block, primary, panel, title, block.heading(primary))
        for panel in (panel for panel in chart.panels if panel not in chart.fronts):
            mine = [row for row in rows if row["panel"] == panel]
            chart.fronts[panel] = front(_frame(mine), higher_is_better=block.higher_is_better(primary))
    return replace(chart, points=_frame(rows))


def cost_chart(blocks: Sequence[Block], metric: str, axis: str) -> Chart:
    """A metric over what a sample was counted to cost, `nfe`, `cost` or `flops`: one panel per block."""
    bars = "Bars: 95 % interval of the value. Numbers: NFE budgets"
    chart = Chart(_frame([]), [], {}, COUNTED[axis], {}, {}, exact_x=False, one_scale=_one_suite(blocks), bars=bars)
    rows: list[dict[str, Any]] = []
    for block in blocks:
        counted = [(row, row.mean_count(axis)) for row in block.rows if metric in row.numbers]
        found = [_point(block, row, metric, block.title) | {"x": x} for row, x in counted if x is not None]
        if found:
            rows += found
            title = block.title if len(blocks) > 1 else ""
            _add_panel(chart, block, metric, block.title, title, block.heading(metric))
            chart.fronts[block.title] = front(_frame(found), higher_is_better=block.higher_is_better(metric))
    return replace(chart, points=_frame(rows))


def tradeoff_chart(blocks: Sequence[Block], metric: str, against: str, budgets: Sequence[int]) -> Chart:
    """One metric over another, each method's guidance scales joined: one panel per N and budget."""
    bars = "Bars: 95 % intervals. Numbers: guidance scales"
    chart = Chart(_frame([]), [], {}, "", {}, {}, along="guidance", exact_x=False, one_scale=True, bars=bars)
    rows: list[dict[str, Any]] = []
    for nfe in budgets:
        for block in blocks:
            panel = f"NFE {nfe}, N = {block.samples}"
            pairs = [r for r in block.rows if r.nfe == nfe and {metric, against} <= r.numbers.keys()]
            across = [(r, r.numbers[against]) for r in pairs]
            x = [{"x": a.value, "x_low": a.low, "x_high": a.high, "against": against} for _, a in across]
            rows += [_point(block, r, metric, panel) | found for (r, _), found in zip(across, x, strict=True)]
            if pairs and panel not in chart.panels:
                chart = replace(chart, x_label=block.heading(against))
                chart.panels.append(panel)
                chart.titles[panel], chart.y_labels[panel] = panel, block.heading(metric)
    return replace(chart, points=_frame(rows, "against"))


def _one_suite(blocks: Sequence[Block]) -> bool:
    return len({block.suite for block in blocks}) == 1


def front(points: pd.DataFrame, *, higher_is_better: bool) -> pd.DataFrame:
    """The points that no other one beats on both axes (x: less is better), by x."""
    return points.iloc[pareto_front(points["x"].tolist(), points["y"].tolist(), higher_is_better=higher_is_better)]


def line_chart(timings: pd.DataFrame) -> Chart:
    """Median milliseconds of a call over measured NFE with the robust line: a panel per guidance, device and batch."""
    timed = timings.dropna(subset=["call_median_ms", "nfe_measured"])
    chart = Chart(_frame([]), [], {}, COUNTED["nfe"], {}, {}, bars="Bands: 10th to 90th percentile of calls")
    rows: list[dict[str, Any]] = []
    fits = latency_fits(timings)
    for guidance, where, found in ((g, *p) for g, some in timed.groupby("guidance") for p in places(some)):
        panel = f"guidance {guidance}; {where}"
        chart.panels.append(panel)
        chart.titles[panel], chart.y_labels[panel] = where, "ms per call (median)"
        if timed["guidance"].nunique() > 1:
            chart.titles[panel] = f"guidance {guidance}\n{where}"
        if is_embedded(timings):
            chart.titles[panel] = f"{EMBEDDED_HEADING}: {chart.titles[panel]}"
        rows += [_timed_point(panel, row) for row in found.to_dict("records")]
        place = found[list(HARDWARE)].iloc[0]
        mine = fits[(fits["guidance"] == guidance) & (fits[list(HARDWARE)] == place).all(axis=1)]
        chart.lines.update({(panel, r["method"]): (r["ms_per_nfe"], r["intercept_ms"]) for _, r in mine.iterrows()})
    return replace(chart, points=_frame(rows))


def _timed_point(panel: str, row: dict[Any, Any]) -> dict[str, Any]:
    facts = {name: row[name] for name in ("suite", "guidance", "method", "nfe")}
    y = {"y": row["call_median_ms"], "y_low": row["call_p10_ms"], "y_high": row["call_p90_ms"]}
    return {"panel": panel, "metric": "call_median_ms", "x": row["nfe_measured"], **facts, **y}


def _add_panel(chart: Chart, block: Block, metric: str, panel: str, title: str, y_label: str) -> None:
    chart.panels.append(panel)
    chart.titles[panel], chart.y_labels[panel] = title, y_label
    if metric in block.floors:
        floor = block.floors[metric]
        word = "ceiling" if block.higher_is_better(metric) else "floor"
        chart.floors[panel] = (f"{word} {number(floor.value)} at N = {floor.samples}", floor.value)


_X = {"x": "median", "x_low": "p10", "x_high": "p90"}
_POINT = (
    *("panel", "suite", "guidance", "samples", "protocol", "metric", "method", "nfe"),
    *("x", "x_low", "x_high", "y", "y_low", "y_high"),
)


def _point(block: Block, row: Row, metric: str, panel: str) -> dict[str, Any]:
    found, nfe = row.numbers[metric], row.mean_count("nfe")
    return {
        "panel": panel,
        **block.facts_of(metric),
        "method": row.method,
        "nfe": row.nfe,
        "x": float(row.nfe) if nfe is None else nfe,
        "y": found.value,
        "y_low": found.low,
        "y_high": found.high,
    }


def _frame(rows: list[dict[str, Any]], *more: str) -> pd.DataFrame:
    columns = [*_POINT, *more]
    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=columns)


# --- words ----------------------------------------------------------------------------------------------------------


def places(timed: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Timings by where and how they were measured."""
    groups = [found for _, found in timed.groupby(list(HARDWARE), sort=True)]
    return [(hardware(*(found[name].iloc[0] for name in HARDWARE)), found) for found in groups]


def hardware(device: str, threads: float, batch: float, variant: str) -> str:
    """Where and how a latency was measured."""
    return f"{device}, {threads:g} thread{'' if threads == 1 else 's'}, batch {batch:g}, {variant}"


def caption(chart: Chart, title: str) -> str:
    """What stands below a chart: the title, what intervals, dashes and the grey edge are."""
    bars = chart.bars
    floor = " Dashed: what a perfect sampler scores at the same N." if chart.floors else ""
    edge = " Grey: the Pareto front, no point is both cheaper and better." if chart.fronts else ""
    line = " Lines: Theil-Sen, time per evaluation." if chart.lines else ""
    return f"{title} {bars}.{floor}{edge}{line}"


def _alt(chart: Chart, title: str) -> str:
    """The figure in words: each line's first and last point."""
    parts = []
    for panel in chart.panels:
        found = chart.of(panel).sort_values(["method", chart.along])
        lines = [_line_in_words(method, line, chart.along) for method, line in found.groupby("method", sort=True)]
        heading = chart.titles[panel].replace("\n", ", ")
        parts.append(f"{heading}: {'; '.join(lines)}" if len(chart.panels) > 1 else "; ".join(lines))
    return f"{title} {'. '.join(parts)}."


def _line_in_words(method: object, line: pd.DataFrame, along: str) -> str:
    word = "NFE" if along == "nfe" else along
    values = [f"{number(float(y))} at {word} {at:g}" for at, y in zip(line[along], line["y"], strict=True)]
    return f"{method} {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else "")
