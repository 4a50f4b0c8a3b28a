"""BDIA, Zhang, Lewis & Kleijn 2023 (arXiv 2307.10829): Exact Diffusion Inversion via Bi-directional Integration
Approximation.

With Delta(a -> b | z_i) the move of a base solver from z_i, times falling from t_N to t_0,

    z_{i-1} = z_{i+1} - (1 - gamma) (z_{i+1} - z_i) - gamma Delta(t_i -> t_{i+1} | z_i) + Delta(t_i -> t_{i-1} | z_i)

so with the end points F = z_i + Delta(t_i -> t_{i-1} | z_i) and B = z_i + Delta(t_i -> t_{i+1} | z_i),

    z_{i-1} = F + gamma (z_{i+1} - B)        z_{i+1} = B + (z_{i-1} - F) / gamma

The authors' README has swapped gamma and 1 - gamma between its revisions; here gamma = 0 is the base solver and
gamma = 1 the two-step (leapfrog-like) scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from evalbench.engine import Eval, Plan, PlannedSolver, State, check_choice, check_grid, linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Step
from evalbench.paths import Path, check_falling
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_PAPER = "Zhang, Lewis & Kleijn 2023, arXiv 2307.10829"
CLAIM = (
    Claim(
        text="At 10 evaluations on overlapping modes BDIA-DDIM with gamma = 1 ends nearer to the flow's end.",
        suite="gmm-smooth",
        arm="bdia",
        baseline="ddim",
        nfe=10,
        metric="paired-median@identity",
        direction="lower",
        effect=0.76,
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_PAPER}; methods-b entry 13: median 0.048 against 0.20",
    ),
    Claim(
        text="At 10 evaluations on separated modes BDIA-DDIM with gamma = 1 ends farther from the flow's end.",
        suite="gmm-sharp",
        arm="bdia",
        baseline="ddim",
        nfe=10,
        metric="paired-median@identity",
        direction="higher",
        effect=2.0,
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_PAPER}; methods-b entry 13: median 0.21 against 0.069",
    ),
    Claim(
        text="BDIA on EDM's Heun sampler has a lower Frechet distance than the Heun sampler (the size is ours).",
        suite="gmm-smooth-edm",
        arm="bdia(base=edm)",
        baseline="heun",
        nfe=20,
        metric="fd@identity",
        direction="lower",
        effect=0.1,
        level="E",
        author="paper",
        transfer="fair",
        source=f"{_PAPER}, abstract: consistently better over four pre-trained models",
    ),
)


class Pair(NamedTuple):
    """The state of a two-step solver: states at two neighbouring times of its grid, each (B, *S)."""

    noisier: torch.Tensor
    cleaner: torch.Tensor


class Move(NamedTuple):
    """A base solver's map z -> scale z + sum of weights times evaluations."""

    scale: float
    weights: dict[Eval, float]


