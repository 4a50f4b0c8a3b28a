"""records x records -> verdicts and exit codes.

Cells are joined by their key (suite, method, NFE, guidance, seed), never by their row. A verdict is about the suite's
primary metric: the 95 % interval of the paired difference (metrics/differences.py) against a tolerance, Holm over the
cells of the gate. What cannot be compared has a reason, and a gate never passes on it in silence. See docs/compare.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from evalbench import registry
from evalbench.errors import EvalbenchError, UserError, unknown
from evalbench.metrics.common import Array
from evalbench.metrics.differences import ROUTES, Difference, Route, TooFewSamples
from evalbench.spec import (
    GRID_SAMPLES,
    SCHEMA,
    Cell,
    Chunk,
    Floor,
    MetricValue,
    Record,
    Suite,
    chunks_of,
    content_id,
    parse_suite,
)
from evalbench.stats import holm, p_beyond, t_quantile
from evalbench.store import Store
from evalbench.suite_references import check_reference_file, read_reference

if TYPE_CHECKING:
    from evalbench.report import ranking

Word: TypeAlias = Literal["better", "worse", "indistinguishable", "undecided", "not comparable"]
SameWord: TypeAlias = Literal["bit-identical", "same to rounding", "changed", "not comparable"]

FINE, REGRESSION, NOT_COMPARABLE = 0, 1, 3
LEVEL, POWER = 0.05, 0.8  # two-sided level of a gate, and the power that the smallest effect is given for
RELATIVE = 0.02  # of the base value: the default tolerance of what has no other
ABSOLUTE: Mapping[str, float] = {"accuracy": 0.01, "align": 0.005}  # default tolerances in the metric's own unit
FORMATS = ("console", "md", "json")
_CELLS_HELD = 3  # of each run, in memory at a time: a cell and its fine solution, for all metrics


# --- the words ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What a metric changed by.

    Attributes:
        metric: id. unit, higher_is_better: of the metric. statistic: what is compared, in words.
        base, new: table values at this N (for orientation; their difference is not the statistic).
        difference: new - base in the metric's unit, se its standard error with `df` degrees of freedom, [low, high] its
            95 % interval by Student's t.
        tolerance: differences up to this do not matter.
    """

    metric: str
    unit: str
    higher_is_better: bool
    statistic: str
    base: float
    new: float
    difference: float
    se: float
    n: int
    tolerance: float
    df: float = math.inf

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        return t_quantile(LEVEL, self.df) * self.se

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.difference - self.half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.difference + self.half

    @property
    def loss(self) -> float:
        """The difference, positive when new is worse."""
        return -self.difference if self.higher_is_better else self.difference

    @property
    def p(self) -> float:
        """Two-sided p of "the difference is within the tolerance"; at most 0.05 iff the interval is beyond it."""
        return float(p_beyond(self.difference, self.tolerance, self.se, self.df))

    def detectable(self, tests: int = 1) -> float:
        """The smallest true difference that is found with 80 % power among so many tests (Bonferroni level)."""
        power = t_quantile(2 * (1 - POWER), self.df)
        return self.tolerance + (t_quantile(LEVEL / tests, self.df) + power) * self.se

    def samples_to_decide(self, tests: int = 1) -> int | None:
        """N at which the interval lies on one side of the tolerance, as se ~ N^-1/2; None at the tolerance itself."""
        margin = abs(abs(self.difference) - self.tolerance)
        if margin <= 1e-6 * self.se:
            return None
        return math.ceil(self.n * (t_quantile(LEVEL / tests, self.df) * self.se / margin) ** 2)


def word_of(effect: Effect, *, rejected: bool) -> Word:
    """The verdict on a difference.

    Args:
        effect: what was measured. rejected: Holm lets "within the tolerance" be rejected.
    """
    if rejected:
        return "worse" if effect.loss > 0 else "better"
    if -effect.tolerance <= effect.low and effect.high <= effect.tolerance:
        return "indistinguishable"
    return "undecided"


