"""The estimate of the time left: forwards x measured cost."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import nnls

from evalbench.progress import MOST_DRAG, CostModel, Phase, ProgressBar


def test_the_cost_model_finds_both_costs() -> None:
    model = CostModel()
    for nfe in (5, 10, 20):
        model.add(100 * nfe, 100, 0.01 * 100 * nfe + 0.3 * 100)
    assert model.seconds(4000, 50) == pytest.approx(0.01 * 4000 + 0.3 * 50)
    assert model.per_forward == pytest.approx(0.01)


@given(
    pieces=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 500), st.floats(0.0, 100.0)), min_size=2, max_size=12)
)
def test_the_cost_model_is_nonnegative_least_squares(pieces: list[tuple[int, int, float]]) -> None:
    assume(len({nfe for nfe, _, _ in pieces}) > 1)
    model = CostModel()
    rows = np.array([(nfe * samples, samples) for nfe, samples, _ in pieces], dtype=float)
    seconds = np.array([seconds for *_, seconds in pieces])
    for (forwards, samples), took in zip(rows.tolist(), seconds.tolist(), strict=True):
        model.add(forwards, samples, took)
    (a, b), _ = nnls(rows, seconds)
    assert model.seconds(1000, 100) == pytest.approx(1000 * a + 100 * b, rel=1e-6, abs=1e-6)


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


def test_plain_lines_where_there_is_no_terminal() -> None:
    said = io.StringIO()
    with ProgressBar(Console(file=said, width=80)) as bar:
        bar.planned("quality", forwards=40, samples=8, workers=1)
        bar.cells(0, 2, 0)
        for _ in range(3):
            bar.landed("quality", 10, 2, 0.1)  # no line for each
        bar.cells(1, 2, 1)
        bar.cells(1, 2, 1)
    lines = said.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("starting: 0%, 0 of 2 cells")
    assert lines[1].startswith("quality: 75%, 1 of 2 cells, 1 error, ")
    assert "chunks/s" in lines[1]


def test_a_terminal_sees_cells_speed_and_what_each_worker_does() -> None:
    said = io.StringIO()
    with ProgressBar(Console(file=said, width=100, force_terminal=True)) as bar:
        bar.planned("quality", forwards=40, samples=8, workers=12)
        bar.cells(1, 3, 0)
        bar.workers({f"worker {i}": "ddim at NFE 5" for i in range(12)})
        bar.landed("quality", 10, 2, 0.1)
    shown = said.getvalue()
    for part in ("quality", "25%", "1 of 3 cells", "worker 0: ddim at NFE 5", "worker 7", "and 4 more"):
        assert part in shown
    assert "worker 8" not in shown
