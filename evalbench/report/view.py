"""Records arranged for reading: blocks of comparable rows, seeds averaged, floors beside them.

Two numbers stand in one block only if suite version, guidance, N and protocol are the same; ranks are per block.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

from evalbench.report.text import first_line, number, plus_minus
from evalbench.spec import DECLARED, Floor, MetricValue, Record, Suite, content_id
from evalbench.stats import normal_interval

_PER_SEED = ("seed", "seeds")  # protocol facts that may differ between the cells one mean is taken over
MARKS = "†‡§¶#"


class Number(NamedTuple):
    """A metric of a row: the value, or its mean over seeds, with its 95 % interval.

    Attributes:
        value, low, high, bias: as in `MetricValue`. n: samples per seed. seeds: how many were averaged.
        note: caveats that stand beside the number.
    """

    value: float
    low: float | None
    high: float | None
    bias: float | None
    n: int
    seeds: int
    note: str

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def __str__(self) -> str:
        return plus_minus(self.value, self.half)


@dataclass(frozen=True)
class Row:
    """A method at a budget: its records over seeds.

    Attributes:
        method: display name. nfe: budget. records: quality records by seed.
        numbers: by metric id. missing: by metric id, why there is none.
        status: `ok` when at least one seed is. reason: of the first failure.
    """

    method: str
    nfe: int
    records: tuple[Record, ...]
    numbers: Mapping[str, Number]
    missing: Mapping[str, str]
    status: str
    reason: str

    def mean_count(self, name: str) -> float | None:
        """Mean over seeds of a count such as `nfe` or `cost`; None when no record has it."""
        values = [r.counts[name] for r in self.records if r.status == "ok" and name in r.counts]
        return fmean(values) if values else None

    @property
    def declared(self) -> dict[str, float]:
        """Counts that nobody measured, by name: `nfe`, and maybe `depth` and `cost`."""
        names = (name for name in ("nfe", "depth", "cost") if self.mean_count(f"{name}{DECLARED}") is not None)
        return {name: self.mean_count(f"{name}{DECLARED}") or 0.0 for name in names}

    @property
    def footprint(self) -> Mapping[str, float]:
        """Bits, bytes and bit operations of its quantised network, the same for every seed; empty where none is."""
        return next((r.footprint for r in self.records if r.footprint), {})

    @property
    def evals(self) -> float | None:
        """Network rows per sample over all roles."""
        roles = {name for r in self.records for name in r.counts if name.startswith("evals.")}
        values = [value for role in roles if (value := self.mean_count(role)) is not None]
        return sum(values) if values else None


@dataclass(frozen=True)
class Block:
    """Rows that may be compared with each other.

    Attributes:
        rows: sorted by method and NFE. samples: N. protocol: hash; facts: what was hashed.
        metrics: ids that have a value somewhere, in the suite's order. floors: by metric id, at this N.
        spoiled: what the metrics say of perfect samples that were spoiled, at this N, and of the reference itself: by
            what was done, then by metric id.
        marks: note -> footnote mark. tag: tells blocks apart whose guidance and N are the same.
    """

    suite: str
    version: int
    guidance: float
    samples: int
    seeds: tuple[int, ...]
    protocol: str
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    floors: Mapping[str, Floor]
    spoiled: Mapping[str, Mapping[str, Floor]] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    tag: str = ""

    @property
    def methods(self) -> list[str]:
        """Display names, sorted."""
        return sorted({row.method for row in self.rows})

    @property
    def budgets(self) -> list[int]:
        """NFE budgets, ascending."""
        return sorted({row.nfe for row in self.rows})

    @property
    def title(self) -> str:
        """What all rows share, for headings."""
        parts = [f"guidance {self.guidance:g}", f"N = {self.samples}" if self.samples else "", self.tag]
        return ", ".join(part for part in parts if part)

    def facts_of(self, metric: str) -> dict[str, Any]:
        """What a row of a figure's CSV says of the block: suite, guidance, samples, protocol, metric."""
        return {
            "suite": self.suite,
            "guidance": self.guidance,
            "samples": self.samples,
            "protocol": self.protocol,
            "metric": metric,
        }

    def row(self, method: str, nfe: int) -> Row | None:
        """The row, or None when it was not planned."""
        return next((r for r in self.rows if (r.method, r.nfe) == (method, nfe)), None)

    def of(self, method: str) -> list[Row]:
        """The rows of a method by NFE."""
        return [r for r in self.rows if r.method == method]

    def mark(self, found: Number) -> str:
        """Footnote marks of a number's notes."""
        return "".join(self.marks[note] for note in notes_of(found))

    def best(self, metric: str, rows: Iterable[Row]) -> Row | None:
        """The row with the best value among these; None when fewer than two have one."""
        scored = [row for row in rows if metric in row.numbers]
        if len(scored) < 2:
            return None
        sign = -1.0 if self.higher_is_better(metric) else 1.0
        return min(scored, key=lambda row: sign * row.numbers[metric].value)

    def higher_is_better(self, metric: str) -> bool:
        """A fact of the metric, as the records carry it."""
        return any(value.higher_is_better for value in self._values(metric))

    def unit(self, metric: str) -> str:
        """A fact of the metric, as the records carry it."""
        return next((value.unit for value in self._values(metric) if value.unit), "")

    def direction(self, metric: str) -> str:
        """The metric and which way is better: `fd@fashion64 ↓`."""
        return f"{metric} {'↑' if self.higher_is_better(metric) else '↓'}"

    def heading(self, metric: str) -> str:
        """The metric with direction and unit: `paired-p90@identity ↓ [RMS per coordinate]`."""
        unit = f" [{self.unit(metric)}]" if self.unit(metric) else ""
        return f"{self.direction(metric)}{unit}"

    def _values(self, metric: str) -> list[MetricValue]:
        return [r.metrics[metric] for row in self.rows for r in row.records if metric in r.metrics]


