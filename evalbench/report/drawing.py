"""Panels of lines with their intervals as bands and their names at their ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from evalbench.report.styles import DARK, GREY, Style, folded_name, ink, look, width_of, wrapped

_LEADING = 1.15  # line heights between two names
_NUMBER = "number"  # marks the numbers of points
_HALO = withStroke(linewidth=1.5, foreground="white")
_PLAIN_TICKS = FuncFormatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Chart:
    """What one figure shows: panels of lines.

    Attributes:
        points: one row per point: panel, method, the column `along`, x, y, x_low, x_high, y_low, y_high.
        panels: in order. floors: label and value by panel, where known. titles, y_labels: by panel.
        along: column by which points are joined. exact_x: whether x is a setting, which has no interval and its own
            ticks; else points are marked with `along`.
        lines: slope and intercept by panel and method, drawn instead of joining points. fronts: points of the Pareto
            front by panel. names: what stands at a line's end, by panel and method, where it is more than the method.
        one_scale: whether panels side by side share their y axis. bars: what intervals are.
    """

    points: pd.DataFrame
    panels: list[str]
    floors: dict[str, tuple[str, float]]
    x_label: str
    titles: dict[str, str]
    y_labels: dict[str, str]
    along: str = "nfe"
    exact_x: bool = True
    lines: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    fronts: dict[str, pd.DataFrame] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    one_scale: bool = False
    bars: str = "Bands: 95 % interval of the value"

    @property
    def methods(self) -> list[str]:
        """Names, sorted: the order of their colours."""
        return sorted(self.points["method"].unique())

    def of(self, panel: str) -> pd.DataFrame:
        """The points of a panel."""
        return self.points[self.points["panel"] == panel]


def draw(chart: Chart, style: Style, inches: float) -> Figure:
    """Panels of lines, each name at the end of its line in the last panel of a row, else a legend."""
    columns = max(1, min(len(chart.panels), int(inches / style.narrowest)))
    rows = math.ceil(len(chart.panels) / columns)
    room = _room(chart, style, inches, columns)
    titles = [wrapped(chart.titles[panel], room, style) for panel in chart.panels]
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    x_label = wrapped(chart.x_label, room, style)
    lines += x_label.count("\n")
    height = min(style.tallest, 0.66 * inches / columns + 0.15) + lines * 1.35 * style.size / 72
    figure = Figure(figsize=(inches, rows * height + 0.1), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if chart.one_scale else False).ravel()
    for i, (axes, panel) in enumerate(zip(grid, chart.panels, strict=False)):
        _draw_panel(axes, chart, panel, titles[i], style, first=i % columns == 0)
        if i + columns >= len(chart.panels):
            axes.set_xlabel(x_label)
    for axes in grid[len(chart.panels) :]:
        axes.set_axis_off()
    last = [i for i in range(len(chart.panels)) if (i + 1) % columns == 0 or i + 1 == len(chart.panels)]
    if not _label_ends(figure, [(grid[i], chart.panels[i]) for i in last], chart, style):
        _legend(figure, chart, style)
    _thin_out(figure, grid)
    figure.set_layout_engine("none")  # it is laid out; every file would do it again
    return figure


def _thin_out(figure: Figure, grid: Iterable[Axes]) -> None:
    """Take away the numbers of points that would print over another one."""
    figure.draw_without_rendering()
    for axes in grid:
        numbers = [text for text in axes.texts if text.get_gid() == _NUMBER]
        kept: list[Any] = [Text.get_window_extent(text) for text in axes.texts if text not in numbers]
        for text in numbers:
            box = Text.get_window_extent(text)
            if any(box.overlaps(other) for other in kept):
                text.remove()
            else:
                kept.append(box)


def _room(chart: Chart, style: Style, inches: float, columns: int) -> float:
    """About how wide the axes of a panel will be: without the names at the end and the numbers of the y axes."""
    names = max(width_of(line, style) for m in chart.methods for line in folded_name(m, _letters(inches)).split("\n"))
    return (inches - names - 0.15 - 0.6 * (1 if chart.one_scale else columns)) / columns


def _letters(inches: float) -> int:
    """Characters of a line of a method's name."""
    return max(17, int(5 * inches))


