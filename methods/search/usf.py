"""USF, the unified sampling framework of "A Unified Sampling Framework for Solver Searching of Diffusion Models".

A solver is a list of decisions, one per step, and a list of times; one formula runs them all. In lambda = log alpha -
log sigma, h = lambda_t - lambda_s, with f = eps (z = h, scale = -sigma_t, a = alpha_t / alpha_s) or f = x0 (z = -h,
scale = alpha_t, a = sigma_t / sigma_s):

    x_t = a x_s + scale (h phi_1(z) f_s + sum_{i=1}^{order - 1} h^{i+1} phi_{i+1}(z) f_s^(i))

The derivatives f^(i) at s come from the evaluations at earlier points (the Taylor system with entries
(Delta lambda_k)^j / j!), the first of them times a relaxation. (phi_1 is the paper's phi_0, and so on.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Self, TypeAlias, get_args

from evalbench.engine import Eval, Plan, PlannedSolver, State, check_grid, derivative_weights, linear_step, phi
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Want
from evalbench.paths import Path, grid
from evalbench.registry import register

from .clock import clock, path_time

Prediction: TypeAlias = Literal["noise", "data"]
Relaxation: TypeAlias = Literal["none", "linear", "bh1", "bh2", "plus", "minus"]
Corrector: TypeAlias = Literal["off", "none", "linear", "bh1", "bh2", "plus", "minus"]

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
RELAXATIONS: tuple[Relaxation, ...] = get_args(Relaxation)
CORRECTORS: tuple[Corrector, ...] = get_args(Corrector)
MAX_ORDER = 4
_WANT: Mapping[Prediction, Want] = {"noise": "eps", "data": "x0"}


@dataclass(frozen=True)
class Decision:
    """How one step is made. As text `prediction:order:points:relaxation:corrector`, the last three may be left out.

    Attributes:
        prediction: `noise` or `data`, what is expanded.
        order: 1..4, number of Taylor terms; at the start as many as there are evaluations.
        points: earlier evaluations that the derivatives are estimated from, at least order - 1; 0 takes order - 1.
        relaxation: factor of the first derivative: `none` 1; `linear` 1 + c h; `bh2` 1/2 z (e^z - 1) / (e^z - 1 - z),
            which makes order 2 the midpoint forms of DPM-Solver and UniPC's B(h) = e^h - 1; `bh1`
            1/2 z^2 / (e^z - 1 - z), UniPC's B(h) = h; `plus`, `minus` 1 +- (e^z - 1) / 2.
        corrector: `off`, or the relaxation with which the step is made once more, one order higher, when the evaluation
            at its end is known. It costs no evaluation: the network is not asked again at the corrected state.
        c: of `linear`, per unit of lambda; as text `linear@0.03`.
    """

    prediction: Prediction = "data"
    order: int = 2
    points: int = 0
    relaxation: Relaxation = "none"
    corrector: Corrector = "off"
    c: float = 0.0

    def __post_init__(self) -> None:
        known = self.prediction in PREDICTIONS and self.relaxation in RELAXATIONS and self.corrector in CORRECTORS
        if not (known and 1 <= self.order <= MAX_ORDER and 0 <= self.points <= MAX_ORDER):
            raise UserError(
                f"usf: step '{self.text}' is none of noise|data : 1..{MAX_ORDER} : 0..{MAX_ORDER} : "
                f"{'|'.join(RELAXATIONS)} : {'|'.join(CORRECTORS)}"
            )

    @property
    def text(self) -> str:
        """`data:2:0:bh2:off`."""
        parts = (self.prediction, str(self.order), str(self.points), self.relaxation, self.corrector)
        return ":".join(f"{part}@{self.c!r}" if part == "linear" else part for part in parts)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The decision of a text.

        Raises:
            UserError: it is none.
        """
        prediction, *rest = text.strip().split(":")
        constants = {part.partition("@")[2] for part in rest if "@" in part}
        words = [part.partition("@")[0] for part in rest]
        try:
            order, points = int(words[0]) if words else 1, int(words[1]) if len(words) > 1 else 0
            c = float(constants.pop()) if constants else 0.0
        except ValueError:
            constants, order, points, c = {"unread"}, 1, 0, 0.0
        if constants or len(words) > 4:  # a step has one c
            raise UserError(f"usf: cannot read step '{text}'; write prediction:order:points:relaxation:corrector")
        more: dict[str, Any] = dict(zip(("relaxation", "corrector"), words[2:], strict=False))
        return cls(prediction, order, points, **more, c=c)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Schedule:
    """A whole solver as data: what a search looks for, and what the engine runs.

    Attributes:
        decisions: one per step.
        inner: falling times between the ends, one fewer than steps, in units of the clock (see `clock`).
        t_end: where the walk ends, in units of the clock; 0 is the suite's end.
        afs: analytical first step: eps(x_T) is taken as x_T / sigma, which saves its evaluation.
    """

    decisions: tuple[Decision, ...]
    inner: tuple[float, ...]
    t_end: float = 0.0
    afs: bool = False

    def __post_init__(self) -> None:
        if len(self.inner) != len(self.decisions) - 1:
            raise ValueError(f"{len(self.decisions)} steps need {len(self.decisions) - 1} inner times")

    @property
    def nfe(self) -> int:
        """Number of evaluations."""
        return len(self.decisions) - self.afs

    def times(self, path: Path) -> tuple[float, ...]:
        """Path times of the walk; a path that ends at t = 0 has its last step there."""
        end = 0.0 if path.final == "zero" else path_time(path, self.t_end) if self.t_end else path.t_end
        return (path.t_start, *(path_time(path, u) for u in self.inner), end)

    def plan(self, path: Path) -> Plan:
        """The plan on a path."""
        return decided_plan(path, self.times(path), self.decisions, afs=self.afs)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        steps = [decision.text for decision in self.decisions]
        return {"steps": steps, "inner": list(self.inner), "t_end": self.t_end, "afs": self.afs}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """From `facts()`."""
        decisions = tuple(Decision.parse(step) for step in facts["steps"])
        return cls(decisions, tuple(facts["inner"]), facts["t_end"], facts["afs"])


