"""The loop: resume, added cells, error rows, and bits that do not depend on who computes them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import EFFORT, MISBEHAVING, PREPARES, request, run_serial, small_suite, timed_request

from evalbench import runner, worker
from evalbench.errors import UserError
from evalbench.runner import SerialExecutor
from evalbench.spec import Record
from evalbench.store import Store, open_run


def _values(records: list[Record]) -> dict[tuple[str, int], dict[str, float]]:
    return {(r.cell.method, r.cell.nfe): {k: v.value for k, v in r.metrics.items()} for r in records}


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["ddim", "unipc"], [5, 10])
    first, computed = run_serial(wanted, tmp_path)
    second, again = run_serial(wanted, tmp_path)
    assert len(computed.jobs) == 3 * (4 + 1)  # 3 chunks of 4 cells and of the fine solution
    assert again.jobs == []
    assert first == second


def test_the_largest_budgets_are_computed_first(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["ddim"], [5, 20, 10], metrics=("fd@identity",))
    _, computed = run_serial(wanted, tmp_path)
    assert [job.cell.nfe for job in computed.jobs] == [20, 10, 5, 20, 20, 10, 10, 5, 5]


def test_a_new_method_computes_only_its_cells(tmp_path: Path) -> None:
    run_serial(request(small_suite(), ["ddim"]), tmp_path)
    records, computed = run_serial(request(small_suite(), ["ddim", "unipc"]), tmp_path)
    assert {job.cell.method for job in computed.jobs} == {"unipc"}
    assert [r.cell.method for r in records] == ["ddim", "unipc"]


def test_more_samples_keep_the_whole_chunks(tmp_path: Path) -> None:
    run_serial(request(small_suite(samples=64), ["ddim"]), tmp_path)
    _, computed = run_serial(request(small_suite(samples=96), ["ddim"]), tmp_path)
    assert {(job.chunk.start, job.chunk.stop) for job in computed.jobs} == {(64, 96)}


def test_an_interrupted_run_continues_to_the_same_records(tmp_path: Path) -> None:
    class Stops(SerialExecutor):
        def map(self, jobs):  # type: ignore[no-untyped-def]
            for i, outcome in enumerate(super().map(jobs)):
                if i == 4:
                    raise KeyboardInterrupt
                yield outcome

    wanted = request(small_suite(), ["ddim", "unipc"])
    with pytest.raises(KeyboardInterrupt):
        runner.run(wanted, tmp_path / "a", Stops)
    resumed, computed = run_serial(wanted, tmp_path / "a")
    straight, _ = run_serial(wanted, tmp_path / "b")
    assert len(computed.jobs) == 9 - 4
    assert _values(resumed) == _values(straight)


def test_chunks_of_another_fingerprint_class_are_not_mixed_in(tmp_path: Path) -> None:
    class Elsewhere(SerialExecutor):
        def environment(self, preferred=()):  # type: ignore[no-untyped-def]
            return super().environment(preferred) | {"class": "another"}

    wanted = request(small_suite(samples=64), ["ddim"])
    run_serial(wanted, tmp_path)
    more = request(small_suite(samples=96), ["ddim"])
    jobs = []

    class Watched(Elsewhere):
        def map(self, todo):  # type: ignore[no-untyped-def]
            for job in todo:
                jobs.append(job)
                yield from super().map(iter([job]))

    runner.run(more, tmp_path, Watched)
    ours = [job for job in jobs if job.cell.method == "ddim"]
    assert len(ours) == 3, "the two chunks that are there come from another class"


def test_a_damaged_chunk_is_computed_again(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["ddim"])
    before, computed = run_serial(wanted, tmp_path)
    file = Store(tmp_path).chunk_file(computed.jobs[-1].chunk)
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "records.jsonl").unlink()
    after, again = run_serial(wanted, tmp_path)
    assert [job.chunk for job in again.jobs] == [computed.jobs[-1].chunk]
    assert _values(before) == _values(after)


def test_misbehaving_methods_become_rows_and_the_rest_is_complete(tmp_path: Path) -> None:
    methods = ["raises", "nan", "wrong-shape", "overspends", "needs-split", "ddim"]
    wanted = request(small_suite(), methods, plugins={"bad.py": MISBEHAVING})
    records, computed = run_serial(wanted, tmp_path)
    rows = {record.cell.method: record for record in records}
    assert {name: row.status for name, row in rows.items()} == {
        "raises": "error",
        "nan": "error",
        "wrong-shape": "error",
        "overspends": "error",
        "needs-split": "unsupported",
        "ddim": "ok",
    }
    messages = {name: row.failure.message for name, row in rows.items() if row.failure}
    assert messages["raises"] == "the method broke"
    first = "(samples 0, 1, 2, 3, 4, 5, 6, 7, ... (24 more))"
    assert messages["nan"] == f"32 of 32 samples hold NaN or infinity {first}"
    assert messages["wrong-shape"] == "wrong-shape returned (31, 8), expected a tensor of shape (32, 8)"
    assert messages["overspends"] == "budget 5, spent 6"
    assert messages["needs-split"] == "not supported: needs split"
    assert "RuntimeError" in rows["raises"].failure.traceback  # type: ignore[union-attr]
    assert len([job for job in computed.jobs if job.cell.method == "raises"]) == 1, "stops at the first failure"
    assert runner.needs_attention(records)
    assert rows["ddim"].metrics["paired-median@identity"].value > 0


POISONED = """
from dataclasses import dataclass
import torch
from evalbench.interfaces import Solver
from evalbench.registry import register

