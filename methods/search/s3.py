"""S3, the solver search of "A Unified Sampling Framework for Solver Searching of Diffusion Models" (see `usf`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np

from evalbench.engine import execute
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Preparation, Solver
from evalbench.paths import GRIDS, Path, spaced
from evalbench.registry import register

from .clock import clock
from .oracle import Oracle
from .usf import CORRECTORS, MAX_ORDER, PREDICTIONS, RELAXATIONS, Decision, Schedule

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

T = TypeVar("T")

CROSSOVER, DEEP = 0.5, 0.5  # probabilities of crossing two parents, and of doing it step by step
INSERT, DELETE, REDRAW = 0.2, 0.2, 0.3  # probabilities of a step more, a step less, another choice
JITTER = 0.03  # standard deviation of moves of times and of relaxation constants
T_END = (0.1, 1.0)  # the release's 1e-4..1e-3, in units of the suite's end


# 0.059 against 0.335 at 5 evaluations in the catalogue's check
CLAIM = Claim(
    text="A solver searched for 5 evaluations makes samples nearer to the data than the best fixed solver.",
    suite="gmm-64",
    arm="s3(evaluations=330,samples=1000)",
    baseline="dpm-solver(order=2,algorithm=multistep,grid=logsnr)",
    nfe=5,
    metric="fd@identity",
    direction="lower",
    effect=0.82,
    level="E",
    author="catalogue",
    transfer="fair",
    source="A Unified Sampling Framework for Solver Searching; methods-a entry 23",
    prepare_seeds=(0, 1, 2),
    witness="tests/methods/test_usf.py",
)


@register("s3")
@dataclass(frozen=True)
class S3(Solver):
    """S3: evolution over the decisions, times and ends of `usf`, for one budget, before sampling.

    Each candidate is scored by the Frechet distance of `samples` search samples to the search split of the data. The
    population starts with known solvers on the named grids (ours: nothing is published about it) and with random
    ones. A child has a parent from the best `parents` of a random class of equal NFE; with probability 0.5 it is
    crossed with another, half of the time step by step; then steps are inserted and deleted (0.2, 0.2), each choice of
    each step is drawn again (0.3), and times and relaxation constants move by N(0, 0.03). Times are those of the clock
    (see `usf`), with t_end in 1e-4..1e-3; on other paths in a tenth of the suite's end to all of it. A child outside
    the classes loses or gains random steps.

    This is the released search, which evaluates every candidate; the paper trains a predictor of the score beside it.
    The release searches a range of budgets in one population; here a preparation is for one budget, `classes` adds
    smaller ones. It costs evaluations x samples x NFE, on the preparation's bill. It needs data.

    Attributes:
        evaluations: candidates scored. The default is a smoke test; the catalogue's check took 330.
        samples: samples a candidate is scored with; the release takes 1000. Well above the number of features, or
            their covariance decides nothing.
        parents: size of the pool that parents come from.
        classes: number of budgets searched together, the cell's and the ones below it.
        seed: of the search.
    """

    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "per-nfe"

    evaluations: int = 20
    samples: int = 64
    parents: int = 15
    classes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("samples", 2), ("parents", 1), ("classes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"s3: {name} must be at least {least}, got {getattr(self, name)}")

    def prepare(self, context: Preparation) -> Artifact:
        oracle = Oracle(context, self.samples, self.seed)
        space = Space(context.path, max(1, context.nfe - self.classes + 1), context.nfe)
        scored = evolve(
            lambda schedule: oracle(schedule.plan(context.path)),
            space,
            context.rng(self.seed),
            self.evaluations,
            self.parents,
        )
        best = min(scored, key=lambda item: item.score)
        if not math.isfinite(best.score):
            raise Unsupported(f"s3: none of {self.evaluations} candidates has a finite distance; raise samples=")
        facts = {"schedule": best.schedule.facts(), "score": best.score, "evaluations": len(scored)}
        known = [item.score for item in scored[: len(space.known())]]
        return Artifact(facts={**facts, "best_known_score": min(known)})

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        schedule = Schedule.from_facts(self.prepared().facts["schedule"])
        if schedule.nfe > nfe:
            raise Unsupported(f"s3: the solver was searched for {schedule.nfe} evaluations, the budget is {nfe}")
        return execute(schedule.plan(denoiser.path), denoiser, x_T, cond, noise)


@dataclass(frozen=True)
class Scored:
    """A candidate with its distance."""

    schedule: Schedule
    score: float


def evolve(
    score: Callable[[Schedule], float], space: Space, rng: np.random.Generator, evaluations: int, parents: int
) -> list[Scored]:
    """Everything that was scored, in order; a fifth of the evaluations (or the known solvers) makes the start."""
    known = space.known()
    start = known + [space.random(rng) for _ in range(evaluations // 5 - len(known))]
    scored = [Scored(schedule, score(schedule)) for schedule in start[:evaluations]]
    while len(scored) < evaluations:
        child = breed(scored, space, rng, parents)
        scored.append(Scored(child, score(child)))
    return scored


def breed(scored: Sequence[Scored], space: Space, rng: np.random.Generator, parents: int) -> Schedule:
    """A child of one or two of the best of a random class."""
    classes = sorted({item.schedule.nfe for item in scored})
    nfe = _pick(rng, classes)
    pool = sorted((item for item in scored if item.schedule.nfe == nfe), key=lambda item: item.score)[:parents]
    child = _pick(rng, pool).schedule
    if rng.random() < CROSSOVER:
        child = space.cross(child, _pick(rng, pool).schedule, rng)
    return space.mutate(child, rng)


@dataclass(frozen=True)
class Space:
    """The solvers of a search: where they start and end, and how many evaluations they may spend.

    Attributes:
        path: of the suite. least, most: NFE of the smallest and the largest class.
    """

    path: Path
    least: int
    most: int

    @property
    def _end(self) -> float:
        """No inner time lies below it."""
        return clock(self.path, self.path.t_end)

    @property
    def _start(self) -> float:
        return clock(self.path, self.path.t_start)

    def known(self) -> list[Schedule]:
        """First, second and third order, of noise and data, with and without corrector, on two grids."""
        solvers = [
            (Decision("data", 2, relaxation="bh2"),),
            (Decision("noise", 2, relaxation="bh2"),),
            (Decision("data", 1, corrector="bh2"), Decision("data", 2, relaxation="bh2", corrector="none")),
            (Decision("data", 3),),
            (Decision("data", 1),),
        ]
        return [self._fixed(steps, kind) for kind in ("logsnr", "time") for steps in solvers]

    def _fixed(self, steps: Sequence[Decision], kind: str) -> Schedule:
        n = self.most
        decisions = [steps[min(i, len(steps) - 1)] for i in range(n)]
        lowered = [replace(decision, order=min(decision.order, n - i)) for i, decision in enumerate(decisions)]
        return Schedule(tuple(lowered), self._grid(kind, n), 0.0)

    def _grid(self, kind: str, n: int) -> tuple[float, ...]:
        """n - 1 inner times; where the path ends at t = 0 the last of them is the smallest it allows."""
        to_zero = self.path.final == "zero"
        times = spaced(self.path, kind, self.path.t_start, self.path.t_end, n - 1 if to_zero else n)
        return tuple(clock(self.path, t) for t in (times[1:] if to_zero else times[1:-1]))

    def random(self, rng: np.random.Generator) -> Schedule:
        """Random decisions on a named grid whose times moved."""
        afs = bool(rng.random() < 0.5)
        n = int(rng.integers(self.least, self.most + 1)) + afs
        decisions = tuple(_random_decision(rng) for _ in range(n))
        inner = self._moved(self._grid(_pick(rng, GRIDS), n), rng, 1.0)
        return Schedule(decisions, self._spread(inner), self._random_end(rng), afs)

    def cross(self, a: Schedule, b: Schedule, rng: np.random.Generator) -> Schedule:
        """Step by step from either (deep), or the decisions of one with the times of the other."""
        first = min(len(a.decisions), len(b.decisions))
        decisions, inner = list(a.decisions), list(a.inner)
        deep = rng.random() < DEEP
        for i in range(first):
            if deep and rng.random() < 0.5:
                decisions[i] = b.decisions[i]
            if i < first - 1 and (not deep or rng.random() < 0.5):
                inner[i] = b.inner[i]
        return Schedule(tuple(decisions), self._spread(inner), _pick(rng, (a.t_end, b.t_end)), a.afs)

    def mutate(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        """Steps more and less, other choices, moved times; then back into the classes."""
        if rng.random() < INSERT:
            schedule = self._insert(schedule, rng)
        if rng.random() < DELETE and len(schedule.decisions) > 1:
            schedule = _delete(schedule, rng)
        decisions = tuple(_redrawn(decision, rng) for decision in schedule.decisions)
        inner = self._spread(self._moved(schedule.inner, rng, REDRAW))
        t_end = self._random_end(rng) if rng.random() < REDRAW else schedule.t_end
        afs = schedule.afs if rng.random() >= REDRAW else bool(rng.random() < 0.5)
        return self._in_class(Schedule(decisions, inner, t_end, afs), rng)

    def _in_class(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        while schedule.nfe > self.most:
            schedule = _delete(schedule, rng)
        while schedule.nfe < self.least:
            schedule = self._insert(schedule, rng)
        return schedule

    def _insert(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        """A step halved, between two of its times in the clock's logarithm; the new half is decided at random."""
        i = int(rng.integers(len(schedule.decisions)))
        ends = (self._start, *schedule.inner, self._end)
        middle = math.sqrt(ends[i] * ends[i + 1])
        inner = (*schedule.inner[:i], middle, *schedule.inner[i:])
        decisions = (*schedule.decisions[: i + 1], _random_decision(rng), *schedule.decisions[i + 1 :])
        return replace(schedule, decisions=decisions, inner=self._spread(inner))

    def _moved(self, inner: Sequence[float], rng: np.random.Generator, probability: float) -> list[float]:
        """Times moved by N(0, 0.03); a move out of the range is not made."""
        moved = [u + JITTER * rng.standard_normal() if rng.random() < probability else u for u in inner]
        return [new if self._end < new < self._start else old for old, new in zip(inner, moved, strict=True)]

    def _spread(self, inner: Sequence[float]) -> tuple[float, ...]:
        """Falling, and no two the same: of equal times one goes half way to the next above, in the logarithm."""
        rising = sorted(inner)
        for i in range(1, len(rising)):
            below = rising[i - 1] * (1.0 + 1e-9)
            if rising[i] <= below:
                above = next(u for u in (*rising[i:], self._start) if u > below)
                rising[i] = math.sqrt(rising[i - 1] * above)
        return tuple(reversed(rising))

    def _random_end(self, rng: np.random.Generator) -> float:
        """Evenly in the logarithm."""
        return self._end * math.exp(rng.uniform(math.log(T_END[0]), math.log(T_END[1])))


