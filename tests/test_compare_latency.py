"""Verdicts on timed cells: words, reasons, false alarms on timings that differ by process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_golden import verdict
from report.synthetic import make_cell, make_suite, timed

from evalbench.compare import Comparison, compare_command, compare_runs
from evalbench.compare.latency import latency_effect
from evalbench.compare.words import decide
from evalbench.report import verdicts
from evalbench.spec import Failure, Latency, Record
from evalbench.store import open_run

CELL = make_cell("ddim", 10)


def seconds(key: int, scale: float = 1.0, processes: int = 6, spread: float = 0.01) -> tuple[Any, ...]:
    """Timings whose processes differ by `spread` and samples by as much, (P, 4 rounds, 5 samples)."""
    rng = np.random.default_rng(key)
    logs = spread * (rng.standard_normal((processes, 1, 1)) + rng.standard_normal((processes, 4, 5)))
    return tuple(tuple(map(tuple, process)) for process in 0.02 * scale * np.exp(logs))


def latency(key: int = 0, scale: float = 1.0, **changes: Any) -> Latency:
    processes = changes.pop("processes", 6)
    content = {
        "seconds": seconds(key, scale, processes),
        "warmup": (3,) * processes,
        "session": f"s{key}",
        "device": "cpu, 2 cores",
        "embedded": False,
        "doubt": "",
        "flags": (),
    }
    return timed("ddim", 10, 2.0).model_copy(update=content | changes)


def record(*timings: Latency, **changes: Any) -> Record:
    content: dict[str, Any] = {"kind": "latency", "status": "ok", "cell": CELL, "latency": timings}
    return Record(**(content | changes))


def compared(tmp_path: Path, base: list[Record], new: list[Record], **more: Any) -> Comparison:
    for name, records in (("base", base), ("new", new)):
        with open_run(tmp_path / name, make_suite(), {}) as store:
            for one in records:
                store.append(one)
    return compare_runs(tmp_path / "base", tmp_path / "new", **more)


@pytest.mark.parametrize(
    ("scale", "word", "code"), [(1.0, "indistinguishable", 0), (1.3, "worse", 1), (0.7, "better", 0)]
)
def test_words_follow_from_the_ratio(tmp_path: Path, scale: float, word: str, code: int) -> None:
    found = compared(tmp_path, [record(latency(0))], [record(latency(1, scale))])
    (one,) = found.verdicts
    assert (one.word, one.metric, found.exit_code()) == (word, "latency@64", code)
    assert one.effect is not None
    assert math.exp(one.effect.difference) == pytest.approx(scale, rel=0.03)
    assert one.effect.df == 5
    assert one.notes == ("not timed together",)
    assert f"× {math.exp(one.effect.difference):#.3g}" in verdicts.to_markdown(found)


def test_margin_is_the_users(tmp_path: Path) -> None:
    found = compared(tmp_path, [record(latency(0))], [record(latency(1, 1.3))], tolerances={"latency": 0.5})
    assert [v.word for v in found.verdicts] == ["indistinguishable"]


def test_an_undecided_ratio_says_how_many_processes_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = [latency(key, scale, seconds=seconds(key, scale, spread=0.05)) for key, scale in ((0, 1.0), (1, 1.1))]
    found = compared(tmp_path, [record(wide[0])], [record(wide[1])])
    assert [v.word for v in found.verdicts] == ["undecided"]
    assert "processes would decide" in verdicts.to_markdown(found)
    assert compare_command(tmp_path / "base", tmp_path / "new", strict=True) == 1
    assert "processes would decide" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu, 8 cores"}, "hardware differs: cpu, 2 cores in BASE, cpu, 8 cores in NEW"),
        ({"threads": 7}, "threads differs: "),
        ({"variant": "compile"}, "execution differs: "),
        ({"clock": "cuda events"}, "clock differs: "),
        ({"embedded": True}, "kind of model differs: "),
        ({"doubt": "3 of 4 outputs differ"}, "timed outputs are not those of the quality run in NEW: 3 of 4"),
        ({"processes": 4}, "timed in 4 fresh processes: a verdict takes 5"),
    ],
)
def test_reasons(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found = compared(tmp_path, [record(latency(0))], [record(latency(1, **changes))])
    (one,) = found.verdicts
    assert one.word == "not comparable"
    assert reason in one.reason
    assert found.exit_code() == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cell": CELL.model_copy(update={"settings": "x"})}, "method version or settings differ"),
        ({"cell": CELL.model_copy(update={"suite_version": 2})}, "suite version differs"),
        ({"cell": CELL.model_copy(update={"generation": "x"})}, "generation facts differ"),
    ],
)
def test_reasons_of_the_cell(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (one,) = compared(tmp_path, [record(latency(0))], [record(latency(1), **changes)]).verdicts
    assert reason in one.reason


def test_a_cell_that_failed_is_named_and_one_batch_less_fails_the_gate(tmp_path: Path) -> None:
    failure = Failure(type="RuntimeError", message="out of memory")
    other = make_cell("heun", 10)
    base = [record(latency(0), latency(0, batch=1)), record(latency(2), cell=other)]
    new = [record(latency(1)), record(status="error", failure=failure, cell=other)]
    found = compared(tmp_path, base, new)
    by = {(v.method, v.metric): v for v in found.verdicts}
    assert by["ddim", "latency@1"].reason == "not timed in NEW"
    assert by["heun", "latency@64"].reason == "not timed in NEW"
    assert by["ddim", "latency@64"].word == "indistinguishable"
    assert found.exit_code() == 3


def test_what_was_timed_together_is_drawn_together(tmp_path: Path) -> None:
    """Two methods of one session whose processes differ by 20 %, but in the same way."""
    rng = np.random.default_rng(3)
    shared = np.exp(0.2 * rng.standard_normal((6, 1, 1)) + 0.002 * rng.standard_normal((6, 4, 5)))
    arms = [latency(seconds=tuple(tuple(map(tuple, p)) for p in 0.02 * s * shared), session="one") for s in (1, 1.1)]
    effects = [latency_effect("latency@64", arms[0], arms[1].model_copy(update={"session": s})) for s in ("one", "x")]
    assert effects[0].difference == pytest.approx(math.log(1.1))
    assert effects[0].se < effects[1].se / 10


@pytest.mark.parametrize("spread", [0.0, 0.05], ids=["samples differ", "processes differ"])
def test_same_code_raises_few_alarms(spread: float) -> None:
    repeats, alarms = 100, 0
    for key in range(repeats):
        rng = np.random.default_rng([key, 5])
        logs = spread * rng.standard_normal((2, 5, 1, 1)) + 0.03 * rng.standard_normal((2, 5, 3, 4))
        a, b = (latency(seconds=tuple(tuple(map(tuple, p)) for p in 0.02 * np.exp(x)), session=str(x)) for x in logs)
        (one,) = decide([verdict("undecided", latency_effect("latency@64", a, b, margin=0.0))])
        alarms += one.word in ("better", "worse")
    assert alarms / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
