"""What report.html has beyond the other formats: ranks, flips, points of the chart, classes, preparations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from evalbench.report.content import Content
from evalbench.report.ranking import AXES, Axis, Ranker, Ranking, flips
from evalbench.report.tables import Shown, Table
from evalbench.report.text import MISSING, count, number, significant
from evalbench.report.view import Block, Row, finite
from evalbench.spec import Suite

CANNOT_TELL = "≈"
_FLIPS = 2  # named per method and axis
_CLASSES, _MOST_METHODS = 100, 40  # of a heat map
_SAME = 1e-6  # relative difference of a metric and the mean of its per-sample scores
_SPENT = (
    ("cost", "cost (forwards per sample)"),
    ("nfe", "NFE (measured)"),
    ("flops", "FLOPs per sample"),
    ("ms", "ms per image"),
)
PerSample = Callable[[str], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Board:
    """The leaderboard of a run.

    Attributes:
        primary, full: the tables of `Content` with ranks, per block. rankings: per block that has more than one axis.
        notes: what must be read with the ranks. heat: per class tables. bills: what was prepared, None for nothing.
        chart: JSON-able points of the interactive charts.
    """

    primary: tuple[Table, ...]
    full: tuple[Table, ...]
    rankings: tuple[Table, ...]
    notes: tuple[str, ...]
    heat: tuple[Table, ...]
    bills: Table | None
    chart: Mapping[str, Any]


def board(content: Content, ranker: Ranker, per_sample: PerSample) -> Board:
    """The leaderboard of what a report says.

    Args:
        ranker: of the primary metric. per_sample: scores by cell id, see `Store.per_sample`.
    """
    ranked = [{nfe: ranker.rankings(block, nfe) for nfe in block.budgets} for block in content.blocks]
    pairs = list(zip(content.blocks, ranked, strict=True))
    return Board(
        primary=tuple(_marked(t, b, r) for t, (b, r) in zip(content.primary, pairs, strict=True)),
        full=tuple(_with_ranks(t, b, r, ranker) for t, (b, r) in zip(content.full, pairs, strict=True)),
        rankings=tuple(t for block, found in pairs if (t := _rankings(block, found))),
        notes=_notes(found for by_budget in ranked for found in by_budget.values()),
        heat=tuple(t for block in content.blocks for t in heat_maps(block, content.suite, per_sample)),
        bills=_bills(content.blocks, ranker.metric),
        chart=chart_data(content.blocks, content.suite, ranker),
    )


def milliseconds(timings: pd.DataFrame) -> dict[str, float]:
    """Median milliseconds of an image by cell id, of one device, variant and batch: the one with the most cells."""
    timed = timings.dropna(subset=["image_median_ms"])
    if timed.empty:
        return {}
    groups = timed.groupby(["device", "threads", "variant", "batch"], sort=True)
    _, most = max(groups, key=lambda pair: pair[1]["cell"].nunique())
    return {str(cell): float(ms) for cell, ms in zip(most["cell"], most["image_median_ms"], strict=True)}


# --- ranks ----------------------------------------------------------------------------------------------------------


def _marked(table: Table, block: Block, found: Mapping[int, Mapping[Axis, Ranking]]) -> Table:
    """Methods x NFE with the ranks of each column, and a sign where the tests cannot tell it from the best."""
    rows = tuple(_marked_row(cells, block.budgets, found) for cells in table.rows)
    return replace(table, rows=rows)


def _marked_row(
    cells: tuple[Shown, ...], budgets: Sequence[int], found: Mapping[int, Mapping[Axis, Ranking]]
) -> tuple[Shown, ...]:
    name, *values = cells
    shown = [name]
    for nfe, cell in zip(budgets, values, strict=True):
        ranking = found[nfe].get("nfe")
        place = ranking.place(name.text) if ranking and cell.kind != "floor" else None
        if ranking is None or place is None or cell.key is None:
            shown.append(cell)
            continue
        same = cell.kind != "best" and ranking.like_best(name.text)
        kind = cell.kind or ("same" if same else "")
        shown.append(Shown(f"{cell.text} {CANNOT_TELL if same else ''}".strip(), cell.key, kind, f"#{place.ranks}"))
    return tuple(shown)


def _with_ranks(table: Table, block: Block, found: Mapping[int, Mapping[Axis, Ranking]], ranker: Ranker) -> Table:
    """All metrics and counts with rank and milliseconds, cheapest first; the floor stays last."""
    ms = [ranker.spent(row, "latency") for row in block.rows]
    timed = any(value is not None for value in ms)
    header = (*table.header[:2], "rank", *table.header[2:-1], *(["ms / image"] if timed else []), table.header[-1])
    sign = -1.0 if block.higher_is_better(ranker.metric) else 1.0
    order = sorted(range(len(block.rows)), key=lambda i: _cost_order(block.rows[i], ranker, sign))
    rows = []
    for i in order:
        cells, row = table.rows[i], block.rows[i]
        ranking = found[row.nfe].get("nfe")
        place = ranking.place(row.method) if ranking and ranker.metric in row.numbers else None
        rank = Shown(str(place.ranks), place.ranks.low + place.ranks.high / 1e4) if place else Shown(MISSING)
        clock = [Shown(significant(ms[i]), ms[i])] if timed else []
        rows.append((*cells[:2], rank, *cells[2:-1], *clock, cells[-1]))
    blank = Shown("", None, "floor")
    floors = [(*c[:2], blank, *c[2:-1], *([blank] if timed else []), c[-1]) for c in table.rows[len(block.rows) :]]
    return Table(table.caption, header, (*rows, *floors))


def _cost_order(row: Row, ranker: Ranker, sign: float) -> tuple[float, float, str]:
    spent, value = ranker.spent(row, "flops"), row.numbers.get(ranker.metric)
    return (np.inf if spent is None else spent, np.inf if value is None else sign * value.value, row.method)


def _rankings(block: Block, found: Mapping[int, Mapping[Axis, Ranking]]) -> Table | None:
    """Every method at every budget's allowance on the axes there are; None where NFE is the only one."""
    axes = [axis for axis in AXES if any(axis in rankings for rankings in found.values())]
    if len(axes) < 2:
        return None
    rows = []
    for nfe, rankings in found.items():
        turned = _flipped(rankings)
        methods = sorted({m for r in rankings.values() for m in r.order}, key=lambda m: _first_rank(rankings, m))
        for method in methods:
            cells = [_rank_cell(rankings.get(axis), method, nfe) for axis in axes]
            rows.append((Shown(method), Shown(str(nfe), nfe), *cells, _flip_cell(turned.get(method, []))))
    header = ("method", "NFE", *(AXES[axis] for axis in axes), "flips")
    return Table(f"Ranks at what the median method spends at a budget, {block.title}", header, tuple(rows))


