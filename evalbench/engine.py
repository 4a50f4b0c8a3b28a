"""The solver engine: a solver is a plan of linear updates, computed in float64; one loop executes any plan.

Every member of the exponential-integrator family, of the Adams-Bashforth family and of the Runge-Kutta family makes
each new state from old states, old network outputs and fresh noise with coefficients that depend on the time grid
alone. So a solver writes those coefficients down (`PlannedSolver.plan`), and nothing but this file runs them. A plan
knows its NFE before anything runs.

    plan = Plan("eps")
    x = plan.x_T
    for s, t in pairwise(times):
        eps = plan.evaluate(x, s, t)
        x = plan.update({x: alpha_t / alpha_s}, {eps: ...})
    plan.finish(x)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NewType, TypeAlias

import numpy as np

from evalbench.errors import UserError
from evalbench.interfaces import Cond, Denoiser, Solver, Step, Want
from evalbench.paths import GRIDS, Path, check_falling, grid

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

State = NewType("State", int)  # handle of a state in a plan
Eval = NewType("Eval", int)  # handle of a network output in a plan


@dataclass(frozen=True)
class Noise:
    """Unit noise to add: an increment of the Brownian path over [t_from, t_to], or a named fresh draw.

    Attributes:
        scale: factor of the unit normals.
        t_from, t_to: times of the Brownian increment (ignored for a named draw).
        use, step: a named draw, for noise that is not an increment of one path (EDM's churn).
    """

    scale: float
    t_from: float = 0.0
    t_to: float = 0.0
    use: str = ""
    step: int = 0


@dataclass(frozen=True)
class _Evaluate:
    out: Eval
    state: State
    t: float
    t_next: float
    step: int
    want: Want


@dataclass(frozen=True)
class _Update:
    out: State
    states: tuple[tuple[State, float], ...]
    evals: tuple[tuple[Eval, float], ...]
    noise: Noise | None


class Plan:
    """A solver's whole trajectory as data.

    Args:
        want: prediction type the evaluations ask for, unless an evaluation says otherwise.
    """

    def __init__(self, want: Want) -> None:
        self.want: Want = want
        self.x_T = State(0)
        self.ops: list[_Evaluate | _Update] = []
        self.result = self.x_T
        self._states, self._evals, self._steps = 1, 0, 0
        self._step_start: float | None = None

    @property
    def nfe(self) -> int:
        """Number of evaluations."""
        return self._evals

    def evaluate(self, x: State, t: float, t_next: float, *, want: Want | None = None, inner: bool = False) -> Eval:
        """Ask the network at (x, t) on the way to t_next. `inner`: a later stage of the step already begun."""
        if t <= 0:
            raise ValueError("a network is never evaluated at t = 0")
        if not inner:
            self._steps += 1
        out = Eval(self._evals)
        self._evals += 1
        self.ops.append(_Evaluate(out, x, float(t), float(t_next), self._steps - 1, want or self.want))
        return out

    def update(self, states: Mapping[State, float], evals: Mapping[Eval, float], noise: Noise | None = None) -> State:
        """A new state: sum of states and evaluations with their coefficients, plus noise."""
        coefficients = [*states.values(), *evals.values()]
        if not all(math.isfinite(c) for c in coefficients):
            raise ValueError(f"a solver coefficient is not finite: {coefficients}")
        out = State(self._states)
        self._states += 1
        used = noise if noise is not None and noise.scale else None
        self.ops.append(_Update(out, tuple(states.items()), tuple(evals.items()), used))
        return out

    def finish(self, x: State) -> Plan:
        """Mark the result and return the plan."""
        self.result = x
        return self

    @property
    def steps(self) -> int:
        """Number of steps (stages of one step count once)."""
        return self._steps


def execute(plan: Plan, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, noise: NoiseSource) -> torch.Tensor:
    """Run a plan from x_T, (B, *S); states keep its dtype, coefficients are float64 scalars."""
    states: dict[State, torch.Tensor] = {plan.x_T: x_T}
    evals: dict[Eval, torch.Tensor] = {}
    drop_states, drop_evals = _last_uses(plan)
    for i, op in enumerate(plan.ops):
        if isinstance(op, _Evaluate):
            step = Step(op.step, plan.steps, op.t, op.t_next, x_T)
            evals[op.out] = denoiser(states[op.state], op.t, cond, op.want, step=step)
        else:
            states[op.out] = _combine(op, states, evals, denoiser.path, noise)
        for state in drop_states.get(i, ()):
            del states[state]
        for evaluation in drop_evals.get(i, ()):
            del evals[evaluation]
    return states[plan.result]


def nudged(plan: Plan, amount: Callable[[float], float]) -> Plan:
    """The same plan, in which the state that a step starts from moves by amount(t) x_T once it was evaluated at t."""
    new = Plan(plan.want)
    states: dict[State, State] = {plan.x_T: new.x_T}
    evals: dict[Eval, Eval] = {}
    last = -1
    for op in plan.ops:
        if isinstance(op, _Evaluate):
            state, inner = states[op.state], op.step == last
            evals[op.out] = new.evaluate(state, op.t, op.t_next, want=op.want, inner=inner)
            shift = 0.0 if inner else amount(op.t)
            if shift:
                moved = {state: 1.0 + shift} if state == new.x_T else {state: 1.0, new.x_T: shift}
                states[op.state] = new.update(moved, {})
            last = op.step
        else:
            terms: dict[State, float] = {}
            for old, c in op.states:
                terms[states[old]] = terms.get(states[old], 0.0) + c
            states[op.out] = new.update(terms, {evals[old]: c for old, c in op.evals}, op.noise)
    return new.finish(states[plan.result])


def _combine(
    op: _Update,
    states: Mapping[State, torch.Tensor],
    evals: Mapping[Eval, torch.Tensor],
    path: Path,
    noise: NoiseSource,
) -> torch.Tensor:
    (first, scale), *rest = op.states
    x = states[first] * scale
    for state, c in rest:
        x = x.add_(states[state], alpha=c)
    for evaluation, c in op.evals:
        x = x.add_(evals[evaluation], alpha=c)
    if op.noise is not None:
        x = x.add_(_draw(op.noise, path, noise), alpha=op.noise.scale)
    return x


def _draw(wanted: Noise, path: Path, noise: NoiseSource) -> torch.Tensor:
    if wanted.use:
        return noise.normal(wanted.use, wanted.step)
    return noise.increment(path.fraction(wanted.t_from), path.fraction(wanted.t_to))


def _last_uses(plan: Plan) -> tuple[dict[int, list[State]], dict[int, list[Eval]]]:
    """Which tensors are not read after op i, so that memory stays at the solver's own history length."""
    state_at: dict[State, int] = {}
    eval_at: dict[Eval, int] = {}
    for i, op in enumerate(plan.ops):
        if isinstance(op, _Evaluate):
            state_at[op.state] = i
            eval_at[op.out] = i
        else:
            state_at.update({s: i for s, _ in op.states})
            eval_at.update({e: i for e, _ in op.evals})
            state_at[op.out] = i
    state_at.pop(plan.result, None)
    states: dict[int, list[State]] = {}
    evals: dict[int, list[Eval]] = {}
    for state, i in state_at.items():
        states.setdefault(i, []).append(state)
    for evaluation, i in eval_at.items():
        evals.setdefault(i, []).append(evaluation)
    return states, evals


class PlannedSolver(Solver):
    """A solver that is data: subclasses write the plan for a path and a list of times.

    Settings shared by all: `grid` names the time grid (see `paths.grid`); empty takes the suite's.
    """

    grid: str

    def steps_for(self, path: Path, nfe: int) -> int:
        """Number of grid steps that spend at most `nfe` evaluations; one evaluation per step unless overridden."""
        return nfe

    @abstractmethod
    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        """The plan over the falling `times` (n + 1 of them for n steps; the last may be 0)."""

    def times(self, path: Path, kind: str, nfe: int) -> tuple[float, ...]:
        """The grid for a budget; overridden by solvers that place inner nodes themselves."""
        return grid(path, kind, self.steps_for(path, nfe))

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Plan:
        """The plan for a budget on the method's grid, or the suite's where the method names none."""
        times = self.times(path, self.grid or suite_grid, nfe)
        check_falling(times)
        return self.plan(path, times)

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        return execute(self.plan_for(denoiser.path, denoiser.grid, nfe), denoiser, x_T, cond, noise)


def check_grid(kind: str) -> None:
    """Raise UserError unless `kind` is empty (the suite's grid) or a known grid."""
    if kind and kind not in GRIDS:
        raise UserError(f"unknown grid '{kind}'; known: {', '.join(GRIDS)}")


def check_least(where: str, least: float, **settings: float) -> None:
    """Raise UserError, with its value, unless each setting of the method `where` is at least `least`."""
    for setting, value in settings.items():
        if value < least:
            raise UserError(f"{where}: {setting} must be at least {least}, got {value}")


def check_choice(where: str, setting: str, value: object, known: Sequence[object]) -> None:
    """Raise UserError unless a setting of the method `where` has one of the `known` values."""
    if value not in known:
        raise UserError(f"{where}: {setting} must be one of {', '.join(map(str, known))}, got {value}")


def multistep_order(order: int, i: int, times: Sequence[float], *, lower_order_final: bool = False) -> int:
    """Order of step i of a multistep solver over `times`: never above the i + 1 evaluations that exist.

    Args:
        order: the solver's order.
        i: index of the step, from 0.
        times: all times; the step goes from times[i] to times[i + 1]. A step to t = 0 is first order (it returns x0).
        lower_order_final: the last steps fall to orders ..., 2, 1.
    """
    if times[i + 1] == 0.0:
        return 1
    steps_left = len(times) - 1 - i
    return min(order, i + 1, steps_left if lower_order_final else order)


# --- coefficients of the exponential-integrator family -------------------------------------------------------------


def phi(k: int, h: float) -> float:
    """phi_k(h) = int_0^1 e^{(1 - u) h} u^{k-1} / (k-1)! du, phi_0 = e^h (Hochbruck & Ostermann 2010, eq. 2.10).

    The recursion phi_{k+1} = (phi_k - 1/k!) / h loses digits for small h, where the series is used instead.
    """
    if k == 0:
        return math.exp(h)
    if abs(h) < 1.0:
        return sum(h**j / math.factorial(j + k) for j in range(20))
    return (phi(k - 1, h) - 1.0 / math.factorial(k - 1)) / h


def linear_step(path: Path, s: float, t: float, want: Want) -> tuple[float, float]:
    """First-order exact step from s to t: x_t = a x_s + b f with f constant, f = x0 or eps. Finite at t = 0."""
    alpha_s, sigma_s, alpha_t, sigma_t = path.alpha(s), path.sigma(s), path.alpha(t), path.sigma(t)
    if want == "x0":
        ratio = sigma_t / sigma_s
        return float(ratio), float(alpha_t - ratio * alpha_s)
    if want == "eps":
        ratio = alpha_t / alpha_s
        return float(ratio), float(sigma_t - ratio * sigma_s)
    raise ValueError(f"no linear step for prediction '{want}'")


def derivative_weights(offsets: Sequence[float], order: int) -> np.ndarray:
    """Weights w (order, len(offsets)) with f^{(k)} ~ sum_j w[k, j] f(offset_j), k = 0..order-1, at offset 0.

    The offsets are times relative to the point of expansion; their number must equal `order` (exact interpolation).
    """
    vandermonde = np.array([[o**k / math.factorial(k) for k in range(order)] for o in offsets])
    return np.linalg.inv(vandermonde)


def exponential_weights(path: Path, s: float, t: float, nodes: Sequence[float], want: Want) -> list[float]:
    """Coefficients c_j of x_t = a x_s + sum_j c_j f(node_j): the polynomial through the nodes, integrated exactly.

    Exact for f polynomial in lambda of degree below the number of nodes; `a` is that of `linear_step`. Nodes may lie
    anywhere (history, or t itself for a corrector).

    Source: variation of constants in lambda (Lu et al. 2022, DPM-Solver, eq. 3.4 for eps; DPM-Solver++, eq. 8 for x0).
    """
    lam_s, lam_t = path.lam(s), path.lam(t)
    h = float(lam_t - lam_s)
    order = len(nodes)
    derivatives = derivative_weights([float(path.lam(u) - lam_s) for u in nodes], order)
    # x0:  alpha_t h sum_k h^k phi_{k+1}(-h) f^(k)   eps:  -sigma_t h sum_k h^k phi_{k+1}(h) f^(k)
    scale, sign = (path.alpha(t), -1.0) if want == "x0" else (-path.sigma(t), 1.0)
    moments = [scale * h ** (k + 1) * phi(k + 1, sign * h) for k in range(order)]
    return [float(c) for c in np.asarray(moments) @ derivatives]


Space: TypeAlias = Literal["t", "rho", "logrho"]
SPACES: tuple[Space, ...] = ("t", "rho", "logrho")


@cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """64 nodes on [-1, 1] and their weights; the integrands are smooth in lambda."""
    return np.polynomial.legendre.leggauss(64)


def polynomial_weights(
    path: Path, s: float, t: float, nodes: Sequence[float], space: Space
) -> tuple[float, list[float]]:
    """(a, c) of x_t = a x_s + sum_j c_j eps(node_j): eps as the polynomial through the nodes in `space`.

    In y = x / alpha the probability flow is dy = eps d rho, rho = sigma / alpha; the polynomial is integrated from s
    to t > 0 by Gauss-Legendre quadrature in lambda, in which rho = e^{-lambda} and all spaces are smooth (on a
    `vp-discrete` path t(lambda) has kinks at the table's entries, which limit the quadrature's accuracy for `t`).

    Source: Zhang & Chen 2023, DEIS (tAB, rhoAB).
    """

    def coordinate(times: Any) -> np.ndarray:
        if space == "t":
            return np.asarray(times, dtype=np.float64)
        rho = np.asarray(path.rho(times), dtype=np.float64)
        return rho if space == "rho" else np.log(rho)

    lam_s, lam_t = path.lam(s), path.lam(t)
    u, weights = _gauss_legendre()
    lam = lam_s + 0.5 * (u + 1.0) * (lam_t - lam_s)
    # d rho = -e^{-lambda} d lambda
    d_rho = -np.exp(-lam) * 0.5 * (lam_t - lam_s) * weights
    at = np.exp(-lam) if space == "rho" else -lam if space == "logrho" else path.t_of_lambda(lam)
    z = coordinate(np.asarray(nodes, dtype=np.float64))
    alpha_s, alpha_t = path.alpha(s), path.alpha(t)
    lagrange = [
        np.prod([(at - z[k]) / (z[j] - z[k]) for k in range(len(z)) if k != j], axis=0) * np.ones_like(at)
        for j in range(len(z))
    ]
    return float(alpha_t / alpha_s), [float(alpha_t * (d_rho @ basis)) for basis in lagrange]
