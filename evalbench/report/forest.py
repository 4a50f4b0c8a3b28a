"""The figure of claims: each effect with its interval, beside the size that was claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from evalbench.report.styles import COLOURS, DARK, GREY, Sheet, Style

# marker, filled, colour by outcome: they differ in shape, so a grey print tells them apart
_LOOKS = {
    "observed here, holds": ("o", True, COLOURS[0]),
    "undecided here": ("s", False, DARK),
    "not observed here, fails": ("X", True, COLOURS[1]),
}
_OUTCOME = {
    "holds": "observed here, holds",
    "observed here": "observed here, holds",
    "fails": "not observed here, fails",
    "not observed here": "not observed here, fails",
    "undecided here": "undecided here",
}
_ROW = 1.32  # lines of text per claim
_TWO_COLUMNS = (24, 5.0)  # from so many claims and inches on
_LEAST = 1e-3  # of the baseline: an interval that reaches 0 is cut here


def forest(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Ratios of each claim's arm to its baseline from the rows of a ledger, in its order.

    A relative effect e is drawn at 1 + e on a log axis: half and double are equally far from the baseline.
    """
    table = pd.DataFrame([_row(row) for row in rows])
    counts = table["verdict"].value_counts().sort_index()
    caption = (
        "Claims on embedded suites: metric of the arm over that of the baseline, mean over run seeds from the same "
        "noise, with the 95 % interval. Grey: the claimed size and beyond (of an equality: the claimed range). "
        f"{', '.join(f'{n} {word}' for word, n in counts.items())}; level M holds or fails, level E is observed or not."
    )
    return Sheet(partial(_draw, table), table, caption, f"{caption} {_words(table)}")


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    claim = row["claim"]
    known = row["effect"] is not None
    low, high = _claimed(claim["direction"], claim["effect"])
    return {
        "claim": row["id"],
        "suite": claim["suite"],
        "metric": claim["metric"],
        "level": claim["level"],
        "author": claim["author"],
        "verdict": row["word"],
        "ratio": 1 + row["effect"] if known else math.nan,
        "ratio_low": 1 + row["low"] if known else math.nan,
        "ratio_high": 1 + row["high"] if known else math.nan,
        "claimed_low": low,
        "claimed_high": high,
        "samples": row["samples"],
        "date": row["date"],
    }


def _claimed(direction: str, size: float) -> tuple[float, float]:
    """The ratios that the claim allows."""
    if direction == "equal":
        return 1 - size, 1 + size
    return (0.0, 1 - size) if direction == "lower" else (1 + size, math.inf)


def _draw(table: pd.DataFrame, style: Style, inches: float) -> Figure:
    columns = 2 if len(table) >= _TWO_COLUMNS[0] and inches >= _TWO_COLUMNS[1] else 1
    rows = math.ceil(len(table) / columns)
    height = rows * _ROW * style.small / 72 + 0.85
    engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03)
    figure = Figure(figsize=(inches, height), layout=engine)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, columns, squeeze=False, sharex=True).ravel()
    limits = _limits(table)
    for i, axes in enumerate(grid):
        _draw_column(axes, table.iloc[i * rows : (i + 1) * rows], rows, limits, style)
    handles = [
        Line2D([], [], color=colour, markerfacecolor=colour if filled else "white", marker=marker, label=word)
        for word, (marker, filled, colour) in _LOOKS.items()
        if word in set(table["verdict"].map(_OUTCOME))
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3 if inches > 4.5 else 2, frameon=False, handlelength=1.5
    )
    return figure


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    values = table[["ratio_low", "ratio", "ratio_high"]].clip(lower=_LEAST).to_numpy(float)
    known = values[~pd.isna(values)]
    low, high = (min(known.min(), 0.5), max(known.max(), 2.0)) if len(known) else (0.5, 2.0)
    room = (high / low) ** 0.04
    return low / room, high * room


def _draw_column(axes: Axes, table: pd.DataFrame, rows: int, limits: tuple[float, float], style: Style) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.axvline(1.0, color=DARK, linewidth=0.8, zorder=1)
    for y, row in enumerate(table.to_dict("records")):
        low, high = max(row["claimed_low"], limits[0]), min(row["claimed_high"], limits[1])
        # the range of an equality to seven digits would be invisible
        axes.barh(y, high - low, left=low, height=0.7, color=GREY, alpha=0.28, linewidth=1.2, edgecolor=GREY, zorder=1)
        if not math.isnan(row["ratio"]):
            _draw_effect(axes, y, row, limits)
        else:
            axes.text(1.0, y, f" {row['verdict']}", va="center", fontsize=style.small, color=DARK)
    labels = [f"{row['claim']}  {row['suite']}" for row in table.to_dict("records")]
    axes.set_yticks(range(len(table)), labels)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlabel("arm / baseline")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_effect(axes: Axes, y: int, row: Mapping[Any, Any], limits: tuple[float, float]) -> None:
    marker, filled, colour = _LOOKS.get(_OUTCOME.get(row["verdict"], ""), ("o", False, DARK))
    ends = [max(row["ratio_low"], limits[0]), min(row["ratio_high"], limits[1])]
    axes.plot(ends, [y, y], color=colour, linewidth=1.2, solid_capstyle="butt", zorder=2)
    face = colour if filled else "white"
    ratio = max(row["ratio"], limits[0])
    axes.plot([ratio], [y], marker=marker, color=colour, markerfacecolor=face, markersize=3.6, zorder=3)


def _words(table: pd.DataFrame) -> str:
    parts = [f"{row.claim} {row.ratio:.3g} ({row.verdict})" for row in table.itertuples()]
    return f"{'; '.join(parts)}."
