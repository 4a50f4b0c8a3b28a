"""The door: conversions between predictions, and a ledger that counts per sample."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from evalbench import registry
from evalbench.cost.flops import count_flops
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import BudgetExceeded
from evalbench.interfaces import Cond, Want
from evalbench.paths import EDM, Flow, Path, VPLinear
from evalbench.predictions import convert

WANTS = [want for want in get_args(Want) if want != "probs"]


def _predictions(path: Path, t: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    alpha, sigma = path.alpha(t), path.sigma(t)
    values = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": path.d_alpha(t) * x0 + path.d_sigma(t) * eps,
        "score": -eps / sigma,
    }
    return alpha * x0 + sigma * eps, values


@pytest.mark.parametrize("path", [VPLinear(), EDM(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("have", "want"), list(itertools.product(WANTS, WANTS)))
def test_conversions_follow_the_definitions(path: Path, have: Want, want: Want) -> None:
    t = 0.3
    x, values = _predictions(path, t)
    torch.testing.assert_close(convert(values[have], x, path, t, have, want), values[want])
    per_row = torch.full((4,), t, dtype=torch.float64)
    torch.testing.assert_close(convert(values[have], x, path, per_row, have, want), values[want])


def _door() -> NetworkDoor:
    model = registry.build_model("gmm", {})
    model.to(torch.float64, torch.device("cpu"))
    return NetworkDoor(model, VPLinear(), "logsnr")


def _field(door: NetworkDoor, batch: int, budget: float | None = None, scale: float = 1.0) -> Field:
    ledger = Ledger(batch, budget)
    door.ledger = ledger
    return Field(registry.build_guidance(scale).wrap(door), ledger)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (0.0, 1), (3.0, 2)])
def test_guidance_costs_rows_not_nfe(scale: float, rows: int) -> None:
    field = _field(_door(), 5, scale=scale)
    field(torch.randn(5, 8, dtype=torch.float64), 0.5, Cond(torch.zeros(5, dtype=torch.int64)))
    np.testing.assert_array_equal(field.ledger.nfe, np.ones(5))
    np.testing.assert_array_equal(field.ledger.evals["base"], np.full(5, rows))
    np.testing.assert_array_equal(field.ledger.cost, np.full(5, rows))
    assert field.ledger.depth == 1


def test_rows_say_which_samples_they_are_for() -> None:
    field = _field(_door(), 3)
    rows = np.array([0, 0, 2, 2, 2])
    field(torch.randn(5, 8, dtype=torch.float64), 0.5, Cond(), rows=rows)
    np.testing.assert_array_equal(field.ledger.nfe, [2, 0, 3])
    with pytest.raises(ValueError, match="say with rows="):
        field(torch.randn(5, 8, dtype=torch.float64), 0.5, Cond())


def test_spending_more_than_the_budget_raises() -> None:
    field = _field(_door(), 2, budget=1)
    x = torch.randn(2, 8, dtype=torch.float64)
    field(x, 0.5, Cond())
    with pytest.raises(BudgetExceeded, match="budget 1, spent 2"):
        field(x, 0.5, Cond())


def test_guidance_is_the_linear_combination() -> None:
    door, x, labels = _door(), torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    outs = {scale: _field(door, 4, scale=scale)(x, 0.4, Cond(labels), "eps") for scale in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(outs[2.5], outs[0.0] + 2.5 * (outs[1.0] - outs[0.0]))


def test_flops_of_a_linear_layer_and_of_nothing_known() -> None:
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 7 * 5
    assert np.isnan(count_flops(lambda: x + x))
