"""What may stand together: blocks by guidance, N and protocol; means over seeds; floors at the same N."""

from __future__ import annotations

import math

import pytest
from report.synthetic import N, failed, make_records, make_suite, quality

from evalbench.report.text import count, md, md_name, number, plus_minus, significant
from evalbench.report.view import blocks, troubles
from evalbench.spec import Record, Suite


def test_rows_of_another_n_are_another_block(suite: Suite) -> None:
    found = blocks([quality("ddim", 10, 2.0), quality("heun", 10, 1.0, samples=1024)], suite)
    assert [(b.samples, b.methods) for b in found] == [(N, ["ddim"]), (1024, ["heun"])]
    assert [b.floors["fd@fashion64"].value for b in found] == [0.42, 1.7]
    assert all(b.best("fd@fashion64", b.rows) is None for b in found)


def test_rows_of_another_protocol_are_another_block_and_say_so(suite: Suite) -> None:
    other = quality("heun", 10, 1.0, protocol="beef" * 4, protocol_facts={"reference": "other"})
    found = blocks([quality("ddim", 10, 2.0), other], suite)
    assert len({b.title for b in found}) == 2
    assert any("protocol beefbeef" in b.title for b in found)


def test_seeds_are_averaged_and_their_errors_combined(suite: Suite) -> None:
    pair = [quality("ddim", 10, 2.0, seed=0), quality("ddim", 10, 3.0, seed=1)]
    (block,) = blocks(pair, suite)
    (row,) = block.rows
    found = row.numbers["fd@fashion64"]
    halves = [0.03 * fd + 0.02 for fd in (2.0, 3.0)]
    assert (found.value, found.seeds) == (2.5, 2)
    assert found.half == pytest.approx(math.hypot(*halves) / 2, rel=1e-4)


def test_a_seed_that_failed_is_told_beside_the_mean(suite: Suite) -> None:
    (block,) = blocks([quality("ddim", 10, 2.0), failed("ddim", 10, "error", "boom", seed=1)], suite)
    assert block.rows[0].numbers["fd@fashion64"].note.endswith("1 of 2 seeds")
    assert block.rows[0].status == "ok"


def test_failures_join_the_block_of_their_guidance(suite: Suite) -> None:
    found = blocks([*make_records(guidance=1.0), *make_records(guidance=3.0)], suite)
    assert [b.guidance for b in found] == [1.0, 3.0]
    assert all({row.status for row in b.rows} == {"ok", "error", "unsupported"} for b in found)


def test_a_run_of_failures_alone_is_a_block(suite: Suite) -> None:
    (block,) = blocks([failed("ddim", 10, "error", "boom")], suite)
    assert block.rows[0].reason == "boom"
    assert block.metrics == ("fd@fashion64",)


def test_best_knows_which_way_is_up(records: list[Record], suite: Suite) -> None:
    (block,) = blocks(records, suite)
    at_20 = [row for row in block.rows if row.nfe == 20]
    assert [block.best(m, at_20).method for m in ("fd@fashion64", "precision@fashion64")] == ["unipc"] * 2  # type: ignore[union-attr]
    at_5 = [row for row in block.rows if row.nfe == 5]
    worst = max(at_5, key=lambda r: r.numbers["fd@fashion64"].value if r.numbers else 0)
    assert worst.method == "ddim"


def test_sensitivity_rows_are_no_floors(suite: Suite) -> None:
    (block,) = blocks([quality("ddim", 10, 2.0)], suite)
    assert block.floors["fd@fashion64"].value == 0.42
    assert {what: list(found) for what, found in block.spoiled.items()} == {"blurred": ["fd@fashion64"]}


def test_everything_without_a_value_is_listed_with_its_reason(records: list[Record]) -> None:
    found = {(t.where, t.what): t.reason for t in troubles(records)}
    assert found["heun at NFE 5", "quality"] == "budget 5, spent 6"
    assert found["faster-diffusion(keys=uniform:4) at NFE 10", "quality"] == "not supported: needs split"
    assert [reason for (where, what), reason in found.items() if what == "align@tiny" and where.startswith("11 cells")]


def test_a_metric_nobody_has_takes_no_column(records: list[Record], suite: Suite) -> None:
    (block,) = blocks(records, suite)
    assert "align@tiny" not in block.metrics
    assert blocks([], make_suite()) == []


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (28.4, 0.872, "28.40 ± 0.87"),
        (0.71, 0.0413, "0.710 ± 0.041"),
        (1234.5, 98.7, "1234 ± 99"),
        (1234.5, 987.0, "1234 ± 987"),
        (0.00021, 9.4e-6, "(2.100 ± 0.094)e-4"),
        (-0.5, 0.25, "-0.50 ± 0.25"),
        (0.0, 0.03, "0.000 ± 0.030"),
        (1.5, None, "1.5"),
        (1.5, 0.0, "1.5"),
    ],
)
def test_value_and_half_interval_have_the_same_digits(value: float, half: float | None, text: str) -> None:
    assert plus_minus(value, half) == text


def test_numbers_as_text() -> None:
    assert [number(v) for v in (None, float("nan"), 3.0, 12345.6, 1e-5, 2.5e9)] == [
        "–", "–", "3", "12346", "1e-05", "2.5e+09",
    ]  # fmt: skip
    assert [count(v) for v in (None, 6.5e9, 512.0, 1.2e12)] == ["–", "6.5 G", "512", "1.2 T"]
    assert [significant(v) for v in (3.0, 2.876, 184.2, 0.0, None)] == ["3.00", "2.88", "184", "0", "–"]


def test_markdown_is_escaped() -> None:
    assert md("a|b\n<i>*x*</i>") == r"a\|b &lt;i&gt;\*x\*&lt;/i&gt;"
    assert md_name("dpm-solver++(order=2)") == "`dpm-solver++(order=2)`"
    assert md_name("a`|b") == r"a\`\|b"
