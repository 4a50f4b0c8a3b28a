"""Figures of a report as PNG, PDF and the CSV behind them: the same bytes for the same records.

Colours are Okabe & Ito's, which colour-blind readers tell apart; markers and line styles repeat the distinction.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from evalbench.cost.speedup import EMBEDDED_HEADING
from evalbench.report.frames import latency_fits, write_bytes, write_table
from evalbench.report.text import number
from evalbench.report.view import Block, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
FLOOR = "#6b6b6b"
HARDWARE = ("device", "threads", "batch", "variant")
_LABEL_LIMIT = 26  # longer names go to a legend below the plot
STYLE: Any = {
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
        caption: what stands below it. wide: whether it has several panels.
    """

    name: str
    png: Path
    pdf: Path
    csv: Path
    alt: str
    caption: str
    wide: bool


@dataclass(frozen=True)
class Chart:
    """What one figure shows: panels of lines over a column.

    Attributes:
        points: one row per point: panel, method, nfe, x, y, and `x_low`, `x_high`, `y_low`, `y_high`.
        lines: slope and intercept by panel and method, drawn instead of joining points. fronts: points of the Pareto
            front by panel. bars: what error bars are.
        panels: in order. floors: label and value by panel, where known. titles, y_labels: by panel.
    """

    points: pd.DataFrame
    panels: list[str]
    floors: dict[str, tuple[str, float]]
    x_label: str
    titles: dict[str, str]
    y_labels: dict[str, str]
    along_nfe: bool = True
    lines: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    fronts: dict[str, pd.DataFrame] = field(default_factory=dict)
    bars: str = "Bars: 95 % interval of the value"


def draw_all(blocks: Sequence[Block], timings: pd.DataFrame, primary: str, folder: Path) -> list[Drawn]:
    """Quality over NFE, quality over latency, latency over NFE, and every other metric over NFE.

    Figures without a point are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
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


def is_embedded(timings: pd.DataFrame) -> bool:
    """Whether all that was timed is evalbench's own models: their timings check the protocol and are no claim."""
    timed = timings.dropna(subset=["image_median_ms"])
    return bool(len(timed)) and bool(timed["embedded"].all())


def nfe_chart(blocks: Sequence[Block], metrics: Sequence[str]) -> Chart:
    """Metrics over measured NFE: one panel per block, or per metric."""
    chart = Chart(_frame([]), [], {}, "NFE per sample (measured)", {}, {})
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
    chart = Chart(_frame([]), [], {}, "ms per image (median)", {}, {}, along_nfe=False)
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


def front(points: pd.DataFrame, *, higher_is_better: bool) -> pd.DataFrame:
    """The points that no other one beats on both axes (x: less is better), by x."""
    kept: list[int] = []
    best = math.inf
    for i, point in points.sort_values(["x", "y"], ascending=[True, not higher_is_better]).iterrows():
        badness = -float(point["y"]) if higher_is_better else float(point["y"])
        if badness < best:
            best = badness
            kept.append(i)  # type: ignore[arg-type]
    return points.loc[kept]


def line_chart(timings: pd.DataFrame) -> Chart:
    """Median milliseconds of a call over measured NFE with the robust line: a panel per guidance, device and batch."""
    timed = timings.dropna(subset=["call_median_ms", "nfe_measured"])
    chart = Chart(
        _frame([]), [], {}, "NFE per sample (measured)", {}, {}, bars="Bars: 10th to 90th percentile of calls"
    )
    rows: list[dict[str, Any]] = []
    fits = latency_fits(timings)
    for guidance, where, found in ((g, *p) for g, some in timed.groupby("guidance") for p in places(some)):
        panel = f"guidance {guidance}; {where}"
        chart.panels.append(panel)
        chart.titles[panel], chart.y_labels[panel] = where, "ms per call (median)"
        if timed["guidance"].nunique() > 1:
            chart.titles[panel] = f"guidance {guidance}\n{where}"
        rows += [_timed_point(panel, row) for row in found.to_dict("records")]
        place = found[list(HARDWARE)].iloc[0]
        mine = fits[(fits["guidance"] == guidance) & (fits[list(HARDWARE)] == place).all(axis=1)]
        chart.lines.update({(panel, r["method"]): (r["ms_per_nfe"], r["intercept_ms"]) for _, r in mine.iterrows()})
    return replace(chart, points=_frame(rows))


