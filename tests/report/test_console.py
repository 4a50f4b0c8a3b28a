"""The table of a terminal, and of a pipe."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from report.synthetic import NOTE, failed, make_records, quality
from rich.console import Console

from evalbench.report import print_table
from evalbench.spec import Record, Suite


def printed(records: list[Record], suite: Suite, *, colour: bool = False, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None)
    print_table(records, suite, console)
    return stream.getvalue()


def test_a_pipe_gets_plain_text_of_100_columns(records: list[Record], suite: Suite) -> None:
    text = printed(records, suite)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    row = next(line for line in text.splitlines() if "unipc" in line)
    for part in ("4.90 ± 0.17", "1.420 ± 0.063", "0.550 ± 0.036"):
        assert part in row
    assert "0.420 ± 0.013" in next(line for line in text.splitlines() if "floor" in line)
    assert f"† {NOTE}" in text


def test_failures_have_one_line_with_the_reason(records: list[Record], suite: Suite) -> None:
    lines = printed(records, suite).splitlines()
    assert "heun at NFE 5: error: budget 5, spent 6" in lines
    assert "faster-diffusion(keys=uniform:4) at NFE 10: not supported: needs split" in lines
    assert not any("second line" in line for line in lines)


def test_the_best_is_bold_and_errors_are_red(records: list[Record], suite: Suite) -> None:
    text = printed(records, suite, colour=True)
    assert "\x1b[1m" in text.split("4.90 ± 0.17")[0][-12:]
    assert "\x1b[31m" in text.split("heun at NFE 5")[0][-12:]


def test_a_name_is_no_markup(suite: Suite) -> None:
    text = printed([quality("odd[bold red](x=1)", 5, 1.0), failed("[/]", 5, "error", "[blink]boom")], suite)
    assert "odd[bold red](x=1)" in text
    assert "[/] at NFE 5: error: [blink]boom" in text


def test_other_metrics_stand_below_unless_there_are_many_blocks(records: list[Record], suite: Suite) -> None:
    assert "ms/image" in printed(records, suite)
    assert "@identity" in printed(records, suite)
    many = [r for g in (1.0, 2.0, 3.0) for r in make_records(guidance=g)]
    assert "table.csv and the report" in printed(many, suite)
    assert "ms/image" not in printed(many, suite)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_narrow_terminal_gets_fewer_metrics_and_whole_numbers(
    width: int, records: list[Record], suite: Suite
) -> None:
    text = printed(records, suite, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "2.100 ± 0.083†" in text
    assert "…" not in text
    assert ("more in table.csv" in text) == (width < 100)


def test_nothing_to_print(suite: Suite) -> None:
    assert printed([], suite) == ""


def test_the_table_needs_neither_pandas_nor_matplotlib() -> None:
    code = "import sys, evalbench.report.console; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pandas", "matplotlib", "torch", "ray"} & set(done.stdout.split())
