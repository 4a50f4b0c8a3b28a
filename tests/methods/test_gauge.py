"""gauge: the exact self-test. Distribution metrics must not move, paired ones must; a symmetric matrix breaks both."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.runner import make_cell
from evalbench.spec import load_suite

N, NFE = 1024, 256
SOLVER = "heun(grid=logsnr)"


@lru_cache
def _setup(suite: str) -> sampling.Setup:
    return sampling.build(load_suite(suite).override(batch=N))


@lru_cache
def _draw(suite: str, method: str) -> torch.Tensor:
    setup = _setup(suite)
    cond = sampling.conditions(setup.suite, setup.model, range(N), setup.device)
    cell = make_cell(setup.suite, method, NFE, 1.0, 0)
    return sampling.sample(setup, registry.build_method(method), cell, range(N), cond, Ledger(N, NFE))


def _sliced(suite: str, x: torch.Tensor) -> float:
    metric = registry.build_metric("sw@identity")
    reference = _setup(suite).model.reference("identity")
    return metric.compute(metric.update({"identity": x.numpy()}), reference).value


@lru_cache
def _floor(suite: str) -> float:
    """The largest of four sets of exact draws."""
    setup = _setup(suite)
    labels = sampling.conditions(setup.suite, setup.model, range(N), setup.device).labels
    return max(_sliced(suite, setup.model.data(range(N), labels, seed)) for seed in range(100, 104))


@pytest.mark.parametrize("suite", ["gmm-smooth", "gmm-sharp"])
@pytest.mark.parametrize("c", [0.25, 1.0, 2.0])
def test_samples_move_and_the_distribution_does_not(suite: str, c: float) -> None:
    plain, turned = _draw(suite, SOLVER), _draw(suite, f"{SOLVER}+gauge(c={c})")
    moved = float((plain - turned).square().mean().sqrt())
    assert 0.8 < moved < 1.7, "catalogue B, A 10: 0.9 to 1.6"
    assert _sliced(suite, turned) < 1.5 * _floor(suite)


@pytest.mark.parametrize("suite", ["gmm-smooth", "gmm-sharp"])
def test_a_symmetric_matrix_of_the_same_norm_destroys_the_distribution(suite: str) -> None:
    assert _sliced(suite, _draw(suite, f"{SOLVER}+gauge(c=0.25,symmetric=true)")) > 2 * _floor(suite)


@pytest.mark.parametrize("want", ["eps", "x0", "v", "score"])
def test_the_turn_by_hand_in_every_prediction_type(want: str) -> None:
    setup, t = _setup("gmm-smooth"), 0.4
    setup.door.ledger = Ledger(3)
    x = setup.model.start(sampling.NoiseSource(0, range(3), (8,), torch.float64), setup.path)
    cond = sampling.conditions(setup.suite, setup.model, range(3), setup.device)
    eps = setup.door(x, t, cond, "eps")
    generator = np.zeros((8, 8))
    for i in range(0, 8, 2):
        generator[i, i + 1], generator[i + 1, i] = -1.0, 1.0
    assert (-generator == generator.T).all()
    expected = eps + 0.7 * eps @ torch.from_numpy(generator).T
    alpha, sigma = float(setup.path.alpha(t)), float(setup.path.sigma(t))
    x0 = (x - sigma * expected) / alpha
    by_hand = {"eps": expected, "x0": x0, "v": alpha * expected - sigma * x0, "score": -expected / sigma}[want]
    chain = registry.build_method("ddim+gauge(c=0.7)")
    torch.testing.assert_close(chain.wraps[0].wrap(setup.door)(x, t, cond, want), by_hand)


def test_a_gauge_of_zero_changes_nothing() -> None:
    torch.testing.assert_close(_draw("gmm-smooth", f"{SOLVER}+gauge(c=0.0)"), _draw("gmm-smooth", SOLVER))
