"""Calls in a thread beside a loop."""

from __future__ import annotations

import pytest

from evalbench.beside import Beside


def test_calls_are_made_in_order_and_what_they_raise_reaches_who_asks() -> None:
    made: list[int] = []
    with Beside(lambda: made.append(0)) as beside:
        futures = [beside(lambda i=i: made.append(i)) for i in (1, 2)]  # type: ignore[misc]
        bad = beside(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            bad.result(10)
        assert [future.result(10) for future in futures] == [None, None]
    assert made == [0, 1, 2]


def test_a_preparation_that_fails_reaches_every_call() -> None:
    def fails() -> None:
        raise RuntimeError("no such device")

    with Beside(fails) as beside:
        for future in (beside(int), beside(int)):
            with pytest.raises(RuntimeError, match="no such device"):
                future.result(10)