@register("bdia")
@dataclass(frozen=True)
class BDIA(PlannedSolver):
    """BDIA (Zhang et al. 2023): two-step update from a base solver's forward and backward moves; invertible.

    The first step is the base solver's. Both moves use the same evaluations, so a step costs what the base costs.

    * `base="ddim"`: order 2 at gamma = 1, else 1; one evaluation per step. `sample_pair` returns the pair (z_1, z_0),
      from which `invert` recovers (z_N, z_{N-1}) exactly, up to rounding. Inversion divides by gamma in each step:
      errors grow like gamma^-N, so gamma = 0.5 cannot be inverted in practice.
    * `base="dpm-solver++"`: the 2M step from the evaluations at z_i and z_{i+1}, and backwards the same polynomial;
      one evaluation per step, order 2. Its first-order step would be that of ddim.
    * `base="edm"`: Heun's step in x / alpha, and backwards the trapezoid of the evaluations at z_i and z_{i+1}, which
      puts the evaluation at z_i where Heun had used that at its prediction; order 2, two evaluations per step, budgets
      as in `heun`. EDM's Euler step would be that of ddim.

    The last two are our reading: the catalogue has the DDIM form only, and says that the paper extends it. They cannot
    be inverted in closed form, because their moves use the network at the state that the inverse looks for.
    A step to t = 0 is first order. It is not EDICT (two coupled chains) nor leapfrog on dx/dt: the moves are the
    exponential steps of the base. The authors advise gamma = 0.5 at 10 steps and 1 at 40, and 0.92..1 for editing.

    Attributes:
        base: `ddim`, `dpm-solver++` or `edm`.
        gamma: weight of the backward move, above 0 and at most 1.
        grid: time grid; empty takes the suite's.
    """

    base: Literal["ddim", "dpm-solver++", "edm"] = "ddim"
    gamma: float = 1.0
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("bdia", "base", self.base, ("ddim", "dpm-solver++", "edm"))
        if not 0.0 < self.gamma <= 1.0:
            raise UserError(f"bdia: gamma must be above 0 and at most 1, got {self.gamma}; 0 is the base solver itself")

    def steps_for(self, path: Path, nfe: int) -> int:
        return (nfe + 1) // 2 if self.base == "edm" else nfe

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Plan:
        times = self.times(path, self.grid or suite_grid, nfe)
        check_falling(times)
        return self._plan(path, times, euler_last=nfe % 2 == 1)

    def plan(self, path: Path, times: Sequence[float]) -> Plan:
        return self._plan(path, times, euler_last=False)

    def _plan(self, path: Path, times: Sequence[float], *, euler_last: bool) -> Plan:
        """`euler_last`: Heun's last step has no correction (an odd budget of `edm`)."""
        plan = Plan("x0" if self.base == "dpm-solver++" else "eps")
        z, z_before, before = plan.x_T, None, None  # z_i; z_{i+1} and its evaluation
        for i, (s, t) in enumerate(pairwise(times)):
            now = plan.evaluate(z, s, t)
            last = times[i - 1] if i else s
            if self.base == "dpm-solver++":
                forward = _two_step(path, (last, before), (s, now), t)
                backward = _two_step(path, (last, before), (s, now), last)
            elif self.base == "edm":
                correct = t > 0 and not (euler_last and i == len(times) - 2)
                forward = _heun(plan, path, z, now, s, t) if correct else _first_order(path, now, s, t)
                backward = _trapezoid(path, now, before, s, last)
            else:
                forward, backward = _first_order(path, now, s, t), _first_order(path, now, s, last)
            z, z_before, before = self._update(plan, z, z_before, forward, backward), z, now
        return plan.finish(z)

    def _update(self, plan: Plan, z: State, z_before: State | None, forward: Move, backward: Move) -> State:
        """F + gamma (z_{i+1} - B); F where there is no z_{i+1}."""
        if z_before is None:
            return plan.update({z: forward.scale}, forward.weights)
        weights = dict(forward.weights)
        for evaluation, weight in backward.weights.items():
            weights[evaluation] = weights.get(evaluation, 0.0) - self.gamma * weight
        scale = forward.scale - self.gamma * backward.scale
        return plan.update({z: scale, z_before: self.gamma}, weights)

    # --- inversion ----------------------------------------------------------------------------------------------

    def sample_pair(
        self, denoiser: Denoiser, start: torch.Tensor | Pair, cond: Cond, nfe: int, noise: NoiseSource
    ) -> Pair:
        """The states (z_1, z_0) that sampling ends with; z_0 is what `sample` returns.

        Args:
            start: z_N, (B, *S), or the pair (z_N, z_{N-1}) of `invert`, which saves the first evaluation.
            denoiser, cond, nfe, noise: as in `sample`.

        Raises:
            Unsupported: base is not `ddim`.
        """
        times = self._invertible_times(denoiser, nfe)
        if isinstance(start, Pair):
            pair, x_T = start, start.noisier
        else:
            x_T = start
            a, b = linear_step(denoiser.path, times[0], times[1], "eps")
            step = Step(0, nfe, times[0], times[1], x_T)
            pair = Pair(x_T, (a * x_T).add_(denoiser(x_T, times[0], cond, "eps", step=step), alpha=b))
        for i in range(1, nfe):
            before, z = pair
            eps = denoiser(z, times[i], cond, "eps", step=Step(i, nfe, times[i], times[i + 1], x_T))
            a, b = self._step(denoiser.path, times, i)
            # in the engine's order of operations, so that z_0 has the bits of `sample`
            pair = Pair(z, (a * z).add_(before, alpha=self.gamma).add_(eps, alpha=b))
        return pair

    def invert(self, denoiser: Denoiser, x_0_pair: Pair, cond: Cond, nfe: int, noise: NoiseSource) -> Pair:
        """The pair (z_N, z_{N-1}) that sampling leads to x_0_pair = (z_1, z_0); nfe - 1 evaluations.

        Args:
            x_0_pair: what `sample_pair` returned, or `first_pair` of given samples.
            denoiser, cond, nfe, noise: as in `sample`; nothing is drawn.

        Raises:
            Unsupported: base is not `ddim`.
        """
        times = self._invertible_times(denoiser, nfe)
        pair = x_0_pair
        for i in range(nfe - 1, 0, -1):
            z, after = pair
            eps = denoiser(z, times[i], cond, "eps", step=Step(nfe - 1 - i, nfe, times[i], times[i - 1]))
            a, b = self._step(denoiser.path, times, i)
            pair = Pair((after - a * z - b * eps) / self.gamma, z)
        return pair

    def first_pair(self, denoiser: Denoiser, x_0: torch.Tensor, cond: Cond, nfe: int) -> Pair:
        """The pair (z_1, x_0) for samples that come alone, (B, *S): one plain DDIM step back, one evaluation.

        Raises:
            Unsupported: base is not `ddim`, or the grid ends at t = 0, where no network can be asked.
        """
        times = self._invertible_times(denoiser, nfe)
        t, s = times[-1], times[-2]
        if t == 0.0:
            raise Unsupported("bdia: inverting samples at t = 0 needs a network there; take a path with final='t_end'")
        a, b = linear_step(denoiser.path, t, s, "eps")
        return Pair(a * x_0 + b * denoiser(x_0, t, cond, "eps", step=Step(0, nfe, t, s)), x_0)

    def _invertible_times(self, denoiser: Denoiser, nfe: int) -> tuple[float, ...]:
        if self.base != "ddim":
            raise Unsupported(
                f"bdia(base={self.base}) has no inverse: it would need the network at the state sought; type base=ddim"
            )
        return self.times(denoiser.path, self.grid or denoiser.grid, nfe)

    def _step(self, path: Path, times: Sequence[float], i: int) -> tuple[float, float]:
        """(a, b) of z_{i-1} = a z_i + b eps + gamma z_{i+1} for the i-th step of falling `times`, i >= 1."""
        a, b = linear_step(path, times[i], times[i + 1], "eps")
        a_back, b_back = linear_step(path, times[i], times[i - 1], "eps")
        return a - self.gamma * a_back, b - self.gamma * b_back


