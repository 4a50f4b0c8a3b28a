"""Rank intervals, the three rankings, what flips, the Pareto front."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.synthetic import make_suite, quality

from evalbench.report import ranking
from evalbench.report.ranking import Difference, Flip, Ranker, Ranks, flips, pareto_front, rank_intervals
from evalbench.report.view import Block, blocks
from evalbench.spec import Record

FD = "fd@fashion64"
numbers = st.floats(-10, 10, allow_nan=False)


def block_of(*records: Record) -> Block:
    (found,) = blocks(records, make_suite())
    return found


def order(found: ranking.Ranking | None) -> list[str]:
    assert found is not None
    return [place.row.method for place in found.places]


def ranks(found: ranking.Ranking | None) -> dict[str, str]:
    assert found is not None
    return {place.row.method: str(place.ranks) for place in found.places}


@pytest.fixture
def three() -> Block:
    return block_of(quality("ddim", 10, 4.0), quality("unipc", 10, 1.0), quality("heun", 10, 1.02))


def test_ranks_are_what_the_tests_allow(three: Block) -> None:
    found = Ranker(FD).ranking(three, 10)
    assert order(found) == ["unipc", "heun", "ddim"]
    assert ranks(found) == {"unipc": "1–2", "heun": "1–2", "ddim": "3"}  # 1.00 and 1.02 ± 0.05: cannot tell
    assert found is not None
    assert [found.like_best(m) for m in ("unipc", "heun", "ddim", "other")] == [True, True, False, False]
    assert found.basis == "intervals"


def test_paired_samples_tell_what_intervals_cannot(three: Block) -> None:
    def paired(a: Record, b: Record, metric: str) -> Difference:
        return Difference(a.metrics[metric].value - b.metrics[metric].value, 0.001)

    found = Ranker(FD, paired).ranking(three, 10)
    assert ranks(found) == {"unipc": "1", "heun": "2", "ddim": "3"}
    assert found is not None
    assert found.basis == "paired"


def test_the_sign_of_a_paired_difference_may_be_that_of_the_other_order(three: Block) -> None:
    """What is tested need not agree with the order of the plug-in values."""
    worse = {"unipc": 3.0, "heun": 2.0, "ddim": 1.0}
    found = Ranker(FD, lambda a, b, _: Difference(worse[a.cell.method] - worse[b.cell.method], 0.01)).ranking(three, 10)
    assert ranks(found) == {"unipc": "3", "heun": "2", "ddim": "1"}


def test_pairs_beyond_what_a_report_affords_use_intervals(three: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_PAIRS", 2)
    found = Ranker(FD, lambda *_: Difference(0.0, 1.0)).ranking(three, 10)
    assert found is not None
    assert found.basis == "intervals"


def test_a_pair_is_tested_once(three: Block) -> None:
    asked: list[tuple[str, str]] = []

    def paired(a: Record, b: Record, _: str) -> None:
        asked.append((a.cell.method, b.cell.method))

    ranker = Ranker(FD, paired)
    ranker.rankings(three, 10)
    assert len(asked) == len({frozenset(pair) for pair in asked}) == 3


def test_a_difference_within_the_bias_says_nothing() -> None:
    """A sampler with too little contrast scores better by as much as the bias."""

    def biased(method: str, fd: float, bias: float) -> Record:
        record = quality(method, 10, fd)
        value = record.metrics[FD].model_copy(update={"bias": bias})
        return record.model_copy(update={"metrics": {FD: value}})

    for bias, expected in ((0.1, "1"), (6.0, "1–2")):
        found = Ranker(FD).ranking(block_of(biased("ddim", 5.0, bias), biased("heun", 10.0, bias)), 10)
        assert ranks(found)["ddim"] == expected


def test_higher_is_better_where_the_metric_says_so() -> None:
    found = Ranker("precision@fashion64").ranking(block_of(quality("ddim", 10, 1.0), quality("heun", 10, 30.0)), 10)
    assert order(found) == ["ddim", "heun"]
    assert ranks(found) == {"ddim": "1", "heun": "2"}


def test_seeds_are_averaged_in_paired_tests() -> None:
    block = block_of(*(quality(m, 10, fd, seed=s) for m, fd in (("ddim", 4.0), ("heun", 1.0)) for s in (0, 1, 2, 3)))
    ranker = Ranker(FD, lambda a, b, _: Difference(3.0 + a.cell.seed, 2.0))
    found = ranker._mean_difference(*block.rows)
    assert found == Difference(4.5, 1.0)  # se 2 / sqrt(4)


# --- equal NFE, FLOPs, latency --------------------------------------------------------------------------------------


def dear(method: str, nfe: int, fd: float, factor: float) -> Record:
    record = quality(method, nfe, fd)
    return record.model_copy(update={"counts": record.counts | {"cost": factor * nfe}})


@pytest.fixture
def guided() -> Block:
    """`guide` is best at equal NFE, but every evaluation is two forwards."""
    found = [dear("guide", n, v, 2.0) for n, v in ((5, 8.0), (10, 3.0), (20, 1.0))]
    found += [dear("plain", n, v, 1.0) for n, v in ((5, 9.0), (10, 4.0), (20, 2.0))]
    return block_of(*found, *(dear("other", n, v, 1.0) for n, v in ((5, 30.0), (10, 20.0), (20, 12.0))))


def test_equal_flops_gives_every_method_the_same_cost(guided: Block) -> None:
    found = Ranker(FD).rankings(guided, 10)
    assert order(found["nfe"]) == ["guide", "plain", "other"]
    assert order(found["flops"]) == ["plain", "guide", "other"]
    place = found["flops"].place("guide")
    assert place is not None
    assert (place.row.nfe, place.spent, found["flops"].allowance) == (5, 10.0, 10.0)
    assert flips(found["nfe"], found["flops"]) == [Flip("guide", "plain", True)]
    assert "latency" not in found


def test_equal_latency_uses_the_clock(guided: Block) -> None:
    ms = {
        r.cell.id: {"guide": 1.0, "plain": 3.0, "other": 3.1}[r.cell.method] * r.cell.nfe
        for row in guided.rows
        for r in row.records
    }
    found = Ranker(FD, None, ms).rankings(guided, 10)
    place = found["latency"].place("guide")
    assert place is not None
    assert place.row.nfe == 20  # the dearest within 30 ms


def test_a_flip_that_no_test_is_sure_of_says_so() -> None:
    block = block_of(
        *(dear("a", n, v, 2.0) for n, v in ((5, 4.02), (10, 3.0))),
        *(dear("b", n, v, 1.0) for n, v in ((5, 9.0), (10, 4.0))),
    )
    found = Ranker(FD).rankings(block, 10)
    assert [f.sure for f in flips(found["nfe"], found["flops"])] == [False]


# --- properties -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(numbers, st.floats(0.01, 2)), min_size=1, max_size=8))
def test_rank_intervals_hold_the_rank_of_the_middle(found: list[tuple[float, float]]) -> None:
    """Intervals that do not overlap order; any ranking that respects them lies inside the rank intervals."""
    beats = np.array([[a + ha < b - hb for b, hb in found] for a, ha in found])
    for i, (value, _) in enumerate(found):
        rank = 1 + sum(other < value for other, _ in found)
        assert rank_intervals(beats)[i].low <= rank <= rank_intervals(beats)[i].high


def test_no_test_is_sure_all_ranks_are_possible() -> None:
    assert rank_intervals(np.zeros((3, 3), bool)) == [Ranks(1, 3)] * 3


@given(st.lists(st.tuples(numbers, numbers), max_size=12), st.booleans())
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]], higher: bool) -> None:
    x, y = [a for a, _ in points], [b for _, b in points]
    front = pareto_front(x, y, higher_is_better=higher)
    bad = [-b if higher else b for b in y]

    def beaten(i: int) -> bool:
        return any(x[j] <= x[i] and bad[j] <= bad[i] and (x[j], bad[j]) != (x[i], bad[i]) for j in range(len(x)))

    assert {points[i] for i in front} == {points[i] for i in range(len(x)) if not beaten(i)}
    assert [x[i] for i in front] == sorted(x[i] for i in front)
