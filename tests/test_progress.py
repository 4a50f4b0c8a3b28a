"""The estimate of the time left: forwards x measured cost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from evalbench.progress import MOST_DRAG, CostModel, Phase, ProgressBar


def test_the_cost_model_finds_both_costs() -> None:
    model = CostModel()
    for nfe in (5, 10, 20):
        model.add(100 * nfe, 100, 0.01 * 100 * nfe + 0.3 * 100)
    assert model.seconds(4000, 50) == pytest.approx(0.01 * 4000 + 0.3 * 50)
    assert model.per_forward == pytest.approx(0.01)


def test_one_kind_of_piece_says_nothing_about_another() -> None:
    model = CostModel()
    assert model.seconds(100, 10) is None
    model.add(500, 100, 2.0)
    assert model.seconds(1000, 200) == pytest.approx(4.0), "the same kind"
    assert model.seconds(1000, 100) is None, "another kind"
    assert model.seconds(0, 0) == 0.0


def test_drag_is_what_the_wall_adds() -> None:
    phase = Phase(forwards=100, samples=10, workers=2)
    for i in range(14):  # two workers, a piece of 1 s lands every 0.6 s instead of every 0.5 s
        phase.landed(5, 1, 1.0, clock=0.6 * i)
    assert phase.drag == pytest.approx(1.2)


def test_a_worker_that_has_not_begun_is_not_drag() -> None:
    phase = Phase(forwards=100, samples=10, workers=2)
    for i in range(14):  # one of two workers lands a piece of 1 s each second
        phase.landed(5, 1, 1.0, clock=1.0 * i)
    assert phase.drag == MOST_DRAG


def test_the_bar_covers_all_phases() -> None:
    with ProgressBar(Console(file=io.StringIO())) as bar:
        bar.planned("quality", forwards=310, samples=30, workers=1)
        bar.planned("latency", forwards=100, samples=10, workers=1)
        assert bar.eta is None
        bar.landed("quality", 100, 10, 2.0)
        assert bar.eta is None, "210 forwards of 20 samples are another kind"
        bar.landed("quality", 50, 10, 1.5)
        assert bar.eta == pytest.approx((160 * 0.01 + 10 * 0.1) + 100 * 0.01)
        bar.note("[red]not markup[/red]")