@dataclass(frozen=True)
class Verdict:
    """The outcome for one cell.

    Attributes:
        base_method, method: equal unless methods were compared deliberately.
        word: the verdict. reason: why it is not comparable. gates: whether a missing comparison fails the gate; a cell
            that had no value in BASE cannot get worse.
        effect: on the primary metric; None when not comparable. detectable: see `Effect.detectable`.
        samples_to_decide: for `undecided`. notes: what must stand beside it.
        descriptive: the other metrics, without verdict; outside the error control.
    """

    suite: str
    suite_version: int
    base_method: str
    method: str
    nfe: int
    guidance: float
    seed: int
    metric: str
    word: Word
    reason: str = ""
    gates: bool = True
    effect: Effect | None = None
    detectable: float | None = None
    samples_to_decide: int | None = None
    notes: tuple[str, ...] = ()
    descriptive: tuple[Effect, ...] = ()

    @property
    def title(self) -> str:
        """The cell in words."""
        methods = self.method if self.method == self.base_method else f"{self.base_method} → {self.method}"
        return f"{methods}, NFE {self.nfe}, guidance {self.guidance:g}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Verdicts of two runs, in the order of the key.

    Attributes:
        base, new: the folders as given. only_new: cells without a partner in BASE; they fail nothing.
    """

    base: str
    new: str
    verdicts: tuple[Verdict, ...]
    only_new: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells by word, every word named."""
        words: tuple[Word, ...] = ("worse", "undecided", "not comparable", "indistinguishable", "better")
        return {word: sum(v.word == word for v in self.verdicts) for word in words}

    def exit_code(self, *, strict: bool = False) -> int:
        """0 fine; 1 a cell is worse (`strict`: or undecided); 3 nothing compared, or a cell that BASE has was not."""
        words = {v.word for v in self.verdicts}
        if "worse" in words or (strict and "undecided" in words):
            return REGRESSION
        if words <= {"not comparable"} or any(v.gates and v.word == "not comparable" for v in self.verdicts):
            return NOT_COMPARABLE
        return FINE


# --- two runs -------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What makes two cells partners. The suite's version and the method's settings are reasons, not parts of it."""

    suite: str
    method: str
    nfe: int
    guidance: float
    seed: int


class _NotComparable(Exception):
    """The message is the reason."""