def _delete(schedule: Schedule, rng: np.random.Generator) -> Schedule:
    """Without one step: it and an end of it that is an inner time."""
    i = int(rng.integers(len(schedule.decisions)))
    j = min(i, len(schedule.inner) - 1)
    decisions = (*schedule.decisions[:i], *schedule.decisions[i + 1 :])
    return replace(schedule, decisions=decisions, inner=(*schedule.inner[:j], *schedule.inner[j + 1 :]))


def _random_decision(rng: np.random.Generator) -> Decision:
    order = int(rng.integers(1, MAX_ORDER + 1))
    corrector = "off" if rng.random() < 0.5 else _pick(rng, CORRECTORS[1:])
    return Decision(
        _pick(rng, PREDICTIONS),
        order,
        int(rng.integers(order - 1, MAX_ORDER + 1)),
        _pick(rng, RELAXATIONS),
        corrector,
        JITTER * float(rng.standard_normal()),
    )


def _redrawn(decision: Decision, rng: np.random.Generator) -> Decision:
    """Each choice drawn again with probability 0.3; the constant moves."""
    new = _random_decision(rng)
    names = ("prediction", "order", "points", "relaxation", "corrector")
    changes = {name: getattr(new, name) for name in names if rng.random() < REDRAW}
    return replace(decision, **changes, c=decision.c + JITTER * float(rng.standard_normal()))


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
