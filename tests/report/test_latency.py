"""The latency section: headings, doubts under the table, speed-ups in words, break-even."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report.synthetic import latency, make_records, make_suite, quality, value

from evalbench.report import html, markdown
from evalbench.report.bars import draw_breakdown
from evalbench.report.content import gather
from evalbench.report.drawing import draw
from evalbench.report.figures import draw_all, front, latency_chart, line_chart
from evalbench.report.frames import latency_fits, timings_frame
from evalbench.report.leaderboard import board
from evalbench.report.ranking import Ranker
from evalbench.report.styles import REPORT
from evalbench.report.view import blocks
from evalbench.spec import Record

SPEED_WORDS = re.compile(r"times faster|speed-up: |Speed-up at matched")


def pair(method: str, nfe: int, fd: float, ms: float, **changes: Any) -> list[Record]:
    timed = {"embedded": False, "session": "s"} | changes
    return [quality(method, nfe, fd), latency(method, nfe, ms, changes=timed)]


def report(records: list[Record], gating: tuple[str, ...] = ()) -> str:
    """report.md without its figures, which take most of the time."""
    timings, suite = timings_frame(records), make_suite()
    suite = suite.model_copy(update={"metrics": suite.metrics.model_copy(update={"gating": gating})})
    content = gather(records, suite, {}, timings, latency_fits(timings), [], [])
    return markdown.render(content, Path()).replace("\\", "")


def rows(text: str, caption: str) -> list[list[str]]:
    lines = text.split(caption)[1].split("\n\n")[1].strip().split("\n")
    cells = [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_embedded_timings_are_a_protocol_check_and_no_speed_up() -> None:
    text = report(make_records())
    assert "## Latency: protocol check" in text
    assert "no claim about any method" in text
    assert not SPEED_WORDS.search(text)
    table = rows(text, "**Protocol check: ratios")
    assert table[0] == ["method", "impl", "baseline", "baseline impl", "latency ratio", "FLOP ratio", "NFE ratio"]


def test_others_have_their_speed_up_in_words() -> None:
    found = [*pair("ddim", 20, 0.5, 9.0), *pair("ddim", 5, 9.0, 9.0)]
    found += [*pair("cached", 20, 0.6, 3.0, training_free=False), *pair("cached", 5, 0.1, 3.0, training_free=False)]
    text = report(found)
    assert "protocol check" not in text.lower()
    said = {row[0]: row for row in rows(text, "**Speed-up at matched quality: ratios")[1:]}
    # 184 ms against 64 ms
    assert said["cached at NFE 20"][2:7] == ["ddim at NFE 20", "reference", said["cached at NFE 20"][4], "1.00", "1.00"]
    assert said["cached at NFE 20"][4].startswith("2.88 (")
    assert "2.88 times faster" in said["cached at NFE 20"][-1]
    assert "no valid speed-up: no training-free solver reaches this quality" in said["cached at NFE 5"][-1]


def test_a_speed_up_is_held_against_every_gating_metric() -> None:
    """A baseline that reaches the method's Frechet distance and not its precision is none."""
    good, timed = pair("cached", 20, 0.5, 3.0, training_free=False)
    worse = good.metrics | {"precision@fashion64": value(0.5, half=0.008, higher_is_better=True)}
    found = [*pair("ddim", 20, 0.3, 9.0), good.model_copy(update={"metrics": worse}), timed]
    assert "times faster" in report(found)
    gating = ("fd@fashion64", "precision@fashion64")
    assert "times faster" in report(found, gating), "the baseline is better on both"
    better = good.metrics | {"precision@fashion64": value(0.99, half=0.001, higher_is_better=True)}
    found[2] = good.model_copy(update={"metrics": better})
    text = report(found, gating)
    assert "times faster" not in text
    assert "no worse on fd@fashion64 or precision@fashion64" in text


def test_what_was_timed_in_other_rounds_is_no_baseline() -> None:
    apart = [*pair("ddim", 20, 0.5, 9.0, session="a"), *pair("cached", 20, 0.6, 3.0, session="b", training_free=False)]
    assert "times faster" not in report(apart)


def test_wrong_answers_are_no_speed_up_and_stand_in_red() -> None:
    doubt = "20 of 20 timed outputs differ"
    found = [*pair("ddim", 20, 0.5, 9.0), *pair("cheat", 20, 0.6, 0.1, training_free=False, doubt=doubt)]
    text = report(found)
    assert f"no valid speed-up: {doubt}" in text
    assert f"† outputs: {doubt}" in text
    timings = timings_frame(found)
    content = gather(found, make_suite(), {}, timings, latency_fits(timings), [], [])
    page = html.render(content, board(content, Ranker("fd@fashion64"), lambda _: {}), html.Pictures())
    assert re.search(r'<td class="error"[^>]*>0\.\d+†</td>', page)