@dataclass(frozen=True)
class Run:
    """One side of a comparison: a run folder that is only read."""

    store: Store
    _held: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # the cells used last, oldest first
    _built: dict[str, dict[str, str]] = field(default_factory=dict)  # parts of a cell's id by method text

    @cached_property
    def suite(self) -> Suite:
        """The suite's facts, from the manifest.

        Raises:
            EvalbenchError: the manifest is damaged, or from a newer evalbench.
        """
        manifest, where = self.store.manifest(), f"manifest of {self.store.folder}"
        if not isinstance(manifest, dict) or not isinstance(manifest.get("suite"), dict):
            raise EvalbenchError(f"{where} names no suite; the file is corrupt, move the folder away and run again")
        if manifest.get("schema") != SCHEMA:
            raise EvalbenchError(f"{where} has schema {manifest.get('schema')}, this evalbench reads {SCHEMA}; upgrade")
        try:
            return parse_suite(manifest["suite"], "", where=where)
        except UserError as error:
            raise EvalbenchError(str(error)) from None

    def cells(self, method: str | None) -> dict[Key, Record]:
        """Quality records by key; with `method`, that method's alone, under the key of any method.

        Raises:
            UserError: no cell of that method.
        """
        records = [record for record in self.store.records() if record.kind == "quality"]
        if method is None:
            return {key_of(record.cell): record for record in records}
        found = {key_of(record.cell)._replace(method=""): record for record in records if record.cell.method == method}
        if not found:
            raise unknown("method", method, {record.cell.method for record in records}, where=str(self.store.folder))
        return found

    def rows(self, cell_id: str, samples: int, size: int, name: str) -> Array:
        """An array of a cell's chunks as float64 (N, D).

        Raises:
            _NotComparable: chunks or the array are missing. EvalbenchError: a chunk is damaged.
        """
        arrays = self._arrays(cell_id, samples, size)
        if name not in arrays:
            raise _NotComparable(f"feature arrays missing: '{name}' is not in the chunks of {self.store.folder}")
        return arrays[name].reshape(len(arrays[name]), -1).astype(np.float64)

    def _arrays(self, cell_id: str, samples: int, size: int) -> dict[str, np.ndarray]:
        """All per-sample arrays of a cell but its images, in their own type."""
        key = f"{cell_id}/{samples}/{size}"
        if key not in self._held:
            chunks = [self._chunk(chunk) for chunk in chunks_of(cell_id, samples, size)]
            names = set.intersection(*(set(chunk) for chunk in chunks)) - {"images"}
            self._held[key] = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
            if len(self._held) > _CELLS_HELD:
                del self._held[next(iter(self._held))]
        self._held[key] = self._held.pop(key)
        return self._held[key]

    def _chunk(self, chunk: Chunk) -> dict[str, np.ndarray]:
        if not self.store.chunk_file(chunk).is_file():
            raise _NotComparable(f"feature arrays missing: {self.store.chunk_file(chunk)} does not exist")
        return self.store.read_chunk(chunk)

    def errors(self, record: Record, name: str) -> Array:
        """Error of each sample against the fine solution from the same noise, RMS per coordinate, (N,)."""
        size, cell = _chunk_size(record), self._solution_cell(record)
        samples = self.rows(record.cell.id, record.samples, size, name)
        try:
            fine = self.rows(cell.id, record.samples, size, name)
        except _NotComparable as error:
            raise _NotComparable(f"of the fine solution: {error}") from None
        return np.asarray(np.sqrt(np.mean((samples - fine) ** 2, axis=1)))

    def _solution_cell(self, record: Record) -> Cell:
        facts = record.protocol_facts.get("solution")
        if not facts:
            raise _NotComparable("the suite has no fine solution to pair with")
        method = facts["method"]
        if method not in self._built:
            try:
                chain = registry.build_method(method)
            except UserError as error:
                raise _NotComparable(f"the fine solution's method cannot be built here: {error}") from None
            self._built[method] = {"method": chain.text, "settings": content_id(chain.settings())}
        return record.cell.model_copy(update={**self._built[method], "nfe": facts["nfe"]})


def _chunk_size(record: Record) -> int:
    if record.chunk is None:
        raise _NotComparable("the record does not say its protocol")
    return record.chunk


def key_of(cell: Cell) -> Key:
    """What a cell is joined by."""
    return Key(cell.suite, cell.method, cell.nfe, cell.guidance, cell.seed)


def compare_runs(
    base: Path | str,
    new: Path | str,
    tolerances: Mapping[str, float] | None = None,
    *,
    base_method: str | None = None,
    new_method: str | None = None,
) -> Comparison:
    """Compare two runs cell by cell.

    Args:
        base, new: run folders; they may be one folder when two methods are named.
        tolerances: by metric id, in the metric's unit; the others have the defaults of docs/compare.md.
        base_method, new_method: compare these two methods, by canonical text, instead of every method with itself.

    Raises:
        UserError: not a run folder, an unknown metric or method, one method without the other.
        EvalbenchError: a record, manifest or chunk cannot be read, or a newer evalbench wrote it.
    """
    if (base_method is None) != (new_method is None):
        raise UserError("name both methods to compare, of BASE and of NEW, or neither")
    runs = Run(Store(base)), Run(Store(new))
    _check_tolerances(tolerances or {}, [run.suite for run in runs])
    olds, news = runs[0].cells(base_method), runs[1].cells(new_method)
    joined = [_compare(runs, olds[key], news.get(key), tolerances or {}) for key in sorted(olds)]
    only_new = tuple(_title(news[key].cell) for key in sorted(news.keys() - olds.keys()))
    if not olds.keys() & news.keys():
        joined = []
    return Comparison(str(base), str(new), tuple(_decide(joined)), only_new)