class Trouble(NamedTuple):
    """A cell, or a metric of some cells, that has no value, and why.

    Attributes:
        where: which cells. what: `quality`, `latency` or a metric id. status: `error`, `unsupported` or `missing`.
    """

    where: str
    what: str
    status: str
    reason: str


def metric_ids(records: Iterable[Record], suite: Suite) -> tuple[str, ...]:
    """Metric ids in the suite's order, then what else the records hold, sorted."""
    held = {name for r in records for name in (*r.metrics, *r.missing)}
    return (*suite.metrics.names, *sorted(held - set(suite.metrics.names)))


def finite(record: Record) -> dict[str, MetricValue]:
    """The metrics of a record that are numbers; NaN is never a score."""
    return {name: value for name, value in record.metrics.items() if math.isfinite(value.value)}


def why_missing(record: Record) -> dict[str, str]:
    """The reason for each metric that has no value."""
    not_finite = {name: "not a finite number" for name in record.metrics if name not in finite(record)}
    return {**record.missing, **not_finite}


def reason(record: Record) -> str:
    """One line that says why a cell has no value; empty when it has one."""
    if record.status == "ok":
        return ""
    message = first_line(record.failure.message) if record.failure else ""
    if record.status == "unsupported":
        return message if message.startswith("not supported") else f"not supported: {message or 'no reason recorded'}"
    return message or (record.failure.type if record.failure else "no reason recorded")


def display_names(records: Iterable[Record]) -> dict[str, str]:
    """Cell id -> method name; where one text stands for several settings or versions, with a part of their hash."""
    variants: defaultdict[str, set[str]] = defaultdict(set)
    held = list(records)
    for record in held:
        variants[record.cell.method].add(record.cell.settings)
    return {
        r.cell.id: r.cell.method if len(variants[r.cell.method]) == 1 else f"{r.cell.method} #{r.cell.settings[:6]}"
        for r in held
    }


def blocks(records: Sequence[Record], suite: Suite) -> list[Block]:
    """All quality records as blocks, sorted by guidance and N, largest N first."""
    quality = sorted((r for r in records if r.kind == "quality"), key=_order)
    names = display_names(quality)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(quality, key=lambda r: r.status != "ok"):
        groups.setdefault(_group(record, groups), []).append(record)
    valued = {name for r in quality for name in finite(r)} | {suite.metrics.primary}
    metrics = tuple(name for name in metric_ids(quality, suite) if name in valued)
    found = [_block(members, suite, metrics, names) for members in groups.values()]
    return _tagged(sorted(found, key=lambda b: (b.suite, b.version, b.guidance, -b.samples, b.protocol)))


def _tagged(found: Sequence[Block]) -> list[Block]:
    """Blocks whose titles differ: those that differ in protocol alone say so."""
    titles = Counter(block.title for block in found)
    return [
        block if titles[block.title] == 1 else replace(block, tag=f"protocol {block.protocol[:8] or 'unknown'}")
        for block in found
    ]


def troubles(records: Iterable[Record]) -> list[Trouble]:
    """Every cell and every metric without a value, with the reason; a reason that many cells share stands once."""
    held = sorted(records, key=_order)
    names = display_names(held)
    found = [Trouble(_where(r, names), r.kind, r.status, reason(r)) for r in held if r.status != "ok"]
    shared: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in held:
        for metric, why in why_missing(r).items() if r.status == "ok" else ():
            shared[metric, first_line(why)].append(r)
    for (metric, why), cells in sorted(shared.items()):
        found.append(Trouble(_where_all(cells, names), metric, "missing", why))
    return found


def _where(record: Record, names: Mapping[str, str]) -> str:
    cell = record.cell
    guidance = "" if cell.guidance == 1 else f", guidance {cell.guidance:g}"
    seed = "" if cell.seed == 0 else f", seed {cell.seed}"
    return f"{names[cell.id]} at NFE {cell.nfe}{guidance}{seed}"


def _where_all(cells: Sequence[Record], names: Mapping[str, str]) -> str:
    if len(cells) < 4:
        return "; ".join(_where(r, names) for r in cells)
    return f"{len(cells)} cells of {', '.join(dict.fromkeys(names[r.cell.id] for r in cells))}"


