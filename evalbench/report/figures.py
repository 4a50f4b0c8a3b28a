"""Figures of a report as PNG, PDF and the CSV behind them: the same bytes for the same records.

Colours are Okabe & Ito's, which colour-blind readers tell apart; markers and line styles repeat the distinction.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from evalbench.report.frames import write_bytes, write_table
from evalbench.report.text import number
from evalbench.report.view import Block

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
FLOOR = "#6b6b6b"
_LABEL_LIMIT = 26  # longer names go to a legend below the plot
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "evalbench",
}


@dataclass(frozen=True)
class Drawn:
    """A figure on disk.

    Attributes:
        name: stem of the files. png, pdf, csv: the files. alt: what a reader who cannot see it is told.
        caption: what stands below it.
    """

    name: str
    png: Path
    pdf: Path
    csv: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Chart:
    """What one figure shows: panels of lines over a column.

    Attributes:
        points: one row per point: panel, method, nfe, x, y, and `x_low`, `x_high`, `y_low`, `y_high`.
        panels: in order. floors: value by panel, where known.
    """

    points: pd.DataFrame
    panels: list[str]
    floors: dict[str, float]
    x_label: str
    y_labels: dict[str, str]
    along_nfe: bool = True


def draw_all(blocks: Sequence[Block], timings: pd.DataFrame, primary: str, folder: Path) -> list[Drawn]:
    """Quality over NFE, quality over latency, and every other metric over NFE; figures without a point are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in (blocks[0].metrics if blocks else ()) if name != primary]
    wanted: list[tuple[str, Chart, str]] = [
        ("quality-nfe", nfe_chart(blocks, [primary]), "Quality over network evaluations."),
        ("quality-latency", latency_chart(blocks, timings, primary), "Quality over time per image."),
        ("metrics-nfe", nfe_chart(blocks[:1], others), "The other metrics over network evaluations."),
    ]
    return [_save(chart, name, title, folder) for name, chart, title in wanted if len(chart.points)]


def nfe_chart(blocks: Sequence[Block], metrics: Sequence[str]) -> Chart:
    """Metrics over measured NFE: one panel per block and metric."""
    rows, floors, labels = [], {}, {}
    for block in blocks:
        for metric in metrics:
            panel = _panel(block, metric, several=len(blocks) > 1, metrics=len(metrics))
            found = _quality_points(block, metric, panel)
            rows += found
            if found:
                labels[panel] = block.heading(metric)
            if found and metric in block.floors:
                floors[panel] = block.floors[metric].value
    return Chart(_frame(rows), list(labels), floors, "network evaluations per sample (NFE, measured)", labels)


def latency_chart(blocks: Sequence[Block], timings: pd.DataFrame, primary: str) -> Chart:
    """The primary metric over median milliseconds per image: one panel per block, device and batch."""
    timed = timings.dropna(subset=["image_median_ms"]).set_index("cell", drop=False)
    rows, floors, labels = [], {}, {}
    for block in blocks:
        for row in block.rows:
            for where, group in timed.loc[timed.index.isin([r.cell.id for r in row.records])].groupby(
                ["device", "threads", "batch"]
            ):
                if primary in row.numbers:
                    device, threads, batch = where
                    panel = f"{device}, {threads:g} threads, batch {batch:g}"
                    panel = f"{block.title}; {panel}" if len(blocks) > 1 else panel
                    x = {name: float(group[f"image_{part}_ms"].median()) for name, part in _X.items()}
                    rows.append(_point(block, row.method, row.nfe, primary, panel) | x)
                    labels[panel] = block.heading(primary)
                    if primary in block.floors:
                        floors[panel] = block.floors[primary].value
    return Chart(_frame(rows), list(labels), floors, "milliseconds per image (median)", labels, along_nfe=False)


_X = {"x": "median", "x_low": "p10", "x_high": "p90"}
_POINT = ("panel", "guidance", "samples", "metric", "method", "nfe", "x", "x_low", "x_high", "y", "y_low", "y_high")


def _panel(block: Block, metric: str, *, several: bool, metrics: int) -> str:
    parts = ([block.title] if several else []) + ([metric] if metrics > 1 else [])
    return ": ".join(parts) or block.title


