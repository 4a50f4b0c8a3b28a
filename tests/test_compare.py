"""Verdicts: their statistics on exact nulls, their words, the join, the reasons, the exit codes, the renderings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import compare_golden
import numpy as np
import pytest
import scipy.stats
from compare_golden import effect, verdict
from hypothesis import given
from hypothesis import strategies as st
from support import request, run_serial, small_suite

from evalbench import registry
from evalbench.compare import (
    Comparison,
    compare_command,
    compare_runs,
    default_tolerance,
    fast_compare,
    pairs,
    parse_tolerances,
    word_of,
)
from evalbench.compare.pairs import statistic_of
from evalbench.compare.runs import NotComparable, Run
from evalbench.compare.words import decide
from evalbench.errors import EvalbenchError, UserError
from evalbench.metrics.common import CLUSTER
from evalbench.metrics.differences import ROUTES, Difference, Plan, TooFewSamples, route_of
from evalbench.metrics.frechet import frechet_distance, moments, unpack_statistics
from evalbench.registry import build_metric
from evalbench.report import verdicts
from evalbench.spec import MetricValue, chunks_of, load_suite
from evalbench.stats import Z95, benjamini_hochberg, holm
from evalbench.store import Store

METRICS = ("paired-median@identity", "paired-p90@identity", "paired-rms@identity", "fd@identity")
Pair = tuple[np.ndarray, np.ndarray]

# --- statistics on cached features ----------------------------------------------------------------------------------

D, REPEATS = 8, 200
EXACT = {"mean": np.zeros(D), "cov": np.eye(D)}


def generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


DRAWS = {"features": generator(2**40).standard_normal((800, D))}


def twins(key: int, shape: tuple[int, ...], rho: float) -> Pair:
    """Two arrays of standard normal numbers, entry by entry with correlation rho: methods that share their noise."""
    rng = generator(key)
    shared, own = rng.standard_normal(shape), rng.standard_normal((2, *shape))
    a, b = math.sqrt(rho) * shared + math.sqrt(1 - rho) * own
    return a, b


def alarms(compute: Callable[[int], Difference]) -> float:
    """Share of repetitions in which the 95 % interval leaves out the truth, no difference."""
    found = (compute(key) for key in range(REPEATS))
    return sum(abs(d.value) > Z95 * d.se for d in found) / REPEATS


LIMIT = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)  # three standard errors of the simulation above the stated level


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("shift", [0.0, 0.4], ids=["perfect", "equally-far"])
@pytest.mark.parametrize(("route", "reference"), [("fd", EXACT), ("kid", DRAWS)])
def test_set_distances_keep_their_level(route: str, reference: dict[str, np.ndarray], shift: float, rho: float) -> None:
    def compute(key: int) -> Difference:
        a, b = twins(key, (16 * D, D), rho)
        return ROUTES[route].compute(a + shift, b + shift, reference)

    assert alarms(compute) <= LIMIT


def share(x: np.ndarray) -> np.ndarray:
    return (x > -1).astype(np.float64)


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize(
    ("route", "score"),
    [("mean", share), ("mean", np.tanh), ("mean", np.exp)] + [(f"paired-{q}", np.exp) for q in ("median", "p90")],
)
def test_scores_and_errors_keep_their_level(route: str, score: Callable[..., Any], rho: float) -> None:
    def compute(key: int) -> Difference:
        a, b = twins(key, (256,), rho)
        return ROUTES[route].compute(score(a), score(b), {})

    assert alarms(compute) <= LIMIT


def test_rms_keeps_its_level() -> None:
    def compute(key: int) -> Difference:
        a, b = twins(key, (256,), 0.9)
        return ROUTES["paired-rms"].compute(np.exp(a / 3), np.exp(b / 3), {})

    assert alarms(compute) <= LIMIT


@pytest.mark.parametrize("route", ["mean", "paired-median", "paired-p90", "paired-rms"])
def test_pairing_shortens_the_interval_and_the_sign_is_new_minus_base(route: str) -> None:
    base = np.exp(generator(1).standard_normal(400))
    new = 1.1 * base
    paired = ROUTES[route].compute(base, new, {})
    shuffled = ROUTES[route].compute(base, generator(2).permutation(new), {})
    assert paired.value > 0
    assert paired.se < shuffled.se / 2


@pytest.mark.parametrize(
    ("metric", "route"),
    [
        *((name, "fd") for name in ("fd@identity", "fd_to_converged@fashion64", "fid@clean", "sfid@adm")),
        *(
            (name, "mean")
            for name in ("accuracy@fashion-classifier", "shortfall@reward-target", "clip@ViT-B-32:openai")
        ),
        ("kid@identity", "kid"),
        ("cmmd@clip-image:ViT-B-32:openai", "cmmd"),
        ("nll-gap@token-nll", "nll-gap"),
    ],
)
def test_a_metric_is_compared_as_what_it_derives_from(metric: str, route: str) -> None:
    assert route_of(registry.build_metric(metric)) is ROUTES[route]


@pytest.mark.parametrize("metric", ["is@tf1", "posterior-spread@posterior", "consistency@posterior", "sw@identity"])
def test_a_metric_without_a_paired_statistic_says_so(metric: str) -> None:
    with pytest.raises(NotComparable, match=f"no paired statistic for '{metric}'"):
        statistic_of(metric)


@pytest.mark.parametrize(("route", "reference"), [("fd", EXACT), ("kid", DRAWS)])
def test_set_distance_to_a_farther_sampler_is_positive(route: str, reference: dict[str, np.ndarray]) -> None:
    base = generator(0).standard_normal((16 * D, D))
    found = ROUTES[route].compute(base, base + 1.0, reference)
    assert found.value - Z95 * found.se > 0


@pytest.mark.parametrize("factor", [4, 8])
def test_sampler_with_too_little_variance_is_never_better(factor: int) -> None:
    dims = 32
    reference = {"mean": np.zeros(dims), "cov": np.eye(dims)}
    found, plug_in = [], []
    for key in range(20):
        base = generator(key).standard_normal((factor * dims, dims))
        new = math.sqrt(0.9) * base
        found.append(ROUTES["fd"].compute(base, new, reference))
        a, b = (frechet_distance(moments(x).gaussian(), unpack_statistics(reference)) for x in (base, new))
        plug_in.append(b < a)
    assert not any(d.value + Z95 * d.se < 0 for d in found)
    assert np.mean([d.value for d in found]) > 0
    if factor == 4:
        assert np.mean(plug_in) > 0.8  # what a difference of two table entries would have said


def test_frechet_verdict_needs_four_samples_a_dimension_and_is_flagged_below_eight() -> None:
    for n in (4 * D - 1, 4 * D, 8 * D - 1, 8 * D):
        a, b = twins(0, (n, D), 0.5)
        if n < 4 * D:
            with pytest.raises(TooFewSamples, match="N too small for d: 31 samples, 8 dimensions"):
                ROUTES["fd"].compute(a, b, EXACT)
        else:
            assert bool(ROUTES["fd"].compute(a, b, EXACT).note) == (n < 8 * D)


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "se", "tolerance", "higher", "word"),
    [
        (0.0, 0.0, 0.0, False, "indistinguishable"),
        (0.3, 0.1, 0.5, False, "indistinguishable"),
        (-0.3, 0.1, 0.5, False, "indistinguishable"),
        (0.31, 0.1, 0.5, False, "undecided"),  # 0.31 + 0.196 > 0.5
        (0.65, 0.1, 0.5, False, "undecided"),  # 0.65 - 0.196 < 0.5
        (0.70, 0.1, 0.5, False, "worse"),
        (0.70, 0.1, 0.5, True, "better"),
        (-0.70, 0.1, 0.5, False, "better"),
        (-0.70, 0.1, 0.5, True, "worse"),
        (0.19, 0.1, 0.0, False, "undecided"),
        (0.20, 0.1, 0.0, False, "worse"),
        (0.5, 0.0, 0.5, False, "indistinguishable"),
        (0.6, 0.0, 0.5, False, "worse"),
    ],
)
def test_word_follows_from_the_interval(
    difference: float, se: float, tolerance: float, higher: bool, word: str
) -> None:
    found = effect(difference=difference, se=se, tolerance=tolerance, higher_is_better=higher)
    (rejected,) = holm([found.p])
    assert word_of(found, rejected=rejected) == word


@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(0, 0.5), st.floats(1, 1e6) | st.just(math.inf))
def test_intervals_and_p_are_students(difference: float, se: float, tolerance: float, df: float) -> None:
    found = effect(difference=difference, se=se, tolerance=tolerance, df=df)
    half = scipy.stats.t.ppf(0.975, df) * se
    assert (found.low, found.high) == pytest.approx((difference - half, difference + half), rel=1e-6)
    beyond = abs(difference) - tolerance
    expected = min(1.0, 2 * scipy.stats.t.sf(beyond / se, df)) if beyond > 0 else 1.0
    assert found.p == pytest.approx(expected, rel=1e-6)
    assert (found.p <= 0.05) == (found.low >= tolerance or found.high <= -tolerance) or math.isclose(found.p, 0.05)


def test_few_degrees_of_freedom_decide_less() -> None:
    """A difference of 2.2 se, which the normal distribution would call a regression."""
    many, few = (effect(difference=0.22, se=0.1, tolerance=0.0, df=df) for df in (math.inf, 5))
    assert [word_of(one, rejected=holm([one.p])[0]) for one in (many, few)] == ["worse", "undecided"]
    assert few.detectable() > many.detectable()
    assert few.samples_to_decide() > few.n > many.samples_to_decide()


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.03 > 0.05 / 2 stops it
    assert holm([0.04, 0.01]) == [True, True]
    assert holm([]) == []


def test_benjamini_hochberg_steps_up() -> None:
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == [True] * 4  # 0.04 <= 0.05 saves all below it
    assert benjamini_hochberg([0.2, 0.011, 0.03, 0.9]) == [False, True, False, False]
    assert benjamini_hochberg([]) == []


def test_reports_may_control_the_share_of_false_words_instead() -> None:
    se = 0.1
    found = [verdict("undecided", effect(difference=z * se, se=se, tolerance=0.0)) for z in (2.05, 2.1, 2.2, 2.6)]
    gate, report = ([v.word for v in decide(found, control)] for control in ("holm", "bh"))
    assert gate == ["undecided"] * 3 + ["worse"]
    assert report == ["worse"] * 4


def test_samples_to_decide_shrink_the_interval_to_the_tolerance() -> None:
    found = effect(difference=0.3, se=0.2, tolerance=0.1, n=1000)
    n = found.samples_to_decide()
    assert n is not None
    assert Z95 * found.se * math.sqrt(found.n / n) == pytest.approx(0.2, rel=1e-3)
    assert effect(difference=0.1, se=0.2, tolerance=0.1).samples_to_decide() is None


def test_detectable_effect_has_its_power() -> None:
    found = effect(se=0.2, tolerance=0.1)
    truth = found.detectable(5)
    hits = truth + 0.2 * generator(0).standard_normal(20_000)
    share_found = np.mean([effect(difference=x, se=0.2, tolerance=0.1).p <= 0.05 / 5 for x in hits])
    assert share_found == pytest.approx(0.8, abs=0.01)


def test_default_tolerances() -> None:
    suite = load_suite("fashion-mixture")
    fd = "fd@fashion64"
    assert default_tolerance(fd, MetricValue(value=20.0, n=2048, bias=2.0), suite) == pytest.approx(0.36)
    assert default_tolerance(fd, MetricValue(value=1.0, n=2048, bias=0.9), suite) == 0.088  # the floor's sd at this N
    assert default_tolerance(fd, MetricValue(value=1.0, n=999), suite) == 0.088  # of the nearest N
    assert default_tolerance(fd, MetricValue(value=1.0, n=3500), suite) == 0.06
    assert default_tolerance("fd@other", MetricValue(value=1.0, n=999), suite) == 0.02
    assert default_tolerance("accuracy@fashion-classifier", MetricValue(value=0.5, n=2048), suite) == 0.01


def test_tolerances_are_read_and_checked(runs: Path) -> None:
    assert parse_tolerances("a@b=0.2, c@d=1e-3") == {"a@b": 0.2, "c@d": 1e-3}
    assert parse_tolerances(None) == parse_tolerances("") == {}
    for wrong in ("a@b", "a@b=", "=1", "a@b=x", "a@b=1,"):
        with pytest.raises(UserError, match="write METRIC=NUMBER"):
            parse_tolerances(wrong)
    with pytest.raises(UserError, match="did you mean 'paired-median@identity'"):
        compare_runs(runs / "a", runs / "b", {"paired-medain@identity": 1})
    with pytest.raises(UserError, match="0 or more"):
        compare_runs(runs / "a", runs / "b", {"paired-median@identity": -1})


# --- real runs ------------------------------------------------------------------------------------------------------

PLUGIN = '''
from itertools import pairwise
from evalbench.engine import Plan, PlannedSolver, linear_step
from evalbench.registry import register

@register("verdict-euler")
class VerdictEuler(PlannedSolver):
    """First-order exponential integrator on x0."""
    grid = ""

    def plan(self, path, times):
        plan = Plan("x0")
        x = plan.x_T
        for s, t in pairwise(times):
            a, b = linear_step(path, s, t, "x0")
            x = plan.update({x: a}, {plan.evaluate(x, s, t): FACTOR * b})
        return plan.finish(x)
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` and `b` of the same cells, `longer` with more samples."""
    folder = tmp_path_factory.mktemp("runs")
    for name, samples in (("a", 96), ("b", 96), ("longer", 128)):
        wanted = request(small_suite(samples=samples), ["ddim", "unipc"], (5, 10), metrics=METRICS)
        run_serial(wanted, folder / name)
    return folder