def _title(cell: Cell) -> str:
    return f"{cell.suite}: {cell.method}, NFE {cell.nfe}, guidance {cell.guidance:g}, seed {cell.seed}"


def _check_tolerances(tolerances: Mapping[str, float], suites: Iterable[Suite]) -> None:
    known = {name for suite in suites for name in (*suite.metrics.names, *suite.metrics.optional)}
    for name, value in tolerances.items():
        if name not in known:
            raise unknown("metric", name, known, where="--tolerance")
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--tolerance {name}={value}: a tolerance is a number of 0 or more")


def _decide(verdicts: Sequence[Verdict]) -> Iterable[Verdict]:
    """Words for the cells that have an effect: Holm over all of them."""
    effects = [v.effect for v in verdicts if v.effect is not None]
    rejected = iter(holm([effect.p for effect in effects]))
    for v in verdicts:
        if v.effect is None:
            yield v
            continue
        word = word_of(v.effect, rejected=next(rejected))
        notes = v.notes
        if word == "undecided" and v.effect.p <= LEVEL:
            notes = (*notes, f"beyond the tolerance alone, not among {len(effects)} cells (Holm)")
        yield replace(
            v,
            word=word,
            notes=notes,
            detectable=v.effect.detectable(len(effects)),
            samples_to_decide=v.effect.samples_to_decide(len(effects)) if word == "undecided" else None,
        )


# --- one cell -------------------------------------------------------------------------------------------------------


def _compare(runs: tuple[Run, Run], old: Record, new: Record | None, tolerances: Mapping[str, float]) -> Verdict:
    """The effect on a cell, its word still open; or why there is none."""
    cell, suite = old.cell, runs[0].suite
    facts: dict[str, Any] = {
        "suite": cell.suite,
        "suite_version": cell.suite_version,
        "base_method": cell.method,
        "method": new.cell.method if new else cell.method,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "metric": suite.metrics.primary,
    }
    try:
        if new is None:
            raise _NotComparable("missing in NEW")
        pair = _Pair(runs, old, new, tolerances)
        pair.check()
        effect, notes = pair.effect(suite.metrics.primary)
        others = [name for name in suite.metrics.names if name != suite.metrics.primary]
        return Verdict(
            **facts, word="undecided", effect=effect, notes=notes, descriptive=tuple(pair.effects_of(others))
        )
    except _NotComparable as error:
        return Verdict(**facts, word="not comparable", reason=str(error), gates=old.status == "ok")


