"""The breakdown figure: stacked bars of where the milliseconds of an image go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evalbench.report.figures import COLOURS, HARDWARE, STYLE, Drawn, figure_bytes, places
from evalbench.report.frames import PARTS, write_bytes, write_table

_SHOWN = PARTS[:-1]  # excess is no part of the call
_HATCHES = ("", "//", "..", "\\\\", "xx")
_MOST = 40  # bars per panel


def draw_breakdown(timings: pd.DataFrame, folder: Path) -> Drawn | None:
    """Write the figure as PNG, PDF and CSV; None where nothing was metered. One panel per device, variant and batch."""
    split = timings.dropna(subset=["denoiser_ms"])
    if split.empty:
        return None
    columns = [*HARDWARE, "method", "nfe", "guidance", "seed", *(f"{part}_ms" for part in PARTS)]
    shares = split[columns].copy()
    for part in PARTS:
        shares[f"{part}_ms"] /= shares["batch"]
    panels = places(shares)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = _draw(panels)
        png = write_bytes(folder / "breakdown.png", figure_bytes(figure, "png"))
        pdf = write_bytes(folder / "breakdown.pdf", figure_bytes(figure, "pdf"))
    table = write_table(shares, folder / "breakdown.csv")
    caption = (
        "Where the milliseconds of an image go, from metered passes that wait at every border: a split, no latency."
    )
    return Drawn("breakdown", png, pdf, table, f"{caption} {_words(panels[-1][1])}", caption, wide=len(panels) > 1)


def _draw(panels: Sequence[tuple[str, pd.DataFrame]]) -> Figure:
    bars = max(min(len(found), _MOST) for _, found in panels)
    figure = Figure(figsize=(3.6 * max(len(panels), 2), 0.9 + 0.19 * bars + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=False).ravel()
    for axes, (where, found) in zip(grid, panels, strict=True):
        ordered = found.sort_values(["method", "nfe"])[:_MOST][::-1]
        names = [f"{row.method}, NFE {row.nfe}" for row in ordered.itertuples()]
        left = pd.Series(0.0, index=ordered.index)
        for i, part in enumerate(_SHOWN):
            width = ordered[f"{part}_ms"]
            look = {"color": COLOURS[i], "hatch": _HATCHES[i], "edgecolor": "white", "linewidth": 0.4}
            axes.barh(range(len(names)), width, left=left, height=0.72, **look)
            left = left + width
        axes.set_yticks(range(len(names)), names, fontsize=7.5)
        axes.set_title(where.replace(", batch", "\nbatch"), loc="left", fontsize=8.5)
        axes.set_xlabel("ms per image")
        axes.set_xlim(0, 1.04 * float(left.max()))
        axes.set_axisbelow(True)
        axes.grid(axis="y", visible=False)
    handles = [
        Patch(facecolor=COLOURS[i], hatch=_HATCHES[i], edgecolor="white", label=part) for i, part in enumerate(_SHOWN)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(_SHOWN), frameon=False, fontsize=8)
    return figure


def _words(found: pd.DataFrame) -> str:
    """Shares of the denoiser, for those who cannot see the bars."""
    total = found[[f"{part}_ms" for part in _SHOWN]].sum(axis=1)
    shares = [
        f"{method} at NFE {nfe} {share:.0%}"
        for method, nfe, share in zip(found["method"], found["nfe"], found["denoiser_ms"] / total, strict=True)
    ]
    return f"Share of the denoiser: {', '.join(shares[:12])}."