def _first_rank(rankings: Mapping[Axis, Ranking], method: str) -> tuple[int, str]:
    return next((r.order[method] for r in rankings.values() if method in r.order), len(rankings)), method


def _rank_cell(ranking: Ranking | None, method: str, nfe: int) -> Shown:
    place = ranking.place(method) if ranking else None
    if ranking is None or place is None:
        return Shown(MISSING)
    other = f" (NFE {place.row.nfe})" if place.row.nfe != nfe else ""
    return Shown(f"{place.ranks}{other}", ranking.order[method] + 1)


def _flipped(rankings: Mapping[Axis, Ranking]) -> dict[str, list[str]]:
    """What flips against equal NFE, in words, by method."""
    first = rankings.get("nfe")
    texts: dict[str, list[str]] = {}
    for axis in (axis for axis in rankings if axis != "nfe" and first is not None):
        assert first is not None
        for flip in flips(first, rankings[axis]):
            doubt = "" if flip.sure else ", not sure"
            texts.setdefault(flip.better, []).append(f"▼ behind {flip.worse} at {AXES[axis]}{doubt}")
            texts.setdefault(flip.worse, []).append(f"▲ ahead of {flip.better} at {AXES[axis]}{doubt}")
    return texts


def _flip_cell(texts: Sequence[str]) -> Shown:
    more = f"; {len(texts) - _FLIPS} more" if len(texts) > _FLIPS else ""
    return Shown("; ".join(texts[:_FLIPS]) + more, float(len(texts)) if texts else None, "words" if texts else "")


