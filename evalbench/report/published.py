"""Published numbers beside the rows of a run that they belong to: always called so, with the paper's baseline."""

from __future__ import annotations

from collections.abc import Sequence

from evalbench.published import Beside, Published, published, standing_beside
from evalbench.report.tables import Shown, Table
from evalbench.report.text import number
from evalbench.report.view import Block, Row

HEADING = "Published numbers (from papers, not measured here)"
NOTES = (
    "A published number was read in its source; nobody here measured it. It is held against ours only at the same N, "
    "NFE and guidance, a minimum of runs only against the minimum of as many. Baseline: of the same published table.",
)
_HEADER = ("method", "NFE", "metric", "comparison", "published as", "published baseline", "source")


def published_tables(blocks: Sequence[Block], numbers: Sequence[Published] | None = None) -> tuple[Table, ...]:
    """One table per block that has a row with a published number.

    Args:
        numbers: published ones of the blocks' suite; None reads those that evalbench brings along.
    """
    if numbers is None:
        numbers = [one for suite in {block.suite for block in blocks} for one in published(suite)]
    found = []
    for block in blocks:
        rows = [line for row in block.rows for line in _lines(block, row, numbers)]
        if rows:
            found.append(Table(f"{HEADING}, {block.title}", _HEADER, tuple(rows)))
    return tuple(found)


def _lines(block: Block, row: Row, numbers: Sequence[Published]) -> list[tuple[Shown, ...]]:
    lines = []
    for metric in row.numbers:
        beside = standing_beside(numbers, arm=row.method, metric=metric, nfe=row.nfe, guidance=block.guidance)
        for one in beside:
            said = _beside(one, block, row, metric)
            name, value = one.baseline or ("", None)
            words = (metric, said.text, one.row.method, f"{name}: {number(value)}" if name else "", _source(one))
            outside = said.text if said.within is False else None
            shown = (Shown(text, None, "error" if text == outside else "words") for text in words)
            lines.append((Shown(row.method), Shown(str(row.nfe), row.nfe), *shown))
    return lines


def _beside(one: Published, block: Block, row: Row, metric: str) -> Beside:
    """The comparison with the row's mean over seeds, or with its minimum where the paper states minima."""
    mine = row.numbers[metric]
    if one.table.statistic != "minimum":
        return one.beside(mine.value, mine.half, samples=block.samples, runs=mine.seeds)
    seeds = [r.metrics[metric].value for r in row.records if metric in r.metrics]
    seeds = seeds[: one.table.runs] if one.table.runs else seeds
    best = (max if block.higher_is_better(metric) else min)(seeds)
    return one.beside(best, samples=block.samples, runs=len(seeds))


def _source(one: Published) -> str:
    facts = [f"{key} {value}" for key, value in one.table.protocol.items()]
    return "; ".join([f"{one.paper}: {one.origin}", one.table.model, *facts])
