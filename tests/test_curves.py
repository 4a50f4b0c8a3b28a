"""`evalbench curve`: a run's metrics over N."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import request, run_serial, small_suite

from evalbench.curves import CellCurve, curve_command, curves_of, unstable
from evalbench.errors import UserError
from evalbench.interfaces import Value
from evalbench.metrics.curve import Curve
from evalbench.runner import make_cell

METRICS = ("paired-median@identity", "fd@identity", "sw@identity")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_serial(request(small_suite(samples=256), ["ddim", "unipc"], (5, 10), metrics=METRICS), folder)
    return folder


def test_the_last_point_is_the_value_of_the_record(run: Path) -> None:
    from evalbench.store import Store

    values = {r.cell.id: r.metrics["fd@identity"].value for r in Store(run).records()}
    found = curves_of(run, ["fd@identity"])
    assert len(found) == 4
    for one in found:
        assert [value.n for value in one.curve.values] == [32, 64, 128, 256]
        assert one.curve.values[-1].value == pytest.approx(values[one.cell.id], rel=1e-4)
        assert one.curve.slope > 0


def test_what_the_command_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve_command(run, ["fd@identity", "sw@identity"], "64,256", False)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) >= 9
    assert shown[0].startswith("fd@identity  ddim, NFE 5, guidance 1, seed 0: ")
    assert " at 64  " in shown[0]
    curve_command(run, ["fd@identity"], "64,256", True)
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["cell"]["method"], first["metric"], len(first["values"])) == ("ddim", "fd@identity", 2)


def test_metrics_and_sizes_that_do_not_fit(run: Path) -> None:
    with pytest.raises(UserError, match="paired-median@identity: paired errors have no curve over N"):
        curves_of(run)
    with pytest.raises(UserError, match="name at least two different ones, from 1 to the 256 samples"):
        curves_of(run, ["fd@identity"], [64, 512])


def test_an_order_that_changes_with_n_is_said() -> None:
    suite = small_suite()

    def made(method: str, *values: float) -> CellCurve:
        points = tuple(Value(value, n) for value, n in zip(values, (100, 200, 400), strict=True))
        return CellCurve(make_cell(suite, method, 5, 1.0, 0), Curve("fd@identity", points, 0.0, 0.0))

    assert unstable([made("ddim", 3, 2, 1), made("unipc", 4, 3, 2)]) == []
    (line,) = unstable([made("ddim", 3, 2, 1), made("unipc", 2.5, 2.1, 2)])
    assert line == "fd@identity at NFE 5: the order at N = 100 is not that at N = 400"
