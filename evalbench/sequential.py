"""`evalbench run --until decided --against BASE`: samples are made only until each cell's verdict stands.

Verdicts only, never table values: cells that stopped have unequal N, and a value that decided when to stop is biased.
The statistics are those of `looks`; the planned N is that of BASE, whose stored rows are read as far as NEW has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias

from evalbench import registry, runner
from evalbench.compare.pairs import Pair, statistic_of
from evalbench.compare.runs import Key, NotComparable, Run, title_of
from evalbench.compare.tolerances import check_tolerances
from evalbench.compare.words import FINE, LEVEL, NOT_COMPARABLE, REGRESSION, Effect
from evalbench.errors import UserError
from evalbench.looks import Look, frechet_looks, group_sequential
from evalbench.metrics.differences import ROUTES
from evalbench.metrics.estimate import Difference
from evalbench.runner import Executor, Observer, Request
from evalbench.spec import Record, chunks_of
from evalbench.store import Store

Word: TypeAlias = Literal["better", "worse", "indistinguishable", "undecided", "not comparable"]
_LOOKS = 10  # at most


@dataclass(frozen=True)
class Stopped:
    """Where a cell stopped.

    Attributes:
        cell: in words. word: `better` and `worse` say the direction of a difference, not that it is beyond the
            tolerance. n, planned: samples made, and those of BASE. look: the last one. tolerance: of the primary.
        reason: why it is not comparable.
    """

    cell: str
    word: Word
    n: int = 0
    planned: int = 0
    look: Look | None = None
    tolerance: float = 0.0
    reason: str = ""

    @property
    def text(self) -> str:
        """One line."""
        if self.look is None:
            return f"{self.cell}: not comparable: {self.reason}"
        interval = f"{self.look.difference:.4g} ± {self.look.half:.2g}, tolerance {self.tolerance:.4g}"
        return f"{self.cell}: {self.word} after {self.n:,} of {self.planned:,} samples (difference {interval})"


def until_decided(
    request: Request,
    out: Path | str,
    base: Path | str,
    executor: Callable[[], Executor],
    observer: Observer | None = None,
    tolerances: Mapping[str, float] | None = None,
) -> Iterator[Stopped]:
    """Run every cell of a request look by look; each ends with what it found.

    Args:
        request: cells; its N is not used. out: run folder of NEW. base: run folder to decide against.
        tolerances: by metric id, as `evalbench compare` takes them.

    Raises:
        UserError: base is no run folder, a tolerance of an unknown metric. EvalbenchError: it cannot be read.
    """
    old = Run(Store(base))
    check_tolerances(tolerances or {}, [old.suite])
    found = old.cells(None)
    cells = list(product(request.methods, request.nfe, request.guidance, request.seeds))
    for method, nfe, guidance, seed in cells:
        one = replace(request, methods=(method,), nfe=(nfe,), guidance=(guidance,), seeds=(seed,))
        key = Key(request.suite.name, registry.build_method(method).text, nfe, guidance, seed)
        yield _Cell(one, Path(out), old, executor, observer, tolerances or {}, LEVEL / len(cells)).decide(
            key, found.get(key)
        )


@dataclass(frozen=True)
class _Cell:
    """One cell of NEW on its way."""

    request: Request
    out: Path
    base: Run
    executor: Callable[[], Executor]
    observer: Observer | None
    tolerances: Mapping[str, float]
    level: float

    def decide(self, key: Key, old: Record | None) -> Stopped:
        """Look by look, until it is decided or BASE has no more samples."""
        title = f"{key.suite}: {key.method}, NFE {key.nfe}, guidance {key.guidance:g}, seed {key.seed}"
        if old is None:
            return Stopped(title, "not comparable", reason="missing in BASE")
        title, metric = title_of(old.cell), self.base.suite.metrics.primary

        @cache
        def effect(n: int) -> Effect:
            return self._pair(key, old, n).effect(metric)[0]

        def at(n: int) -> Difference:
            found = effect(n)
            return Difference(found.difference, found.se, found.n, df=found.df, slope=found.slope)

        try:
            looks = self._looks(metric, old)
            tolerance = effect(looks[0]).tolerance
            done = group_sequential(at, looks, tolerance, self.level)
        except NotComparable as error:
            return Stopped(title, "not comparable", reason=str(error))
        last = done[-1]
        better = old.metrics[metric].higher_is_better
        words: dict[str, Word] = {
            "inside": "indistinguishable",
            "open": "undecided",
            "above": "better" if better else "worse",
            "below": "worse" if better else "better",
        }
        return Stopped(title, words[last.decision], last.n, old.samples, last, tolerance)

    def _looks(self, metric: str, old: Record) -> tuple[int, ...]:
        """Numbers of samples, whole chunks; of a Frechet distance at least 8 d more each."""
        built, route = statistic_of(metric)
        if metric not in old.metrics:
            raise NotComparable(f"'{metric}' has no value in BASE")
        planned, chunk = old.samples, old.chunk or old.samples
        steps = [round(planned * k / _LOOKS) for k in range(1, _LOOKS + 1)]
        if route is ROUTES["fd"]:
            first = chunks_of(old.cell.id, planned, chunk)[0]
            rows = self.base.chunk(first).get(built.needs[0])
            if rows is None:
                raise NotComparable(
                    f"feature arrays missing: '{built.needs[0]}' is not in the chunks of {self.base.store.folder}"
                )
            steps = list(frechet_looks(planned, int(rows[0].size), _LOOKS))
        return tuple(sorted({min(planned, -(-step // chunk) * chunk) for step in steps}))

    def _pair(self, key: Key, old: Record, n: int) -> Pair:
        """Both records as far as n samples go; makes what is missing."""
        suite = self.request.suite.override(samples=n)
        runner.run(replace(self.request, suite=suite), self.out, self.executor, self.observer)
        new = Run(Store(self.out))
        record = new.cells(None).get(key)
        if record is None:
            raise NotComparable("no such cell in NEW")
        pair = Pair((self.base, new), old.model_copy(update={"samples": n}), record, self.tolerances)
        pair.check()
        return pair


def exit_code(stopped: list[Stopped]) -> int:
    """As of `evalbench compare`: 1 a cell is worse, 3 a cell could not be compared or there is none, else 0."""
    words = {one.word for one in stopped}
    if "worse" in words:
        return REGRESSION
    return NOT_COMPARABLE if not words or "not comparable" in words else FINE


def check_options(until: str, against: Path | None, samples: int | None, measure: list[str]) -> bool:
    """Whether a run is to be sequential.

    Raises:
        UserError: options that do not go together.
    """
    if not until and against is None:
        return False
    if until != "decided":
        raise UserError(f"--until '{until}': write --until decided, with --against BASE")
    if against is None:
        raise UserError("--until decided needs --against BASE, the run folder to decide against")
    if samples is not None:
        raise UserError("--until decided stops by itself: the most samples are those of BASE; drop --samples")
    if measure != ["quality"]:
        raise UserError("--until decided decides on quality; drop --measure")
    return True
