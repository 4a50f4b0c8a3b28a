"""Two records of one key: whether they may be compared, the first reason why not, and the effect on a metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from evalbench import registry
from evalbench.compare.runs import NotComparable, Run, chunk_size
from evalbench.compare.tolerances import default_tolerance
from evalbench.compare.words import Effect
from evalbench.errors import UserError
from evalbench.interfaces import Metric
from evalbench.metrics.common import Array
from evalbench.metrics.differences import Difference, Plan, Route, TooFewSamples, route_of
from evalbench.metrics.persample import PerSampleScore
from evalbench.spec import PHILOX, MetricValue, Record, noise_words
from evalbench.store import Store

if TYPE_CHECKING:
    from evalbench.report import ranking


@dataclass(frozen=True)
class Pair:
    """Two records of one key."""

    runs: tuple[Run, Run]
    old: Record
    new: Record
    tolerances: Mapping[str, float]

    @property
    def _records(self) -> tuple[Record, Record]:
        return self.old, self.new

    def check(self) -> None:
        """Raise NotComparable with the first reason that concerns the whole cell."""
        for side, record in zip(("BASE", "NEW"), self._records, strict=True):
            if record.status != "ok":
                message = record.failure.message if record.failure else record.status
                raise NotComparable(f"{record.status} row in {side}: {message}")
        a, b = self.old.cell, self.new.cell
        if a.suite_version != b.suite_version:
            raise NotComparable(f"suite version differs: {a.suite_version} in BASE, {b.suite_version} in NEW")
        if a.method == b.method and a.settings != b.settings:
            raise NotComparable("method version or settings differ under one text; name both methods to compare them")
        if self.old.samples != self.new.samples:
            raise NotComparable(f"N differs: {self.old.samples} in BASE, {self.new.samples} in NEW")
        base, new = (_noise(record) for record in self._records)
        if base != new:
            raise NotComparable(f"noise differs: {noise_words(base)} in BASE, {noise_words(new)} in NEW")
        sides = [{k: r.protocol_facts.get(k) for k in ("generation", "seed", "guidance")} for r in self._records]
        _same(sides[0], sides[1], "")
        if a.generation != b.generation:
            raise NotComparable("generation facts differ")

    def effect(self, metric: str) -> tuple[Effect, tuple[str, ...]]:
        """The effect on a metric, and notes.

        Raises:
            NotComparable: with the reason.
        """
        route, found = self.difference(metric)
        values = [self._value(side, r, metric) for side, r in zip(("BASE", "NEW"), self._records, strict=True)]
        return self._effect(metric, route, values, found), self._notes(found)

    def difference(self, metric: str) -> tuple[Route, Difference]:
        """new - base of a metric, and how it was found.

        Raises:
            NotComparable: with the reason.
        """
        built, route = statistic_of(metric)
        self._check_protocol(route, built)
        for side, record in zip(("BASE", "NEW"), self._records, strict=True):
            self._value(side, record, metric)
        reference = self._reference(built.reference_key) if built.reference_key else {}
        base, new = (_rows(run, record, route, built) for run, record in zip(self.runs, self._records, strict=True))
        plan = Plan(self._clusters(), self._strata())
        try:
            return route, route.compute(base, new, reference, plan)
        except TooFewSamples as error:
            raise NotComparable(str(error)) from None

    def effects_of(self, metrics: Iterable[str]) -> Iterable[Effect]:
        """Effects on the metrics that have one."""
        for metric in metrics:
            try:
                yield self.effect(metric)[0]
            except NotComparable:
                continue

    def _check_protocol(self, route: Route, metric: Metric[Any]) -> None:
        keys = [*(("features", name) for name in metric.needs), ("references", metric.reference_key)]
        for fact, key in keys:
            sides = [record.protocol_facts.get(fact, {}).get(key) for record in self._records]
            _same(sides[0], sides[1], f"{fact}.{key}")
        if route.rows == "errors":
            solutions = [record.protocol_facts.get("solution") for record in self._records]
            _same(solutions[0], solutions[1], "solution")

    def _value(self, side: str, record: Record, metric: str) -> MetricValue:
        if metric not in record.metrics:
            why = record.missing.get(metric, "was not measured")
            raise NotComparable(f"'{metric}' has no value in {side}: {why}")
        return record.metrics[metric]

    def _reference(self, key: str) -> dict[str, np.ndarray]:
        """The reference of both sides; a stored one must be the same in both."""
        base, new = (run.reference(key) for run in self.runs)
        if base is not new and not _alike(base, new):
            raise NotComparable(f"reference '{key}' differs: its model computes other arrays in NEW")
        return base

    def _clusters(self) -> np.ndarray | None:
        """Which samples share a prompt, (N,), where the chunks say it; the same in both."""
        base, new = (
            run.clusters(record.cell.id, record.samples, chunk_size(record))
            for run, record in zip(self.runs, self._records, strict=True)
        )
        if base is None and new is None:
            return None
        if base is None or new is None or not np.array_equal(base, new):
            raise NotComparable("the samples that share a prompt differ")
        return base

    def _strata(self) -> np.ndarray | None:
        """The class of each sample, (N,), as the suite plans them: as many of each, give or take one."""
        labels = self.runs[0].suite.conditions.plan(range(self.old.samples))
        return None if labels is None else np.asarray(labels)

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
            slope=found.slope,
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
            pair = Pair((self._run, self._run), second, first, {})
            pair.check()
            _, found = pair.difference(metric)
        except NotComparable:
            return None
        return Difference(found.value, found.se, found.df, found.slope)

    def solution(self, record: Record) -> str | None:
        """The cell id of the fine solution from the same noise; None where the suite has none."""
        try:
            return self._run.solution_cell(record).id
        except NotComparable:
            return None


def statistic_of(name: str) -> tuple[Metric[Any], Route]:
    """The metric of an id, and how two cells are compared in it.

    Raises:
        NotComparable: it cannot be built here, or there is no way.
    """
    try:
        metric = registry.build_metric(name)
    except UserError as error:
        raise NotComparable(str(error)) from None
    route = route_of(metric)
    if route is None:
        raise NotComparable(f"no paired statistic for '{name}'")
    return metric, route


def _rows(run: Run, record: Record, route: Route, metric: Metric[Any]) -> Array:
    """What a route computes its difference from, see `Route.rows`."""
    if route.rows == "errors":
        return run.errors(record, metric.arg)
    arrays = {name: run.rows(record.cell.id, record.samples, chunk_size(record), name) for name in metric.needs}
    if route.rows == "scores":
        assert isinstance(metric, PerSampleScore)
        return metric.per_sample(arrays)
    return arrays[metric.needs[0]]


def _noise(record: Record) -> str:
    """Where a record's x_T came from."""
    return str(record.protocol_facts.get("generation", {}).get("sampling", {}).get("noise", PHILOX))


def _same(base: Any, new: Any, where: str) -> None:
    """Raise NotComparable naming the first fact in which two protocols differ."""
    if isinstance(base, dict) and isinstance(new, dict):
        for key in sorted(base.keys() | new.keys()):
            _same(base.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif base != new:
        raise NotComparable(f"protocol differs in {where}: {_short(base)} in BASE, {_short(new)} in NEW")


def _alike(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Equal but for the last bits that another machine may compute."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and np.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
