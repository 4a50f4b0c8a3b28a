"""UniPC, Zhao et al. 2023 (arXiv 2302.04867), section 3: UniC and UniP in their multistep form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from evalbench.engine import (
    Eval,
    Plan,
    PlannedSolver,
    State,
    check_choice,
    check_grid,
    linear_step,
    multistep_order,
    phi,
)
from evalbench.paths import Path
from evalbench.registry import register


@register("unipc")
@dataclass(frozen=True)
class UniPC(PlannedSolver):
    """UniPC (Zhao et al. 2023): multistep predictor UniP with the corrector UniC, which costs no evaluation.

    One evaluation per step; UniP of order p has order p, with UniC p + 1. The evaluation at the predicted state also
    corrects it: the corrected state is the base of the next step. The last step has no evaluation at its end, hence
    no correction. A step to t = 0 is first order and returns x0. Without corrector and with `variant="bh2"` order 2
    is `dpm-solver++` 2M. Equals diffusers' UniPCMultistepScheduler with `solver_order`, `solver_type` and
    `predict_x0` of the same meaning, except that `bh1` with a step to sigma = 0 gives NaN there.

    Attributes:
        order: 1, 2 or 3, of the predictor.
        variant: B(h) = h (`bh1`) or e^h - 1 (`bh2`), section 3.1.
        prediction: `x0` or `eps`, what is interpolated.
        corrector: whether UniC is used.
        lower_order_final: the last steps fall to orders 2, 1, as in the paper's code and diffusers' default.
        grid: time grid; empty takes the suite's.
    """

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    prediction: Literal["x0", "eps"] = "x0"
    corrector: bool = True
    lower_order_final: bool = True
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("unipc", "order", self.order, (1, 2, 3))
        check_choice("unipc", "variant", self.variant, ("bh1", "bh2"))
        check_choice("unipc", "prediction", self.prediction, ("x0", "eps"))

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan(self.prediction)
        base = predicted = plan.x_T
        history: list[tuple[float, Eval]] = []  # newest first
        for i, (s, t) in enumerate(pairwise(times)):
            here = (s, plan.evaluate(predicted, s, t))
            if i > 0 and self.corrector:
                base = self._step(plan, path, base, s, history, corrects_with=here)
            else:
                base = predicted
            p = multistep_order(self.order, i, times, lower_order_final=self.lower_order_final)
            history = [here, *history][:p]
            predicted = self._step(plan, path, base, t, history)
        return plan.finish(predicted)

    def _step(
        self,
        plan: Plan,
        path: Path,
        x: State,
        t: float,
        history: Sequence[tuple[float, Eval]],
        corrects_with: tuple[float, Eval] | None = None,
    ) -> State:
        """UniP of order len(history) from history[0] to t, or UniC of the same order with the evaluation at t."""
        (s, m_0), *older = history
        nodes = [*older, corrects_with] if corrects_with else older
        a, b = linear_step(path, s, t, plan.want)
        if not nodes:
            return plan.update({x: a}, {m_0: b})
        h = float(path.lam(t) - path.lam(s))
        z, scale = (-h, path.alpha(t)) if plan.want == "x0" else (h, path.sigma(t))
        B = z if self.variant == "bh1" else math.expm1(z)
        r = np.array([float(path.lam(u) - path.lam(s)) / h for u, _ in nodes])
        weights = -scale * B * self._rho(r, z, B) / r  # of m_j - m_0; r = 1 at t itself
        evals = {m_0: float(b - weights.sum())}
        evals.update({m: float(w) for (_, m), w in zip(nodes, weights, strict=True)})
        return plan.update({x: a}, evals)

    @staticmethod
    def _rho(r: np.ndarray, z: float, B: float) -> np.ndarray:
        """a_p of theorem 3.1: sum_j r_j^(k-1) rho_j = k! z phi_(k+1)(z) / B, k = 1..len(r).

        With one unknown both variants take rho = 1/2, as the authors' code does: right to first order for both B.
        """
        n = len(r)
        if n == 1:
            return np.array([0.5])
        R = np.vander(r, increasing=True).T
        b = [math.factorial(k) * z * phi(k + 1, z) / B for k in range(1, n + 1)]
        return np.linalg.solve(R, b)