@dataclass(frozen=True)
class _Pair:
    """Two records of one key."""

    runs: tuple[Run, Run]
    old: Record
    new: Record
    tolerances: Mapping[str, float]

    @property
    def _records(self) -> tuple[Record, Record]:
        return self.old, self.new

    def check(self) -> None:
        """Raise _NotComparable with the first reason that concerns the whole cell."""
        for side, record in zip(("BASE", "NEW"), self._records, strict=True):
            if record.status != "ok":
                message = record.failure.message if record.failure else record.status
                raise _NotComparable(f"{record.status} row in {side}: {message}")
        a, b = self.old.cell, self.new.cell
        if a.suite_version != b.suite_version:
            raise _NotComparable(f"suite version differs: {a.suite_version} in BASE, {b.suite_version} in NEW")
        if a.method == b.method and a.settings != b.settings:
            raise _NotComparable("method version or settings differ under one text; name both methods to compare them")
        if self.old.samples != self.new.samples:
            raise _NotComparable(f"N differs: {self.old.samples} in BASE, {self.new.samples} in NEW")
        sides = [{k: r.protocol_facts.get(k) for k in ("generation", "seed", "guidance")} for r in self._records]
        _same(sides[0], sides[1], "")
        if a.generation != b.generation:
            raise _NotComparable("generation facts differ")

    def effect(self, metric: str) -> tuple[Effect, tuple[str, ...]]:
        """The effect on a metric, and notes.

        Raises:
            _NotComparable: with the reason.
        """
        route, found = self.difference(metric)
        values = [self._value(side, r, metric) for side, r in zip(("BASE", "NEW"), self._records, strict=True)]
        return self._effect(metric, route, values, found), self._notes(found)

    def difference(self, metric: str) -> tuple[Route, Difference]:
        """new - base of a metric, and how it was found.

        Raises:
            _NotComparable: with the reason.
        """
        name, _, arg = metric.partition("@")
        if name not in ROUTES:
            raise _NotComparable(f"no paired statistic for '{metric}'")
        route = ROUTES[name]
        self._check_protocol(route, arg)
        for side, record in zip(("BASE", "NEW"), self._records, strict=True):
            self._value(side, record, metric)
        reference = self._reference(route.reference.format(arg)) if route.reference else {}
        base, new = (self._rows(run, record, route, arg) for run, record in zip(self.runs, self._records, strict=True))
        try:
            return route, route.compute(base, new, reference)
        except TooFewSamples as error:
            raise _NotComparable(str(error)) from None

    def effects_of(self, metrics: Iterable[str]) -> Iterable[Effect]:
        """Effects on the metrics that have one."""
        for metric in metrics:
            try:
                yield self.effect(metric)[0]
            except _NotComparable:
                continue

    def _check_protocol(self, route: Route, arg: str) -> None:
        keys = {"features": arg, "references": route.reference.format(arg)}
        for fact, key in keys.items():
            sides = [record.protocol_facts.get(fact, {}).get(key) for record in self._records]
            _same(sides[0], sides[1], f"{fact}.{key}")
        if route.rows == "errors":
            solutions = [record.protocol_facts.get("solution") for record in self._records]
            _same(solutions[0], solutions[1], "solution")

    def _value(self, side: str, record: Record, metric: str) -> MetricValue:
        if metric not in record.metrics:
            why = record.missing.get(metric, "was not measured")
            raise _NotComparable(f"'{metric}' has no value in {side}: {why}")
        return record.metrics[metric]

    def _reference(self, key: str) -> dict[str, np.ndarray]:
        suite = self.runs[0].suite
        if key not in suite.references:
            raise _NotComparable(f"the suite has no reference '{key}'")
        if suite.references[key].model:
            raise _NotComparable(
                f"reference '{key}' is computed by the model, not stored; no verdict without the model"
            )
        try:
            check_reference_file(suite, key)
        except UserError as error:
            raise _NotComparable(str(error)) from None
        return read_reference(suite, key)

    def _rows(self, run: Run, record: Record, route: Route, arg: str) -> Array:
        if route.rows == "errors":
            return run.errors(record, arg)
        rows = run.rows(record.cell.id, record.samples, _chunk_size(record), arg)
        return rows[:, 0] if route.rows == "scores" else rows

    def _effect(self, metric: str, route: Route, values: Sequence[MetricValue], found: Difference) -> Effect:
        return Effect(
            metric=metric,
            unit=values[0].unit,
            higher_is_better=values[0].higher_is_better,
            statistic=route.statistic,
            base=values[0].value,
            new=values[1].value,
            difference=found.value,
            se=found.se,
            n=found.n,
            df=found.df,
            tolerance=self.tolerances.get(metric, default_tolerance(metric, values[0], self.runs[0].suite)),
        )

    def _notes(self, found: Difference) -> tuple[str, ...]:
        classes = {record.environment.get("class") for record in self._records}
        return (*([found.note] if found.note else []), *(["other fingerprint class"] if len(classes) > 1 else []))


@dataclass(frozen=True)
class Pairs:
    """What two records of one run folder have in common sample by sample, for rankings and galleries."""

    store: Store

    @cached_property
    def _run(self) -> Run:
        return Run(self.store)

    def difference(self, first: Record, second: Record, metric: str) -> ranking.Difference | None:
        """first - second by the statistic of verdicts, see `metrics.differences`; None where there is none."""
        from evalbench.report.ranking import Difference

        try:
            pair = _Pair((self._run, self._run), second, first, {})
            pair.check()
            _, found = pair.difference(metric)
        except _NotComparable:
            return None
        return Difference(found.value, found.se, found.df)

    def solution(self, record: Record) -> str | None:
        """The cell id of the fine solution from the same noise; None where the suite has none."""
        try:
            return self._run._solution_cell(record).id
        except _NotComparable:
            return None


