"""Bugs planted on purpose, and refactorings that change nothing but rounding: each a method made from a real solver.

A plan is data (`evalbench.engine`), so most bugs are an edit of it: a sign, one percent, another evaluation, another
time. The others sit between a solver and its network or its noise. Metrics are broken as functions, and an oracle with
a closed form must notice. Used by `verdicts.py` and by the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evalbench import registry
from evalbench.engine import Plan, PlannedSolver, _Evaluate, _Update, execute
from evalbench.interfaces import DenoiserWrap
from evalbench.metrics.frechet import Gaussian, frechet_distance
from evalbench.metrics.kernel import cubic_kernel, mmd2

NFE = 10
Edit = Callable[[Plan], None]


@dataclass(frozen=True)
class Mutant:
    """A changed solver.

    Attributes:
        name: what was done. base: text of the solver. kind: `solver`, `grid`, `cache`, `noise`, `labels`, `dtype`, or
            `harmless`. edit: of the plan. wrap: of the denoiser. start: of x_T.
    """

    name: str
    base: str
    kind: str
    edit: Edit | None = None
    wrap: type[DenoiserWrap] | None = None
    start: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def method(self) -> str:
        """The name it is registered under."""
        return "mutant-" + "".join(c if c.isalnum() else "-" for c in f"{self.name} {self.base}".lower())


def register(mutant: Mutant) -> str:
    """Register a mutant as a method, once; its name."""
    if mutant.method in registry.names("method"):
        return mutant.method
    inner: Any = registry.build_method(mutant.base).solver

    class Changed(PlannedSolver):
        """A planted change."""

        grid = ""

        def plan(self, path: Any, times: Any) -> Plan:
            return inner.plan(path, times)

        def sample(self, denoiser: Any, x_T: Any, cond: Any, nfe: int, noise: Any) -> Any:
            plan = inner.plan_for(denoiser.path, denoiser.grid, nfe)
            if mutant.edit:
                mutant.edit(plan)
            x = mutant.start(x_T) if mutant.start else x_T
            return execute(plan, mutant.wrap(denoiser) if mutant.wrap else denoiser, x, cond, noise)

    registry.register(mutant.method)(Changed)
    return mutant.method


# --- edits of plans -------------------------------------------------------------------------------------------------


def updates(plan: Plan) -> list[int]:
    """Places of the updates."""
    return [i for i, op in enumerate(plan.ops) if isinstance(op, _Update)]


def evaluations(plan: Plan) -> list[int]:
    """Places of the evaluations."""
    return [i for i, op in enumerate(plan.ops) if isinstance(op, _Evaluate)]


def scale_newest(factor: float) -> Edit:
    """The newest evaluation of every update times a factor."""

    def edit(plan: Plan) -> None:
        for i in updates(plan):
            op = plan.ops[i]
            newest = max(op.evals)[0]
            plan.ops[i] = dataclasses.replace(
                op, evals=tuple((e, c * factor if e == newest else c) for e, c in op.evals)
            )

    return edit


def flip_oldest(plan: Plan) -> None:
    """The oldest evaluation of every update with several has the wrong sign."""
    for i in updates(plan):
        op = plan.ops[i]
        if len(op.evals) > 1:
            oldest = min(op.evals)[0]
            plan.ops[i] = dataclasses.replace(op, evals=tuple((e, -c if e == oldest else c) for e, c in op.evals))


def scale_state(place: int, factor: float) -> Edit:
    """The state of one update times a factor."""

    def edit(plan: Plan) -> None:
        i = updates(plan)[place]
        op = plan.ops[i]
        plan.ops[i] = dataclasses.replace(op, states=tuple((s, c * factor) for s, c in op.states))

    return edit


def stale(first: int, count: int = 1) -> Edit:
    """Evaluations first, ..., are read from a cache that holds the one before."""

    def edit(plan: Plan) -> None:
        for i in updates(plan):
            op, found = plan.ops[i], {}
            for e, c in op.evals:
                known = first - 1 if first <= e < first + count else e
                found[known] = found.get(known, 0.0) + c
            plan.ops[i] = dataclasses.replace(op, evals=tuple(found.items()))

    return edit


def late(plan: Plan) -> None:
    """Every evaluation but the last is told the time of the next one: off by one."""
    places = evaluations(plan)
    times = [plan.ops[i].t for i in places]
    for i, t in zip(places, [*times[1:], times[-1]], strict=True):
        plan.ops[i] = dataclasses.replace(plan.ops[i], t=t)


def scale_times(factor: float) -> Edit:
    """Networks are told times that are off by a factor."""

    def edit(plan: Plan) -> None:
        for i in evaluations(plan):
            plan.ops[i] = dataclasses.replace(plan.ops[i], t=min(1.0, plan.ops[i].t * factor))

    return edit


def drop_last(plan: Plan) -> None:
    """The last update never happens."""
    plan.result = plan.ops[updates(plan)[-1]].states[0][0]


def swap_history(plan: Plan) -> None:
    """Two evaluations of an update in the wrong order."""
    for i in updates(plan):
        op = plan.ops[i]
        if len(op.evals) == 2:
            (e, c), (f, d) = op.evals
            plan.ops[i] = dataclasses.replace(op, evals=((e, d), (f, c)))


def other_order(plan: Plan) -> None:
    """The same sums in another order."""
    for i in updates(plan):
        plan.ops[i] = dataclasses.replace(plan.ops[i], evals=plan.ops[i].evals[::-1], states=plan.ops[i].states[::-1])


def two_halves(plan: Plan) -> None:
    """Every term added in two unequal parts."""
    for i in updates(plan):
        op = plan.ops[i]
        evals = tuple((e, c * part) for e, c in op.evals for part in (0.3, 0.7))
        plan.ops[i] = dataclasses.replace(op, evals=evals)


# --- between solver and network -------------------------------------------------------------------------------------


class Half(DenoiserWrap):
    """Outputs in half precision."""

    def __call__(self, x: Any, t: Any, cond: Any, want: Any = "x0", **more: Any) -> torch.Tensor:
        return super().__call__(x, t, cond, want, **more).half().to(x.dtype)


class Brain(DenoiserWrap):
    """Outputs in bfloat16."""

    def __call__(self, x: Any, t: Any, cond: Any, want: Any = "x0", **more: Any) -> torch.Tensor:
        return super().__call__(x, t, cond, want, **more).bfloat16().to(x.dtype)


class WrongLabels(DenoiserWrap):
    """Labels of the neighbour."""

    def __call__(self, x: Any, t: Any, cond: Any, want: Any = "x0", **more: Any) -> torch.Tensor:
        return super().__call__(x, t, dataclasses.replace(cond, labels=cond.labels.roll(1)), want, **more)


class NoLabels(DenoiserWrap):
    """All labels are class 0."""

    def __call__(self, x: Any, t: Any, cond: Any, want: Any = "x0", **more: Any) -> torch.Tensor:
        return super().__call__(x, t, dataclasses.replace(cond, labels=torch.zeros_like(cond.labels)), want, **more)


MUTANTS = (
    Mutant("sign of the oldest evaluation", "dpm-solver++", "solver", flip_oldest),
    Mutant("sign of the oldest evaluation", "ipndm", "solver", flip_oldest),
    Mutant("sign of the oldest evaluation", "unipc", "solver", flip_oldest),
    Mutant("1 % on the newest evaluation", "dpm-solver++", "solver", scale_newest(1.01)),
    Mutant("1 % on the newest evaluation", "ddim", "solver", scale_newest(1.01)),
    Mutant("1 % on the newest evaluation", "heun", "solver", scale_newest(1.01)),
    Mutant("1 % less of the newest evaluation", "ddim", "solver", scale_newest(0.99)),
    Mutant("1 % on one state", "unipc", "solver", scale_state(5, 1.01)),
    Mutant("history in the wrong order", "dpm-solver++", "solver", swap_history),
    Mutant("last update missing", "dpm-solver++", "solver", drop_last),
    Mutant("one stale evaluation", "dpm-solver++", "cache", stale(5)),
    Mutant("one stale evaluation", "ddim", "cache", stale(5)),
    Mutant("cache never refreshed", "ddim", "cache", stale(6, 10)),
    Mutant("cache never refreshed", "unipc", "cache", stale(6, 10)),
    Mutant("times off by one", "ddim", "grid", late),
    Mutant("times off by one", "dpm-solver++", "grid", late),
    Mutant("times 1 % too late", "ipndm", "grid", scale_times(1.01)),
    Mutant("times 1 % too early", "heun", "grid", scale_times(0.99)),
    Mutant("outputs in half precision", "dpm-solver++", "dtype", wrap=Half),
    Mutant("outputs in bfloat16", "ddim", "dtype", wrap=Brain),
    Mutant("labels of the neighbour", "ddim", "labels", wrap=WrongLabels),
    Mutant("no labels", "unipc", "labels", wrap=NoLabels),
    Mutant("noise 1 % too large", "dpm-solver++", "noise", start=lambda x: 1.01 * x),
    Mutant("noise of the neighbour", "unipc", "noise", start=lambda x: x.roll(1, 0)),
)
HARMLESS = tuple(
    Mutant(name, base, "harmless", edit)
    for base in ("ddim", "heun", "dpm-solver++", "unipc", "ipndm")
    for name, edit in (("sums in another order", other_order), ("terms in two parts", two_halves))
)


# --- metrics --------------------------------------------------------------------------------------------------------

Distance = Callable[[Gaussian, Gaussian], float]
Kernel = Callable[[np.ndarray, np.ndarray], float]


def closed_form(distance: Distance) -> bool:
    """Whether a Frechet distance is |dm|^2 + d (a - b)^2 on scaled unit Gaussians, both ways round."""
    d = 6
    a, b = Gaussian(np.full(d, 0.1), 4.0 * np.eye(d)), Gaussian(np.zeros(d), np.eye(d))
    exact = d * 0.01 + d
    return bool(np.allclose([distance(a, b), distance(b, a), distance(a, a)], [exact, exact, 0.0], atol=1e-6))


def unbiased_on_twins(mmd: Kernel) -> bool:
    """Whether a squared MMD is 0 on average, within 4 standard errors, for two sets of one distribution."""
    found = []
    for key in range(400):
        x, y = np.random.default_rng(key).standard_normal((2, 12, 3))
        found.append(mmd(x, y))
    return bool(abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5)


def _frechet(*, mean: float = 1.0, cross: float = 2.0, root: bool = True) -> Distance:
    """A Frechet distance with factors that can be wrong."""

    def distance(a: Gaussian, b: Gaussian) -> float:
        product = np.linalg.eigvals(a.cov @ b.cov).real
        overlap = np.sqrt(np.maximum(product, 0)).sum() if root else product.sum()
        gap = a.mean - b.mean
        return float(mean * gap @ gap + np.trace(a.cov) + np.trace(b.cov) - cross * overlap)

    return distance


def _biased(x: np.ndarray, y: np.ndarray) -> float:
    return float(cubic_kernel(x, x).mean() + cubic_kernel(y, y).mean() - 2 * cubic_kernel(x, y).mean())


METRIC_MUTANTS: Mapping[str, tuple[str, Callable[[], bool]]] = {
    "Frechet distance without the means": ("closed form", lambda: closed_form(_frechet(mean=0.0))),
    "1 % on the cross term": ("closed form", lambda: closed_form(_frechet(cross=2.02))),
    "cross term not doubled": ("closed form", lambda: closed_form(_frechet(cross=1.0))),
    "no square root": ("closed form", lambda: closed_form(_frechet(root=False))),
    "means with the wrong sign": ("closed form", lambda: closed_form(_frechet(mean=-1.0))),
    "MMD with its diagonal": ("zero on twins", lambda: unbiased_on_twins(_biased)),
}
METRIC_ORIGINALS: Mapping[str, Callable[[], bool]] = {
    "Frechet distance": lambda: closed_form(frechet_distance),
    "another form of it": lambda: closed_form(_frechet()),
    "MMD": lambda: unbiased_on_twins(lambda x, y: mmd2(x, y).value),
}
