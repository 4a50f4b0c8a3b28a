"""A run folder -> the files of its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from evalbench.report import html, latex, markdown
from evalbench.report.bars import draw_breakdown
from evalbench.report.content import gather
from evalbench.report.figures import draw_all
from evalbench.report.frames import (
    cells_frame,
    latency_fits,
    timings_frame,
    write_bytes,
    write_table,
)
from evalbench.report.grids import sample_grid
from evalbench.report.html import Pictures
from evalbench.report.leaderboard import board, milliseconds
from evalbench.report.ranking import Ranker
from evalbench.report.samples import Page, farthest, slides
from evalbench.report.styles import Drawn
from evalbench.report.view import Block, blocks
from evalbench.spec import Suite
from evalbench.store import Store

if TYPE_CHECKING:
    from evalbench.report import Pairs

_MOST_BLOCKS, _MOST_METHODS = 3, 12  # of a figure


def build(
    store: Store, suite: Suite, out_dir: Path, formats: Sequence[str], pairs: Pairs | None = None
) -> dict[str, Path]:
    """Write what `build_report` promises."""
    records = store.shown_records()
    timings = timings_frame(records)
    paths: dict[str, Path] = {}
    if "csv" in formats:
        paths["table"] = write_table(cells_frame(records, suite), store.folder / "table.csv")
        paths["timings"] = write_table(timings, store.folder / "timings.csv")
    if set(formats) <= {"csv"}:
        return paths
    out_dir.mkdir(parents=True, exist_ok=True)
    found = blocks(records, suite)
    primary = suite.metrics.primary
    ranker = Ranker(primary, pairs.difference if pairs else None, milliseconds(timings))
    if "latex" in formats:
        paths["latex"] = write_bytes(out_dir / "report.tex", latex.render(found, primary, ranker).encode())
    if not {"md", "html"} & set(formats):
        return paths
    fits = latency_fits(timings)
    paths["latency fits"] = write_table(fits, out_dir / "latency-fits.csv")
    figures = _figures(found, timings, primary, out_dir / "figures")
    grids = _grids(store, found, out_dir)
    content = gather(records, suite, store.manifest(), timings, fits, figures, grids, found)
    if "md" in formats:
        paths["md"] = write_bytes(out_dir / "report.md", markdown.render(content, out_dir).encode())
    if "html" in formats:
        leaderboard = board(content, ranker, store.per_sample)
        page = html.render(content, leaderboard, _samples(store, found, pairs))
        paths["html"] = write_bytes(out_dir / "report.html", page.encode())
    return paths | _pictures(figures, grids)


def _figures(found: Sequence[Block], timings: pd.DataFrame, primary: str, folder: Path) -> list[Drawn]:
    """The report's figures, of as many blocks and methods as one can read; captions say what is left out."""
    few = [_best(block, primary) for block in found[:_MOST_BLOCKS]]
    cells = {record.cell.id for block in few for row in block.rows for record in row.records}
    mine = timings[timings["cell"].isin(cells)] if few else timings
    drawn = draw_all(few, mine, primary, folder)
    split = draw_breakdown(mine, folder)
    left_out = _left_out(found, few)
    return [replace(one, caption=one.caption + left_out) for one in (*drawn, *([split] if split else []))]


def _best(block: Block, primary: str) -> Block:
    """The block with the methods that reach the best values."""
    sign = -1.0 if block.higher_is_better(primary) else 1.0
    best: dict[str, float] = {}
    for row in block.rows:
        value = sign * row.numbers[primary].value if primary in row.numbers else math.inf
        best[row.method] = min(value, best.get(row.method, math.inf))
    kept = sorted(best, key=lambda method: (best[method], method))[:_MOST_METHODS]
    return replace(block, rows=tuple(row for row in block.rows if row.method in kept))


def _left_out(found: Sequence[Block], few: Sequence[Block]) -> str:
    methods = max((len(block.methods) for block in found), default=0)
    blocks = (
        f" Of {len(found)} guidance scales, sizes or protocols, the first {len(few)}." if len(few) < len(found) else ""
    )
    return blocks + (
        f" Of {methods} methods, the {_MOST_METHODS} with the best values." if methods > _MOST_METHODS else ""
    )


def _samples(store: Store, found: Sequence[Block], pairs: Pairs | None) -> Pictures:
    """Samples inside the page, as far as it has room."""
    page = Page()
    strips = [one for block in found if (one := slides(store.images, block, page))]
    solution = pairs.solution if pairs else None
    return Pictures(strips, [one for block in found for one in farthest(store.images, block, page, solution)])


def _grids(store: Store, found: Sequence[Block], out_dir: Path) -> list[tuple[str, Path]]:
    grids = []
    (out_dir / "figures").mkdir(exist_ok=True)
    for i, block in enumerate(found):
        path = out_dir / "figures" / ("samples.png" if i == 0 else f"samples-{i + 1}.png")
        if sample_grid(store.images, block, path):
            seed = block.seeds[0]
            grids.append((f"The first samples of seed {seed}, the same noise in every row; {block.title}.", path))
    return grids


def _pictures(figures: Sequence[Drawn], grids: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    return {f"figure:{f.name}": f.png for f in figures} | {f"grid:{path.stem}": path for _, path in grids}