class Poisoned(Solver):
    def sample(self, denoiser, x_T, cond, nfe, noise):
        return self.spoil(x_T.clamp(-1, 1), noise.samples)

@register("same-in-every-batch")
class SameInEveryBatch(Poisoned):
    '''Samples spoiled in one way.'''

    def spoil(self, x, samples):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)

@register("one-grey")
class OneGrey(Poisoned):
    '''Samples spoiled in one way.'''

    def spoil(self, x, samples):
        x[[i for i, sample in enumerate(samples) if sample == 37]] = 0.5
        return x

@register("bytes")
class Bytes(Poisoned):
    '''Samples spoiled in one way.'''

    def spoil(self, x, samples):
        return (x + 1) * 127.5
"""


def test_poisoned_images_are_error_rows_that_name_the_samples(tmp_path: Path) -> None:
    """By their index in the cell, also where two batches or chunks must be seen together."""
    suite = small_suite("fashion-mixture", samples=96, batch=32, chunk=64).model_copy(update={"solution": None})
    methods = ["same-in-every-batch", "one-grey", "bytes"]
    wanted = request(suite, methods, metrics=("kid@fashion64",), plugins={"poisoned.py": POISONED})
    records, _ = run_serial(wanted, tmp_path)
    messages = {record.cell.method: record.failure.message for record in records if record.failure}
    assert messages["same-in-every-batch"] == "sample 32 is a copy of sample 0"
    assert messages["one-grey"] == "1 of 32 images are constant (samples 37)"
    assert messages["bytes"].startswith("32 of 32 samples are out of range: root mean square above 3")
    assert [record.status for record in records] == ["error"] * 3


def test_batches_are_looked_at_while_the_next_is_drawn_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's worker does, on this CPU."""
    threads, look = set(), worker._looked_at

    def watched(*args):  # type: ignore[no-untyped-def]
        threads.add(threading.current_thread().name)
        return look(*args)

    monkeypatch.setattr(worker, "_looked_at", watched)
    suite = small_suite("fashion-mixture", chunk=96)
    wanted = request(suite, ["ddim(eta=1)", "one-grey"], metrics=("fd@fashion64",), plugins={"poisoned.py": POISONED})
    found = {}
    for overlaps in (False, True):
        monkeypatch.setattr(worker, "overlaps", lambda device, answer=overlaps: answer)
        threads.clear()
        records, _ = run_serial(wanted, tmp_path / str(overlaps))
        assert threads == {"beside" if overlaps else threading.current_thread().name}
        store = Store(tmp_path / str(overlaps))
        arrays = {chunk: store.read_chunk(chunk) for r in records for chunk in store.present_chunks(r.cell.id)}
        content = {(chunk, name): rows.tobytes() for chunk, held in arrays.items() for name, rows in held.items()}
        found[overlaps] = (content, [r.failure and r.failure.message for r in records])
    assert found[True] == found[False]
    assert found[True][1] == [None, "1 of 32 images are constant (samples 37)"]


