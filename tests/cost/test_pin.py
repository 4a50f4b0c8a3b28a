"""Pinning: the quietest cores, as many as there are threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evalbench.cost import pin

STAT = """cpu  9 9 9 9 9 9 9 9 0 0
cpu0 10 1 2 1000 500 3 4 5 0 0
cpu12 7 0 0 1000 500 0 0 0 0 0
intr 5
"""


def test_ticks_of_each_core_without_idle_and_waiting(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT, encoding="ascii")
    assert pin.busy(tmp_path / "stat") == {0: 25, 12: 7}
    assert pin.busy(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("threads", "after", "cores"),
    [
        (1, {0: 0, 1: 0, 2: 0, 3: 0}, (3,)),
        (1, {0: 9, 1: 2, 2: 5, 3: 9}, (1,)),
        (2, {0: 9, 1: 2, 2: 5, 3: 9}, (1, 2)),
        (2, {}, (2, 3)),
        (9, {}, (0, 1, 2, 3)),
    ],
)
def test_the_quietest_cores_are_chosen(threads: int, after: dict[int, int], cores: tuple[int, ...]) -> None:
    assert pin.quietest({0, 1, 2, 3}, threads, dict.fromkeys(after, 0), after) == cores


def test_what_was_busy_before_the_look_does_not_count() -> None:
    assert pin.quietest({0, 1}, 1, {0: 900, 1: 0}, {0: 901, 1: 5}) == (0,)


def test_cores_that_are_not_allowed_are_not_chosen() -> None:
    assert pin.quietest({0, 2}, 1, {}, {0: 5, 1: 0, 2: 7}) == (0,)


def test_this_process_is_pinned_and_let_go() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system pins nothing")
    allowed = os.sched_getaffinity(0)
    try:
        cores = pin.pin(1)
        assert len(cores) == 1
        assert os.sched_getaffinity(0) == set(cores) <= allowed
    finally:
        os.sched_setaffinity(0, allowed)