def _timed_point(panel: str, row: dict[Any, Any]) -> dict[str, Any]:
    facts = {name: row[name] for name in ("guidance", "method", "nfe")}
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
_POINT = ("panel", "guidance", "samples", "metric", "method", "nfe", "x", "x_low", "x_high", "y", "y_low", "y_high")


def _point(block: Block, row: Row, metric: str, panel: str) -> dict[str, Any]:
    found, nfe = row.numbers[metric], row.mean_count("nfe")
    return {
        "panel": panel,
        "guidance": block.guidance,
        "samples": block.samples,
        "metric": metric,
        "method": row.method,
        "nfe": row.nfe,
        "x": float(row.nfe) if nfe is None else nfe,
        "y": found.value,
        "y_low": found.low,
        "y_high": found.high,
    }


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    values = [[row.get(name) for name in _POINT] for row in rows]
    return pd.DataFrame(values, columns=list(_POINT))


# --- drawing --------------------------------------------------------------------------------------------------------


def _save(chart: Chart, name: str, title: str, folder: Path) -> Drawn:
    with matplotlib.rc_context(STYLE):
        figure = draw(chart)
        png = write_bytes(folder / f"{name}.png", figure_bytes(figure, "png"))
        pdf = write_bytes(folder / f"{name}.pdf", figure_bytes(figure, "pdf"))
    table = write_table(chart.points, folder / f"{name}.csv")
    return Drawn(name, png, pdf, table, _alt(chart, title), _caption(chart, title), wide=len(chart.panels) > 1)


def figure_bytes(figure: Figure, kind: str) -> bytes:
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
    for i, (axes, panel) in enumerate(zip(grid, chart.panels, strict=False)):
        _draw_panel(axes, chart, panel, methods)
        if i + columns >= len(chart.panels):
            axes.set_xlabel(chart.x_label)
    for axes in grid[len(chart.panels) :]:
        axes.set_axis_off()
    if len(chart.panels) > 1 or not _label_ends(figure, grid[0], chart, methods):
        _legend(figure, chart, methods)
    return figure


def _draw_panel(axes: Axes, chart: Chart, panel: str, methods: Sequence[str]) -> None:
    found = chart.points[chart.points["panel"] == panel]
    axes.set_title(_folded(chart.titles[panel], 90 if len(chart.panels) == 1 else 40), loc="left")
    axes.set_ylabel(_folded(chart.y_labels[panel], 40))
    _scale(axes, found, chart, chart.floors[panel][1] if panel in chart.floors else None)
    for i, method in enumerate(methods):
        line = chart.lines.get((panel, method)) if chart.lines else None
        _draw_line(axes, found[found["method"] == method].sort_values("nfe"), i, chart.along_nfe, line)
    if chart.lines:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel in chart.fronts:
        edge = chart.fronts[panel]
        axes.step(edge["x"], edge["y"], where="post", color=FLOOR, linewidth=4.0, alpha=0.3, zorder=1)
    if panel in chart.floors:
        _draw_floor(axes, *chart.floors[panel])


def _folded(text: str, width: int) -> str:
    """Text in lines of at most `width`; a unit that does not fit gets a line of its own."""
    lines = [part for line in text.split("\n") for part in (line.split(" [") if len(line) > width else [line])]
    marked = [line if "]" not in line or "[" in line else f"[{line}" for line in lines]
    return "\n".join(textwrap.fill(line, width) for line in marked)


