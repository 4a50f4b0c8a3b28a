"""What the built-in suites promise in their comments and summaries."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from evalbench import api, registry, runner, sampling
from evalbench.cost.ledger import Ledger
from evalbench.runner import make_cell
from evalbench.spec import load_suite, suite_names

ROWS = 64
BEST = ("unipc", "dpm-solver++(order=3,d2=taylor)", "deis", "ipndm(variable_step=true)")


@lru_cache
def _setup(suite: str) -> sampling.Setup:
    return sampling.build(load_suite(suite).override(batch=ROWS))


def _samples(suite: str, method: str, nfe: int) -> torch.Tensor:
    setup = _setup(suite)
    cond = sampling.conditions(setup.suite, setup.model, range(ROWS), setup.device)
    cell = make_cell(setup.suite, method, nfe, 1.0, 0)
    return sampling.sample(setup, registry.build_method(method), cell, range(ROWS), cond, Ledger(ROWS, nfe))


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).flatten(1).pow(2).mean(1).sqrt().median())


@pytest.mark.parametrize(
    "suite", [name for name in suite_names() if name.startswith("gmm") and load_suite(name).solution]
)
def test_the_fine_solution_is_fine_enough(suite: str) -> None:
    solution = load_suite(suite).solution
    assert solution is not None
    fine = _samples(suite, solution.method, solution.nfe)
    own = _error(fine, _samples(suite, solution.method, 4 * solution.nfe))
    best = min(_error(fine, _samples(suite, method, 20)) for method in BEST)
    assert own < best / 20


def test_the_fine_solution_of_the_images_is_fine_enough() -> None:
    solution = load_suite("fashion-mixture").solution
    assert solution is not None
    fine = _samples("fashion-mixture", solution.method, solution.nfe)
    own = _error(fine, _samples("fashion-mixture", solution.method, 4 * solution.nfe))
    best = min(_error(fine, _samples("fashion-mixture", method, 20)) for method in BEST)
    assert own < best / 10


def test_network_error_changes_the_ranking(tmp_path) -> None:
    """A stochastic sampler loses to an ODE solver on the exact score and wins against it on the wrong one."""
    values = {}
    for suite in ("gmm-smooth", "gmm-error"):
        request = api.make_request(suite, methods=["ddpm", "unipc"], nfe=[20], metrics=["fd@identity"], samples=2048)
        for record in runner.run(request, tmp_path / suite, runner.SerialExecutor):
            values[suite, record.cell.method] = record.metrics["fd@identity"]
    assert values["gmm-smooth", "unipc"].high < values["gmm-smooth", "ddpm"].low  # type: ignore[operator]
    assert values["gmm-error", "ddpm"].high < values["gmm-error", "unipc"].low  # type: ignore[operator]


def test_floors_stand_beside_the_value_at_the_same_n() -> None:
    suite = load_suite("fashion-mixture")
    floors = {(f.metric, f.what): f for f in suite.floors if f.samples == suite.sampling.samples}
    for metric in suite.metrics.names:
        if not metric.startswith("paired"):
            assert {"floor", "blur", "jpeg", "duplicated"} <= {what for name, what in floors if name == metric}
    floor = floors["fd@fashion64", "floor"]
    for spoiled in ("blur", "jpeg", "duplicated"):
        assert floors["fd@fashion64", spoiled].value > floor.value + 5 * (floor.sd or 0.0)
    (itself,) = (f for f in suite.floors if (f.metric, f.what) == ("fd@fashion64", "itself"))
    assert abs(itself.value) < 1e-2 * floor.value