@pytest.fixture
def edited(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of run `b` whose records (as dicts) went through a function; None drops a record."""

    def edit(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(runs / "b", folder)
        file = folder / "records.jsonl"
        records = [change(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(record) + "\n" for record in records if record is not None))
        return folder

    return edit


def words(found: Comparison) -> set[str]:
    return {v.word for v in found.verdicts}


def test_same_run_is_indistinguishable_and_bit_identical(runs: Path) -> None:
    found = compare_runs(runs / "a", runs / "b")
    assert words(found) == {"indistinguishable"}
    assert found.exit_code(strict=True) == 0
    gate = fast_compare(runs / "a", runs / "b")
    assert [c.word for c in gate.cells] == ["bit-identical"] * 4
    assert gate.exit_code() == 0


def test_better_solver_is_better_in_its_direction(runs: Path) -> None:
    forward = compare_runs(runs / "a", runs / "b", base_method="ddim", new_method="unipc")
    back = compare_runs(runs / "a", runs / "a", base_method="unipc", new_method="ddim")
    assert (words(forward), words(back)) == ({"better"}, {"worse"})
    assert (forward.exit_code(), back.exit_code()) == (0, 1)
    for f, b in zip(forward.verdicts, back.verdicts, strict=True):
        assert f.effect is not None
        assert b.effect is not None
        assert f.effect.difference == pytest.approx(-b.effect.difference)
        assert {e.metric for e in f.descriptive} == {"paired-p90@identity", "paired-rms@identity", "fd@identity"}


def test_difference_is_that_of_the_table_where_nothing_is_extrapolated(runs: Path) -> None:
    for v in compare_runs(runs / "a", runs / "a", base_method="unipc", new_method="ddim").verdicts:
        for e in (v.effect, *v.descriptive):
            assert e is not None
            if e.metric != "fd@identity":  # the table has its bias
                assert e.difference == pytest.approx(e.new - e.base)


def test_mutated_solver_is_found(tmp_path: Path) -> None:
    for name, factor in (("good", "1.0"), ("mutant", "1.01"), ("refactored", "(1 + 1e-9)")):
        plugins = {"mine.py": PLUGIN.replace("FACTOR", factor)}
        run_serial(request(small_suite(), ["verdict-euler"], (10,), metrics=METRICS, plugins=plugins), tmp_path / name)
        registry._parts["method"].pop("verdict-euler")
    (mutant,) = compare_runs(tmp_path / "good", tmp_path / "mutant", {"paired-median@identity": 1e-4}).verdicts
    assert mutant.word in ("worse", "better")  # 1 % of a coefficient may happen to help; it is not overlooked
    assert [c.word for c in fast_compare(tmp_path / "good", tmp_path / "mutant").cells] == ["changed"]
    assert fast_compare(tmp_path / "good", tmp_path / "mutant").exit_code() == 3
    assert words(compare_runs(tmp_path / "good", tmp_path / "refactored")) == {"indistinguishable"}
    assert [c.word for c in fast_compare(tmp_path / "good", tmp_path / "refactored").cells] == ["same to rounding"]


def test_feature_distances_of_an_image_suite(tmp_path: Path) -> None:
    metrics = ("fd@fashion64", "kid@fashion64", "accuracy@fashion-classifier")
    suite = load_suite("fashion-mixture").override(samples=256, batch=128, chunk=128)
    run_serial(request(suite, ["ddim", "unipc"], (5,), metrics=metrics), tmp_path / "run")
    run = tmp_path / "run"
    (found,) = compare_runs(run, run, base_method="ddim", new_method="unipc").verdicts
    assert found.word == "better"
    assert found.notes == ("N < 8 d (256 samples, 64 dimensions)",)
    assert {e.metric for e in found.descriptive} == {"kid@fashion64", "accuracy@fashion-classifier"}
    assert words(compare_runs(run, run)) == {"indistinguishable"}
    assert {c.word for c in fast_compare(run, run).cells} == {"bit-identical"}


def test_rows_are_joined_by_key(runs: Path, edited: Callable[..., Path]) -> None:
    folder = edited(lambda record: record)
    file = folder / "records.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert compare_runs(runs / "a", folder).verdicts == compare_runs(runs / "a", runs / "b").verdicts


def replaced(path: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Sets `a.b.c` of the record of unipc at NFE 5."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["cell"]["method"] == "unipc" and record["cell"]["nfe"] == 5:
            table = record
            *parents, last = path.split("/")
            for parent in parents:
                table = table[parent]
            table[last] = value
        return record

    return change


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("cell/suite_version", 2, "suite version differs: 1 in BASE, 2 in NEW"),
        ("cell/settings", "other", "method version or settings differ"),
        ("samples", 64, "N differs: 96 in BASE, 64 in NEW"),
        ("status", "error", "error row in NEW: error"),
        (
            "protocol_facts/generation/sampling/dtype",
            "float32",
            "protocol differs in generation.sampling.dtype: float64",
        ),
        ("protocol_facts/generation/path", None, "protocol differs in generation.path"),
        ("protocol_facts/generation/conditions/labels", "x", "protocol differs in generation.conditions.labels"),
        ("protocol_facts/generation/sampling/noise", "edm", "noise differs: philox in BASE, edm (drawn on the CPU)"),
        ("protocol_facts/generation/sampling/batch", 1, "protocol differs in generation.sampling.batch"),
        ("protocol_facts/generation/model/options/seed", 9, "protocol differs in generation.model.options.seed"),
        ("protocol_facts/guidance", 3.0, "protocol differs in guidance: 1.0 in BASE, 3.0 in NEW"),
        ("protocol_facts/seed", 7, "protocol differs in seed"),
        ("cell/generation", "x", "generation facts differ"),
        ("cell/guidance", 3.0, "missing in NEW"),
        ("protocol_facts/features/identity", "x", "protocol differs in features.identity"),
        ("protocol_facts/solution/nfe", 65, "protocol differs in solution.nfe: 64 in BASE, 65 in NEW"),
        ("protocol_facts", {}, "protocol differs in generation"),
        ("metrics", {}, "'paired-median@identity' has no value in NEW: was not measured"),
        ("cell/seed", 1, "missing in NEW"),
    ],
)
def test_reasons_are_named_and_fail_the_gate(
    runs: Path, edited: Callable[..., Path], path: str, value: Any, reason: str
) -> None:
    found = compare_runs(runs / "a", edited(replaced(path, value)))
    (odd,) = [v for v in found.verdicts if v.word == "not comparable"]
    assert (odd.method, odd.nfe) == ("unipc", 5)
    assert reason in odd.reason
    assert found.exit_code() == 3  # three cells are fine; the gate does not pass in silence on the fourth


def test_missing_cells_arrays_and_other_n(runs: Path, edited: Callable[..., Path]) -> None:
    folder = edited(lambda record: None if record["cell"]["method"] == "ddim" else record)
    found = compare_runs(runs / "a", folder)
    assert [v.reason for v in found.verdicts if v.method == "ddim"] == ["missing in NEW"] * 2
    back = compare_runs(folder, runs / "a")
    assert len(back.only_new) == 2
    assert back.exit_code() == 0  # a method more is no regression
    shutil.rmtree(folder / "chunks" / Store(folder).records()[0].cell.id)
    reasons = [v.reason for v in compare_runs(runs / "b", folder).verdicts]
    assert any("feature arrays missing" in reason for reason in reasons)
    assert {v.reason for v in compare_runs(runs / "a", runs / "longer").verdicts} == {
        "N differs: 96 in BASE, 128 in NEW"
    }


def test_cell_without_a_value_in_base_fails_nothing(runs: Path, edited: Callable[..., Path]) -> None:
    found = compare_runs(edited(replaced("status", "unsupported")), runs / "a")
    assert [v.reason for v in found.verdicts if v.word == "not comparable"] == ["unsupported row in BASE: unsupported"]
    assert found.exit_code() == 0


def test_other_fingerprint_class_is_a_remark(runs: Path, edited: Callable[..., Path]) -> None:
    folder = edited(replaced("environment/class", "other"))
    found = {(v.method, v.nfe): v for v in compare_runs(runs / "a", folder).verdicts}
    assert found["unipc", 5].notes == ("other fingerprint class",)
    assert found["unipc", 5].word == "indistinguishable"
    assert found["unipc", 10].notes == ()
    gate = {c.cell: c.word for c in fast_compare(runs / "a", folder).cells}
    assert gate["gmm-smooth: unipc, NFE 5, guidance 1, seed 0"] == "same to rounding"
    assert gate["gmm-smooth: unipc, NFE 10, guidance 1, seed 0"] == "bit-identical"


def primary_of(runs: Path, folder: Path, metric: str) -> Path:
    """A copy of run `a` whose suite has another primary metric."""
    shutil.copytree(runs / "a", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["suite"]["metrics"]["primary"] = metric
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_reference_of_the_model_is_kept_by_the_run(runs: Path, tmp_path: Path) -> None:
    folder = primary_of(runs, tmp_path / "run", "fd@identity")
    assert words(compare_runs(folder, runs / "b")) == {"indistinguishable"}
    assert words(compare_runs(folder, runs / "b", base_method="ddim", new_method="unipc")) <= {"better", "undecided"}
    (kept,) = (folder / "references").glob("*.npz")
    store = Store(folder)
    arrays = store.read_reference("identity")
    assert arrays is not None
    store.write_reference("identity", {name: values + 0.1 for name, values in arrays.items()})
    assert {v.reason for v in compare_runs(folder, runs / "b").verdicts} == {
        "reference 'identity' differs: its model computes other arrays in NEW"
    }
    kept.write_bytes(b"no reference")
    with pytest.raises(EvalbenchError, match="damaged") as caught:
        compare_runs(folder, runs / "b")
    assert caught.value.exit_code == 4
    kept.unlink()
    found = compare_runs(folder, runs / "b")
    assert all("computed by the model and not stored" in v.reason for v in found.verdicts)
    assert found.exit_code() == 3


# --- exit codes -----------------------------------------------------------------------------------------------------


def test_nothing_in_common_is_3(runs: Path, edited: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    empty = edited(lambda record: None)
    other = tmp_path / "other"
    run_serial(request(small_suite("gmm-sharp"), ["ddim"], (5,), metrics=METRICS), other)
    for pair in ((runs / "a", empty), (empty, runs / "a"), (empty, empty), (runs / "a", other)):
        for fast in (False, True):
            assert compare_command(*pair, fast=fast) == 3
            assert "No cell in common" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("records.jsonl", "{]\n", "line 1 is not a record"),
        ("records.jsonl", '{"schema": 99}\n', "schema 99"),
        ("manifest.json", "{", "cannot be read"),
        ("manifest.json", "{}", "names no suite"),
        ("manifest.json", '{"schema": 99, "suite": {}}', "schema 99"),
    ],
)
def test_what_cannot_be_read_is_4(
    runs: Path, edited: Callable[..., Path], file: str, content: str, message: str
) -> None:
    folder = edited(lambda record: record)
    (folder / file).write_text(content)
    for fast in (False, True):
        with pytest.raises(EvalbenchError, match=message) as caught:
            compare_command(runs / "a", folder, fast=fast)
        assert caught.value.exit_code == 4


def test_damaged_chunk_is_4(runs: Path, edited: Callable[..., Path]) -> None:
    folder = edited(lambda record: record)
    for chunk in (folder / "chunks").rglob("*.npz"):
        chunk.write_bytes(b"no chunk")
    with pytest.raises(EvalbenchError, match=r"is damaged .*; delete it and run again") as caught:
        compare_runs(runs / "a", folder)
    assert caught.value.exit_code == 4


def test_what_the_user_got_wrong_is_2(runs: Path, tmp_path: Path) -> None:
    a, b = runs / "a", runs / "b"
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: compare_command(tmp_path, b), "is not a run folder"),
        (lambda: compare_command(a, b, fmt="pdf"), "unknown format 'pdf'"),
        (lambda: compare_command(a, b, control="hlom"), "did you mean 'holm'"),
        (lambda: compare_command(a, b, "x"), "write METRIC=NUMBER"),
        (lambda: compare_command(a, b, base_method="ddim"), "name both methods"),
        (lambda: compare_command(a, b, base_method="ddim", new_method="unpic"), "did you mean 'unipc'"),
        (lambda: compare_command(a, b, "paired-median@identity=1", fast=True), "takes no tolerance"),
        (lambda: compare_command(a, b, junit=tmp_path / "no" / "x.xml"), "cannot write"),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("found", "code", "strict"),
    [
        ([], 3, 3),
        (["better", "indistinguishable"], 0, 0),
        (["undecided"], 0, 1),
        (["not comparable"], 3, 3),
        (["not comparable", "better"], 3, 3),
        (["not comparable", "undecided"], 3, 1),
        (["not comparable", "worse"], 1, 1),
    ],
)
def test_exit_codes(found: list[str], code: int, strict: int) -> None:
    comparison = Comparison("a", "b", tuple(verdict(word) for word in found))
    assert (comparison.exit_code(), comparison.exit_code(strict=True)) == (code, strict)


# --- renderings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return compare_golden.renderings()


def test_golden_files(rendered: dict[str, str]) -> None:
    for name, content in rendered.items():
        golden = (compare_golden.FOLDER / name).read_text(encoding="utf-8")
        assert content == golden, f"{name} differs; if that is meant, run: python tests/compare_golden.py"


def test_readers_find_what_the_golden_files_say() -> None:
    found = json.loads((compare_golden.FOLDER / "compare.json").read_text())
    assert found["exit_code"] == 1
    assert found["counts"] == {
        "worse": 2, "undecided": 1, "not comparable": 2, "indistinguishable": 1, "better": 1
    }  # fmt: skip
    suite = ElementTree.parse(compare_golden.FOLDER / "compare.xml").getroot()[0]
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7", "failures": "2", "errors": "1", "skipped": "2"
    }  # fmt: skip
    rows = [line for line in (compare_golden.FOLDER / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows[:8]} == {10}  # escaped bars open no column
    assert all("\x1b" not in path.read_text() for path in compare_golden.FOLDER.glob("compare.[mx]*"))


def test_strict_junit_fails_what_is_undecided() -> None:
    suite = ElementTree.fromstring(verdicts.to_junit(compare_golden.comparison(), strict=True))[0]
    assert {k: suite.get(k) for k in ("failures", "errors", "skipped")} == {
        "failures": "3", "errors": "1", "skipped": "1"
    }  # fmt: skip


def test_command_writes_its_files_and_the_same_bytes_again(runs: Path, tmp_path: Path, capsys: Any) -> None:
    content = []
    for turn in ("1", "2"):
        junit, out = tmp_path / f"{turn}.xml", tmp_path / f"{turn}.json"
        for fmt in ("console", "md", "json"):
            code = compare_command(runs / "a", runs / "b", junit=junit, json_path=out, fmt=fmt)
            assert code == 0
        content.append((junit.read_bytes(), out.read_bytes(), capsys.readouterr().out))
    assert content[0] == content[1]
    assert content[0][2].count("4 indistinguishable") == 2
    fast = tmp_path / "fast.json"
    assert compare_command(runs / "a", runs / "b", json_path=fast, fast=True) == 0
    assert capsys.readouterr().out.count("bit-identical") == 4
    assert len(json.loads(fast.read_text())["cells"]) == 4


def test_strict_fails_on_undecided(runs: Path, capsys: Any) -> None:
    a = runs / "a"
    (one, _) = compare_runs(a, a, base_method="unipc", new_method="ddim").verdicts
    assert one.effect is not None
    tolerance = f"paired-median@identity={one.effect.difference}"
    arguments: dict[str, Any] = {"base_method": "unipc", "new_method": "ddim"}
    assert compare_command(a, a, tolerance, **arguments) == 0
    assert "no N decides" in capsys.readouterr().out
    assert compare_command(a, a, tolerance, strict=True, **arguments) == 1


# --- how samples were drawn ------------------------------------------------------------------------------------------


def pair_of(folder: Path) -> pairs.Pair:
    run = Run(Store(folder))
    records = {record.cell.method: record for record in run.records if record.cell.nfe == 5}
    return pairs.Pair((run, run), records["ddim"], records["unipc"], {})


def rows_and_route(pair: pairs.Pair, metric: str) -> tuple[Any, ...]:
    name, _, features = metric.partition("@")
    rows = [pair.runs[0].rows(r.cell.id, r.samples, r.chunk, features) for r in (pair.old, pair.new)]
    return ROUTES[name], *rows, pair.runs[0].reference(features)


def test_a_label_plan_is_none_of_the_error(runs: Path) -> None:
    """Suites with as many samples of each class."""
    pair = pair_of(runs / "a")
    route, base, new, reference = rows_and_route(pair, "fd@identity")
    labels = np.arange(len(base)) % pair.runs[0].suite.conditions.classes
    found = pair.difference("fd@identity")[1]
    assert found == route.compute(base, new, reference, Plan(None, labels))
    assert found.se < route.compute(base, new, reference).se


def test_samples_of_one_prompt_are_a_cluster_where_chunks_say_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "run")
    pair, prompts = pair_of(tmp_path / "run"), np.arange(96) // 8

    def name_prompts(record: Any, of: np.ndarray) -> None:
        store = pair.runs[0].store
        for chunk in chunks_of(record.cell.id, record.samples, record.chunk):
            arrays, facts = store.read_whole_chunk(chunk)
            store.write_chunk(chunk, {**arrays, CLUSTER: of[chunk.start : chunk.stop]}, facts)

    name_prompts(pair.old, prompts)
    with pytest.raises(NotComparable, match="the samples that share a prompt differ"):
        pair_of(tmp_path / "run").difference("fd@identity")
    name_prompts(pair.new, prompts)
    pair = pair_of(tmp_path / "run")
    route, base, new, reference = rows_and_route(pair, "fd@identity")
    assert pair.difference("fd@identity")[1] == route.compute(base, new, reference, Plan(prompts))


def test_difference_of_cmmd_is_that_of_its_values_without_their_bias() -> None:
    base, new = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a + 0.5 for a in twins(3, (150, 6), 0.5)))
    y = generator(4).standard_normal((100, 6))
    metric = build_metric("cmmd@identity")
    values = [metric.compute(metric.update({"identity": x}), {"features": y}) for x in (base, new)]
    found = ROUTES["cmmd"].compute(base, new, {"features": y})
    assert found.value == pytest.approx((values[1].value - values[1].bias) - (values[0].value - values[0].bias))
