"""Rewards as metrics: values by hand, the note on a reward that methods may have optimised, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics.reward import SEEN
from evalbench.models.gmm import GaussianMixture
from evalbench.models.gmm_reward import RewardMixture
from evalbench.registry import build_extractor, build_metric

NAMES = ("reward-target", "reward-held-out")


def batch(model: GaussianMixture) -> SampleBatch:
    model.to(torch.float32, torch.device("cpu"))
    return SampleBatch(torch.linspace(-1, 1, 40).reshape(5, 8), None, Cond(), model)


@pytest.mark.parametrize(("name", "point"), list(zip(NAMES, (0, 1), strict=True)))
def test_extractors_give_the_rewards_of_the_samples(name: str, point: int) -> None:
    samples = batch(model := RewardMixture())
    found = build_extractor(name)(samples)
    assert found.dtype == torch.float64
    expected = -np.sqrt(((samples.x - model.points[point]).numpy() ** 2).mean(1))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_rewards_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' need a model with rewards, and 'gmm' has none"):
        build_extractor(name)(batch(GaussianMixture()))


@pytest.mark.parametrize("name", NAMES)
def test_values_and_their_notes(name: str) -> None:
    scores = np.array([-1.0, -2.0, -3.0, -6.0])
    note = "" if name == "reward-held-out" else SEEN
    for kind, sign in (("reward", 1), ("shortfall", -1)):
        metric = build_metric(f"{kind}@{name}")
        value = metric.compute(metric.update({name: scores}), None)
        assert value.value == pytest.approx(sign * -3.0)
        assert value.se == pytest.approx(np.std(scores, ddof=1) / 2)
        assert value.note == note


def test_a_shortfall_needs_rewards_that_are_zero_at_best() -> None:
    with pytest.raises(EvalbenchError, match="needs rewards of at most 0"):
        build_metric("shortfall@reward-target").update({"reward-target": np.array([-1.0, 0.25])})
