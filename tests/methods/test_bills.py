"""Bills of what is trained or calibrated inside a network: counts by hand, seconds, and the images that pay for them.

Real runs of twins, seen as users see them: table.csv, timings.csv and the report's table of preparations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import twins
from methods_inside import ByHand
from support import request, run_serial

import evalbench
from evalbench import preparation, registry
from evalbench.report import leaderboard, suite_of
from evalbench.report.tables import Shown
from evalbench.report.view import blocks
from evalbench.store import Store

pytestmark = pytest.mark.slow

NFE = 4
PLAIN = (2, 8)  # budgets of the solver that prepares nothing, beside NFE
METRIC = "paired-median@pixels"
DEEDIFF_STEPS = 25  # of the walk that finds its threshold

# method -> evaluations of the field, network rows, backward passes, steps of a training; by hand
DIT = {
    # roll-outs of NFE steps; all but the first step run the mixed network too, with a backward pass
    "ddim+harmonica(rollouts=3,batch=4)": (3 * NFE * 4, 3 * NFE * 4 + 3 * (NFE - 1) * 4, 3 * (NFE - 1) * 4, 0),
    # trajectories, then the states that were chosen: one of each, or every one
    "ddim+ptq4dm(samples=6,steps=3)": (6 * 3 + 6, 6 * 3 + 6, 0, 0),
    "ddim+vidit-q(samples=4,steps=3)": (2 * 4 * 3, 2 * 4 * 3, 0, 0),
    # one call of a batch in each iteration, then the head alone after each of three blocks; then the walk
    "ddim+deediff(images=8,iterations=3)": (
        3 * 8 + DEEDIFF_STEPS * 8,
        3 * 8 + DEEDIFF_STEPS * 8 + 3 * 3 * 8,
        3 * 3 * 8,
        0,
    ),
    # candidates, samples, steps
    "autodiffusion(population=4,epochs=2,samples=4)": (8 * 4 * NFE, 8 * 4 * NFE, 0, 0),
    "autodiffusion(population=4,epochs=2,samples=4,layers=0.75)": (8 * 4 * NFE, 8 * 4 * NFE, 0, 0),
    # iterations of a batch through all steps: of the budget, of the student
    "ddim+mmd-ddm(iterations=2,batch=3,features=identity)": (2 * 3 * NFE, 2 * 3 * NFE, 0, 2 * 3),
    "diversity-distill(steps=3,iterations=2,batch=3,features=identity)": (2 * 3 * 3, 2 * 3 * 3, 0, 2 * 3),
}
SD = {
    "ddim+tfmq(samples=3,steps=2,groups=2,tiar=1)": (2 * 3 * 2, 2 * 3 * 2, 0, 0),
    "ddim+tfmq-cache(samples=3,groups=2)": (2 * 3 * NFE, 2 * 3 * NFE, 0, 0),  # walks the budget itself
}
ALL = {"dit": DIT, "sd": SD}
PAIRS = [(kind, method) for kind, methods in ALL.items() for method in methods]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    """A run of each twin."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_REFERENCE_SAMPLES", 200)  # of a search that is only to be billed
        for kind, methods in ALL.items():
            folder: Path = tmp_path_factory.mktemp(kind)
            suite = twins.suite(kind).override(samples=4, batch=4, chunk=4)
            assert suite.solution is not None
            suite = suite.model_copy(update={"solution": suite.solution.model_copy(update={"nfe": 16})})
            run_serial(request(suite, ["ddim"], nfe=PLAIN, metrics=(METRIC,)), folder)
            run_serial(request(suite, ["ddim", *methods], nfe=(NFE,), metrics=(METRIC,)), folder)
            found[kind] = Store(folder)
        yield found


def rows(store: Store, table: str = "cells") -> pd.DataFrame:
    """A run's table, one row per method that prepared something."""
    frame = evalbench.load(store.folder, table)
    assert (frame["error"].fillna("") == "").all(), frame["error"].tolist()
    return frame[frame["nfe"] == NFE].set_index("method")