def environments(records: Iterable[Record]) -> list[tuple[dict[str, Any], int]]:
    """The distinct environments with the number of records from each, most used first."""
    seen: dict[str, tuple[dict[str, Any], int]] = {}
    for record in sorted(records, key=_order):
        if record.environment:
            key = content_id(record.environment)
            seen[key] = (record.environment, seen.get(key, ({}, 0))[1] + 1)
    return sorted(seen.values(), key=lambda item: -item[1])


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as `a.b: text`."""
    result: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            result[f"{prefix}{key}"] = ", ".join(str(item) for item in value)
        elif value is not None and value != "" and value != {}:
            result[f"{prefix}{key}"] = f"{value:g}" if isinstance(value, float) else str(value)
    return result


def notes_of(found: Number) -> list[str]:
    """The single notes of a number."""
    return [note.strip() for note in found.note.split(";") if note.strip()]


def floor_text(floor: Floor) -> str:
    """A floor with its standard deviation."""
    return number(floor.value) if floor.sd is None else plus_minus(floor.value, floor.sd)


def _order(record: Record) -> tuple[Any, ...]:
    cell = record.cell
    return (cell.suite, cell.guidance, cell.seed, cell.method, cell.nfe, cell.id, record.kind)


def _group(record: Record, groups: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Key of the block; a failure, which may know neither N nor protocol, joins the first block that it fits."""
    cell = record.cell
    place = (cell.suite, cell.suite_version, cell.generation, cell.guidance)
    facts = {key: value for key, value in record.protocol_facts.items() if key not in _PER_SEED}
    key = (*place, record.samples, content_id(facts) if facts else record.protocol)
    if record.status == "ok":
        return key
    fits = [g for g in groups if g[:4] == place and record.samples in (0, g[4])]
    return key if key in fits or not fits else fits[0]


def _block(members: Sequence[Record], suite: Suite, metrics: tuple[str, ...], names: Mapping[str, str]) -> Block:
    cells: defaultdict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in sorted(members, key=_order):
        cells[names[record.cell.id], record.cell.nfe].append(record)
    rows = tuple(_row(method, nfe, found) for (method, nfe), found in sorted(cells.items()))
    lead = next((r for r in members if r.status == "ok"), members[0])
    floors = {f.metric: f for f in suite.floors if f.samples == lead.samples and f.what == "floor"}
    notes = [note for row in rows for found in row.numbers.values() for note in notes_of(found)]
    return Block(
        suite=lead.cell.suite,
        version=lead.cell.suite_version,
        guidance=lead.cell.guidance,
        samples=lead.samples,
        seeds=tuple(sorted({r.cell.seed for r in members})),
        protocol=lead.protocol,
        facts=lead.protocol_facts,
        rows=rows,
        metrics=metrics,
        floors=floors,
        spoiled=_spoiled(suite, lead.samples),
        marks={note: _mark(i) for i, note in enumerate(dict.fromkeys(notes))},
    )


def _spoiled(suite: Suite, samples: int) -> dict[str, dict[str, Floor]]:
    found: dict[str, dict[str, Floor]] = defaultdict(dict)
    for floor in suite.floors:
        if floor.what != "floor" and (floor.samples == samples or floor.what == "itself"):
            found[floor.what][floor.metric] = floor
    return dict(found)


def _mark(index: int) -> str:
    return MARKS[index % len(MARKS)] * (index // len(MARKS) + 1)


def _row(method: str, nfe: int, records: list[Record]) -> Row:
    good = [r for r in records if r.status == "ok"]
    names = {name for r in good for name in finite(r)}
    numbers = {name: _mean([finite(r)[name] for r in good if name in finite(r)], len(records)) for name in names}
    missing = {name: why for r in good for name, why in why_missing(r).items() if name not in numbers}
    failures = [r for r in records if r.status != "ok"]
    status = "ok" if good else failures[0].status
    return Row(method, nfe, tuple(records), numbers, missing, status, reason(failures[0]) if failures else "")


def _mean(values: Sequence[MetricValue], planned: int) -> Number:
    """Mean over seeds, whose samples are independent; the interval from the standard errors."""
    notes = list(dict.fromkeys(note.strip() for v in values for note in v.note.split(";") if note.strip()))
    if len(values) < planned:
        notes.append(f"{len(values)} of {planned} seeds")
    mean = fmean(v.value for v in values)
    low, high = _interval(values, mean)
    biases = [v.bias for v in values if v.bias is not None]
    bias = fmean(biases) if len(biases) == len(values) else None
    return Number(mean, low, high, bias, values[0].n, len(values), "; ".join(notes))


def _interval(values: Sequence[MetricValue], mean: float) -> tuple[float | None, float | None]:
    first = values[0]
    if len(values) == 1 and first.low is not None and first.high is not None:
        return first.low, first.high
    errors = [v.se for v in values if v.se is not None]
    if len(errors) < len(values):
        return None, None
    found = normal_interval(mean, math.sqrt(sum(se * se for se in errors)) / len(errors))
    return found.low, found.high
