"""The probability-flow ODE and the reverse-time SDE of one model, as a pair.

Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck equation (Deveney et al. 2025)
compares the two. Song et al. 2021 (arXiv 2011.13456), eq. 13, and Anderson 1982: for dx = f x dt + g dW with
f = alpha'/alpha and g^2 / 2 = sigma sigma' - sigma^2 alpha'/alpha, run from noise to data,

    ode   dx = (f x - g^2 / 2 s) dt
    sde   dx = (f x - g^2 s) dt + g dW

Both have the marginals of the path when the score s is exact. When it is not, the ODE carries an error along its whole
trajectory, while the SDE's drift towards the model's own density forgets the early part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

from evalbench.engine import Noise, Plan, PlannedSolver, State, check_choice, check_grid
from evalbench.interfaces import Claim
from evalbench.paths import Path
from evalbench.registry import register

from .stochastic_interpolant import euler_maruyama_step, reverse_epsilon

_SOURCE = "Deveney et al., Closing the ODE-SDE gap; methods-b section A item 9"
CLAIM = (
    Claim(
        text="With an exact score the ODE ends nearer to the data than the SDE at 20 steps.",
        suite="gmm-smooth",
        arm="ode",
        baseline="sde",
        nfe=20,
        metric="sw@identity",
        direction="lower",
        effect=0.45,
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_SOURCE}: sliced W1 0.056 against 0.102",
    ),
    Claim(
        text="With a network error of fixed size the SDE ends nearer to the data than the ODE at 200 steps.",
        suite="gmm-error",
        arm="sde",
        baseline="ode",
        nfe=200,
        metric="sw@identity",
        direction="lower",
        effect=0.51,
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_SOURCE}: sliced W1 0.070 against 0.142",
    ),
    Claim(
        text="With a network error of fixed size the ODE gains nothing from 200 steps against 50.",
        suite="gmm-error",
        arm="ode",
        baseline="ode",
        nfe=200,
        baseline_nfe=50,
        metric="sw@identity",
        direction="equal",
        effect=0.05,
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_SOURCE}: 0.142 however many steps",
    ),
)

Update: TypeAlias = Literal["exponential", "euler"]


@dataclass(frozen=True)
class FirstOrder(PlannedSolver):
    """First-order steps of the flow and `noise` times g^2 / 2 beside it: 0 is the ODE, 1 the reverse-time SDE."""

    noise: ClassVar[float]
    update: Update = "exponential"
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice(self.name, "update", self.update, ("exponential", "euler"))

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        plan = Plan("x0")
        x = plan.x_T
        for s, t in pairwise(times):
            if self.update == "euler":
                x = euler_maruyama_step(plan, path, x, s, t, lambda u: self.noise * reverse_epsilon(path, u))
            else:
                x = _exponential_step(plan, path, x, s, t, self.noise)
        return plan.finish(x)


@register("ode")
@dataclass(frozen=True)
class ODE(FirstOrder):
    """Probability-flow ODE by a first-order step: the other half of `sde`, with the same step and grid.

    Order 1, one evaluation per step. It is a name for a comparison, not another solver: with `update="exponential"` it
    equals `ddim`, with `euler` it equals `euler` (and `stochastic-interpolant(epsilon=0)`).

    Attributes:
        update: `exponential` takes x0 constant over a step and solves the rest exactly; `euler` takes the whole drift
            constant in the path's t.
        grid: time grid; empty takes the suite's.
    """

    noise = 0.0


@register("sde")
@dataclass(frozen=True)
class SDE(FirstOrder):
    """Reverse-time SDE (Anderson 1982; Song et al. 2021) by a first-order step: the other half of `ode`.

    Order 1 in law, one evaluation per step, noise from one Brownian path. It is a name for a comparison, not another
    solver: with `update="exponential"` it equals `ddpm`, `ddim(eta=1)` and `dpm-solver++(algorithm=sde,order=1)`, with
    `euler` it is Euler-Maruyama, `stochastic-interpolant(schedule=reverse)`. Which of the two is better at few steps
    with an exact score depends on the update: compare like with like.

    Attributes:
        update: `exponential` takes x0 constant over a step and solves the rest exactly, noise included; `euler` takes
            drift and g constant in the path's t, and needs a grid with short steps in log-SNR, such as `logsnr`.
        grid: time grid; empty takes the suite's.
    """

    noise = 1.0


def _exponential_step(plan: Plan, path: Path, x: State, s: float, t: float, noise: float) -> State:
    """The step with x0 constant: x - alpha x0 shrinks by (sigma_t / sigma_s) r^noise, r = rho_t / rho_s.

    Its variance is what keeps that of sigma n: sigma_t^2 (1 - r^(2 noise)).
    """
    forgotten = float(path.rho(t) / path.rho(s)) ** noise
    scale = float(path.sigma(t) / path.sigma(s)) * forgotten
    x0 = plan.evaluate(x, s, t)
    added = Noise(float(path.sigma(t)) * math.sqrt(1.0 - forgotten**2), s, t)
    return plan.update({x: scale}, {x0: float(path.alpha(t) - scale * path.alpha(s))}, added)