def test_flags_stand_under_the_table_each_once() -> None:
    flags = ("other processes used 40% of the CPUs", "CPU clock went from 3000 to 2000 MHz")
    found = [*pair("ddim", 20, 0.5, 9.0, flags=flags), *pair("heun", 20, 0.6, 3.0, flags=flags[:1])]
    text = report(found)
    table = {row[0]: row for row in rows(text, "**Latency of whole sampling calls")[1:]}
    assert table["ddim"][2].endswith("†‡")
    assert table["heun"][2].endswith("†")
    assert text.count("- † other processes used 40%") == text.count("- ‡ CPU clock") == 1


def test_few_processes_have_no_interval_and_the_report_says_what_to_type() -> None:
    seconds = (((0.2,), (0.21,)),)
    found = [*pair("ddim", 20, 0.5, 9.0, seconds=seconds), *pair("heun", 20, 0.6, 9.0, seconds=seconds)]
    text = report(found)
    assert "Timed in 1 fresh process: ratios have no interval, which takes 5" in text
    assert "--processes 5" in text
    assert "no valid speed-up: 1 fresh processes" in text


@pytest.mark.parametrize(
    ("ms", "bill", "clock", "cost"),
    [
        (3.0, {"seconds": 6.0, "cost": 2000.0}, "3200", "100"),
        (12.0, {"seconds": 6.0, "cost": 2000.0}, "never", "100"),
    ],
)
def test_break_even_is_what_was_paid_over_what_is_saved(
    ms: float, bill: dict[str, float], clock: str, cost: str
) -> None:
    """(184 - 64) ms over 64 images save 1.875 ms an image, and 20 forwards."""
    method, timed = pair("searched", 20, 0.6, ms, training_free=False)
    counts = method.counts | {"cost": 20.0}
    found = [*pair("ddim", 20, 0.5, 9.0), method.model_copy(update={"bill": bill, "counts": counts}), timed]
    (row,) = rows(report(found), "**Break-even")[1:]
    assert row == ["searched at NFE 20", "6", "2000", "ddim at NFE 20", clock, cost]


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_line_figure_draws_the_fit_and_the_points() -> None:
    frame = timings_frame(make_records())
    chart = line_chart(frame)
    (panel,) = chart.panels
    assert chart.lines[panel, "ddim"] == pytest.approx((9.0, 4.0))
    (axes,) = draw(chart, REPORT, REPORT.column).axes
    lines = [tuple(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(ys == pytest.approx((4 + 9.0 * 5, 4 + 9.0 * 20)) for ys in lines)
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert axes.get_xlim()[1] > 20
    assert axes.get_ylim()[1] > 180


def test_the_front_holds_what_nothing_beats() -> None:
    points = pd.DataFrame({"x": [1.0, 2.0, 3.0, 2.0, 4.0], "y": [9.0, 5.0, 7.0, 4.0, 4.0]})
    assert list(front(points, higher_is_better=False).index) == [0, 3]
    assert list(front(points, higher_is_better=True).index) == [0]


def test_bars_add_up_to_the_latency(tmp_path: Path) -> None:
    frame = timings_frame(make_records())
    drawn = draw_breakdown(frame, tmp_path)
    assert drawn is not None
    written = pd.read_csv(drawn.csv)
    parts = written[["denoiser_ms", "decoder_ms", "conditioning_ms", "arithmetic_ms", "overhead_ms"]].sum(axis=1)
    ddim = written[(written["method"] == "ddim") & (written["nfe"] == 10)]
    assert parts[ddim.index[0]] == pytest.approx(94.0 / 64)
    assert "denoiser" in drawn.alt
    assert draw_breakdown(timings_frame([]), tmp_path) is None


def test_figures_with_times_of_embedded_models_are_headed_protocol_check(tmp_path: Path) -> None:
    suite = make_suite()
    for records, headed in ((make_records(), True), (pair("ddim", 20, 0.5, 9.0) + pair("ddim", 5, 2.0, 9.0), False)):
        timings = timings_frame(records)
        chart = latency_chart(blocks(records, suite), timings, suite.metrics.primary)
        assert all(title.startswith("Protocol check: ") == headed for title in chart.titles.values())
        drawn = draw_all(blocks(records, suite), timings, suite.metrics.primary, tmp_path / str(headed))
        captions = {one.name: one.caption.startswith("Protocol check: ") for one in drawn}
        assert captions["quality-latency"] == headed
        assert not captions["quality-nfe"]
