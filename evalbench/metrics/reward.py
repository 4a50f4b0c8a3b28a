"""Rewards of samples: those that methods may optimise, and held-out ones that rank them.

A method that optimised a score is never ranked by it (design, section 6). A reward that the denoiser gives to methods
is called `reward-target` here, and its value says so beside the number; one that only metrics see is `reward-held-out`,
and is what a suite takes for its primary metric. Published rewards stand in `preferences.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

from evalbench.errors import EvalbenchError, Unsupported, UserError
from evalbench.interfaces import Extractor, Parts, SampleBatch, Value
from evalbench.metrics.common import Array
from evalbench.metrics.persample import MeanScore, Sums
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

TARGET, HELD_OUT = "reward-target", "reward-held-out"
SEEN = "methods may have optimised it: it ranks no method that did"


class _HeldOut(Protocol):
    def held_out(self, x0: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor: ...


@register(TARGET)
class TargetReward(Extractor):
    """The model's reward `target` of each sample, float64 (B,): what searches at sampling time optimise."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        try:
            return batch.model.reward("target", batch.x, batch.cond.labels).double()
        except Unsupported:
            raise UserError(_nothing("reward-target", batch)) from None


@register(HELD_OUT)
class HeldOutReward(Extractor):
    """The model's held-out reward of each sample, float64 (B,): no method can ask for it."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        if not hasattr(batch.model, "held_out"):
            raise UserError(_nothing(HELD_OUT, batch))
        return cast(_HeldOut, batch.model).held_out(batch.x, batch.cond.labels).double()


def _nothing(features: str, batch: SampleBatch) -> str:
    return (
        f"features '{features}' need a model with rewards, and '{batch.model.name}' has none; "
        "run them on suite gmm-reward-flow"
    )


class RewardScore(MeanScore):
    """A mean of a reward, with a note where methods may have optimised it."""

    unit = "reward"

    def compute(self, state: Sums, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        value = super().compute(state, reference, allow_small_n=allow_small_n)
        return replace(value, note=SEEN) if self.arg == TARGET else value


@register("reward")
class Reward(RewardScore):
    """Mean reward of the samples."""


@register("shortfall")
class Shortfall(RewardScore):
    """Mean of what a sample lacks to the highest reward, for rewards that are 0 at best: minus the mean reward.

    Positive, so that ratios of methods mean something.
    """

    higher_is_better = False
    unit = "below the highest reward"

    def per_sample(self, parts: Parts) -> Array:
        rewards = super().per_sample(parts)
        if (rewards > 0).any():
            raise EvalbenchError(f"metric '{self.id}': a reward of {rewards.max():.3g}; it needs rewards of at most 0")
        return -rewards