def _quality_points(block: Block, metric: str, panel: str) -> list[dict[str, Any]]:
    points = []
    for row in block.rows:
        if metric in row.numbers:
            x = row.mean_count("nfe")
            points.append(_point(block, row.method, row.nfe, metric, panel) | {"x": float(row.nfe) if x is None else x})
    return points


def _point(block: Block, method: str, nfe: int, metric: str, panel: str) -> dict[str, Any]:
    row = block.row(method, nfe)
    assert row is not None
    found = row.numbers[metric]
    return {
        "panel": panel,
        "guidance": block.guidance,
        "samples": block.samples,
        "metric": metric,
        "method": method,
        "nfe": nfe,
        "y": found.value,
        "y_low": found.low,
        "y_high": found.high,
    }


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    values = [[row.get(name) for name in _POINT] for row in rows]
    return pd.DataFrame(values, columns=list(_POINT))


# --- drawing --------------------------------------------------------------------------------------------------------


def _save(chart: Chart, name: str, title: str, folder: Path) -> Drawn:
    with matplotlib.rc_context(_STYLE):
        figure = draw(chart)
        png = write_bytes(folder / f"{name}.png", _bytes(figure, "png"))
        pdf = write_bytes(folder / f"{name}.pdf", _bytes(figure, "pdf"))
    return Drawn(
        name, png, pdf, write_table(chart.points, folder / f"{name}.csv"), _alt(chart, title), _caption(chart, title)
    )


def _bytes(figure: Figure, kind: str) -> bytes:
    """The file without dates and versions, so that equal figures are equal bytes."""
    metadata = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=160, metadata=metadata[kind])
    return stream.getvalue()


def draw(chart: Chart) -> Figure:
    """Panels of lines with intervals, floor and names at the line ends, or a legend where they would overlap."""
    columns = min(len(chart.panels), 3)
    rows = math.ceil(len(chart.panels) / columns)
    size = (6.4, 3.9) if len(chart.panels) == 1 else (3.2 * columns + 0.4, 2.6 * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    methods = sorted(chart.points["method"].unique())
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, chart.panels, strict=False):
        _draw_panel(axes, chart, panel, methods)
    for axes in grid[len(chart.panels) :]:
        axes.set_axis_off()
    if len(chart.panels) > 1:
        figure.supxlabel(chart.x_label, fontsize=9)
    if len(chart.panels) > 1 or not _label_ends(figure, grid[0], chart, methods):
        _legend(figure, chart, methods)
    return figure


def _draw_panel(axes: Axes, chart: Chart, panel: str, methods: Sequence[str]) -> None:
    found = chart.points[chart.points["panel"] == panel]
    one = len(chart.panels) == 1
    if not one or not chart.along_nfe:
        axes.set_title(panel if len(panel) < 60 else f"{panel[:57]}...", loc="left")
    if one:
        axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_labels[panel] if one or not panel.endswith(_metric_of(found)) else "")
    _scale(axes, found, chart, chart.floors.get(panel))
    for i, method in enumerate(methods):
        _draw_line(axes, found[found["method"] == method].sort_values("nfe"), i, chart.along_nfe)
    _draw_floor(axes, chart.floors.get(panel), int(found["samples"].iloc[0]))


def _metric_of(points: pd.DataFrame) -> str:
    return str(points["metric"].iloc[0])


def _draw_line(axes: Axes, points: pd.DataFrame, index: int, along_nfe: bool) -> None:
    if points.empty:
        return
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    colour = COLOURS[index % len(COLOURS)]
    axes.errorbar(
        x,
        y,
        yerr=_error(points, "y") if points["y_low"].notna().any() else None,
        xerr=None if along_nfe else _error(points, "x"),
        ecolor=colour,
        elinewidth=1.0,
        capsize=2.5,
        zorder=3,
        **_look(index),
    )
    if not along_nfe:
        for nfe, px, py in zip(points["nfe"], x, y, strict=True):
            axes.annotate(str(nfe), (px, py), xytext=(5, 5), textcoords="offset points", fontsize=7, color=colour)


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _error(points: pd.DataFrame, axis: str) -> Any:
    """Lengths of error bars, (2, n); zero where there is no interval."""
    value = points[axis].astype(float)
    low = (value - points[f"{axis}_low"].astype(float)).fillna(0).clip(lower=0)
    high = (points[f"{axis}_high"].astype(float) - value).fillna(0).clip(lower=0)
    return [low.tolist(), high.tolist()]


