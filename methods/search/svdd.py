"""SVDD on a flow model's SDE: the baseline of RBF that takes the best of K proposals at every step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from evalbench.interfaces import Claim, Cond, Denoiser, Step
from evalbench.registry import register

from ._flow_sde import FlowSDE, Judge, better, moved, on_interpolant

if TYPE_CHECKING:
    from evalbench.noise import NoiseSource

_SOURCE = "Inference-Time Scaling for Flow Models; methods-b section A item 8"


def _claim(metric: str, which: str, size: str) -> Claim:
    return Claim(
        text=f"On the linear SDE SVDD has a better {which} reward than best-of-N on the ODE at equal NFE.",
        suite="gmm-reward-flow",
        arm="svdd",
        baseline="ddim+best-of-n",
        nfe=100,
        metric=metric,
        direction="lower",
        effect=0.42,
        level="E",
        author="catalogue",
        transfer="weak",
        source=f"{_SOURCE}: -0.21 against -0.36 at NFE 100{size}",
        witness="tests/methods/test_rewards.py",
    )


CLAIM = (
    _claim("shortfall@reward-target", "target", ""),
    _claim("shortfall@reward-held-out", "held-out", " on the reward searched for; the size on another is ours"),
)


@register("svdd")
@dataclass(frozen=True)
class SVDD(FlowSDE):
    """SVDD (soft value-based decoding), argmax form: each step of an SDE takes the best of K proposals by x0-hat.

    One particle per sample. At each of `steps` steps K states are proposed for the next time, the network is asked at
    each (one evaluation and one call of the reward per proposal), and the one whose x0-hat has the highest reward
    is the next state; its evaluation serves the next step. The result is the last x0-hat. Every budget is spent: one
    evaluation at x_T, the others in equal shares, so that K differs by at most 1 between steps; a budget of `steps` or
    less is an SDE of nfe - 1 steps without choice. At equal NFE it asks for the reward about
    `steps` times as often as `best-of-n`; those calls are counted apart. It optimises its reward: rank it by a held-out
    one. Near names: `rbf` stops proposing at the first improvement; `best-of-n` chooses among finished samples.

    Attributes:
        reward: name of the reward it optimises.
        steps: steps of the SDE, at least 1.
        interpolant: path of the SDE: `linear` x = (1 - t) x0 + t n, `vp` the variance preserving one (beta 0.1 to 20).
        g: factor of t^2 in the SDE's g(t); 3 in the paper. 0 is the ODE, whose proposals are all the same.
        grid: `exp`, t = sqrt(1 - (1 - v)^2) with v uniform; or a grid of `paths.grid`; empty takes the suite's.
    """

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        field = on_interpolant(denoiser, self.interpolant)
        path, n = field.path, min(self.steps, nfe - 1)
        times = self.times(path, denoiser.grid, n)
        judge = Judge(field, cond, self.reward)
        x = moved(x_T, denoiser.path, path)
        at = judge(x, times[0], Step(0, n + 1, times[0], times[min(1, n)], x))
        for i, (s, t) in enumerate(pairwise(times)):
            mean, std = self.transition(path, at, s, t)
            step = Step(i + 1, n + 1, t, times[min(i + 2, n)], x)
            chosen = None
            for k in range((nfe - 1) * (i + 1) // n - (nfe - 1) * i // n):
                proposal = judge(mean + std * noise.normal(f"proposal {k}", i), t, step)
                chosen = proposal if chosen is None else better(proposal, chosen)
            assert chosen is not None
            at = chosen
        return at.x0
