"""Speed-up at matched quality, on points whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evalbench.cost.speedup import EMBEDDED_HEADING, HEADING, Point, Score, envelope, speed_up
from evalbench.stats import Interval

MARGINS = {"fd": 0.5}


def point(method: str, nfe: float, seconds: float, fd: float | None, **changes: Any) -> Point:
    """A plain solver with 100 FLOPs an evaluation, the same seconds in 5 processes, and a narrow interval."""
    scores = {} if fd is None else {"fd": Score(fd, fd - 0.1, fd + 0.1)}
    facts = {
        "method": method,
        "nfe": nfe,
        "flops": 100.0 * nfe,
        "seconds": np.full((5, 3, 2), seconds),
        "scores": scores,
        "training_free": True,
    }
    return Point(**(facts | changes))


def solvers() -> list[Point]:
    """Two solvers: dpm is better than ddim at every budget."""
    ddim = [point("ddim", nfe, nfe / 64, fd) for nfe, fd in ((4, 40), (8, 20), (16, 10), (32, 5))]
    return ddim + [point("dpm", nfe, nfe / 64, fd) for nfe, fd in ((4, 30), (8, 10), (16, 4), (32, 3))]


def student(fd: float, **changes: Any) -> Point:
    """One evaluation, 1/64 of a second."""
    return point("student", 1, 1 / 64, fd, training_free=False, **changes)


def said(method: Point, points: list[Point] | None = None, margins: dict[str, float] | None = None, **options: Any):
    return speed_up(method, points or solvers(), margins or MARGINS, **({"embedded": False} | options))


def test_the_baseline_is_the_cheapest_solver_that_is_no_worse() -> None:
    found = said(student(10.0))
    assert (found.heading, found.valid, str(found.baseline)) == (HEADING, True, "dpm at NFE 8")
    assert (found.latency.value, found.flops, found.nfe) == (8.0, 8.0, 8.0)
    assert found.sentence == (
        "8.00 times faster (8.00 to 8.00) than dpm at NFE 8 (impl reference against reference, default variant)"
    )
    assert str(said(student(4.0)).baseline) == "dpm at NFE 16"  # not the cheaper dpm of 8, not ddim


def test_three_ratios_stand_side_by_side_and_differ() -> None:
    cached = point("ddim+cache", 8, 6 / 64, 10.0, training_free=False, flops=200.0, impl="optimised")
    row = said(cached).row()
    assert row == {
        "method": "ddim+cache at NFE 8",
        "impl": "optimised",
        "variant": "",
        "baseline": "dpm at NFE 8",
        "baseline impl": "reference",
        "latency ratio": "1.33 (1.33 to 1.33)",
        "FLOP ratio": "4.00",
        "NFE ratio": "1.00",
    }


def test_missing_flops_are_missing() -> None:
    found = said(student(10.0, flops=float("nan")))
    assert (found.flops, found.row()["FLOP ratio"], found.valid) == (None, "", True)
    assert said(student(10.0, flops=0.0)).flops is None


@pytest.mark.parametrize(
    ("fd", "reason"),
    [
        (2.0, "no training-free solver reaches this quality at a budget that was measured"),
        (9.45, "undecided whether dpm at NFE 8, which is cheaper, is as good; more samples would decide"),
        (2.45, "undecided whether dpm at NFE 32 is as good; more samples would decide"),
    ],
)
def test_nothing_is_extrapolated_and_nothing_guessed(fd: float, reason: str) -> None:
    found = said(student(fd))
    assert (found.sentence, found.valid) == (f"no valid speed-up: {reason}", False)
    assert (found.baseline, found.latency, found.row()["latency ratio"]) == (None, None, "")


def test_a_worse_method_is_held_against_cheap_points() -> None:
    found = said(point("slow", 4, 10 / 64, 45.0, training_free=False))
    assert str(found.baseline) == "dpm at NFE 4"
    assert found.sentence.startswith("no valid speed-up: latency ratio 0.40 (0.40 to 0.40), slower than dpm at NFE 4")
    assert not found.valid


def test_a_ratio_that_may_be_one_is_no_speed_up() -> None:
    rng = np.random.default_rng(0)
    seconds = 8 / 64 * np.exp(rng.normal(0, 0.1, (5, 3, 2)))
    found = said(replace(point("same", 8, 0.0, 10.0, training_free=False), seconds=seconds))
    assert "not distinguishable from dpm at NFE 8" in found.sentence
    assert found.latency.interval.low < 1 < found.latency.interval.high


def test_every_gating_metric_gates() -> None:
    clip = {"dpm": 0.20, "ddim": 0.30, "student": 0.30}

    def with_clip(one: Point) -> Point:
        value = clip[one.method]
        return replace(one, scores={**one.scores, "clip": Score(value, value, value, higher_is_better=True)})

    points = [with_clip(one) for one in solvers()]
    margins = {"fd": 0.5, "clip": 0.01}
    assert str(said(with_clip(student(10.0)), points, margins).baseline) == "ddim at NFE 16"
    assert str(said(with_clip(student(10.0)), points, {"fd": 0.5, "clip": 0.2}).baseline) == "dpm at NFE 8"
    assert "student at NFE 1 has no clip" in said(student(10.0), points, margins).sentence
    partly = [with_clip(one) if one.method == "ddim" else one for one in solvers()]
    found = said(with_clip(student(10.0)), partly, margins)
    assert "undecided whether dpm at NFE 8, which is cheaper, is as good" in found.sentence


def test_only_plain_solvers_of_the_same_variant_are_baselines() -> None:
    points = [*solvers(), point("fast", 1, 1 / 64, 1.0, training_free=False), student(1.0)]
    assert str(said(student(10.0), points).baseline) == "dpm at NFE 8"
    assert "no training-free solver was measured on this model" in said(student(10.0), points[-2:]).sentence
    found = said(student(10.0, variant="compile,bfloat16"), points)
    assert found.sentence == "no valid speed-up: no training-free solver was measured as 'compile,bfloat16'"
    both = [replace(one, variant=text) for one in solvers() for text in ("eager,float32", "compile,bfloat16")]
    assert said(student(10.0, variant="compile,bfloat16"), both).baseline.variant == "compile,bfloat16"


def test_a_method_is_no_baseline_of_itself() -> None:
    found = said(point("dpm", 8, 8 / 64, 10.0), solvers())
    assert str(found.baseline) == "ddim at NFE 16"


def test_answers_that_were_wrong_count_for_nothing() -> None:
    found = said(student(10.0, fault="20 of 20 timed outputs differ"))
    assert found.sentence == "no valid speed-up: 20 of 20 timed outputs differ"
    points = [replace(one, fault="differs") if one.method == "dpm" else one for one in solvers()]
    assert str(said(student(10.0), points).baseline) == "ddim at NFE 16"


def test_doubts_about_the_machine_are_in_the_sentence() -> None:
    points = [replace(one, flags=("GPU clocks held down: power cap",)) for one in solvers()]
    found = said(student(10.0, flags=("other processes used 30% of the CPUs",)), points)
    assert found.sentence.endswith("; flagged: other processes used 30% of the CPUs; GPU clocks held down: power cap")


def test_few_processes_make_no_claim() -> None:
    points = [replace(one, seconds=one.seconds[:4]) for one in solvers()]
    found = said(replace(student(10.0), seconds=np.full((4, 3, 2), 1 / 64)), points)
    assert found.sentence == "no valid speed-up: 4 fresh processes, an interval takes 5"
    assert (found.latency.value, found.row()["latency ratio"]) == (8.0, "8.00")


@pytest.mark.parametrize("fd", [10.0, 2.0])
def test_an_embedded_model_is_a_protocol_check_and_says_no_sentence(fd: float) -> None:
    found = said(student(fd), embedded=True)
    assert (found.heading, found.sentence, found.valid) == (EMBEDDED_HEADING, "", False)
    assert (found.row()["latency ratio"] == "8.00 (8.00 to 8.00)") == (fd == 10.0)


def test_paired_differences_decide_where_separate_intervals_cannot() -> None:
    wide = [replace(one, scores={"fd": Score(one.scores["fd"].value, 0.0, 60.0)}) for one in solvers()]
    assert "undecided" in said(student(10.0), wide).sentence

    def paired(first: Point, second: Point, metric: str) -> Interval:
        difference = first.scores[metric].value - second.scores[metric].value
        return Interval(difference - 0.01, difference + 0.01)

    assert str(said(student(10.0), wide, difference=paired).baseline) == "dpm at NFE 8"


def test_no_gate_is_no_match() -> None:
    assert speed_up(student(10.0), solvers(), {}, embedded=False).sentence == "no valid speed-up: no gating metric"


def test_the_envelope_is_what_nothing_beats() -> None:
    points = solvers()
    assert [str(one) for one in envelope(points, ["fd"])] == [f"dpm at NFE {nfe}" for nfe in (4, 8, 16, 32)]
    odd = point("odd", 20, 20 / 64, 5.0)  # dearer and worse than dpm of 16
    assert odd not in envelope([*points, odd], ["fd"])
    unknown = point("unknown", 20, 20 / 64, None)
    assert unknown in envelope([*points, unknown], ["fd"])
    assert envelope([], ["fd"]) == []