def _scale(axes: Axes, points: pd.DataFrame, chart: Chart, floor: float | None) -> None:
    values = [*points["y"].astype(float), *([floor] if floor is not None else [])]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log", nonpositive="clip")
        _plain_log_ticks(axes, "y", max(values) / min(values))
    x = points["x"].astype(float)
    if chart.along_nfe:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(set(x)))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif x.max() > 4 * x.min() > 0:
        axes.set_xscale("log")
        _plain_log_ticks(axes, "x", x.max() / x.min())


def _apart(ticks: Sequence[float]) -> list[float]:
    """Ticks without those that would print over the one before on a log axis."""
    kept: list[float] = []
    least = math.log(max(ticks) / min(ticks)) / 14 if len(ticks) > 1 else 0.0
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) > least:
            kept.append(tick)
    return kept[::-1]


def _plain_log_ticks(axes: Axes, which: str, span: float) -> None:
    """Numbers such as 0.5 and 20 instead of powers; fewer of them over many decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_floor(axes: Axes, floor: float | None, samples: int) -> None:
    if floor is None or (axes.get_yscale() == "log" and floor <= 0):
        return
    axes.axhline(floor, color=FLOOR, linestyle=(0, (4, 3)), linewidth=1.0, zorder=2)
    axes.annotate(
        f"floor {number(floor)} at N = {samples}",
        (0.0, floor),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7.5,
        color="#4a4a4a",
    )


def _label_ends(figure: Figure, axes: Axes, chart: Chart, methods: Sequence[str]) -> bool:
    """Write each name at the end of its line; False, and nothing written, where names would overlap or are long."""
    if not chart.along_nfe or max(map(len, methods)) > _LABEL_LIMIT:
        return False
    ends = {m: _end(chart.points, m) for m in methods}
    figure.draw_without_rendering()
    heights = sorted(float(axes.transData.transform(end)[1]) for end in ends.values())
    least = 1.15 * 8.5 * figure.dpi / 72
    if any(b - a < least for a, b in pairwise(heights)):
        return False
    for i, (method, end) in enumerate(ends.items()):
        axes.annotate(
            method,
            end,
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=COLOURS[i % len(COLOURS)],
            annotation_clip=False,
        )
    return True


def _end(points: pd.DataFrame, method: str) -> tuple[float, float]:
    last = points[points["method"] == method].sort_values("nfe").iloc[-1]
    return float(last["x"]), float(last["y"])


def _legend(figure: Figure, chart: Chart, methods: Sequence[str]) -> None:
    """A legend below all panels, in the order in which the lines end in the first panel."""
    handles: list[Line2D] = [Line2D([], [], label=method, **_look(i)) for i, method in enumerate(methods)]
    first = chart.points[chart.points["panel"] == chart.panels[0]]
    handles.sort(key=lambda line: _last_value(first, str(line.get_label())), reverse=True)
    longest = max(map(len, methods))
    width = figure.get_size_inches()[0]
    columns = max(1, min(len(methods), int(width * 12 / (longest + 6))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def _last_value(points: pd.DataFrame, method: str) -> float:
    return _end(points, method)[1] if (points["method"] == method).any() else -math.inf


# --- words ----------------------------------------------------------------------------------------------------------


def _caption(chart: Chart, title: str) -> str:
    bars = "Bars: 95 % interval of the value"
    bars += "." if chart.along_nfe else "; across, 10th to 90th percentile of the timed calls. Numbers are NFE budgets."
    floor = " Dashed: what a perfect sampler scores at the same N." if chart.floors else ""
    shared = "" if len(chart.panels) > 1 else f" {chart.panels[0]}."
    return f"{title}{shared} {bars}{floor}"


def _alt(chart: Chart, title: str) -> str:
    """The figure in words: each line's first and last point."""
    parts = []
    for (panel, method), found in chart.points.groupby(["panel", "method"], sort=True):
        line = found.sort_values("nfe")
        a, b = line.iloc[0], line.iloc[-1]
        prefix = f"{panel}, " if len(chart.panels) > 1 else ""
        ends = f"{number(float(a['y']))} at NFE {a['nfe']}"
        if len(line) > 1:
            ends += f" to {number(float(b['y']))} at NFE {b['nfe']}"
        parts.append(f"{prefix}{method}: {ends}")
    return f"{title} {'; '.join(parts[:24])}."
