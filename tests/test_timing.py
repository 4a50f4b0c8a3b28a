"""Latency as `evalbench run` measures it: in virtual time equal to the truth, in real processes never fooled."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import virtual_time
from support import EFFORT, request, small_suite
from virtual_time import UNIT, VirtualClock

from evalbench import registry, runner, sampling, timing, warm
from evalbench.cost import memory
from evalbench.cost.latency import Steady
from evalbench.cost.ratio import median_ratio, verdict
from evalbench.cost.session import sit
from evalbench.cost.variants import Variant
from evalbench.report.frames import latency_fits, timings_frame
from evalbench.runner import SerialExecutor
from evalbench.spec import Latency, ModelSpec, Record, Suite
from evalbench.store import Store
from evalbench.timing import CellBench, Effort, LatencyJob

EVALBENCH = str(Path(sys.executable).with_name("evalbench"))
LAUNCH = 300 * UNIT
# An exact model whose evaluations, and a solver whose own Python, take the virtual time that the test says.
VIRTUAL = '''
from dataclasses import dataclass

import virtual_time
from virtual_time import UNIT
from evalbench.interfaces import Solver
from evalbench.models.gmm import GaussianMixture
from evalbench.registry import register


@register("virtual-gmm")
@dataclass
class VirtualMixture(GaussianMixture):
    """An evaluation takes 4 units, the first three of a model take 100 more."""

    def __post_init__(self):
        super().__post_init__()
        self.calls = 0

    def predict(self, *arguments):
        self.calls += 1
        virtual_time.SHARED.now += (4 + 100 * (self.calls <= 3)) * UNIT
        return super().predict(*arguments)


@register("walks")
@dataclass(frozen=True)
class Walks(Solver):
    """Evaluates `nfe` times; its own work takes 9 units, or what is asked."""

    units: int = 9

    def sample(self, denoiser, x_T, cond, nfe, noise):
        virtual_time.SHARED.now += self.units * UNIT
        for i in range(nfe):
            x = denoiser(x_T, 1.0 - i / (nfe + 1), cond)
        return x


@register("remembers")
@dataclass(frozen=True)
class Remembers(Walks):
    """Answers from its first answer of that size."""

    def sample(self, denoiser, x_T, cond, nfe, noise):
        key = (nfe, len(x_T))
        if key not in _answers:
            _answers[key] = super().sample(denoiser, x_T, cond, nfe, noise)
        return _answers[key]


_answers = {}
'''


class VirtualExecutor(SerialExecutor):
    """Processes in virtual time: each loads its model anew, `drift` makes every call slower than the one before."""

    def latency(self, job: LatencyJob) -> Any:
        clock = virtual_time.SHARED

        def launch(function: Callable[..., Any], *arguments: Any) -> Any:
            clock.now += LAUNCH
            warm.kept.forget()
            sys.modules[registry.get("method", "walks").__module__]._answers.clear()
            return function(*arguments, clock) if function is sit else function(*arguments)

        return timing.run_latency(job, launch, clock)


@pytest.fixture(autouse=True)
def _virtual(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(virtual_time, "SHARED", VirtualClock(), raising=False)
    monkeypatch.setattr(timing, "clock_for", lambda _: virtual_time.SHARED)
    monkeypatch.setattr(memory, "_give_back", lambda: None)
    yield
    warm.kept.forget()


def virtual_suite() -> Suite:
    suite = small_suite()
    return suite.model_copy(update={"model": ModelSpec(loader="virtual-gmm", options=suite.model.options)})


def run(out: Path, methods: list[str], nfe: list[int], effort: Effort | None = None) -> list[Record]:
    effort = effort or replace(EFFORT, processes=5, rounds=3, batches=(4,), steady=Steady(window=2))
    wanted = request(
        virtual_suite(),
        methods,
        nfe,
        measure=frozenset({"quality", "latency"}),
        metrics=("fd@identity",),
        effort=effort,
        plugins={"virtual.py": VIRTUAL},
    )
    return runner.run(wanted, out, VirtualExecutor)


def timed(records: list[Record]) -> dict[tuple[str, int], Latency]:
    return {(r.cell.method, r.cell.nfe): one for r in records for one in r.latency}


# --- virtual time ---------------------------------------------------------------------------------------------------


def test_what_is_recorded_and_reported_is_the_truth(tmp_path: Path) -> None:
    records = run(tmp_path, ["walks"], [2, 4, 8])
    for (_, nfe), one in timed(records).items():
        np.testing.assert_array_equal(np.array(one.seconds), np.full((5, 3, 2), (9 + 4 * nfe) / 512))
        assert one.breakdown is not None
        parts = (one.breakdown.denoiser, one.breakdown.arithmetic, one.breakdown.overhead, one.breakdown.excess)
        assert parts == (4 * nfe / 512, 0.0, 9 / 512, 0.0)
        assert (one.breakdown.decoder, one.breakdown.conditioning, one.doubt, one.steady) == (0.0, 0.0, "", True)
    frame = timings_frame(Store(tmp_path).records())
    assert list(frame["call_median_ms"]) == [1e3 * (9 + 4 * nfe) / 512 for nfe in (2, 4, 8)]
    (fit,) = latency_fits(frame).to_dict("records")
    assert (fit["ms_per_nfe"], fit["intercept_ms"], fit["r2"]) == (1e3 * 4 / 512, 1e3 * 9 / 512, 1.0)


def test_slow_first_calls_stand_apart(tmp_path: Path) -> None:
    one = timed(run(tmp_path, ["walks"], [2]))["walks", 2]
    assert one.first == (217 / 512,) * 5
    assert set(one.calls) == {17 / 512}
    assert one.cold == pytest.approx([(LAUNCH + 217 * UNIT) / 1e9] * 5, rel=1e-12)


def test_flops_are_not_counted_inside_a_first_call(tmp_path: Path) -> None:
    records = run(tmp_path, ["walks(units=1)"], [1], replace(EFFORT, processes=1, batches=(1,)))
    assert timed(records)["walks(units=1)", 1].first == (105 / 512,)


@pytest.mark.parametrize("methods", [["walks", "remembers"], ["remembers", "walks"]])
def test_a_method_that_answers_from_memory_is_caught(methods: list[str], tmp_path: Path) -> None:
    found = timed(run(tmp_path, methods, [4]))
    assert np.median(found["remembers", 4].calls) < np.median(found["walks", 4].calls) / 10
    assert (found["walks", 4].doubt, found["walks", 4].checked) == ("", 10)
    assert "timed outputs differ from the same samples computed again" in found["remembers", 4].doubt


def test_the_order_of_the_methods_changes_no_verdict(tmp_path: Path) -> None:
    names = {"a": "walks(units=100)", "b": "walks(units=200)", "c": "walks(units=101)"}
    verdicts = set()
    for order in ("abc", "cba", "bca"):
        found = timed(run(tmp_path / order, [names[letter] for letter in order], [2]))
        seconds = {letter: np.array(found[names[letter], 2].seconds) for letter in names}
        pairs = (("a", "b"), ("a", "c"))
        verdicts.add(tuple(verdict(median_ratio(seconds[x], seconds[y], resamples=50)) for x, y in pairs))
    assert verdicts == {("faster", "indistinguishable")}


# --- facts ----------------------------------------------------------------------------------------------------------


def job(methods: tuple[str, ...] = ("ddim",), suite: Suite | None = None, **changes: Any) -> LatencyJob:
    suite = suite or small_suite()
    return LatencyJob(suite, tuple(runner.make_cell(suite, m, 3, 1.0, 0) for m in methods), **changes)


def test_a_bench_crosses_process_borders_without_a_network() -> None:
    bench = CellBench.of(job(("ddim", "unipc"), variant="bfloat16"))
    again = pickle.loads(pickle.dumps(bench))
    assert again == bench
    assert (again.arms, again.batches) == (("ddim at NFE 3", "unipc at NFE 3"), (1, 32))
    assert len(pickle.dumps(bench)) < 20_000


@pytest.mark.parametrize(("batch", "batches"), [(256, (1, 64)), (32, (1, 32)), (1, (1,))])
def test_batches_are_one_and_the_suites(batch: int, batches: tuple[int, ...]) -> None:
    suite = small_suite(batch=batch)
    assert Effort().batches_of(suite) == batches
    assert Effort(batches=(8, 2, 8)).batches_of(suite) == (2, 8)


def test_witness_and_timed_call_make_the_same_samples() -> None:
    stand = CellBench.of(job(("ddim(eta=1)",))).build()
    (arm,) = stand.bench.arms  # type: ignore[attr-defined]
    rows = stand.witness(arm, [5, 3, 1 << 25])
    for row, index in zip(rows, (5, 3, 1 << 25), strict=True):
        np.testing.assert_allclose(stand.call(arm, range(index, index + 1))()[0], row, rtol=1e-9)


def test_images_are_timed_to_the_last_pixel() -> None:
    bench = CellBench.of(job(suite=small_suite("fashion-mixture", batch=4)))
    assert bench.build().call(bench.arms[0], range(2))().dtype == torch.uint8


@pytest.mark.parametrize(
    ("method", "free"),
    [
        ("ddim", True),
        ("ddim+cfg(scale=2)", True),
        ("unipc(order=3)", True),
        ("ddim+t-stitch", False),
        ("dpm-solver-v3", False),
    ],
)
def test_a_baseline_is_a_solver_on_the_unchanged_network(method: str, free: bool) -> None:
    assert timing.is_training_free(registry.build_method(method)) == free


def test_models_that_come_along_are_embedded_and_others_are_not() -> None:
    registry.load_plugin(VIRTUAL, "virtual.py")
    assert timing.is_embedded(small_suite())
    assert not timing.is_embedded(virtual_suite())


def test_a_default_variant_is_the_plain_model() -> None:
    suite = small_suite()
    assert "predict" not in vars(sampling.build(suite, sampling.default_variant(suite)).model)
    assert "predict" in vars(sampling.build(suite, Variant(dtype="float32")).model)


def test_the_deterministic_flag_is_set() -> None:
    from evalbench import environment

    torch.use_deterministic_algorithms(False)
    environment.prepare_process()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_catches_a_method_that_remembers(tmp_path: Path) -> None:
    plugin = tmp_path / "cheat.py"
    start = "from dataclasses import dataclass\nfrom evalbench.interfaces import Solver\n"
    solver = VIRTUAL[VIRTUAL.index('@register("walks")') :].replace("virtual_time.SHARED.now += self.units * UNIT", "")
    plugin.write_text(f"{start}from evalbench.registry import register\n{solver}")
    command = [EVALBENCH, "run", "gmm-smooth", "--out", str(tmp_path / "r"), "--plugin", str(plugin), "--serial"]
    what = ["--methods", "ddim,walks,remembers", "--nfe", "4", "--samples", "64", "--measure", "quality,latency"]
    how = ["--processes", "1", "--latency-rounds", "2", "--latency-batch", "4"]
    done = subprocess.run(
        [*command, *what, *how, "--allow-small-n"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = timed(Store(tmp_path / "r").records())
    assert {name for (name, _), one in found.items() if one.doubt} == {"remembers"}
    assert "timed outputs differ" in (tmp_path / "r" / "report" / "report.md").read_text()
    assert all(one.cores or not hasattr(__import__("os"), "sched_setaffinity") for one in found.values())


@pytest.mark.slow
def test_a_script_without_a_guard_may_time(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import evalbench\n"
        'frame = evalbench.run("gmm-smooth", "r", methods=["ddim"], nfe=[2], samples=64, metrics=["fd@identity"],\n'
        '    measure=["latency"], processes=1, latency_rounds=1, latency_batch=[2], serial=True, allow_small_n=True)\n'
        'print("once")\n'
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.split()) == (0, ["once"]), done.stderr
    assert [record.status for record in Store(tmp_path / "r").records()] == ["ok"]
