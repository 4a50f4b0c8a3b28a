"""The DPM-Solver family, Lu et al. 2022: DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095).

Both integrate x_t = a x_s + (integral of the network output f against an exponential in lambda). With f = eps
(DPM-Solver, eq. 3.4) or f = x0 (DPM-Solver++, eq. 8) the updates are one formula,

    x_t = a x_s - scale z (phi_1(z) D0 + phi_2(z) D1 + phi_3(z) D2),    D0 = f, D1 ~ h f', D2 ~ h^2 f''

    eps: a = alpha_t / alpha_s, scale = sigma_t, z = h        x0: a = sigma_t / sigma_s, scale = alpha_t, z = -h

and the published `midpoint` updates put phi_1(z) / 2 in the place of phi_2(z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from evalbench.engine import (
    Eval,
    Noise,
    Plan,
    PlannedSolver,
    State,
    check_choice,
    check_grid,
    linear_step,
    multistep_order,
    phi,
)
from evalbench.errors import BudgetExceeded, Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Preparation
from evalbench.paths import Path, grid, spaced
from evalbench.registry import register

from ._adaptive import ATOL, RTOL, Tolerances, fitted, solve

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

SolverType: TypeAlias = Literal["midpoint", "heun"]
D2: TypeAlias = Literal["published", "taylor"]
History: TypeAlias = Sequence[tuple[float, Eval]]  # times and evaluations, newest first


@register("dpm-solver")
@dataclass(frozen=True)
class DPMSolver(PlannedSolver):
    """DPM-Solver (Lu et al. 2022): exponential integrator on the noise prediction, order 1 to 3.

    Singlestep (the paper's, "DPM-Solver-fast"): a step of order p costs p evaluations at inner nodes and has order
    p; the budget is split into steps of the highest order and lower ones at the end. On the `logsnr` grid the inner
    nodes lie at equal distances in lambda; on other grids the grid has one time per evaluation and inner nodes are
    its times. Multistep: one evaluation per step, the history in place of inner nodes; order 2 has order 2, order 3
    also order 2 (see `dpm-solver++`). Order 1 is `ddim`. A step to t = 0 is first order.

    Adaptive ("DPM-Solver-12", "-23"): order 2 or 3; steps in lambda as long as a pair of orders p - 1 and p on the same
    evaluations differs by no more than a tolerance, from h = 0.05 on, with safety factor 0.9. Each sample has its own
    steps: its evaluations differ from sample to sample, and the budget is one for their mean. The authors' code takes
    the largest error of the batch, which couples samples, and evaluates a second time at the start of a step that it
    repeats; here neither. `rtol=0` fits both tolerances to the budget: `prepare` finds the smallest multiple of (atol,
    rtol=0.05) whose evaluations, on search noise, leave room for the spread of a batch of 64; smaller batches may still
    run over, and budgets that need rtol above 1 are refused. A given rtol is kept, and the row is an error where it
    asks for more than the budget. Tolerances are of x on the suite's path: on `edm`, where x is sigma large, rtol means
    far less than on a path that preserves variance. The calls carry no `Step`.

    It is not `dpm-solver++` (data prediction). Multistep equals diffusers' DPMSolverMultistepScheduler with
    `algorithm_type="dpmsolver"`. Singlestep equals DPMSolverSinglestepScheduler at order 2; at order 3 that class
    computes the second inner node with the midpoint formula, where the paper and this take phi_2.

    Attributes:
        order: 1, 2 or 3. algorithm: `singlestep`, `multistep` or `adaptive`.
        lower_order_final: the last steps fall to orders 2, 1: the paper's plan for singlestep order 3. Without it
            singlestep takes as many steps of full order as fit and then the rest in one step. diffusers does it in
            multistep only below 15 steps, and otherwise only for a last step to t = 0. Nothing to `adaptive`.
        grid: time grid; empty takes the suite's (the paper's is `logsnr`). `adaptive` has none.
        rtol: of `adaptive`, tolerance relative to |x| (the paper's is 0.05); 0 fits the tolerances to the budget.
        atol: of `adaptive`, absolute tolerance in units of x. seed: of the search noise that rtol=0 is fitted on.
    """

    order: int = 3
    algorithm: Literal["singlestep", "multistep", "adaptive"] = "singlestep"
    lower_order_final: bool = True
    grid: str = ""
    rtol: float = 0.0
    atol: float = ATOL
    seed: int = 0

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("dpm-solver", "order", self.order, (1, 2, 3))
        check_choice("dpm-solver", "algorithm", self.algorithm, ("singlestep", "multistep", "adaptive"))
        if self.algorithm == "adaptive":
            self._check_adaptive()
        elif (self.rtol, self.atol, self.seed) != (0.0, ATOL, 0):
            raise UserError("dpm-solver: rtol, atol and seed belong to adaptive steps; type algorithm=adaptive")

    def _check_adaptive(self) -> None:
        if self.order == 1 or self.grid:
            raise UserError("dpm-solver: adaptive steps need order=2 or order=3, and no grid")
        if not (self.rtol >= 0.0 and self.atol > 0.0 and self.seed >= 0):
            raise UserError(
                f"dpm-solver: rtol and seed are at least 0, atol above 0; got rtol={self.rtol}, atol={self.atol}, "
                f"seed={self.seed}"
            )

    @property
    def prepares(self) -> Literal["", "per-nfe"]:  # type: ignore[override]
        """Only tolerances that are fitted to a budget need anything before sampling."""
        return "per-nfe" if self.algorithm == "adaptive" and self.rtol == 0.0 else ""

    def prepare(self, context: Preparation) -> Artifact:
        tolerances, spent = fitted(context, self.order, Tolerances(self.atol, RTOL), self.seed)
        return Artifact(facts={"atol": tolerances.atol, "rtol": tolerances.rtol, "mean nfe": float(spent.mean())})

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        if self.algorithm != "adaptive":
            return super().sample(denoiser, x_T, cond, nfe, noise)
        tolerances = Tolerances(self.atol, self.rtol)
        if self.rtol == 0.0:
            facts = self.prepared().facts
            tolerances = Tolerances(facts["atol"], facts["rtol"])
        try:
            return solve(denoiser, x_T, cond, self.order, tolerances)[0]
        except BudgetExceeded as error:
            raise BudgetExceeded(
                f"{error} at rtol={tolerances.rtol:.3g}, atol={tolerances.atol:.3g}: type a larger rtol or budget"
            ) from None

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Plan:
        if self.algorithm == "adaptive":
            raise Unsupported("dpm-solver(algorithm=adaptive) chooses its times while it samples; it has no plan")
        return super().plan_for(path, suite_grid, nfe)

    def times(self, path: Path, kind: str, nfe: int) -> tuple[float, ...]:
        if self.algorithm == "multistep":
            return super().times(path, kind, nfe)
        return singlestep_times(path, kind, nfe, self.order, self.lower_order_final)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("eps")
        if self.algorithm == "multistep":
            return multistep_plan(plan, path, times, self.order, self.lower_order_final, "midpoint", "published")
        return singlestep_plan(plan, path, times, self.order, self.lower_order_final, "midpoint")


@register("dpm-solver++")
@dataclass(frozen=True)
class DPMSolverPP(PlannedSolver):
    """DPM-Solver++ (Lu et al. 2022): exponential integrator on the data prediction; 2M by default.

    `multistep` (2M, 3M), one evaluation per step: order 2 has order 2. The published third-order update has order 2
    too, because its second difference is half of h^2 f'': `d2="published"` keeps it (as diffusers, the authors' code
    and k-diffusion do), `d2="taylor"` doubles it and has order 3. `singlestep` (2S): p evaluations per step of order
    p, split over the budget as in `dpm-solver`. `sde` (SDE-DPM-Solver++): multistep on the reverse SDE, noise from
    one Brownian path; its `order` is that of the deterministic part. Order 1 is `ddim`, as sde `ddim(eta=1)`. A step
    to t = 0 is first order, it returns x0.

    It is not `dpm-solver` (noise prediction) nor `unipc` without corrector (whose order 3 differs). Equals diffusers'
    DPMSolverMultistepScheduler with `dpmsolver++` or `sde-dpmsolver++`, and DPMSolverSinglestepScheduler at order 2
    and at order 3 with `solver_type="heun"`; at order 3 with `midpoint` that class computes the second inner node
    with the midpoint formula, where this takes phi_2. Its `sde-dpmsolver++` at order 3 has -1/2 where the integral
    of the second difference has +1/2; this has +1/2, as k-diffusion's 3M SDE.

    Attributes:
        order: 1, 2 or 3. algorithm: `multistep`, `singlestep` or `sde`.
        d2: second difference of the third-order multistep update.
        solver_type: `midpoint` or `heun`: phi_1 / 2 or phi_2 before the first difference at order 2; at order 3
            singlestep, without or with a second difference.
        lower_order_final: the last steps fall to orders 2, 1 whatever their number. diffusers does it only below 15
            steps, and otherwise only for a last step to t = 0.
        grid: time grid; empty takes the suite's.
    """

    order: int = 2
    algorithm: Literal["multistep", "singlestep", "sde"] = "multistep"
    d2: D2 = "published"
    solver_type: SolverType = "midpoint"
    lower_order_final: bool = True
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("dpm-solver++", "order", self.order, (1, 2, 3))
        check_choice("dpm-solver++", "algorithm", self.algorithm, ("multistep", "singlestep", "sde"))
        check_choice("dpm-solver++", "d2", self.d2, ("published", "taylor"))
        check_choice("dpm-solver++", "solver_type", self.solver_type, ("midpoint", "heun"))

    def times(self, path: Path, kind: str, nfe: int) -> tuple[float, ...]:
        if self.algorithm != "singlestep":
            return super().times(path, kind, nfe)
        return singlestep_times(path, kind, nfe, self.order, self.lower_order_final)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("x0")
        if self.algorithm == "singlestep":
            return singlestep_plan(plan, path, times, self.order, self.lower_order_final, self.solver_type)
        sde = self.algorithm == "sde"
        return multistep_plan(plan, path, times, self.order, self.lower_order_final, self.solver_type, self.d2, sde=sde)


# --- multistep ------------------------------------------------------------------------------------------------------


def multistep_plan(
    plan: Plan,
    path: Path,
    times: Sequence[float],
    order: int,
    lower_order_final: bool,
    solver_type: SolverType,
    d2: D2,
    *,
    sde: bool = False,
) -> Plan:
    """One evaluation per step; derivatives of f from the last `order` evaluations."""
    x = plan.x_T
    history: list[tuple[float, Eval]] = []
    for i, (s, t) in enumerate(pairwise(times)):
        history.insert(0, (s, plan.evaluate(x, s, t)))
        p = multistep_order(order, i, times, lower_order_final=lower_order_final)
        x = multistep_step(plan, path, x, t, history[:p], solver_type, d2, sde=sde)
    return plan.finish(x)


def multistep_step(
    plan: Plan, path: Path, x: State, t: float, history: History, solver_type: SolverType, d2: D2, *, sde: bool
) -> State:
    """One step of order len(history) from history[0] to t."""
    s = history[0][0]
    noise = None
    if sde:
        decay = path.rho(t) / path.rho(s)  # e^{-h}
        noise = Noise(path.sigma(t) * math.sqrt(1.0 - decay**2), s, t)
    if len(history) == 1:
        a, b = _sde_step(path, s, t) if sde else linear_step(path, s, t, plan.want)
        return plan.update({x: a}, {history[0][1]: b}, noise)
    a, scale, z = _exponent(plan, path, s, t)
    if sde:  # the SDE's own exponential doubles the exponent
        a, z = _sde_step(path, s, t)[0], 2.0 * z
    weights = -scale * z * _integral(z, _differences(path, t, history, d2), solver_type)
    return plan.update({x: a}, _weighted([e for _, e in history], weights), noise)


def _sde_step(path: Path, s: float, t: float) -> tuple[float, float]:
    """First-order step of the reverse SDE, x_t = a x_s + b x0 + noise (SDE-DPM-Solver-1). Finite at t = 0."""
    decay = path.rho(t) / path.rho(s)
    return float(path.sigma(t) / path.sigma(s) * decay), float(path.alpha(t) * (1.0 - decay**2))


def _exponent(plan: Plan, path: Path, s: float, t: float) -> tuple[float, float, float]:
    """(a, scale, z) of the module's formula."""
    a, _ = linear_step(path, s, t, plan.want)
    h = float(path.lam(t) - path.lam(s))
    return (a, path.alpha(t), -h) if plan.want == "x0" else (a, path.sigma(t), h)


def _differences(path: Path, t: float, history: History, d2: D2) -> tuple[np.ndarray, ...]:
    """D0, D1 (and D2) as weights over the evaluations of the history."""
    lam = [float(path.lam(u)) for u, _ in history]
    h = float(path.lam(t)) - lam[0]
    m = np.eye(len(history))
    r0 = (lam[0] - lam[1]) / h
    D1_0 = (m[0] - m[1]) / r0
    if len(history) == 2:
        return m[0], D1_0
    r1 = (lam[1] - lam[2]) / h
    D1_1 = (m[1] - m[2]) / r1
    D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
    # h^2 f'' is twice the second divided difference; the published update leaves the 2 out
    D2 = (2.0 if d2 == "taylor" else 1.0) * (D1_0 - D1_1) / (r0 + r1)
    return m[0], D1, D2


def _integral(z: float, differences: Sequence[np.ndarray], solver_type: SolverType) -> np.ndarray:
    """phi_1 D0 + phi_2 D1 + phi_3 D2 as weights over evaluations; `midpoint` at order 2 has phi_1 / 2 for phi_2."""
    factors = [phi(k + 1, z) for k in range(len(differences))]
    if len(differences) == 2 and solver_type == "midpoint":
        factors[1] = 0.5 * factors[0]
    return np.sum([c * d for c, d in zip(factors, differences, strict=True)], axis=0)  # type: ignore[no-any-return]


def _weighted(evals: Sequence[Eval], weights: np.ndarray) -> dict[Eval, float]:
    return {e: float(c) for e, c in zip(evals, weights, strict=True)}


# --- singlestep -----------------------------------------------------------------------------------------------------


def singlestep_orders(n: int, order: int, *, lower_order_final: bool, to_zero: bool) -> list[int]:
    """Orders of the steps that spend n evaluations (the plan of "DPM-Solver-fast").

    A step of order p spends p. `to_zero`: the last step is first order, so a last step of order p becomes p - 1, 1.
    """
    full, rest = divmod(n, order)
    if order == 3 and lower_order_final and rest == 0:
        orders = [3] * (full - 1) + [2, 1]
    else:
        orders = [order] * full + ([rest] if rest else [])
    if to_zero and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def singlestep_times(path: Path, kind: str, n: int, order: int, lower_order_final: bool) -> tuple[float, ...]:
    """n + 1 times, one interval per evaluation; on `logsnr` the steps, not the intervals, are equally long."""
    if kind != "logsnr":
        return grid(path, kind, n)
    to_zero = path.final == "zero"
    orders = singlestep_orders(n, order, lower_order_final=lower_order_final, to_zero=to_zero)
    if to_zero:
        del orders[-1]
    outer = spaced(path, kind, path.t_start, path.t_end, len(orders))
    times = [outer[0]]
    for s, t, p in zip(outer, outer[1:], orders, strict=False):
        times += spaced(path, kind, s, t, p)[1:]
    return (*times, 0.0) if to_zero else tuple(times)


def singlestep_plan(
    plan: Plan,
    path: Path,
    times: Sequence[float],
    order: int,
    lower_order_final: bool,
    solver_type: SolverType,
) -> Plan:
    """Steps over the n intervals of `times`, a step of order p over p of them, its inner nodes the times between."""
    orders = singlestep_orders(len(times) - 1, order, lower_order_final=lower_order_final, to_zero=times[-1] == 0.0)
    x, i = plan.x_T, 0
    for p in orders:
        x = singlestep_step(plan, path, x, times[i : i + p + 1], solver_type)
        i += p
    return plan.finish(x)


def singlestep_step(plan: Plan, path: Path, x: State, nodes: Sequence[float], solver_type: SolverType) -> State:
    """One step of order p = len(nodes) - 1 from nodes[0] to nodes[-1] (DPM-Solver-1, -2, -3)."""
    s, t, order = nodes[0], nodes[-1], len(nodes) - 1
    m_s = plan.evaluate(x, s, t)
    a, b = linear_step(path, s, nodes[1], plan.want)
    u = plan.update({x: a}, {m_s: b})
    if order == 1:
        return u
    lam_s = path.lam(s)
    h = float(path.lam(t) - lam_s)
    r1 = float(path.lam(nodes[1]) - lam_s) / h
    m_1 = plan.evaluate(u, nodes[1], t, inner=True)
    if order == 2:
        D0, D1 = np.array([1.0, 0.0]), np.array([-1.0, 1.0]) / r1
        a, scale, z = _exponent(plan, path, s, t)
        weights = -scale * z * _integral(z, (D0, D1), solver_type)
        return plan.update({x: a}, _weighted((m_s, m_1), weights))
    r2 = float(path.lam(nodes[2]) - lam_s) / h
    a, scale, z = _exponent(plan, path, s, nodes[2])
    D0, D1 = np.array([1.0, 0.0]), np.array([-1.0, 1.0]) * r2 / r1
    weights = -scale * z * _integral(z, (D0, D1), "heun")
    u = plan.update({x: a}, _weighted((m_s, m_1), weights))
    m_2 = plan.evaluate(u, nodes[2], t, inner=True)
    D0, D1_1, D1_2 = np.array([[1.0, 0.0, 0.0], [-1.0 / r1, 1.0 / r1, 0.0], [-1.0 / r2, 0.0, 1.0 / r2]])
    a, scale, z = _exponent(plan, path, s, t)
    if solver_type == "midpoint":  # no second difference: phi_2 before the difference over r2 alone
        weights = -scale * z * _integral(z, (D0, D1_2), "heun")
    else:
        D1 = (r2 * D1_1 - r1 * D1_2) / (r2 - r1)
        D2 = 2.0 * (D1_2 - D1_1) / (r2 - r1)
        weights = -scale * z * _integral(z, (D0, D1, D2), "heun")
    return plan.update({x: a}, _weighted((m_s, m_1, m_2), weights))


# --- claims ---------------------------------------------------------------------------------------------------------

_CATALOGUE = "Lu et al. 2022, DPM-Solver; catalogue B, A 3 (smooth mixture, logSNR grid, medians)"

CLAIM = (
    Claim(
        text="At 5 evaluations the singlestep solver of order 3 ends farther from the flow's end than DDIM",
        suite="gmm-smooth",
        arm="dpm-solver(order=3)",
        baseline="ddim",
        nfe=5,
        metric="paired-median@identity",
        direction="higher",
        effect=1.1,
        level="E",
        author="catalogue",
        transfer="fair",
        source=_CATALOGUE,
        witness="tests/methods/test_agreement.py",
    ),
    Claim(
        text="At 10 evaluations it ends nearer",
        suite="gmm-smooth",
        arm="dpm-solver(order=3)",
        baseline="ddim",
        nfe=10,
        metric="paired-median@identity",
        direction="lower",
        effect=0.7,
        level="E",
        author="catalogue",
        transfer="fair",
        source=_CATALOGUE,
        witness="tests/methods/test_agreement.py",
    ),
    Claim(
        text="At 40 evaluations adaptive steps of order 3 end nearer than as many on a fixed logSNR grid (size ours)",
        suite="gmm-smooth",
        arm="dpm-solver(algorithm=adaptive,order=3)",
        baseline="dpm-solver(order=3)",
        nfe=40,
        metric="paired-median@identity",
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="fair",
        source="Lu et al. 2022, DPM-Solver, adaptive step size; catalogue B 4 gives no size",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_dpm_solver_adaptive.py",
    ),
)