def row_of(frame: pd.DataFrame, method: str) -> pd.Series:
    return frame.loc[registry.build_method(method).text]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_the_table_has_the_bill_and_it_is_the_count_by_hand(kind: str, method: str, stores: dict[str, Store]) -> None:
    row = row_of(rows(stores[kind]), method)
    nfe, evals, backward, training = ALL[kind][method]
    assert row["prepare.nfe"] == nfe
    assert row["prepare.evals_total"] == row["prepare.evals.base"] == evals
    assert row["prepare.backward"] == backward
    assert (
        (row.get("prepare.aux.training", math.nan) == training)
        if training
        else pd.isna(row.get("prepare.aux.training"))
    )
    assert row["nfe_measured"] <= NFE, "what was prepared is not the samples' cost"
    assert row_of(rows(stores[kind], "timings"), method)["prepare_s"] > 0


def test_what_prepares_nothing_has_no_bill(stores: dict[str, Store]) -> None:
    row = row_of(rows(stores["dit"]), "ddim")
    assert row.filter(like="prepare.").isna().all()
    assert math.isnan(row_of(rows(stores["dit"], "timings"), "ddim")["prepare_s"])


def test_operations_of_a_bill_are_those_by_hand(stores: dict[str, Store]) -> None:
    frame, twin = rows(stores["dit"]), ByHand.of("dit")
    out = 8 * 4 * 4  # blocks: a quarter of the four of each of four steps, of every candidate's samples
    for method, blocks_out in (
        ("ddim+ptq4dm(samples=6,steps=3)", 0),
        ("ddim+vidit-q(samples=4,steps=3)", 0),
        ("autodiffusion(population=4,epochs=2,samples=4)", 0),
        ("autodiffusion(population=4,epochs=2,samples=4,layers=0.75)", out),
    ):
        row, expected = row_of(frame, method), DIT[method][1] * twin.whole - blocks_out * twin.block
        assert row["prepare.flops"] == pytest.approx(expected, rel=1e-12), method
        assert row["prepare.cost"] == pytest.approx(expected / twin.whole, rel=1e-12), method
    for method in (
        name for name, counts in DIT.items() if counts[3]
    ):  # a training's backward passes are in flops alone
        row = row_of(frame, method)
        assert row["prepare.cost"] == pytest.approx(DIT[method][1])
        assert row["prepare.flops"] > 2 * DIT[method][1] * twin.whole


@pytest.mark.parametrize("kind", ALL)
def test_the_report_says_after_how_many_images_a_bill_is_paid(kind: str, stores: dict[str, Store]) -> None:
    """Against the cheapest budget of DDIM that is as good, from the numbers of the table."""
    store, frame = stores[kind], evalbench.load(stores[kind].folder)
    table = leaderboard._bills(blocks(store.shown_records(), suite_of(store)), METRIC)
    assert table is not None
    assert table.header[-1] == "break-even images"
    assert len(table.rows) == len(ALL[kind])
    plain = frame[frame["method"] == "ddim"]
    for shown in table.rows:
        cells: dict[str, Shown] = dict(zip(table.header, shown, strict=True))
        row = frame[(frame["method"] == cells["method"].text) & (frame["nfe"] == NFE)].iloc[0]
        assert cells["evaluations"].key == row["prepare.evals_total"]
        assert cells["cost"].key == row["prepare.cost"]
        assert cells["seconds"].key is not None
        assert cells["seconds"].key > 0
        as_good = plain[plain[METRIC] <= row[METRIC]]
        if as_good.empty:
            assert cells["against"].text == "none as good"
            continue
        saved = as_good["cost"].min() - row["cost"]
        expected = f"{math.ceil(row['prepare.cost'] / saved)}" if saved > 0 else "never"
        assert cells["break-even images"].text == expected
    if kind == "dit":
        texts = [shown[-1].text for shown in table.rows]
        assert any(text.isdigit() for text in texts), texts
