"""Numbers from papers, with source and protocol, and what a measured number says beside them. No torch, no ray.

They lie in `results/published/*.toml` and are never mixed with what was measured: every text that shows one says
`published`. A number is held against ours only where suite, metric, N, NFE and guidance are the same; a minimum of
several runs is held against the minimum of as many of ours, never against a mean.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from evalbench.errors import UserError
from evalbench.spec import SCHEMA, Frozen, validation_line

UNSTATED = "unstated"  # key of a value whose NFE the source does not state


class Band(Frozen):
    """How near a measurement should come.

    Attributes:
        relative: of the published value. absolute: in the metric's unit. absolute_below: published values from here on
            have the relative band alone; 0 is no limit.
    """

    relative: float = Field(0.0, ge=0)
    absolute: float = Field(0.0, ge=0)
    absolute_below: float = Field(0.0, ge=0)


class Row(Frozen):
    """A method of a table.

    Attributes:
        method: as the paper calls it. arm: canonical text of the method here that is the same one; empty without.
        values: by NFE, `unstated` where the source does not say it. window: least and largest accepted value.
        metric, name, higher_is_better: where they differ from the table's.
    """

    method: str
    arm: str = ""
    values: dict[str, float] = Field(default_factory=dict)
    window: tuple[float, float] | None = None
    metric: str = ""
    name: str = ""
    higher_is_better: bool | None = None

    @model_validator(mode="after")
    def _has_numbers(self) -> Row:
        if bool(self.values) == (self.window is not None):
            raise ValueError(f"row '{self.method}' has values or a window, and not both")
        if any(not (key == UNSTATED or (key.isdecimal() and int(key) > 0)) for key in self.values):
            raise ValueError(f"values of '{self.method}': keys are NFE, or {UNSTATED}")
        if self.window and self.window[0] > self.window[1]:
            raise ValueError(f"window of '{self.method}': the least value comes first")
        return self


class Table(Frozen):
    """A table of a paper.

    Attributes:
        id: unique. table: what it shows. suite: name of the suite here with the same data, N and reference; empty
            without. model: of the paper. metric: id here with the same recipe; empty without. name: the paper's word.
        statistic: `one run`, `mean`, `minimum` of `runs` runs (0: their number is not stated), or `window`.
        samples: N. guidance: scale. baseline: the row that is the paper's own baseline.
        nfe_convention: what the source counts. protocol: other facts. band: see `Band`. source: if not the file's.
    """

    id: str
    table: str
    suite: str = ""
    model: str
    metric: str = ""
    name: str = "FID"
    higher_is_better: bool = False
    statistic: Literal["one run", "mean", "minimum", "window"] = "one run"
    runs: int = Field(0, ge=0)
    samples: int | None = Field(None, gt=0)
    guidance: float = 1.0
    baseline: str = ""
    nfe_convention: str = ""
    protocol: dict[str, str] = Field(default_factory=dict)
    band: Band | None = None
    source: str = ""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _has_its_baseline(self) -> Table:
        if self.baseline and self.baseline not in {row.method for row in self.rows}:
            raise ValueError(f"table '{self.id}': baseline '{self.baseline}' is none of its rows")
        return self


class Paper(Frozen):
    """A file of `results/published/`."""

    schema_: int = Field(SCHEMA, alias="schema")
    paper: str
    source: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Beside:
    """What our number says beside a published one.

    Attributes:
        text: a sentence that says which of the two is published. within: whether ours lies in the band or window; None
            where the two are not compared or there is no band.
    """

    text: str
    within: bool | None


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        nfe: None where the source does not state it. value: None for a window. window: None for a value.
        origin: where the number was read. baseline: name and value of the table's baseline at the same NFE, or None.
    """

    paper: str
    origin: str
    table: Table
    row: Row
    nfe: int | None
    value: float | None
    window: tuple[float, float] | None
    baseline: tuple[str, float] | None

    @property
    def metric(self) -> str:
        """Metric id here; empty when none has the same recipe."""
        return self.row.metric or self.table.metric

    @property
    def name(self) -> str:
        """The paper's word for the metric."""
        return self.row.name or self.table.name

    def beside(self, ours: float, half: float | None = None, *, samples: int | None = None, runs: int = 1) -> Beside:
        """`published 2.77, ours 2.81 ± 0.03, within 4 %`.

        Args:
            ours: one run's value, the mean over `runs` seeds, or their minimum where the table holds minima.
            half: half of its 95 % interval. samples: our N, of each run.
        """
        said, mine = f"published {self._text()}", f"ours {_plus_minus(ours, half)}"
        reason = self._apart(samples, runs)
        if reason:
            return Beside(f"{said}, {mine}; not compared: {reason}", None)
        if self.window:
            within = self.window[0] <= ours <= self.window[1]
            return Beside(f"{said}, {mine}, {'inside' if within else 'outside'}", within)
        assert self.value is not None
        gap = (ours - self.value) / self.value
        if self.table.band is None:
            return Beside(f"{said}, {mine}, {_percent(gap)}", None)
        holding = next((text for text, room in self._room() if abs(ours - self.value) <= room), "")
        if holding:
            return Beside(f"{said}, {mine}, within {holding}", True)
        widest = max(self._room(), key=lambda one: one[1])[0]
        return Beside(f"{said}, {mine}, {_percent(gap)}: outside {widest}", False)

    def _text(self) -> str:
        if self.window:
            return f"window {self.window[0]:g} to {self.window[1]:g}"
        least = {"minimum": " (minimum of runs)", "mean": " (mean)"}.get(self.table.statistic, "")
        if self.table.statistic == "minimum" and self.table.runs:
            least = f" (minimum of {self.table.runs} runs)"
        return f"{self.value:g}{least}"

    def _apart(self, samples: int | None, runs: int) -> str:
        """Why the two are not held against each other."""
        table = self.table
        if table.samples is not None and samples is not None and samples != table.samples:
            return f"N = {table.samples:,} there, {samples:,} here"
        if table.statistic == "minimum" and runs != table.runs:
            several = f"{table.runs} runs" if table.runs else "an unstated number of runs"
            return f"a minimum of {several} there, {runs} here"
        return ""

    def _room(self) -> list[tuple[str, float]]:
        """The band in words and in the metric's unit, narrow words first."""
        assert self.table.band is not None
        assert self.value is not None
        band, room = self.table.band, []
        if band.relative:
            room.append((f"{100 * band.relative:g} %", band.relative * abs(self.value)))
        if band.absolute and (not band.absolute_below or abs(self.value) < band.absolute_below):
            room.append((f"{band.absolute:g}", band.absolute))
        return room or [("0", 0.0)]


