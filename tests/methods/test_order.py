"""Orders of convergence on a smooth Gaussian mixture with exact score: slope of the median paired error."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from exact_model import draw

from evalbench.paths import make_path

BUDGETS = (40, 80, 160)
BATCH = 32


@lru_cache(maxsize=4)
def fine(kind: str) -> torch.Tensor:
    """The end point of the probability flow; a third-order singlestep solver none of the tests measures."""
    text = "dpm-solver++(order=3,algorithm=singlestep,solver_type=heun,lower_order_final=false)"
    return draw(text, make_path(kind), 900, BATCH)[0]


def order(text: str, kind: str) -> float:
    """-slope of log median |x - x_fine| against log NFE on the log-SNR grid."""
    errors = []
    for budget in BUDGETS:
        x, nfe = draw(text, make_path(kind), budget, BATCH)
        assert nfe == budget
        errors.append(float((x - fine(kind)).norm(dim=1).median()))
    assert 1e-7 < errors[-1] < errors[0]  # above the reference's own error
    return -float(np.polyfit(np.log(BUDGETS), np.log(errors), 1)[0])


FULL = "lower_order_final=false"
# method, path, least and greatest order
ORDERS = [
    ("ddim", "vp-linear", 0.9, 1.1),
    ("euler", "vp-linear", 0.9, 1.1),
    ("heun", "vp-linear", 1.9, 2.25),
    ("dpm-solver(order=2)", "vp-linear", 1.9, 2.25),
    ("dpm-solver(order=3)", "vp-linear", 2.7, 3.8),
    (f"dpm-solver(order=2,algorithm=multistep,{FULL})", "vp-linear", 1.85, 2.2),
    ("dpm-solver++", "vp-linear", 1.9, 2.2),
    ("dpm-solver++(algorithm=singlestep)", "vp-linear", 1.8, 2.2),
    ("dpm-solver++(algorithm=singlestep,order=3)", "vp-linear", 2.7, 3.4),
    # the published third-order multistep update is second order, its correction third
    (f"dpm-solver++(order=3,{FULL})", "vp-linear", 1.8, 2.3),
    (f"dpm-solver++(order=3,d2=taylor,{FULL})", "vp-linear", 2.8, 3.6),
    # the corrector raises the order by one
    ("unipc(order=1,corrector=false)", "vp-linear", 0.9, 1.1),
    ("unipc(order=1)", "vp-linear", 1.8, 2.2),
    ("unipc(corrector=false)", "vp-linear", 1.9, 2.2),
    ("unipc", "vp-linear", 2.7, 3.3),
    (f"unipc(variant=bh1,{FULL})", "vp-linear", 2.7, 3.3),
    ("deis(order=2)", "vp-linear", 1.8, 2.1),
    ("deis", "vp-linear", 2.7, 3.1),
    ("deis(space=logrho)", "vp-linear", 2.9, 3.3),
    ("deis(order=4)", "vp-linear", 3.3, 4.1),
    # equal-step weights on unequal steps: second order at most
    ("ipndm", "vp-linear", 1.8, 2.2),
    ("ipndm(variable_step=true)", "vp-linear", 3.3, 4.1),
    ("ddim", "edm", 0.9, 1.1),
    ("heun", "edm", 1.9, 2.25),
    ("ddim", "flow", 0.9, 1.1),
    ("heun", "flow", 1.9, 2.25),
]


@pytest.mark.parametrize(("text", "kind", "low", "high"), ORDERS)
def test_order_of_convergence(text, kind, low, high):
    measured = order(text, kind)
    print(f"{text} {kind}: {measured:.2f}")
    assert low < measured < high
