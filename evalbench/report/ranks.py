"""The figure of rank flips: the same methods ranked at equal NFE, equal FLOPs and equal latency, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from evalbench.report.protocol import protocol_words
from evalbench.report.ranking import AXES, Flip, Ranker, Ranking, flips
from evalbench.report.styles import DARK, Sheet, Style, folded_name, ink, look, width_of, wrapped
from evalbench.report.text import number
from evalbench.report.view import Block

_LETTERS = 20  # per line of a name
_DODGE = 0.035  # between the rank intervals of two methods, in distances of two rankings


def rank_flips(blocks: Sequence[Block], ranker: Ranker, budgets: Sequence[int], check: str) -> Sheet | None:
    """A panel per block and budget that has two rankings at least; None where there is none.

    Args:
        budgets: NFE whose allowances the rankings are at. check: what stands before the title of latencies.
    """
    panels: dict[str, list[Ranking]] = {}
    rows: list[dict[str, Any]] = []
    shown: list[Block] = []
    for block in blocks:
        for nfe in budgets:
            rankings = list(ranker.rankings(block, nfe).values())
            panel = f"{block.title}, budget NFE {nfe}"
            if len(rankings) > 1:
                panels[panel] = rankings
                shown += [block] * (block not in shown)
                rows += [row for ranking in rankings for row in _rows(panel, block, ranker.metric, ranking)]
    if not panels:
        return None
    table = pd.DataFrame(rows)
    words = f"{ranker.metric}, ranked at equal NFE, FLOPs and latency; {protocol_words(shown, [ranker.metric])}"
    caption = (
        f"{check}{words}. At an allowance every method stands with the dearest measured budget that it affords. Bars: "
        "the ranks that tests of all pairs from the intervals allow (5 %, Holm). Rings: two methods change places; "
        "filled, where both tests are sure."
    )
    return Sheet(partial(_draw, panels), table, caption, f"{caption} {_words(panels)}", wide=len(panels) > 1)


def _rows(panel: str, block: Block, metric: str, ranking: Ranking) -> list[dict[str, Any]]:
    return [
        {
            "panel": panel,
            **block.facts_of(metric),
            "ranking": AXES[ranking.axis],
            "budget": ranking.budget,
            "allowance": ranking.allowance,
            "method": place.row.method,
            "nfe": place.row.nfe,
            "spent": place.spent,
            "value": place.row.numbers[metric].value,
            "rank": i + 1,
            "rank_low": place.ranks.low,
            "rank_high": place.ranks.high,
            "basis": ranking.basis,
        }
        for i, place in enumerate(ranking.places)
    ]


def _draw(panels: dict[str, list[Ranking]], style: Style, inches: float) -> Figure:
    methods = sorted({m for rankings in panels.values() for ranking in rankings for m in ranking.order})
    names = [folded_name(m, _LETTERS) for m in methods]
    lines = max(name.count("\n") + 1 for name in names)
    columns = max(1, min(len(panels), int(inches / 2.6)))
    rows = -(-len(panels) // columns)
    room = inches / columns - max(width_of(line, style) for name in names for line in name.split("\n")) - 0.4
    titles = [wrapped(panel, room, style) if len(panels) > 1 else "" for panel in panels]
    line = 1.3 * style.size / 72
    extra = max((title.count("\n") + 1 for title in titles if title), default=0) + 4
    height = rows * (len(methods) * max(lines * line, 0.22) + extra * line)
    figure = Figure(figsize=(inches, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, title, rankings in zip(grid, titles, panels.values(), strict=False):
        axes.set_title(title, loc="left")
        _draw_panel(axes, rankings, methods, style)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    ring = {"linestyle": "none", "marker": "o", "color": DARK, "markersize": 5.0}
    handles = [
        Line2D([], [], markerfacecolor="white", label="order differs", **ring),  # type: ignore[arg-type]
        Line2D([], [], label="order differs, surely", **ring),  # type: ignore[arg-type]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, handlelength=1.0)
    return figure


def _draw_panel(axes: Axes, rankings: Sequence[Ranking], methods: Sequence[str], style: Style) -> None:
    for i, method in enumerate(methods):
        held = [(x, found) for x, ranking in enumerate(rankings) if (found := ranking.place(method))]
        if not held:
            continue
        xs, ys = [x for x, _ in held], [rankings[x].order[method] + 1 for x, _ in held]
        axes.plot(xs, ys, zorder=3, **look(i))
        beside = _DODGE * (i - (len(methods) - 1) / 2)
        for x, place in held:
            ends = [place.ranks.low - 0.12, place.ranks.high + 0.12]
            axes.plot([x + beside] * 2, ends, color=look(i)["color"], alpha=0.55, linewidth=2.0, zorder=2)
        text = {"va": "center", "fontsize": style.size - 0.5, "color": ink(i), "linespacing": 1.0}
        axes.text(xs[-1] + 0.16, ys[-1], folded_name(method, _LETTERS), **text)  # type: ignore[arg-type]
    for x, (first, second) in enumerate(pairwise(rankings)):
        for flip in flips(first, second):
            axes.plot(*_crossing(x, first, second, flip), **_ring(flip))
    most = max(len(ranking.places) for ranking in rankings)
    labels = [f"{AXES[r.axis].replace('equal ', 'equal' + chr(10))}\n{_allowance(r)}" for r in rankings]
    axes.set_xticks(range(len(rankings)), labels)
    axes.set_xlim(-0.25, len(rankings) - 0.8)
    axes.set_yticks(range(1, most + 1))
    axes.set_ylim(most + 0.6, 0.4)
    axes.set_ylabel("rank")
    axes.grid(axis="x", visible=False)


def _allowance(ranking: Ranking) -> str:
    if ranking.axis == "latency":
        return f"{number(float(f'{ranking.allowance:.3g}'))} ms"
    return f"{number(float(f'{ranking.allowance:.3g}'))}" + (" forwards" if ranking.axis == "flops" else "")


def _crossing(x: int, first: Ranking, second: Ranking, flip: Flip) -> tuple[float, float]:
    """Where the lines of two methods cross between two rankings."""
    (a, b), (c, d) = ((ranking.order[flip.better], ranking.order[flip.worse]) for ranking in (first, second))
    share = (b - a) / ((b - a) + (c - d))
    return x + share, 1 + a + share * (c - a)


def _ring(flip: Flip) -> dict[str, Any]:
    face = DARK if flip.sure else "white"
    return {"marker": "o", "markersize": 5.0, "color": DARK, "markerfacecolor": face, "linestyle": "none", "zorder": 4}


def _words(panels: dict[str, list[Ranking]]) -> str:
    parts = []
    for panel, rankings in panels.items():
        orders = [f"{AXES[r.axis]}: {', '.join(place.row.method for place in r.places)}" for r in rankings]
        parts.append(f"{panel}: {'; '.join(orders)}")
    return f"{'. '.join(parts)}."
