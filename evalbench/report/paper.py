"""`evalbench figure`: one figure of one or more runs at the column width of a conference, as PDF, PNG and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from evalbench.cost.speedup import EMBEDDED_HEADING
from evalbench.errors import UserError, unknown
from evalbench.report import figures
from evalbench.report.bars import breakdown
from evalbench.report.claims import read_ledger
from evalbench.report.drawing import Chart
from evalbench.report.forest import forest
from evalbench.report.frames import timings_frame
from evalbench.report.leaderboard import milliseconds
from evalbench.report.protocol import protocol_words
from evalbench.report.ranking import Ranker
from evalbench.report.ranks import rank_flips
from evalbench.report.strips import strips
from evalbench.report.styles import Drawn, Sheet, paper, save
from evalbench.report.view import Block, blocks
from evalbench.spec import Record, Suite, parse_suite
from evalbench.store import Store

AXES = ("cost", "flops", "nfe", "latency")
LEDGER = Path("results/claims.json")
_TIME_IT = "evalbench run SUITE --methods ... --measure quality,latency"


@dataclass(frozen=True)
class Choice:
    """What of the runs a figure shows; empty is the suite's.

    Attributes:
        metric: on the y axis. against: on the x axis of `tradeoff`. axis: cost of `pareto`, one of AXES.
        nfe: budgets of `grid` (all) and `tradeoff` (the largest). guidance: scales that count.
    """

    metric: str = ""
    against: str = ""
    axis: str = "cost"
    nfe: tuple[int, ...] = ()
    guidance: tuple[float, ...] = ()


class Pool:
    """Runs together: of a cell that several hold, the record of the last one counts.

    Args:
        folders: run folders, or for `claims` a ledger.
    """

    def __init__(self, folders: Sequence[Path], choice: Choice) -> None:
        self.folders, self.choice = folders, choice
        self.stores = [Store(folder) for folder in folders]
        self.suites: dict[str, Suite] = {}
        self.records: dict[str, list[Record]] = {}
        for store in self.stores:
            suite = parse_suite(store.manifest()["suite"], "", where=f"manifest of {store.folder}")
            name = f"{suite.name} v{suite.version}"
            self.suites[name] = suite
            self.records.setdefault(name, []).extend(store.shown_records())
        self.records = {name: _latest(found) for name, found in self.records.items()}

    @property
    def primary(self) -> str:
        """The metric that was chosen, or the first suite's primary one."""
        return self.choice.metric or next(iter(self.suites.values())).metrics.primary

    def blocks(self) -> list[Block]:
        """Comparable rows at the chosen guidance scales, of all suites.

        Raises:
            UserError: none, or a guidance scale that no run has.
        """
        found = [
            replace(block, tag=", ".join(part for part in (block.tag, name) if part)) if len(self.suites) > 1 else block
            for name, suite in self.suites.items()
            for block in blocks(self.records[name], suite)
        ]
        held = {block.guidance for block in found}
        for scale in self.choice.guidance:
            if scale not in held:
                known = ", ".join(f"{g:g}" for g in sorted(held)) or "none"
                raise UserError(f"--guidance {scale:g}: the runs have {known}")
        return [block for block in found if not self.choice.guidance or block.guidance in self.choice.guidance]

    def timings(self) -> pd.DataFrame:
        """Timings at the chosen guidance scales."""
        frame = timings_frame([record for found in self.records.values() for record in found])
        return frame[frame["guidance"].isin(self.choice.guidance)] if self.choice.guidance else frame

    def images(self, cell_id: str) -> np.ndarray | None:
        """Kept images of a cell, from the last run that has them."""
        found = (store.images(cell_id) for store in reversed(self.stores))
        return next((images for images in found if images is not None), None)


def _latest(records: Sequence[Record]) -> list[Record]:
    return list({(r.cell.id, r.kind, r.variant): r for r in records}.values())


def figure(
    name: str,
    runs: Sequence[Path | str],
    out: Path | str = "figures",
    *,
    style: str = "neurips",
    width: str = "column",
    choice: Choice | None = None,
) -> Drawn:
    """Draw one figure of a paper.

    Args:
        name: one of FIGURES. runs: run folders; of `claims` the ledger, default `results/claims.json`.
        out: folder for NAME.pdf, NAME.png (300 dpi) and NAME.csv. style: `neurips`, `icml`, `cvpr`.
        width: `column` or `text`, the width of the page's text. choice: what is shown.

    Raises:
        UserError: an unknown name, style, width, metric, axis or guidance; no run; nothing to show.
    """
    chosen, page = choice or Choice(), paper(style)
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    if chosen.axis not in AXES:
        raise unknown("axis", chosen.axis, AXES)
    inches = page.inches(width)
    folders = [Path(run) for run in runs]
    if not folders and name != "claims":
        raise UserError(f"figure '{name}' needs a run folder: evalbench figure {name} results/runs/SUITE")
    sheet = _claims(folders) if name == "claims" else OF_RUNS[name](Pool(folders, chosen))
    return save(sheet, name, Path(out), page, inches)