def test_errors_are_tried_again_and_unsupported_pairs_are_not(tmp_path: Path) -> None:
    wanted = request(small_suite(), ["raises", "needs-split"], plugins={"bad.py": MISBEHAVING})
    run_serial(wanted, tmp_path)
    _, computed = run_serial(wanted, tmp_path)
    assert {job.cell.method for job in computed.jobs} == {"raises"}


def test_chunk_size_and_order_do_not_change_a_sample(tmp_path: Path) -> None:
    class Backwards(SerialExecutor):
        def map(self, jobs):  # type: ignore[no-untyped-def]
            return super().map(reversed(list(jobs)))

    runs = {}
    for name, chunk, executor in (("a", 32, SerialExecutor), ("b", 96, SerialExecutor), ("c", 32, Backwards)):
        wanted = request(small_suite(chunk=chunk), ["ddim(eta=1)"])
        runner.run(wanted, tmp_path / name, executor)
        store = Store(tmp_path / name)
        cell = store.records()[0].cell
        plan = runner.make_plan(wanted)
        blocks = [store.read_chunk(chunk)["identity"] for chunk in plan.chunks(cell)]
        runs[name] = np.concatenate(blocks)
    np.testing.assert_array_equal(runs["a"], runs["b"])
    np.testing.assert_array_equal(runs["a"], runs["c"])


def test_another_batch_size_is_the_same_to_rounding(tmp_path: Path) -> None:
    values = [
        _values(run_serial(request(small_suite(batch=batch), ["unipc"]), tmp_path / str(batch))[0]) for batch in (32, 8)
    ]
    (one,), (other,) = (v.values() for v in values)
    for metric, value in one.items():
        assert other[metric] == pytest.approx(value, rel=1e-5)


def test_batch_is_part_of_the_protocol_and_samples_too(tmp_path: Path) -> None:
    protocols = {
        run_serial(request(small_suite(**change), ["ddim"]), tmp_path / str(i))[0][0].protocol
        for i, change in enumerate([{}, {"batch": 16}, {"samples": 64}])
    }
    assert len(protocols) == 3


def test_guidance_is_an_axis(tmp_path: Path) -> None:
    records, _ = run_serial(request(small_suite(), ["ddim"], guidance=(1.0, 3.0)), tmp_path)
    assert [r.counts["evals.base"] for r in records] == [5.0, 10.0]
    assert [r.counts["nfe"] for r in records] == [5.0, 5.0]