def _draw_panel(axes: Axes, chart: Chart, panel: str, title: str, style: Style, *, first: bool) -> None:
    found = chart.of(panel)
    axes.set_title(title, loc="left")
    if first or not chart.one_scale:
        axes.set_ylabel(wrapped(chart.y_labels[panel], 0.9 * style.tallest, style))
    shown = chart.points if chart.one_scale else found
    floors = [value for name, (_, value) in chart.floors.items() if chart.one_scale or name == panel]
    _scale(axes, shown, found, chart, floors)
    for i, method in enumerate(chart.methods):
        points = found[found["method"] == method].sort_values(chart.along)
        if len(points):
            _draw_line(axes, points, i, chart, chart.lines.get((panel, method)), style)
    if chart.lines:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel in chart.fronts:
        edge = chart.fronts[panel]
        axes.step(edge["x"], edge["y"], where="post", color=GREY, linewidth=4.0, alpha=0.3, zorder=1)
    if panel in chart.floors:
        _draw_floor(axes, *chart.floors[panel], style)


def _draw_line(
    axes: Axes, points: pd.DataFrame, index: int, chart: Chart, line: tuple[float, float] | None, style: Style
) -> None:
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    shown = look(index)
    colour = shown["color"]
    if line is not None:
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, line[1] + line[0] * ends, color=colour, linestyle=shown["linestyle"], zorder=2)
        shown |= {"linestyle": "none"}
    axes.plot(x, y, zorder=2.2, **(shown | {"marker": ""}))
    axes.plot(x, y, zorder=3, **(shown | {"linestyle": "none"}))
    if chart.exact_x:
        low, high = (points[name].astype(float).fillna(points["y"]) for name in ("y_low", "y_high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)
        return
    spread = {"xerr": _error(points, "x"), "yerr": _error(points, "y")}
    axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6, zorder=2, **spread)
    for value, px, py in zip(points[chart.along], x, y, strict=True):
        offset: Any = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": style.small - 1}
        axes.annotate(f"{value:g}", (px, py), color=ink(index), gid=_NUMBER, zorder=2.6, path_effects=[_HALO], **offset)


def _error(points: pd.DataFrame, axis: str) -> Any:
    """Lengths of error bars, (2, n); zero where there is no interval."""
    value = points[axis].astype(float)
    low = (value - points[f"{axis}_low"].astype(float)).fillna(0).clip(lower=0)
    high = (points[f"{axis}_high"].astype(float) - value).fillna(0).clip(lower=0)
    return [low.tolist(), high.tolist()]


# --- axes -----------------------------------------------------------------------------------------------------------


def _scale(axes: Axes, shown: pd.DataFrame, found: pd.DataFrame, chart: Chart, floors: Sequence[float]) -> None:
    values = [*shown["y"].astype(float), *floors]
    if chart.lines:
        return
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log", nonpositive="clip")
        _log_limits(axes, shown, min(values), max(values))
        _plain_log_ticks(axes, "y", max(values) / min(values))
    x = found["x"].astype(float)
    if chart.exact_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(set(x)))))
        axes.xaxis.set_major_formatter(_PLAIN_TICKS)
        axes.xaxis.set_minor_locator(NullLocator())
    elif x.max() > 4 * x.min() > 0:
        axes.set_xscale("log")
        _plain_log_ticks(axes, "x", x.max() / x.min())


def _log_limits(axes: Axes, shown: pd.DataFrame, low: float, high: float) -> None:
    """All values with some room; bands too, but one that reaches 0 is cut below a third of the least value."""
    bottom = max(low / 3, min([low, *shown["y_low"].astype(float).dropna()]))
    top = max([high, *shown["y_high"].astype(float).dropna()])
    room = (top / bottom) ** 0.06
    axes.set_ylim(bottom / room, top * room)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Ticks without those that would print over the one before on a log axis."""
    kept: list[float] = []
    least = math.log(max(ticks) / min(ticks)) / 9 if len(ticks) > 1 else 0.0
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) > least:
            kept.append(tick)
    return kept[::-1]


def _plain_log_ticks(axes: Axes, which: str, span: float) -> None:
    """Numbers such as 0.5 and 20 instead of powers; fewer of them over many decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    subs = (
        (1.0, 2.0, 3.0, 5.0) if span < 10 else (1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0) if span < 1000 else (1.0,)
    )
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(_PLAIN_TICKS)
    axis.set_minor_locator(NullLocator())


def _draw_floor(axes: Axes, label: str, floor: float, style: Style) -> None:
    log = axes.get_yscale() == "log"
    if log and floor <= 0:
        return
    axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, zorder=2)
    low, high = axes.get_ylim()
    room = 0.09 * (math.log(high / low) if log else high - low)
    low = min(low, floor * math.exp(-room) if log else floor - room)
    high = max(high, floor * math.exp(1.5 * room) if log else floor + 1.5 * room)
    axes.set_ylim(low, high)
    # below the line: above it are the curves that end at it
    place: Any = {"xytext": (2, -2), "textcoords": "offset points", "va": "top"}
    axes.annotate(label, (0.0, floor), xycoords=axes.get_yaxis_transform(), fontsize=style.small, color=DARK, **place)