def _percent(gap: float) -> str:
    return f"{100 * abs(gap):.2g} % {'above' if gap > 0 else 'below'}" if gap else "equal"


def _plus_minus(value: float, half: float | None) -> str:
    return f"{value:.4g}" if half is None else f"{value:.4g} ± {half:.2g}"


def folder() -> Path:
    """Where the files lie: inside an installed package, or in a checkout."""
    installed = Path(__file__).parent / "published_tables"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "results" / "published"


def published(suite: str | None = None, where: Path | None = None) -> tuple[Published, ...]:
    """All published numbers, or those of a suite, in the order of files and tables.

    Args:
        suite: name; None for all. where: folder of TOML files; None for those that evalbench brings along.

    Raises:
        UserError: a file that is not of the format, or two tables of one id.
    """
    found: list[Published] = []
    ids: dict[str, str] = {}
    for file in sorted((where or folder()).glob("*.toml")):
        paper = read_paper(file)
        for table in paper.tables:
            if table.id in ids:
                both = f"{ids[table.id]} and in {file.name}"
                raise UserError(f"published table '{table.id}' stands in {both}; rename one")
            ids[table.id] = file.name
            if suite is None or table.suite == suite:
                found += _numbers(paper, table)
    return tuple(found)


def tables(where: Path | None = None) -> dict[str, Table]:
    """Published tables by id.

    Raises:
        UserError: as `published`.
    """
    return {number.table.id: number.table for number in published(where=where)}


def read_paper(file: Path) -> Paper:
    """One file.

    Raises:
        UserError: not TOML, an unknown or missing key, a value out of range.
    """
    where = f"published numbers '{file}'"
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    if content.get("schema") != SCHEMA:
        raise UserError(f"{where}: schema {content.get('schema')}, this evalbench reads {SCHEMA}")
    try:
        return Paper(**content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of the checks above; what they looked at is a whole table
            raise UserError(f"{where}: {first['ctx']['error']}") from None
        raise UserError(validation_line(error, where, Paper)) from None


def _numbers(paper: Paper, table: Table) -> list[Published]:
    base = next((row.values for row in table.rows if row.method == table.baseline), {})
    origin = table.source or paper.source
    found = []
    for row in table.rows:
        if row.window:
            found.append(Published(paper.paper, origin, table, row, None, None, row.window, None))
        for key, value in row.values.items():
            nfe = None if key == UNSTATED else int(key)
            beside = (table.baseline, base[key]) if key in base else None
            found.append(Published(paper.paper, origin, table, row, nfe, value, None, beside))
    return found


def standing_beside(
    numbers: Sequence[Published], *, arm: str, metric: str, nfe: int, guidance: float
) -> list[Published]:
    """The published numbers of a row of a run: same method, metric, NFE and guidance."""
    return [
        one
        for one in numbers
        if (one.row.arm, one.metric, one.nfe, one.table.guidance) == (arm, metric, nfe, guidance) and arm and metric
    ]