# --- the engine's part ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The network at a point of the walk. `out` None: not asked, eps is x / sigma (the analytical first step)."""

    t: float
    state: State
    out: Eval | None
    want: Want


@dataclass
class Sum:
    """A linear combination of states and evaluations."""

    path: Path
    states: dict[State, float] = field(default_factory=dict)
    evals: dict[Eval, float] = field(default_factory=dict)

    def add_state(self, x: State, c: float) -> None:
        """Add c x."""
        self.states[x] = self.states.get(x, 0.0) + c

    def add(self, point: Point, c: float, want: Want) -> None:
        """Add c times the prediction at a point, as `want`: x = alpha x0 + sigma eps at its own state and time."""
        alpha, sigma = float(self.path.alpha(point.t)), float(self.path.sigma(point.t))
        if point.out is None:  # eps = x / sigma, so x0 = 0
            if want == "eps":
                self.add_state(point.state, c / sigma)
            return
        if point.want != want:
            mine, other = (alpha, sigma) if want == "x0" else (sigma, alpha)
            self.add_state(point.state, c / mine)
            c = -c * other / mine
        self.evals[point.out] = self.evals.get(point.out, 0.0) + c


def decided_plan(path: Path, times: Sequence[float], decisions: Sequence[Decision], *, afs: bool = False) -> Plan:
    """The plan of a decision per step over falling `times`; a step to t = 0 is first order."""
    plan = Plan("eps")
    base = predicted = plan.x_T
    history: list[Point] = []  # newest first
    done: Decision | None = None  # the step that led here, with the order it was made with
    for i, ((s, t), decision) in enumerate(zip(pairwise(times), decisions, strict=True)):
        want = _WANT[decision.prediction]
        asked = None if afs and i == 0 else plan.evaluate(predicted, s, t, want=want)
        here = Point(s, predicted, asked, want)
        if done is None or done.corrector == "off":
            base = predicted
        else:
            base = _step(plan, path, base, s, done, history, corrects_with=here)
        history = [here, *history][: MAX_ORDER + 1]
        done = _made(decision, len(history) - 1, to_zero=t == 0.0)
        predicted = _step(plan, path, base, t, done, history)
    return plan.finish(predicted)


def _made(decision: Decision, older: int, *, to_zero: bool) -> Decision:
    """The decision with the order that `older` evaluations allow, and the points it needs at least."""
    order = 1 if to_zero else min(decision.order, older + 1)
    return replace(decision, order=order, points=max(order - 1, decision.points))


def _step(
    plan: Plan,
    path: Path,
    x: State,
    t: float,
    decision: Decision,
    history: Sequence[Point],
    corrects_with: Point | None = None,
) -> State:
    """The step from history[0] to t, or the same with one order more and the point at t."""
    here, *older = history[: decision.points + 1]
    order, nodes, relaxation = decision.order, [here, *older], decision.relaxation
    if corrects_with is not None:
        assert decision.corrector != "off"
        order, nodes, relaxation = order + 1, [*nodes, corrects_with], decision.corrector
    want = _WANT[decision.prediction]
    lam = float(path.lam(here.t))
    a, b = linear_step(path, here.t, t, want)
    total = Sum(path)
    total.add_state(x, a)
    total.add(here, b, want)
    if order > 1:
        h = float(path.lam(t)) - lam
        z, scale = (-h, float(path.alpha(t))) if want == "x0" else (h, -float(path.sigma(t)))
        derivatives = derivative_weights([float(path.lam(node.t)) - lam for node in nodes], len(nodes))
        for i in range(1, order):
            factor = relaxed(relaxation, decision.c, h, z) if i == 1 else 1.0
            for node, weight in zip(nodes, derivatives[i], strict=True):
                total.add(node, scale * h ** (i + 1) * phi(i + 1, z) * factor * float(weight), want)
    return plan.update(total.states, total.evals)


