"""Sequential verdicts: the points of the looks, their errors, and runs that stop by themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import request, run_serial, small_suite

from evalbench.errors import UserError
from evalbench.looks import (
    Spending,
    boundaries,
    decision_of,
    frechet_looks,
    group_sequential,
    score_sequence,
    sequence_half,
    spent,
)
from evalbench.metrics.estimate import Difference, from_influence
from evalbench.runner import SerialExecutor
from evalbench.sequential import Stopped, check_options, exit_code, until_decided

N, REPEATS = 400, 1000
LIMIT = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)


def test_all_of_the_level_is_spent_at_the_end() -> None:
    assert spent(1.0) == pytest.approx(0.05)
    assert 0 < spent(0.1) < spent(0.5) < 0.05


def test_points_of_one_look_are_the_fixed_designs_and_more_looks_cost() -> None:
    assert boundaries((1.0,))[0] == pytest.approx(1.95996, abs=1e-4)
    assert all(z > 1.96 for z in boundaries((0.25, 0.5, 0.75, 1.0)))


@pytest.mark.parametrize("shares", [(0.5, 1.0), (0.1, 0.2, 0.4, 0.7, 1.0)])
def test_sums_cross_the_points_as_often_as_the_level_says(shares: tuple[float, ...]) -> None:
    """Cumulative normal sums at the looks, crossing in time for what was spent until then."""
    rng = np.random.default_rng(0)
    steps = np.sqrt(np.diff([0.0, *shares]))
    z = np.cumsum(rng.standard_normal((200_000, len(shares))) * steps, axis=1) / np.sqrt(shares)
    crossed = np.abs(z) > boundaries(shares)
    for k, share in enumerate(shares):
        assert crossed[:, : k + 1].any(1).mean() == pytest.approx(spent(share), abs=0.0016)


def crossings(information: list[float], points: tuple[float, ...]) -> float:
    """How often sums with independent increments in this information leave the points."""
    steps = np.sqrt(np.diff([0.0, *information]))
    sums = np.cumsum(np.random.default_rng(1).standard_normal((100_000, len(information))) * steps, axis=1)
    return float((np.abs(sums) / np.sqrt(information) > points).any(1).mean())


def test_looks_that_have_less_in_common_than_n_says_keep_the_level() -> None:
    """Noise of second order, whose information grows as N^2."""
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    information, spending = [share**2 for share in shares], Spending()
    points = tuple(spending.point(share, one) for share, one in zip(shares, information, strict=True))
    assert crossings(information, points) == pytest.approx(0.05, abs=0.0021)
    assert crossings(information, boundaries(shares)) > 0.055


def test_looks_measure_their_information() -> None:
    """The unit of the difference does not matter, nor does one that never varies."""
    found = {n: Difference(1.0, 2.0 / n, n) for n in (100, 200, 400)}
    by_unit = [
        group_sequential(lambda n, u=unit: Difference(0, u * found[n].se, n), [*found], 0.0) for unit in (1.0, 1e-6)
    ]
    assert [one.half for one in by_unit[0]] == pytest.approx([1e6 * one.half for one in by_unit[1]])
    spending = Spending()
    points = [spending.point(n / 400, (n / 2.0) ** 2) for n in found]
    assert [one.half for one in by_unit[0]] == pytest.approx([z * 2 / n for z, n in zip(points, found, strict=True)])
    assert group_sequential(lambda n: Difference(0.0, 0.0, n), [100, 200], 0.0)[-1].decision == "inside"


def gaps(key: int, effect: float = 0.0) -> np.ndarray:
    return np.random.default_rng([key, 4]).standard_normal(N) + effect


def looked(x: np.ndarray, tolerance: float) -> Any:
    def at(n: int) -> Difference:
        return from_influence(float(x[:n].mean()), x[:n])

    return group_sequential(at, [N * k // 8 for k in range(1, 9)], tolerance)[-1]


def test_looks_and_sequences_keep_their_level_on_the_null() -> None:
    """With a tolerance that nothing is inside of, every stop is a false direction."""
    by_looks = np.mean([looked(gaps(key), 0.0).decision != "open" for key in range(REPEATS)])
    hundredths = range(N // 10, N + 1, N // 50)
    by_sequence = np.mean([score_sequence(gaps(key), hundredths, 0.0)[-1].decision != "open" for key in range(REPEATS)])
    fixed_points = np.mean(
        [any(abs(gaps(k)[:n].mean()) > 1.96 / n**0.5 for n in range(N // 8, N + 1, N // 8)) for k in range(REPEATS)]
    )
    assert by_looks <= LIMIT
    assert by_sequence <= LIMIT
    assert fixed_points > 0.1  # what looking eight times at 5 % each would have said


def test_large_effects_stop_early_in_their_direction_and_none_stops_as_inside() -> None:
    tolerance = 3.6 / N**0.5
    two = [looked(gaps(key, -2 * tolerance), tolerance) for key in range(100)]
    assert {one.decision for one in two} == {"below"}
    assert np.mean([one.n for one in two]) < 0.3 * N
    none = [looked(gaps(key), tolerance) for key in range(100)]
    assert np.mean([one.decision == "inside" for one in none]) > 0.7


def test_decisions() -> None:
    words = [decision_of(d, h, 1.0) for d, h in ((0.2, 0.5), (0.7, 0.1), (0.7, 0.5), (-1.5, 1.4), (0.7, 0.8))]
    assert words == ["inside", "inside", "above", "below", "open"]


def test_a_sequence_is_wider_than_a_fixed_interval_and_narrows() -> None:
    halves = [sequence_half(1.0, n, N) for n in (50, 100, 400)]
    assert halves == sorted(halves, reverse=True)
    assert halves[-1] > 1.96 / N**0.5


def test_looks_of_a_frechet_distance_are_eight_dimensions_apart() -> None:
    assert frechet_looks(4096, 64) == (819, 1638, 2458, 3277, 4096)
    assert frechet_looks(1024, 64) == (512, 1024)
    assert frechet_looks(256, 64) == (256,)


# --- runs -----------------------------------------------------------------------------------------------------------

METRICS = ("paired-median@identity",)


def wanted(methods: list[str], **changes: Any) -> Any:
    return request(small_suite(samples=320), methods, (5,), metrics=METRICS, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequential") / "base"
    run_serial(wanted(["ddim", "unipc"]), folder)
    return folder


def test_the_same_method_stops_as_indistinguishable_at_the_first_look(base: Path, tmp_path: Path) -> None:
    stopped = list(until_decided(wanted(["ddim", "unipc"]), tmp_path / "new", base, SerialExecutor))
    assert [(one.word, one.n, one.planned) for one in stopped] == [("indistinguishable", 32, 320)] * 2
    assert exit_code(stopped) == 0
    assert "indistinguishable after 32 of 320 samples" in stopped[0].text
    assert len(list((tmp_path / "new" / "chunks").rglob("*.npz"))) == 3  # two cells and their solution, one chunk each


def test_what_base_lacks_is_named(base: Path, tmp_path: Path) -> None:
    stopped = list(until_decided(wanted(["heun"]), tmp_path / "new", base, SerialExecutor))
    assert [one.reason for one in stopped] == ["missing in BASE"]
    assert exit_code(stopped) == 3
    assert not (tmp_path / "new").exists()  # nothing was sampled for it


def test_exit_codes() -> None:
    words = {
        word: Stopped("c", word) for word in ("better", "worse", "indistinguishable", "undecided", "not comparable")
    }
    assert [exit_code([words[w]]) for w in ("better", "worse", "undecided", "not comparable")] == [0, 1, 0, 3]
    assert exit_code([words["not comparable"], words["worse"]]) == 1
    assert exit_code([]) == 3


@pytest.mark.parametrize(
    ("until", "against", "samples", "measure", "message"),
    [
        ("", Path("b"), None, ["quality"], "write --until decided"),
        ("forever", Path("b"), None, ["quality"], "--until 'forever'"),
        ("decided", None, None, ["quality"], "needs --against BASE"),
        ("decided", Path("b"), 64, ["quality"], "drop --samples"),
        ("decided", Path("b"), None, ["latency"], "drop --measure"),
    ],
)
def test_options_that_do_not_go_together(
    until: str, against: Path | None, samples: int | None, measure: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_options(until, against, samples, measure)
    assert not check_options("", None, samples, measure)
