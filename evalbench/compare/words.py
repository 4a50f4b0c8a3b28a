"""The words of verdicts: an effect's interval against a tolerance, and error control over the cells of a gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from evalbench.stats import Interval, benjamini_hochberg, holm, p_beyond, t_interval, t_quantile

Word: TypeAlias = Literal["better", "worse", "indistinguishable", "undecided", "not comparable"]
Control: TypeAlias = Literal["holm", "bh"]

FINE, REGRESSION, NOT_COMPARABLE = 0, 1, 3
LEVEL, POWER = 0.05, 0.8  # two-sided level of a gate, and the power that the smallest effect is given for
CONTROLS: Mapping[Control, Callable[[Sequence[float], float], list[bool]]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
}
CONTROL_NAMES: Mapping[str, str] = {"holm": "Holm", "bh": "Benjamini-Hochberg"}


@dataclass(frozen=True)
class Effect:
    """What a metric changed by.

    Attributes:
        metric: id. unit, higher_is_better: of the metric. statistic: what is compared, in words.
        base, new: table values at this N (for orientation; their difference is not the statistic).
        difference: new - base in the metric's unit, se its standard error with `df` degrees of freedom, [low, high] its
            95 % interval by Student's t.
        tolerance: differences up to this do not matter.
        slope: of the squared standard error by the difference, see `stats.StandardError`.
        relative: difference, se and tolerance are logarithms of a ratio new / base, and n counts processes.
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
    relative: bool = False
    slope: float = 0.0

    @property
    def _interval(self) -> Interval:
        return t_interval(self.difference, self.se, self.df, self.slope)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self._interval.low

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self._interval.high

    @property
    def half(self) -> float:
        """Half of the 95 % interval; of its longer side where the sides differ."""
        return max(self.high - self.difference, self.difference - self.low)

    @property
    def loss(self) -> float:
        """The difference, positive when new is worse."""
        return -self.difference if self.higher_is_better else self.difference

    @property
    def p(self) -> float:
        """Two-sided p of "the difference is within the tolerance"; at most 0.05 iff the interval is beyond it."""
        return float(p_beyond(self.difference, self.tolerance, self.se, self.df, self.slope))

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
        effect: what was measured. rejected: the error control lets "within the tolerance" be rejected.
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
        control: of errors over the cells.
    """

    base: str
    new: str
    verdicts: tuple[Verdict, ...]
    only_new: tuple[str, ...] = ()
    control: Control = "holm"

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


def decide(verdicts: Sequence[Verdict], control: Control = "holm") -> Iterable[Verdict]:
    """Words for the cells that have an effect, with error control over all of them.

    Args:
        control: `holm`, no false word in the whole gate; `bh`, few among the words of a report.
    """
    effects = [v.effect for v in verdicts if v.effect is not None]
    rejected = iter(CONTROLS[control]([effect.p for effect in effects], LEVEL))
    for v in verdicts:
        if v.effect is None:
            yield v
            continue
        word = word_of(v.effect, rejected=next(rejected))
        notes = v.notes
        if word == "undecided" and v.effect.p <= LEVEL:
            notes = (*notes, f"beyond the tolerance alone, not among {len(effects)} cells ({CONTROL_NAMES[control]})")
        yield replace(
            v,
            word=word,
            notes=notes,
            detectable=v.effect.detectable(len(effects)),
            samples_to_decide=v.effect.samples_to_decide(len(effects)) if word == "undecided" else None,
        )