def _notes(found: Iterable[Mapping[Axis, Ranking]]) -> tuple[str, ...]:
    """How the ranks were found."""
    bases = {ranking.basis for rankings in found for ranking in rankings.values()}
    if not bases:
        return ()
    how = {
        "paired": "Tests are paired, sample by sample from the same noise, without the bias of the plug-in values.",
        "intervals": (
            "Where samples or reference of a pair are not stored, and in very long tables, a test compares the "
            "intervals of the two values instead; a difference within their bias says nothing."
        ),
    }
    return (
        "# lowest–highest rank in its column that the tests allow: all pairs at 5 %, Holm.",
        f"{CANNOT_TELL} cannot tell: the tests do not tell it from the best of its column.",
        *(how[basis] for basis in sorted(bases, reverse=True)),
    )


# --- chart ----------------------------------------------------------------------------------------------------------


def chart_data(blocks: Sequence[Block], suite: Suite, ranker: Ranker) -> dict[str, Any]:
    """Points for the interactive charts: numbers with five digits, names once.

    Keys: `axes` ([key, label] of what is spent), `metrics` (id, label, higher), `methods`, `blocks` (title, guidance,
    samples, floors by metric), `points` ([block, method, nfe, [spent ...], [[value, low, high] ...]]).
    """
    metrics = list(dict.fromkeys(m for block in blocks for m in block.metrics))
    methods = sorted({row.method for block in blocks for row in block.rows})
    index = {method: i for i, method in enumerate(methods)}
    held: dict[str, tuple[str, bool]] = {}
    for block in blocks:
        for metric in block.metrics:
            held.setdefault(metric, (block.heading(metric), block.higher_is_better(metric)))
    points: list[Any] = [
        [b, index[row.method], row.nfe, _spending(row, ranker), [_value(row, metric) for metric in metrics]]
        for b, block in enumerate(blocks)
        for row in block.rows
        if row.numbers
    ]
    return {
        "axes": [axis for i, axis in enumerate(_SPENT) if any(p[3][i] is not None for p in points)],
        "columns": [key for key, _ in _SPENT],
        "metrics": [{"id": m, "label": held[m][0], "higher": held[m][1]} for m in metrics],
        "primary": suite.metrics.primary,
        "methods": methods,
        "blocks": [
            {
                "title": f"{block.suite}, {block.title}",
                "guidance": block.guidance,
                "samples": block.samples,
                "floors": [_short(block.floors[m].value) if m in block.floors else None for m in metrics],
            }
            for block in blocks
        ],
        "points": points,
    }


def _spending(row: Row, ranker: Ranker) -> list[float | None]:
    counts = (row.mean_count("cost"), row.mean_count("nfe"), row.mean_count("flops"), ranker.spent(row, "latency"))
    return [_short(value) for value in counts]


def _value(row: Row, metric: str) -> list[float | None] | None:
    found = row.numbers.get(metric)
    return None if found is None else [_short(found.value), _short(found.low, 3), _short(found.high, 3)]


def _short(value: float | None, digits: int = 5) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e6 else short


# --- classes --------------------------------------------------------------------------------------------------------


def heat_maps(block: Block, suite: Suite, per_sample: PerSample) -> list[Table]:
    """Per-sample scores averaged by class, a row per method at the middle budget, first seed.

    A score is shown where its mean over the samples is the metric's value, so that no number stands under a wrong name.
    """
    classes = suite.conditions.classes if suite.conditions.labels == "cyclic" else 0
    if not 1 < classes <= _CLASSES or not block.budgets:
        return []
    budget = middle(block.budgets)
    rows = [row for row in block.rows if row.nfe == budget and row.status == "ok"][:_MOST_METHODS]
    scores = [(row, per_sample(row.records[0].cell.id)) for row in rows]
    tables = []
    for metric in block.metrics:
        part = metric.partition("@")[2]
        found = [(row, held["sample"], held[part]) for row, held in scores if _is_mean(row, metric, held.get(part))]
        if found:
            tables.append(_heat_map(block, metric, budget, classes, found))
    return tables