def relaxed(relaxation: Relaxation, c: float, h: float, z: float) -> float:
    """Factor of the first derivative; z is h for noise and -h for data."""
    if relaxation == "linear":
        return 1.0 + c * h
    if relaxation == "bh1":
        return 0.5 / phi(2, z)
    if relaxation == "bh2":
        return 0.5 * phi(1, z) / phi(2, z)
    if relaxation == "none":
        return 1.0
    return 1.0 + (0.5 if relaxation == "plus" else -0.5) * math.expm1(z)


# --- the method -----------------------------------------------------------------------------------------------------


@register("usf")
@dataclass(frozen=True)
class USF(PlannedSolver):
    """USF (Unified Sampling Framework): any multistep exponential integrator as a list of decisions, one per step.

    One evaluation per step, minus one with the analytical first step; orders 1 to 4. The default list is
    `dpm-solver++` 2M; `data:1` is `ddim`, `noise:3` is `dpm-solver(algorithm=multistep)` with the Taylor differences,
    `data:2:0:bh2:none` after `data:1:0:none:bh2` is `unipc`. Steps of noise and of data may follow each other: the
    history is converted by x = alpha x0 + sigma eps. A step to t = 0 is first order.

    It runs a list that is given; `s3` searches one. Of the released decisions it lacks the prediction of
    DPM-Solver-v3 and the factors of a network's skip connections; the implicit corrector that asks the network again
    never runs in the release. In the release the corrector shares the step's relaxation; here it has its own, because
    UniPC needs one.

    Attributes:
        steps: decisions `prediction:order:points:relaxation:corrector` joined by `/` (see `Decision`), the last one
            repeated; more than the steps of the budget are not used.
        timesteps: times between start and end, falling, in units of the clock: t itself on VP paths, elsewhere the
            time of equal log-SNR on `vp-linear`. They fix the number of steps, one more than times; empty takes `grid`.
        t_end: end of the grid in units of the clock, 1e-4..1e-3 in the release; 0 takes the suite's.
        afs: analytical first step, eps(x_T) = x_T / sigma: a step more for the same budget.
        lower_order_final: the last steps fall to orders ..., 2, 1.
        grid: time grid where no timesteps are given; empty takes the suite's.
    """

    steps: str = "data:2:0:bh2"
    timesteps: tuple[float, ...] = ()
    t_end: float = 0.0
    afs: bool = False
    lower_order_final: bool = True
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        self._decisions(1)
        if any(b >= a for a, b in pairwise((*self.timesteps, 0.0))):
            raise UserError(f"usf: timesteps must fall and stay above 0, got {list(self.timesteps)}")
        if self.t_end < 0.0:
            raise UserError(f"usf: t_end must be at least 0, got {self.t_end}")

    def steps_for(self, path: Path, nfe: int) -> int:
        return nfe + self.afs

    def times(self, path: Path, kind: str, nfe: int) -> tuple[float, ...]:
        return self.schedule(path, kind, nfe).times(path)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        return decided_plan(path, times, self._decisions(len(times) - 1), afs=self.afs)

    def schedule(self, path: Path, kind: str, nfe: int) -> Schedule:
        """The whole solver for a budget on a grid.

        Raises:
            Unsupported: the given timesteps need another budget.
        """
        n = self.steps_for(path, nfe)
        if not self.timesteps:
            ends = path.between(t_end=path_time(path, self.t_end)) if self.t_end else path
            inner = tuple(clock(path, t) for t in grid(ends, kind, n)[1:-1])
        elif len(self.timesteps) < n:
            n, inner = len(self.timesteps) + 1, self.timesteps
        else:
            least = len(self.timesteps) + 1 - self.afs
            raise Unsupported(f"usf: {len(self.timesteps)} timesteps spend {least} evaluations; give a budget of them")
        return Schedule(self._decisions(n), inner, self.t_end, self.afs)

    def _decisions(self, n: int) -> tuple[Decision, ...]:
        given = [Decision.parse(step) for step in self.steps.split("/")]
        full = [given[min(i, len(given) - 1)] for i in range(n)]
        if not self.lower_order_final:
            return tuple(full)
        return tuple(replace(decision, order=min(decision.order, n - i)) for i, decision in enumerate(full))


CLAIM = Claim(
    text="With data prediction, order 2 and two points at every step USF is DPM-Solver++(2M)",
    suite="gmm-smooth",
    arm="usf",
    baseline="dpm-solver++",
    nfe=10,
    metric="paired-median@identity",
    direction="equal",
    effect=1e-9,
    level="M",
    author="paper",
    transfer="fair",
    source="A Unified Sampling Framework for Solver Searching; catalogue A 23 (c)",
    witness="tests/methods/test_usf.py",
)
