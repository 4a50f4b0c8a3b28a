"""The breakdown figure: stacked bars of where the milliseconds of an image go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evalbench.cost.speedup import EMBEDDED_HEADING
from evalbench.report.figures import HARDWARE, is_embedded, places
from evalbench.report.frames import PARTS
from evalbench.report.styles import COLOURS, REPORT, Drawn, Sheet, Style, folded_name, save, width_of, wrapped

_SHOWN = PARTS[:-1]  # excess is no part of the call
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
_MOST = 40  # bars per panel
_NAME = 24  # characters per line of a method's name


def draw_breakdown(timings: pd.DataFrame, folder: Path) -> Drawn | None:
    """Write the figure as PNG, PDF and CSV; None where nothing was metered."""
    found = breakdown(timings)
    if found is None:
        return None
    return save(found, "breakdown", folder, REPORT, REPORT.text if found.wide else REPORT.column)


def breakdown(timings: pd.DataFrame) -> Sheet | None:
    """Milliseconds of an image by part; None where nothing was metered. One panel per device, variant and batch."""
    split = timings.dropna(subset=["denoiser_ms"])
    if split.empty:
        return None
    columns = [*HARDWARE, "method", "nfe", "guidance", "seed", *(f"{part}_ms" for part in PARTS)]
    shares = split[columns].copy()
    for part in PARTS:
        shares[f"{part}_ms"] /= shares["batch"]
    heading = f"{EMBEDDED_HEADING}: " if is_embedded(timings) else ""
    panels = [(f"{heading}{where}", found) for where, found in places(shares)]
    check = f"{EMBEDDED_HEADING}: where" if is_embedded(timings) else "Where"
    caption = (
        f"{check} the milliseconds of an image go, from metered passes that wait at every border: a split, no latency."
    )
    return Sheet(partial(_draw, panels), shares, caption, f"{caption} {_words(panels[-1][1])}", wide=len(panels) > 1)


def _draw(panels: Sequence[tuple[str, pd.DataFrame]], style: Style, inches: float) -> Figure:
    """Panels below each other: names of methods take the width that panels side by side would need."""
    heights = [min(len(found), _MOST) for _, found in panels]
    room = inches - max(width_of(name, style) for _, found in panels for name in _names(found)) - 0.2
    bar = 1.45 * style.small / 72
    figure = Figure(figsize=(inches, sum(bar * n + 0.72 for n in heights) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, (where, found) in zip(grid, panels, strict=True):
        ordered = found.sort_values(["method", "nfe", "guidance", "seed"])[:_MOST][::-1]
        left = pd.Series(0.0, index=ordered.index)
        for i, part in enumerate(_SHOWN):
            width = ordered[f"{part}_ms"]
            shown = {"color": COLOURS[i], "hatch": _HATCHES[i], "edgecolor": "white", "linewidth": 0.4}
            axes.barh(range(len(ordered)), width, left=left, height=0.72, **shown)
            left = left + width
        axes.set_yticks(range(len(ordered)), _names(ordered))
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.set_title(wrapped(where, room, style), loc="left")
        axes.set_xlim(0, 1.04 * float(left.max()))
        axes.set_axisbelow(True)
        axes.grid(axis="y", visible=False)
    grid[-1].set_xlabel("ms per image")
    handles = [
        Patch(facecolor=COLOURS[i], hatch=_HATCHES[i], edgecolor="white", label=part)
        for i, part in enumerate(_SHOWN)
        if any((found[f"{part}_ms"] > 0).any() for _, found in panels)
    ]
    columns = len(handles) if inches > 4.5 else min(len(handles), 3)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _names(ordered: pd.DataFrame) -> list[str]:
    scales, seeds = ordered["guidance"].nunique() > 1, ordered["seed"].nunique() > 1
    return [
        folded_name(f"{row.method}", _NAME)
        + f", NFE {row.nfe}"
        + (f", g {row.guidance:g}" if scales else "")
        + (f", seed {row.seed}" if seeds else "")
        for row in ordered.itertuples()
    ]


def _words(found: pd.DataFrame) -> str:
    """Shares of the denoiser, for those who cannot see the bars."""
    total = found[[f"{part}_ms" for part in _SHOWN]].sum(axis=1)
    shares = [
        f"{method} at NFE {nfe} {share:.0%}"
        for method, nfe, share in zip(found["method"], found["nfe"], found["denoiser_ms"] / total, strict=True)
    ]
    return f"Share of the denoiser: {', '.join(shares[:12])}."