# --- names ----------------------------------------------------------------------------------------------------------


def _label_ends(figure: Figure, shown: Sequence[tuple[Axes, str]], chart: Chart, style: Style) -> bool:
    """Write each name at the end of its line; False, and nothing written, where a panel lacks a line or the room."""
    methods = chart.methods
    ends = [{m: end for m in methods if (end := _end(chart, panel, m))} for _, panel in shown]
    if any(len(found) < len(methods) for found in ends):
        return False
    letters = _letters(float(figure.get_size_inches()[0]))
    written = [
        _write_names(where[0], chart, where[1], found, style, letters) for where, found in zip(shown, ends, strict=True)
    ]
    figure.draw_without_rendering()  # only now are axes where they will be
    places = [_places(axes, names) for (axes, _), names in zip(shown, written, strict=True)]
    if any(found is None for found in places):
        for names in written:
            for text in names.values():
                text.remove()
        return False
    for names, found in zip(written, places, strict=True):
        for method, height in (found or {}).items():
            names[method].set_position((names[method].xyann[0], height))
    return True


def _write_names(
    axes: Axes, chart: Chart, panel: str, ends: Mapping[str, tuple[float, float]], style: Style, letters: int
) -> dict[str, Annotation]:
    """Names in lines of at most `letters` characters, at half height for now."""
    thread = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    found = {}
    for i, method in enumerate(chart.methods):
        text = folded_name(chart.names.get((panel, method), method), letters)
        found[method] = axes.annotate(
            text,
            ends[method],
            xytext=(1.05, 0.5),
            textcoords="axes fraction",
            va="center",
            fontsize=style.size - 0.5,
            linespacing=1.0,
            color=ink(i),
            annotation_clip=False,
            arrowprops=thread | {"color": ink(i)},
        )
    return found


def _places(axes: Axes, names: Mapping[str, Annotation]) -> dict[str, float] | None:
    """Heights of the names, fractions of the axes: as near to the line's end as the others allow; None without room."""
    from scipy.optimize import isotonic_regression

    box = axes.get_window_extent()
    wanted = {m: float(axes.transData.transform(text.xy)[1] - box.y0) / box.height for m, text in names.items()}
    order = sorted(names, key=lambda m: wanted[m])
    heights = [Text.get_window_extent(names[m]).height * _LEADING / box.height for m in order]
    if sum(heights) > 1.15:
        return None
    # distances between neighbours are at least half of both heights: shifted by them, the places only have to ascend
    shifts = np.cumsum([0.0, *((a + b) / 2 for a, b in pairwise(heights))])
    placed = isotonic_regression(np.array([wanted[m] for m in order]) - shifts).x + shifts
    top, bottom = placed[-1] + heights[-1] / 2 - 1.05, -0.05 - (placed[0] - heights[0] / 2)
    placed += -max(top, 0.0) if top > 0 else max(bottom, 0.0)
    if placed[0] - heights[0] / 2 < -0.2:  # both ends are full: packed from the bottom up
        placed = shifts + heights[0] / 2 - 0.05
    return dict(zip(order, placed.tolist(), strict=True))


def _end(chart: Chart, panel: str, method: str) -> tuple[float, float] | None:
    """The rightmost point of a line."""
    found = chart.of(panel)
    found = found[found["method"] == method]
    if found.empty:
        return None
    last = found.sort_values("x").iloc[-1]
    return float(last["x"]), float(last["y"])


def _legend(figure: Figure, chart: Chart, style: Style) -> None:
    """A legend below all panels, in the order in which the lines end in the first panel."""
    names = {m: folded_name(m, 44) for m in chart.methods}
    handles = [Line2D([], [], label=names[m], **look(i)) for i, m in enumerate(chart.methods)]
    height = {names[m]: end[1] if (end := _end(chart, chart.panels[0], m)) else -math.inf for m in chart.methods}
    handles.sort(key=lambda line: height[str(line.get_label())], reverse=True)
    longest = max(width_of(line, style) for name in names.values() for line in name.split("\n"))
    columns = max(1, min(len(handles), int(figure.get_size_inches()[0] / (longest + 0.7))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.0)