# --- moves of the base solvers, forward and backward ------------------------------------------------------------------


def _first_order(path: Path, eps: Eval, s: float, to: float) -> Move:
    """DDIM's step from s to any time; the identity for to = s."""
    scale, weight = linear_step(path, s, to, "eps")
    return Move(scale, {eps: weight})


def _two_step(path: Path, before: tuple[float, Eval | None], now: tuple[float, Eval], to: float) -> Move:
    """DPM-Solver++(2M), midpoint form, from `now` to any time; first order without history and to t = 0."""
    s, x0 = now
    last, x0_last = before
    scale, weight = linear_step(path, s, to, "x0")
    if x0_last is None or to == 0.0:
        return Move(scale, {x0: weight})
    # D = x0 + (x0 - x0_last) / (2 r), r the ratio of the last step to this one in lambda (-1 for the way back)
    extrapolation = 0.5 * float((path.lam(to) - path.lam(s)) / (path.lam(s) - path.lam(last)))
    return Move(scale, {x0: weight * (1.0 + extrapolation), x0_last: -weight * extrapolation})


def _heun(plan: Plan, path: Path, z: State, d: Eval, s: float, t: float) -> Move:
    """EDM's Heun step from s to t: d z / alpha = eps d sigma / alpha by the trapezoid with a predicted end."""
    scale, weight = linear_step(path, s, t, "eps")
    predicted = plan.update({z: scale}, {d: weight})
    d_next = plan.evaluate(predicted, t, t, inner=True)
    return Move(scale, {d: 0.5 * weight, d_next: 0.5 * weight})


def _trapezoid(path: Path, d: Eval, d_before: Eval | None, s: float, last: float) -> Move:
    """The way back over the last step with the evaluations at both of its ends."""
    scale, weight = linear_step(path, s, last, "eps")
    if d_before is None:
        return Move(scale, {d: weight})
    return Move(scale, {d: 0.5 * weight, d_before: 0.5 * weight})