def _same(base: Any, new: Any, where: str) -> None:
    """Raise _NotComparable naming the first fact in which two protocols differ."""
    if isinstance(base, dict) and isinstance(new, dict):
        for key in sorted(base.keys() | new.keys()):
            _same(base.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif base != new:
        raise _NotComparable(f"protocol differs in {where}: {_short(base)} in BASE, {_short(new)} in NEW")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def default_tolerance(metric: str, base: MetricValue, suite: Suite) -> float:
    """The tolerance of a metric that the user gave none for; the table in docs/compare.md.

    `accuracy` 0.01, `align` 0.005; the others 2 % of the base value without its estimated bias, and for set distances
    at least the standard deviation of what a perfect sampler scores, at the N nearest to this one that the suite lists.
    """
    name = metric.partition("@")[0]
    if name in ABSOLUTE:
        return ABSOLUTE[name]
    relative = RELATIVE * abs(base.value - (base.bias or 0.0))
    floors = [(abs(math.log(f.samples / base.n)), f.sd) for f in suite.floors if f.metric == metric and _is_floor(f)]
    return max(relative, min(floors)[1] or 0.0) if floors else relative


def _is_floor(floor: Floor) -> bool:
    return floor.what == "floor" and floor.sd is not None


def parse_tolerances(text: str | None) -> dict[str, float]:
    """`fd@fashion64=0.2,kid@fashion64=1` as numbers by metric id.

    Raises:
        UserError: not of that form.
    """
    found: dict[str, float] = {}
    for entry in (text or "").split(",") if text else []:
        metric, equals, number = (part.strip() for part in entry.partition("="))
        try:
            found[metric] = float(number)
        except ValueError:
            equals = ""
        if not metric or not equals:
            raise UserError(f"--tolerance '{entry}': write METRIC=NUMBER, such as fd@fashion64=0.2")
    return found


# --- the fast gate --------------------------------------------------------------------------------------------------

# What may differ by rounding alone: (largest, mean) difference over the largest absolute value. Coarse storage hides
# small changes from its largest difference but not from its mean: rounding flips few entries, a change moves most.
_ROUNDING: Mapping[str, tuple[float, float]] = {
    "float64": (1e-5, 1e-5),
    "float32": (1e-5, 1e-5),
    "float16": (2.0**-10, 2.0**-10 / 20),
    "uint8": (1 / 255, 1 / 255 / 20),
}


@dataclass(frozen=True)
class Sameness:
    """Whether a cell's first samples are what they were.

    Attributes:
        difference: the largest over arrays, relative to the largest absolute value; None when not comparable.
    """

    cell: str
    word: SameWord
    difference: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class FastComparison:
    """The fast gate: the first samples of every cell of BASE."""

    base: str
    new: str
    cells: tuple[Sameness, ...]

    def exit_code(self) -> int:
        """0 all the same; 3 something changed or is missing: only the full comparison can tell."""
        same = bool(self.cells) and all(c.word in ("bit-identical", "same to rounding") for c in self.cells)
        return FINE if same else NOT_COMPARABLE


def fast_compare(base: Path | str, new: Path | str) -> FastComparison:
    """Compare the first 64 stored samples (`images`, `identity`, `pixels`) of the cells that BASE has values for.

    Raises:
        UserError, EvalbenchError: as `compare_runs`.
    """
    runs = Run(Store(base)), Run(Store(new))
    for run in runs:
        _ = run.suite
    olds, news = runs[0].cells(None), runs[1].cells(None)
    if not olds.keys() & news.keys():
        return FastComparison(str(base), str(new), ())
    cells = [_sameness(runs, olds[key], news.get(key)) for key in sorted(olds) if olds[key].status == "ok"]
    return FastComparison(str(base), str(new), tuple(cells))


def _sameness(runs: tuple[Run, Run], old: Record, new: Record | None) -> Sameness:
    title = _title(old.cell)
    try:
        if new is None:
            raise _NotComparable("missing in NEW")
        _Pair(runs, old, new, {}).check()
        a, b = (_first_samples(run, record) for run, record in zip(runs, (old, new), strict=True))
        shared = sorted(a.keys() & b.keys())
        if not shared:
            raise _NotComparable("no samples of both are stored")
    except _NotComparable as error:
        return Sameness(title, "not comparable", reason=str(error))
    same_class = old.environment.get("class") == new.environment.get("class")
    if same_class and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in shared):
        return Sameness(title, "bit-identical", 0.0)
    gaps = [_gap(a[name], b[name]) for name in shared]
    word: SameWord = "same to rounding" if all(small for _, small in gaps) else "changed"
    return Sameness(title, word, max(gap for gap, _ in gaps))


