"""What --plan says: what is left, and time and disk by a probe that agrees with what a run then costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import PREPARES, request, run_serial, small_suite

from evalbench import registry
from evalbench.forecast import Forecast, Probe, forecast, lines, probe
from evalbench.plan import make_plan
from evalbench.progress import CostModel
from evalbench.store import Store


def test_what_is_there_is_left_out(tmp_path: Path) -> None:
    plan = make_plan(request(small_suite(), ["ddim", "heun"], (4, 8)))
    before = forecast(plan, tmp_path / "r", None)
    assert (before.cells, before.present) == (4, 0)
    assert before.sampled == len(plan.work) == 5  # and the fine solution
    assert before.forwards == sum(cell.nfe for cell in plan.work) * small_suite().sampling.samples
    run_serial(request(small_suite(), ["ddim"], (4,)), tmp_path / "r")
    after = forecast(plan, tmp_path / "r", None)
    done = {plan.cells[0].id, plan.solutions[plan.cells[0].id].id}
    assert after.present == sum(len(plan.chunks(cell)) for cell in plan.work if cell.id in done)
    assert after.chunks + after.present == before.chunks
    assert forecast(make_plan(request(small_suite(), ["ddim"], (4,))), tmp_path / "r", None).forwards == 0


def test_time_and_disk_are_those_of_the_probe() -> None:
    plan = make_plan(request(small_suite(), ["ddim"], (4, 8)))
    cost = CostModel()
    cost.add(400, 100, 400 * 0.01 + 100 * 0.5)
    cost.add(800, 100, 800 * 0.01 + 100 * 0.5)
    found = forecast(plan, Path("none"), Probe(cost, row=100.0, image=0.0))
    assert found.seconds == pytest.approx(0.01 * found.forwards + 0.5 * found.samples)
    assert found.bytes == pytest.approx(100.0 * found.samples)


def test_a_probe_says_how_large_the_files_become(tmp_path: Path) -> None:
    asked = request(small_suite(), ["ddim"], (4, 8))
    plan = make_plan(asked)
    found = forecast(plan, tmp_path / "r", probe(plan))
    assert found.seconds is not None
    assert found.seconds > 0
    run_serial(asked, tmp_path / "r")
    store = Store(tmp_path / "r")
    arrays = [store.read_chunk(chunk) for cell in plan.work for chunk in plan.chunks(cell)]
    assert found.bytes == pytest.approx(sum(a.nbytes for chunk in arrays for a in chunk.values()), rel=0.15)


def test_methods_that_prepare_are_not_probed() -> None:
    registry.load_plugin(PREPARES, "prepares.py")
    plan = make_plan(request(small_suite(), ["prepares"], (4,), metrics=("fd@identity",)))
    assert probe(plan) is None
    assert "no batch could be probed" in lines(forecast(plan, Path("none"), None), 2)[-1]


def test_the_words() -> None:
    said = lines(Forecast(12, 13, 1_000_000, 7, 256_000_000, 10**10, 7200.0, 2.5e9), 4)
    assert said == [
        "cells: 12  (with fine solutions: 13)",
        "chunks: 1,000,000 to compute, 7 there already; 256,000,000 samples; evaluations: at most 10,000,000,000",
        "time: 2 worker-hours by a short probe; 0.5 hours on 4 workers",
        "disk: 2,500.0 MB",
    ]