def test_a_method_that_guides_itself_is_paired_with_the_guided_solution(tmp_path: Path) -> None:
    suite = small_suite()
    own, _ = run_serial(request(suite, ["ddim+cfg(scale=3)"], [20]), tmp_path / "own")
    of_suite, _ = run_serial(request(suite, ["ddim"], [20], guidance=(3.0,)), tmp_path / "suite")
    values = [r[0].metrics["paired-median@identity"].value for r in (own, of_suite)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_the_converged_reference_holds_at_the_suites_guidance_alone(tmp_path: Path) -> None:
    suite = small_suite("fashion-mixture", samples=32)
    methods = ["ddim", "ddim+cfg(scale=2)"]
    wanted = request(suite, methods, [2], guidance=(1.0, 2.0), metrics=("fd_to_converged@fashion64",))
    records, _ = run_serial(wanted, tmp_path)
    found = {(r.cell.method, r.cell.guidance): bool(r.metrics) for r in records}
    assert [key for key, there in found.items() if there] == [("ddim", 1.0)]
    assert all("at this guidance" in r.missing["fd_to_converged@fashion64"] for r in records if not r.metrics)


def test_a_missing_metric_says_why(tmp_path: Path) -> None:
    (record,), _ = run_serial(
        request(small_suite(samples=12), ["ddim"], metrics=("fd@identity",), allow_small_n=False), tmp_path
    )
    assert record.metrics == {}
    assert "--allow-small-n" in record.missing["fd@identity"]


def test_latency_is_measured_once_per_cell(tmp_path: Path) -> None:
    wanted = timed_request(["ddim", "unipc"], [2, 4])
    records, _ = run_serial(wanted, tmp_path)
    assert len(records) == 4
    for record in records:
        assert [(one.batch, np.array(one.seconds).shape) for one in record.latency] == [(1, (2, 2, 2)), (8, (2, 2, 2))]
        assert all(seconds > 0 for one in record.latency for seconds in one.calls)
        assert {one.doubt for one in record.latency} == {""}
        assert (record.variant, record.latency[0].variant) == ("eager,float64", "eager,float64")
    assert len({one.session for record in records for one in record.latency}) == 1
    again, computed = run_serial(wanted, tmp_path)
    assert (again, computed.timed) == (records, [])


def test_a_method_that_is_added_is_timed_in_the_same_rounds_as_the_others(tmp_path: Path) -> None:
    run_serial(timed_request(["ddim"], [2]), tmp_path)
    records, computed = run_serial(timed_request(["ddim", "unipc"], [2]), tmp_path)
    assert [len(job.cells) for job in computed.timed] == [2]
    assert len({one.session for record in records for one in record.latency}) == 1


def test_variants_and_more_processes_are_timed_anew_and_seeds_are_not(tmp_path: Path) -> None:
    run_serial(timed_request(["ddim"], [2], seeds=(0, 1)), tmp_path)
    assert len(Store(tmp_path).records()) == 1, "another seed takes the same time"
    _, computed = run_serial(timed_request(["ddim"], [2], variant="float32"), tmp_path)
    assert [job.variant for job in computed.timed] == ["eager,float32"]
    assert {r.variant for r in Store(tmp_path).records()} == {"eager,float64", "eager,float32"}
    (float32,) = (r.latency[0] for r in Store(tmp_path).records() if r.variant == "eager,float32")
    assert float32.doubt == ""
    more = timed_request(["ddim"], [2], effort=replace(EFFORT, processes=3))
    _, computed = run_serial(more, tmp_path)
    assert len(computed.timed) == 1


def test_a_variant_that_the_device_cannot_run_is_not_supported(tmp_path: Path) -> None:
    wanted = timed_request(["ddim"], [2], variant="cuda-graphs,float64")
    for _ in range(2):
        (record,), computed = run_serial(wanted, tmp_path)
        assert record.status == "unsupported"
        assert "needs a CUDA device" in record.failure.message  # type: ignore[union-attr]
    assert computed.timed == [], "it is not tried again"


def test_cells_that_fail_are_rows_and_the_others_are_timed(tmp_path: Path) -> None:
    wanted = timed_request(["raises", "overspends", "ddim"], [3], plugins={"bad.py": MISBEHAVING})
    records, _ = run_serial(wanted, tmp_path)
    rows = {r.cell.method: r for r in records}
    assert {name: row.status for name, row in rows.items()} == {"raises": "error", "overspends": "error", "ddim": "ok"}
    assert rows["overspends"].failure.message == "budget 3, spent 4"  # type: ignore[union-attr]


def test_a_method_that_prepares_is_prepared_before_it_is_timed(tmp_path: Path) -> None:
    wanted = timed_request(["prepares"], [3], plugins={"p.py": PREPARES})
    (record,), _ = run_serial(wanted, tmp_path)
    assert record.status == "ok", record.failure
    assert {one.training_free for one in record.latency} == {False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nfe": (0,)}, "--nfe 0"),
        ({"nfe": ()}, "--nfe is empty"),
        ({"methods": ("ddimm",)}, "unknown method 'ddimm'"),
        ({"metrics": ("fdd@identity",)}, "unknown metric 'fdd'"),
        ({"metrics": ("fd@identities",)}, "unknown extractor 'identities'; did you mean 'identity'"),
        ({"seeds": (-1,)}, "a seed is 0 or more"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(changes: dict, message: str, tmp_path: Path) -> None:
    wanted = request(small_suite(), ["ddim"])
    import dataclasses

    with pytest.raises(UserError, match=message):
        runner.run(dataclasses.replace(wanted, **changes), tmp_path / "out", SerialExecutor)
    assert not (tmp_path / "out").exists()


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    suite = small_suite()
    with open_run(tmp_path / "r", suite, {}), pytest.raises(UserError, match="another evalbench is writing"):
        runner.run(request(suite, ["ddim"]), tmp_path / "r", SerialExecutor)


# --- budgets in other units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "unit", "budget", "guidance", "nfe"),
    [
        ("ddim", "nfe", 10, 1.0, 10),
        ("ddim", "evals", 10, 1.0, 10),
        ("ddim", "evals", 10, 2.0, 5),
        ("ddim+cfg(scale=2.0)", "evals", 10, 1.0, 5),
        ("ddim", "steps", 10, 2.0, 10),
        ("heun", "steps", 10, 1.0, 19),  # the least that makes ten steps: the last may be a plain one
    ],
)
def test_a_published_budget_becomes_evaluations(method: str, unit: str, budget: int, guidance: float, nfe: int) -> None:
    wanted = request(small_suite(), [method], nfe=[budget], guidance=(guidance,), budget_unit=unit)
    (cell,) = runner.make_plan(wanted).cells
    assert cell.nfe == nfe


def test_a_budget_that_says_nothing_is_one_clear_line() -> None:
    wanted = request(small_suite(), ["ddim"], nfe=[1], guidance=(2.0,), budget_unit="evals")
    with pytest.raises(UserError, match=r"--budget-unit evals, ddim: .*one evaluation takes 2"):
        runner.make_plan(wanted)


class Apart(SerialExecutor):
    """Says that jobs are computed elsewhere, so that cells are reduced beside them."""

    apart = True


def test_cells_reduced_beside_the_workers_give_the_same_records_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, reduce_cell = [], runner.reduce_cell

    def watched(*args, **options):  # type: ignore[no-untyped-def]
        threads.append(threading.current_thread())
        return reduce_cell(*args, **options)

    wanted = request(small_suite(), ["ddim", "unipc", "raises"], [3, 6], plugins={"bad.py": MISBEHAVING})
    run_serial(wanted, tmp_path / "serial")
    monkeypatch.setattr(runner, "reduce_cell", watched)
    runner.run(wanted, tmp_path / "apart", Apart)
    assert len(threads) == 4
    assert threading.main_thread() not in threads
    ours, theirs = (
        [record.model_copy(update={"seconds": 0.0}) for record in Store(tmp_path / name).records_after(0)]
        for name in ("apart", "serial")
    )
    assert ours == theirs


def test_what_goes_wrong_beside_the_workers_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a metric's own fault")

    monkeypatch.setattr(runner, "reduce_cell", broken)
    with pytest.raises(ZeroDivisionError, match="a metric's own fault"):
        runner.run(request(small_suite(), ["ddim", "unipc"]), tmp_path, Apart)


@pytest.mark.parametrize("executor", [SerialExecutor, Apart])
def test_a_chunk_damaged_in_the_run_is_computed_again_once(tmp_path: Path, executor: type[SerialExecutor]) -> None:
    """It belongs to the fine solution: every cell that meets it waits for the new one."""
    notes, jobs = [], []

    class Told(runner.Silent):
        def note(self, line: str) -> None:
            notes.append(line)

    class Spoils(executor):  # type: ignore[valid-type,misc]
        def map(self, todo):  # type: ignore[no-untyped-def]
            for outcome in super().map(todo):
                jobs.append(outcome.job)
                yield outcome
                file = Store(tmp_path / "spoilt").chunk_file(outcome.job.chunk)
                if outcome.job.cell.nfe == 64 and not (tmp_path / "once").exists():
                    (tmp_path / "once").touch()
                    file.write_bytes(file.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX", 1))

    wanted = request(small_suite(), ["ddim", "unipc"], [3, 6])
    records = runner.run(wanted, tmp_path / "spoilt", Spoils, Told())
    straight, _ = run_serial(wanted, tmp_path / "straight")
    assert _values(records) == _values(straight)
    assert len(notes) == 1
    assert "is damaged" in notes[0]
    assert len(jobs) == 3 * (4 + 1) + 1