def _draw_line(
    axes: Axes, points: pd.DataFrame, index: int, along_nfe: bool, line: tuple[float, float] | None = None
) -> None:
    if points.empty:
        return
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    colour = COLOURS[index % len(COLOURS)]
    look = _look(index)
    if line is not None:
        ends = [x.min(), x.max()]
        axes.plot(ends, [line[1] + line[0] * end for end in ends], color=colour, linestyle=look["linestyle"], zorder=2)
        look |= {"linestyle": "none"}
    axes.errorbar(
        x,
        y,
        yerr=_error(points, "y") if points["y_low"].notna().any() else None,
        xerr=None if along_nfe else _error(points, "x"),
        ecolor=colour,
        elinewidth=1.0,
        capsize=2.5,
        zorder=3,
        **look,
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
    if chart.lines:
        axes.set_yscale("linear")
    elif chart.along_nfe:
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
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 10 else (1.0, 2.0, 5.0) if span < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _draw_floor(axes: Axes, label: str, floor: float) -> None:
    log = axes.get_yscale() == "log"
    if log and floor <= 0:
        return
    axes.axhline(floor, color=FLOOR, linestyle=(0, (4, 3)), linewidth=1.0, zorder=2)
    low, high = axes.get_ylim()
    room = 0.06 * (math.log(high / low) if log else high - low)
    low = min(low, floor * math.exp(-room) if log else floor - room)
    high = max(high, floor * math.exp(1.5 * room) if log else floor + 1.5 * room)
    axes.set_ylim(low, high)
    axes.annotate(
        label,
        (0.0, floor),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7.5,
        color="#4a4a4a",
    )


def _label_ends(figure: Figure, axes: Axes, chart: Chart, methods: Sequence[str]) -> bool:
    """Write each name at the end of its line; False, and nothing written, where that is not clear."""
    if not chart.along_nfe or max(map(len, methods)) > _LABEL_LIMIT:
        return False
    ends = {m: _end(chart.points, m) for m in methods}
    reach = max(x for x, _ in ends.values())
    if min(x for x, _ in ends.values()) < 0.85 * reach:
        return False
    figure.draw_without_rendering()
    heights = sorted(float(axes.transData.transform(end)[1]) for end in ends.values())
    least = 1.15 * 8.5 * figure.dpi / 72
    if any(b - a < least for a, b in pairwise(heights)):
        return False
    for i, (method, (_, y)) in enumerate(ends.items()):
        axes.annotate(
            method,
            (reach, y),
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
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, handlelength=3.2
    )


def _last_value(points: pd.DataFrame, method: str) -> float:
    return _end(points, method)[1] if (points["method"] == method).any() else -math.inf


# --- words ----------------------------------------------------------------------------------------------------------


def places(timed: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Timings by where and how they were measured."""
    groups = [found for _, found in timed.groupby(list(HARDWARE), sort=True)]
    return [(hardware(*(found[name].iloc[0] for name in HARDWARE)), found) for found in groups]


def hardware(device: str, threads: float, batch: float, variant: str) -> str:
    """Where and how a latency was measured."""
    return f"{device}, {threads:g} thread{'' if threads == 1 else 's'}, batch {batch:g}, {variant}"


def _caption(chart: Chart, title: str) -> str:
    bars = chart.bars
    if not chart.along_nfe:
        bars += "; across, 10th to 90th percentile of the timed calls. Numbers are NFE budgets"
    floor = " Dashed: what a perfect sampler scores at the same N." if chart.floors else ""
    edge = " Grey: the Pareto front, no point is both faster and better." if chart.fronts else ""
    line = " Lines: Theil-Sen, time per evaluation." if chart.lines else ""
    return f"{title} {bars}.{floor}{edge}{line}"


def _alt(chart: Chart, title: str) -> str:
    """The figure in words: each line's first and last point."""
    parts = []
    for panel in chart.panels:
        found = chart.points[chart.points["panel"] == panel].sort_values(["method", "nfe"])
        lines = [_line_in_words(method, line) for method, line in found.groupby("method", sort=True)]
        heading = chart.titles[panel].replace("\n", ", ")
        parts.append(f"{heading}: {'; '.join(lines)}" if len(chart.panels) > 1 else "; ".join(lines))
    return f"{title} {'. '.join(parts)}."


def _line_in_words(method: object, line: pd.DataFrame) -> str:
    values = [f"{number(float(y))} at NFE {nfe}" for nfe, y in zip(line["nfe"], line["y"], strict=True)]
    return f"{method} {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else "")