# --- the figures ----------------------------------------------------------------------------------------------------


def _nfe(pool: Pool) -> Sheet:
    metric, found = pool.primary, pool.blocks()
    chart = figures.nfe_chart(found, [metric])
    _need_points(chart, pool, metric)
    return figures.sheet(chart, f"{metric} over network evaluations; {protocol_words(found, [metric])}.")


def _latency(pool: Pool) -> Sheet:
    timings = pool.timings()
    chart = figures.line_chart(timings)
    if chart.points.empty:
        raise UserError(f"figure 'latency': no run was timed; {_TIME_IT}")
    return figures.sheet(chart, f"{_check(timings)}Time of a whole call over network evaluations.")


def _pareto(pool: Pool) -> Sheet:
    metric, found, axis = pool.primary, pool.blocks(), pool.choice.axis
    timings = pool.timings()
    if axis == "latency":
        chart = figures.latency_chart(found, timings, metric)
        if chart.points.empty:
            raise UserError(f"figure 'pareto' over latency: no run was timed; {_TIME_IT}")
    else:
        chart = figures.cost_chart(found, metric, axis)
        _need_points(chart, pool, metric)
    words = {"latency": "time per image", "nfe": "network evaluations", "flops": "FLOPs", "cost": "cost"}[axis]
    check = _check(timings) if axis == "latency" else ""
    return figures.sheet(chart, f"{check}{metric} over {words}; {protocol_words(found, [metric])}.")


def _breakdown(pool: Pool) -> Sheet:
    found = breakdown(pool.timings())
    if found is None:
        raise UserError(f"figure 'breakdown': no run was timed; {_TIME_IT}")
    return found


def _grid(pool: Pool) -> Sheet:
    for block in pool.blocks():
        found = strips(pool.images, block, pool.choice.nfe or block.budgets)
        if found is not None:
            return found
    raise UserError("figure 'grid': no cell has images; run a suite of images, such as fashion-mixture")


def _tradeoff(pool: Pool) -> Sheet:
    metric, found = pool.primary, pool.blocks()
    against = pool.choice.against or _score(found, metric)
    budgets = pool.choice.nfe or tuple(sorted({nfe for block in found for nfe in block.budgets})[-1:])
    chart = figures.tradeoff_chart(found, metric, against, budgets)
    _need_points(chart, pool, metric, against)
    words = protocol_words(found, [metric, against])
    return figures.sheet(chart, f"{metric} against {against}, the guidance scales of a method joined; {words}.")


def _rank_flip(pool: Pool) -> Sheet:
    metric, found, timings = pool.primary, pool.blocks(), pool.timings()
    timed = milliseconds(timings)
    budgets = pool.choice.nfe or tuple(sorted({nfe for block in found for nfe in block.budgets})[-1:])
    sheet = rank_flips(found, Ranker(metric, milliseconds=timed), budgets, _check(timings))
    if sheet is None:
        raise UserError(f"figure 'rank-flip': fewer than two methods have '{metric}' and counts at NFE {budgets}")
    return sheet


def _score(found: Sequence[Block], metric: str) -> str:
    """The first metric of samples that guidance is meant to raise: alignment, CLIP score, accuracy.

    Raises:
        UserError: none.
    """
    held = dict.fromkeys(name for block in found for name in block.metrics if name != metric)
    for kind in ("clip", "align", "accuracy"):
        for name in held:
            if name.partition("@")[0] == kind:
                return name
    raise UserError(f"figure 'tradeoff': name the other metric with --against; known: {', '.join(held) or 'none'}")


def _claims(files: Sequence[Path]) -> Sheet:
    if len(files) > 1:
        raise UserError("figure 'claims' shows one ledger; name one file")
    file = files[0] if files else LEDGER
    if not file.is_file():
        raise UserError(f"no ledger of claims at '{file}'; make one: evalbench claims --run --ledger {file}")
    return forest(read_ledger(file))


def _need_points(chart: Chart, pool: Pool, *metrics: str) -> None:
    if len(chart.points):
        return
    held = sorted({name for block in pool.blocks() for row in block.rows for name in row.numbers})
    for metric in metrics:
        if metric not in held:
            raise unknown("metric", metric, held, where=", ".join(map(str, pool.folders)))
    raise UserError(f"no cell of {', '.join(map(str, pool.folders))} has a value to show; see its table.csv")


def _check(timings: pd.DataFrame) -> str:
    return f"{EMBEDDED_HEADING}: " if figures.is_embedded(timings) else ""


OF_RUNS: dict[str, Callable[[Pool], Sheet]] = {
    "nfe": _nfe,
    "latency": _latency,
    "pareto": _pareto,
    "breakdown": _breakdown,
    "grid": _grid,
    "rank-flip": _rank_flip,
    "tradeoff": _tradeoff,
}
FIGURES = (*OF_RUNS, "claims")
