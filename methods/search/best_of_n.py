"""Best-of-N sampling: the candidate of highest reward, the baseline of searches at sampling time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Modifier, Solver
from evalbench.registry import register

from ._flow_sde import choose, starts

if TYPE_CHECKING:
    from evalbench.noise import NoiseSource


@register("best-of-n")
@dataclass(frozen=True)
class BestOfN(Modifier):
    """Best-of-N: samples N times from independent noise and keeps, per sample, the candidate of highest reward.

    N solvers of floor(nfe / N) evaluations each, all of them counted, and one call of the reward per candidate. The
    candidates start from independent x_T (the first from the sample's own) and have independent step noise; they
    share the condition. The reward is asked for finished samples, not for predictions on the way as `svdd` and `rbf`
    do. Its own reward says nothing about it: rank it by a held-out one.

    Attributes:
        n: candidates. 0 takes as many as `steps` evaluations each allow, at least 1.
        steps: evaluations of a candidate where n = 0; the rest of the budget goes to all candidates alike.
        reward: name of the reward it optimises.
    """

    requires = frozenset({"reward"})

    n: int = 0
    steps: int = 10
    reward: str = "target"

    def __post_init__(self) -> None:
        if self.n < 0 or self.steps < 1:
            raise UserError(f"best-of-n: needs n >= 0 and steps >= 1, got n={self.n}, steps={self.steps}")

    def candidates(self, nfe: int) -> int:
        """N at a budget.

        Raises:
            Unsupported: there is less than one evaluation for each.
        """
        if self.n > nfe:
            raise Unsupported(f"best-of-n: {self.n} candidates need NFE {self.n} or more, the budget is {nfe}")
        return self.n or max(1, nfe // self.steps)

    def modify(self, solver: Solver) -> Solver:
        return Best(solver, self)


class Best(Solver):
    """A solver run several times."""

    def __init__(self, solver: Solver, settings: BestOfN) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        n = self.settings.candidates(nfe)
        best = highest = None
        for k in range(n):
            start = starts(x_T, denoiser, noise, k)
            x = self.solver.sample(denoiser, start, cond, nfe // n, noise.candidate(k))
            reward = denoiser.reward(self.settings.reward, x, cond)
            if best is None or highest is None:
                best, highest = x, reward
            else:
                best = choose(reward > highest, x, best)
                highest = torch.maximum(reward, highest)
        assert best is not None
        return best


CLAIM = Claim(
    text="At 100 evaluations the best of ten candidates is nearer to the held-out reward than one sample (size ours)",
    suite="gmm-reward-flow",
    arm="ddim+best-of-n",
    baseline="ddim",
    nfe=100,
    metric="shortfall@reward-held-out",
    direction="lower",
    effect=0.3,
    level="E",
    author="catalogue",
    transfer="weak",
    source="Inference-Time Scaling for Flow Models, its baseline; catalogue B 41 gives no size",
    witness="tests/methods/test_rewards.py",
)