def middle(budgets: Sequence[int]) -> int:
    """The budget in the middle, the lower of two."""
    return budgets[(len(budgets) - 1) // 2]


def _is_mean(row: Row, metric: str, scores: np.ndarray | None) -> bool:
    value = finite(row.records[0]).get(metric)
    if value is None or scores is None:
        return False
    return len(scores) == value.n and abs(float(np.mean(scores)) - value.value) <= _SAME * max(abs(value.value), 1e-12)


def _heat_map(
    block: Block, metric: str, budget: int, classes: int, found: Sequence[tuple[Row, np.ndarray, np.ndarray]]
) -> Table:
    means = np.array([[scores[sample % classes == k].mean() for k in range(classes)] for _, sample, scores in found])
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    shade = (means - low) / (high - low) if high > low else np.zeros_like(means)
    rows = tuple(
        (Shown(row.method), *(_heat_cell(m, s) for m, s in zip(mean, depth, strict=True)))
        for (row, _, _), mean, depth in zip(found, means, shade, strict=True)
    )
    header = ("method", *(f"class {k}" for k in range(classes)))
    return Table(
        f"{block.direction(metric)} by class at NFE {budget}, {block.title}, seed {block.seeds[0]}", header, rows
    )


def _heat_cell(mean: float, shade: float) -> Shown:
    if not np.isfinite(mean):
        return Shown(MISSING)
    return Shown(significant(float(mean)), float(mean), f"heat h{round(9 * float(shade))}")


# --- preparations ---------------------------------------------------------------------------------------------------


def _bills(blocks: Sequence[Block], metric: str) -> Table | None:
    """What was spent once before sampling, and after how many images that is saved, by cost; None for nothing.

    Against the cheapest row of the block that has a value no worse and prepared nothing; by the clock it stands with
    the latencies.
    """
    rows = []
    for block in blocks:
        sign = -1.0 if block.higher_is_better(metric) else 1.0
        plain = [row for row in block.rows if metric in row.numbers and not bill_of(row)]
        for row in (row for row in block.rows if bill_of(row)):
            bill, mine = bill_of(row), row.mean_count("cost")
            evals = sum(value for name, value in bill.items() if name.startswith("evals."))
            value = row.numbers.get(metric)
            as_good = [r for r in plain if value and sign * r.numbers[metric].value <= sign * value.value]
            costs = [(c, r) for r in as_good if (c := r.mean_count("cost")) is not None]
            cheapest = min(costs, key=lambda pair: pair[0], default=None)
            rows.append(
                (
                    Shown(row.method),
                    Shown(str(row.nfe), row.nfe),
                    Shown(block.title),
                    Shown(number(evals), evals),
                    *(Shown(number(bill.get(k)), bill.get(k)) for k in ("backward", "cost")),
                    Shown(count(bill.get("flops")), bill.get("flops")),
                    Shown(number(bill.get("seconds")), bill.get("seconds")),
                    Shown(f"{cheapest[1].method} at NFE {cheapest[1].nfe}" if cheapest else "none as good"),
                    _break_even(bill.get("cost"), cheapest[0] - mine if cheapest and mine is not None else None),
                )
            )
    header = (
        "method",
        "NFE",
        "block",
        "evaluations",
        "backward",
        "cost",
        "FLOPs",
        "seconds",
        "against",
        "break-even images",
    )
    return (
        Table("What was prepared once, and after how many images its cost is saved", header, tuple(rows))
        if rows
        else None
    )


def bill_of(row: Row) -> Mapping[str, float]:
    """What a row's preparation spent; empty for none."""
    return next((r.bill for r in row.records if r.bill), {})


def _break_even(paid: float | None, saved: float | None) -> Shown:
    if paid is None or saved is None:
        return Shown(MISSING)
    return Shown(f"{np.ceil(paid / saved):.0f}", paid / saved) if saved > 0 else Shown("never")