def _first_samples(run: Run, record: Record) -> dict[str, np.ndarray]:
    """Stored samples of the first images of a cell, by array."""
    found: dict[str, list[np.ndarray]] = {}
    for chunk in chunks_of(record.cell.id, record.samples, _chunk_size(record)):
        if chunk.start >= GRID_SAMPLES:
            break
        arrays = run._chunk(chunk)
        for name in arrays.keys() & {"images", "identity", "pixels"}:
            found.setdefault(name, []).append(arrays[name][: GRID_SAMPLES - chunk.start])
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _gap(a: np.ndarray, b: np.ndarray) -> tuple[float, bool]:
    """Largest relative difference of two arrays, and whether it is rounding."""
    if a.shape != b.shape or a.dtype != b.dtype or a.dtype.name not in _ROUNDING:
        return math.inf, False
    largest, mean = _ROUNDING[a.dtype.name]
    x, y = a.astype(np.float64), b.astype(np.float64)
    scale = float(np.abs(x).max(initial=0.0)) if a.dtype.name != "uint8" else 255.0
    gaps = np.abs(x - y) / (scale or 1.0)
    return float(gaps.max(initial=0.0)), bool(gaps.max(initial=0.0) <= largest and gaps.mean() <= mean)


# --- the command ----------------------------------------------------------------------------------------------------


def compare_command(
    base: Path,
    new: Path,
    tolerance_text: str | None = None,
    *,
    junit: Path | None = None,
    json_path: Path | None = None,
    fmt: str = "console",
    strict: bool = False,
    fast: bool = False,
    base_method: str | None = None,
    new_method: str | None = None,
) -> int:
    """`evalbench compare`: print verdicts, write the files asked for, return the exit code.

    Args:
        base, new: run folders. tolerance_text: see `parse_tolerances`. junit, json_path: files to write.
        fmt: what is printed: `console`, `md` or `json`. strict: undecided cells fail too. fast: `fast_compare`.
        base_method, new_method: see `compare_runs`.

    Raises:
        UserError, EvalbenchError: as `compare_runs`; the caller turns them into 2 and 4.
    """
    from evalbench.report import verdicts as text

    if fmt not in FORMATS:
        raise unknown("format", fmt, FORMATS)
    tolerances = parse_tolerances(tolerance_text)
    if fast:
        if tolerances or base_method or new_method or junit:
            raise UserError("--fast compares bits: it takes no tolerance, no methods and no --junit")
        gate = fast_compare(base, new)
        print(text.fast_text(gate, fmt), end="")
        _write(json_path, text.fast_json(gate))
        return gate.exit_code()
    found = compare_runs(base, new, tolerances, base_method=base_method, new_method=new_method)
    _write(junit, text.to_junit(found, strict=strict))
    _write(json_path, text.to_json(found, strict=strict))
    if fmt == "console":
        text.print_verdicts(found)
    else:
        print(text.to_json(found, strict=strict) if fmt == "json" else text.to_markdown(found), end="")
    return found.exit_code(strict=strict)


def _write(file: Path | None, content: str) -> None:
    if file is None:
        return
    try:
        file.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror}; choose another place") from None
