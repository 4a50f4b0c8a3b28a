"""The oracle of a search: plans scored by the distance of their samples to the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from evalbench.engine import Plan, execute
from evalbench.interfaces import Denoiser, Preparation

_BATCH = 256  # rows per call, so that a search over images fits where a run does


class Oracle:
    """Scores plans: the distance of what they make of one fixed set of search noise; lower is better.

    Args:
        context: of the preparation. samples: number of samples a plan is scored with. seed: the method's own.
    """

    def __init__(self, context: Preparation, samples: int, seed: int) -> None:
        self._context = context
        self._batches = []
        for indices in _batches(samples):
            noise = context.noise(indices, seed)
            x_T, cond = context.x_T(noise), context.cond(indices)
            self._batches.append((noise, x_T, cond, context.denoiser(len(indices))))

    def __call__(self, plan: Plan, wrap: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser) -> float:
        """The distance; infinite where a plan leaves the finite numbers.

        Args:
            wrap: what stands around the field while the plan is executed.
        """
        made = [execute(plan, wrap(denoiser), x_T, cond, noise) for noise, x_T, cond, denoiser in self._batches]
        x = torch.cat(made)
        score = self._context.distance(x) if bool(torch.isfinite(x).all()) else math.inf
        return score if math.isfinite(score) else math.inf


def _batches(samples: int) -> list[Sequence[int]]:
    return [range(start, min(start + _BATCH, samples)) for start in range(0, samples, _BATCH)]
