"""Preparation: billed apart, from noise and data of its own, kept and found again; modifiers and the other doors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from support import CountingExecutor, request, run_serial, small_suite

from evalbench import preparation, registry, runner, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported
from evalbench.interfaces import Cond, Model
from evalbench.runner import make_cell
from evalbench.store import Store
from evalbench.worker import PrepareJob

PLUGIN = '''
from dataclasses import dataclass

import numpy as np

from evalbench.interfaces import Artifact, DenoiserWrap, Modifier, Solver, Wrap
from evalbench.registry import register


@register("learns")
@dataclass(frozen=True)
class Learns(Solver):
    """Returns what it prepared."""

    prepares = "once"
    fails: bool = False

    def prepare(self, context):
        if self.fails:
            raise RuntimeError("nothing learnt")
        x = context.x_T(context.noise(range(10)))
        out = context.denoiser(10)(x, 0.5, context.cond(range(10)))
        return Artifact({"mean": out.mean(0).cpu().numpy()}, {"rows": 10})

    def sample(self, denoiser, x_T, cond, nfe, noise):
        made = self.prepared()
        denoiser(x_T, 0.5, cond)
        return x_T * 0 + x_T.new_tensor(made.arrays["mean"]) * made.facts["rows"]


@register("learns-per-nfe")
@dataclass(frozen=True)
class LearnsPerNfe(Learns):
    """Returns its budget."""

    prepares = "per-nfe"

    def prepare(self, context):
        return Artifact({"mean": np.zeros(context.shape)}, {"rows": 0, "nfe": context.nfe})


@register("rounds")
@dataclass(frozen=True)
class Rounds(Wrap):
    """Says that it quantises, and changes nothing."""

    prepares = "once"
    bits: int = 8

    def prepare(self, context):
        return Artifact(facts={"footprint": {"weight_bits": self.bits, "bops": 8.0 * self.bits}})

    def wrap(self, denoiser):
        return denoiser


@register("notes")
@dataclass(frozen=True)
class Notes(Wrap):
    """Remembers which field it saw in preparation."""

    prepares = "once"
    factor: float = 1.0

    def prepare(self, context):
        x = context.x_T(context.noise([3]))
        return Artifact({"seen": context.denoiser(1)(x, 0.5, context.cond([3])).cpu().numpy()})

    def wrap(self, denoiser):
        return _Scaled(denoiser, self.factor)


class _Scaled(DenoiserWrap):
    def __init__(self, inner, factor):
        super().__init__(inner)
        self.factor = factor

    def __call__(self, x, t, cond, want="x0", *, step=None, rows=None):
        return self.factor * self.inner(x, t, cond, want, step=step, rows=rows)


@register("times")
@dataclass(frozen=True)
class Times(Modifier):
    """Multiplies samples."""

    by: float = 2.0

    def modify(self, solver):
        return _Times(solver, self.by)


class _Times(Solver):
    def __init__(self, solver, by):
        self.solver, self.by = solver, by

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return self.by * self.solver.sample(denoiser, x_T, cond, nfe, noise)
'''
PLUGINS = {"learns.py": PLUGIN}


@pytest.fixture(autouse=True)
def _plugin() -> None:
    registry.load_plugin(PLUGIN, "learns.py")


def _run(
    out: Path, methods: list[str], nfe: tuple[int, ...] = (2,), **changes: object
) -> tuple[dict, CountingExecutor]:
    wanted = request(small_suite(), methods, nfe=nfe, plugins=PLUGINS, **changes)
    records, executor = run_serial(wanted, out)
    return {(r.cell.method, r.cell.nfe): r for r in records}, executor


def _prepared(executor: CountingExecutor) -> list[PrepareJob]:
    return [job for job in executor.jobs if isinstance(job, PrepareJob)]


def test_a_preparation_runs_once_is_billed_apart_and_reaches_every_chunk(tmp_path: Path) -> None:
    records, executor = _run(tmp_path, ["learns"], nfe=(1, 2))
    assert len(_prepared(executor)) == 1, "both budgets share it"
    for record in records.values():
        assert record.status == "ok"
        assert record.counts["nfe"] == 1, "what was prepared is not the samples' cost"
        assert record.bill["nfe"] == record.bill["evals.base"] == 10
        assert record.bill["seconds"] > 0
    again, executor = _run(tmp_path, ["learns"], nfe=(1, 2, 3))
    assert not _prepared(executor)
    assert again["learns", 3].bill == records["learns", 1].bill


def test_a_record_has_the_footprint_that_its_quantisation_prepared(tmp_path: Path) -> None:
    twice = "ddim+rounds+rounds(bits=4)"
    records, _ = _run(tmp_path, ["ddim", "learns", "learns+rounds(bits=6)", twice])
    found = {method: record.footprint for (method, _), record in records.items()}
    assert found["learns+rounds(bits=6)"] == {"weight_bits": 6.0, "bops": 48.0}
    assert found["ddim"] == found["learns"] == {}
    assert found[twice] == {}, "neither saw what the other left"


def test_per_nfe_prepares_for_each_budget(tmp_path: Path) -> None:
    _, executor = _run(tmp_path, ["learns-per-nfe"], nfe=(1, 2, 3))
    keys = {job.cell.nfe: job.key for job in _prepared(executor)}
    assert set(keys) == {1, 2, 3}
    store = Store(tmp_path)
    for nfe, key in keys.items():
        found = store.read_artifacts(key)
        assert found is not None
        assert found[1]["parts"][0]["nfe"] == nfe


def test_a_failed_preparation_is_the_error_of_all_its_cells_and_of_no_other(tmp_path: Path) -> None:
    records, _ = _run(tmp_path, ["learns(fails=true)", "ddim"], nfe=(1, 2))
    for (method, _), record in records.items():
        assert record.status == ("ok" if method == "ddim" else "error")
    failure = records["learns(fails=true)", 1].failure
    assert failure is not None
    assert failure.message == "nothing learnt"
    assert "RuntimeError" in failure.traceback


def test_a_damaged_artefact_is_made_again(tmp_path: Path) -> None:
    _, executor = _run(tmp_path, ["learns"])
    (job,) = _prepared(executor)
    file = Store(tmp_path).artifact_file(job.key)
    file.write_bytes(file.read_bytes()[:-30])
    _, executor = _run(tmp_path, ["learns"], nfe=(3,))
    assert len(_prepared(executor)) == 1


def test_serial_and_ray_prepare_the_same_bytes(tmp_path: Path) -> None:
    from evalbench.cluster import RayExecutor

    wanted = request(small_suite(), ["learns"], plugins=PLUGINS)
    runner.run(wanted, tmp_path / "serial", runner.SerialExecutor)
    ray = RayExecutor(workers=1)
    try:
        runner.run(wanted, tmp_path / "ray", lambda: ray)
    finally:
        ray.shutdown()
    found = []
    for name in ("serial", "ray"):
        (file,) = (tmp_path / name / "artifacts").glob("*.npz")
        with np.load(file) as content:
            found.append((file.name, content["0.mean"].tobytes(), json.loads(str(content["facts"]))["bill"]["nfe"]))
    assert found[0] == found[1]


def _context(method: str, part: int, nfe: int = 4, guidance: float = 1.0) -> preparation.Context:
    setup, chain = sampling.build(small_suite()), registry.build_method(method)
    return preparation.Context(setup, chain, make_cell(setup.suite, method, nfe, guidance, 0), part, [])


def test_search_noise_and_search_data_are_of_no_run() -> None:
    context = _context("ddim", 0)
    for seed in range(3):
        searched = context.noise(range(4), seed).start()
        for run_seed in range(5):
            assert not torch.isclose(
                searched, sampling.NoiseSource(run_seed, range(4), (8,), torch.float64).start()
            ).any()
    assert not torch.isclose(context.noise([0], 0).start(), context.noise([0], 1).start()).any()
    x, cond = context.data(6)
    assert cond.labels is not None
    assert x.shape == (6, 8)
    assert not torch.isclose(x, context.data(6, seed=1)[0]).any()


def test_data_are_draws_of_the_model_and_the_oracle_sees_it() -> None:
    context = _context("ddim", 0)
    x, _ = context.data(20_000)
    exact = sampling.build(small_suite()).model.reference("identity")
    assert np.abs(x.mean(0).numpy() - exact["mean"]).max() < 0.05
    assert np.abs(np.cov(x.numpy().T) - exact["cov"]).max() < 0.1
    assert context.distance(x) < 0.01, "the floor of 20,000 draws in 8 dimensions"
    assert context.distance(x + 0.5) == pytest.approx(8 * 0.25, rel=0.1), "|mean difference|^2"


def test_images_are_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of a search is 20,000 samples: no decoder takes them at once."""
    made, sizes = twins.setup("dit"), []

    def decoded(model: Model, x: torch.Tensor) -> torch.Tensor | None:
        sizes.append(len(x))
        return sampling.images_of(model, x)

    monkeypatch.setattr(preparation, "images_of", decoded)
    context = preparation.Context(made, registry.build_method("ddim"), make_cell(made.suite, "ddim", 4, 1.0, 0), 0, [])
    x = torch.linspace(-1.0, 1.0, 1200, dtype=made.dtype)[:, None, None, None].expand(-1, *made.model.shape)
    features = context._features(x)
    assert sizes == [500, 500, 200]
    np.testing.assert_allclose(features[[0, 600, 1199]], context._features(x[[0, 600, 1199]]), rtol=1e-4, atol=1e-4)
    assert not np.allclose(features[0], features[1199])


def test_a_class_gets_its_own_draws() -> None:
    model = sampling.build(small_suite()).model
    labels = torch.tensor([2] * 200)
    x = model.data(range(200), labels, 5)
    own = model.responsibilities(x, labels=labels)  # type: ignore[operator]
    anywhere = model.responsibilities(x)  # type: ignore[operator]
    assert (own * anywhere).sum(1).mean() > 0.9, "of a component of class 2"


def test_a_part_prepares_with_what_stands_before_it() -> None:
    setup = sampling.build(small_suite())
    seen = {}
    for text in ("ddim+notes", "ddim+notes(factor=3.0)+notes", "ddim+notes(factor=3.0)"):
        chain = registry.build_method(text)
        prepared = preparation.prepare(setup, chain, make_cell(setup.suite, text, 2, 1.0, 0))
        seen[text] = [a.arrays["seen"] for a in prepared.artifacts if a is not None]
    plain = seen["ddim+notes"][0]
    np.testing.assert_array_equal(seen["ddim+notes(factor=3.0)"][0], plain)  # its own factor is not yet around it
    np.testing.assert_array_equal(seen["ddim+notes(factor=3.0)+notes"][1], 3.0 * plain)
    guided = preparation.prepare(setup, registry.build_method("ddim+notes"), make_cell(setup.suite, "ddim", 2, 3.0, 0))
    assert not np.allclose(guided.artifacts[1].arrays["seen"], plain)  # type: ignore[union-attr]
    assert guided.bill["evals.base"] == 2


def test_modifiers_stand_around_the_solver_in_the_order_written() -> None:
    setup = sampling.build(small_suite())
    cond = sampling.conditions(setup.suite, setup.model, range(4), setup.device)

    def draw(text: str) -> torch.Tensor:
        cell = make_cell(setup.suite, text, 3, 1.0, 0)
        return sampling.sample(setup, registry.build_method(text), cell, range(4), cond, Ledger(4, 3))

    assert torch.equal(draw("ddim+times(by=3)+times(by=0.5)"), 0.5 * (3 * draw("ddim")))
    chain = registry.build_method("ddim+times+cfg(scale=2)")
    assert chain.text == "ddim+times+cfg(scale=2.0)"
    assert len(chain.wraps) == len(chain.modifiers) == 1


def test_a_method_without_its_artefact_says_so() -> None:
    setup = sampling.build(small_suite())
    cell = make_cell(setup.suite, "learns", 2, 1.0, 0)
    with pytest.raises(Unsupported, match="'learns' has nothing prepared"):
        sampling.sample(setup, registry.build_method("learns"), cell, range(2), Cond(), Ledger(2, 2))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("want", ["eps", "x0", "v"])
def test_jvp_is_the_derivative_of_the_field_in_state_and_time(want: str, guidance: float) -> None:
    context = _context("ddim", 0, guidance=guidance)
    field, cond, t = context.denoiser(5), context.cond(range(5)), 0.4
    x = context.x_T(context.noise(range(5)))
    dx = context.noise(range(5)).normal("direction")
    out, tangent = field.jvp(x, t, cond, want, dx, 0.3)
    h = 1e-5
    ahead, behind = (field(x + s * h * dx, t + s * h * 0.3, cond, want) for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, field(x, t, cond, want))
    _, spatial = field.jvp(x, t, cond, want, dx)
    ahead, behind = (field(x + s * h * dx, t, cond, want) for s in (1, -1))
    torch.testing.assert_close(spatial, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


def test_jvp_is_counted() -> None:
    context = _context("ddim", 0)
    field = context.denoiser(5)
    x = context.x_T(context.noise(range(5)))
    field.jvp(x, 0.5, context.cond(range(5)), "eps", torch.ones_like(x), 1.0)
    ledger = field.ledger  # type: ignore[attr-defined]
    for counts in (ledger.nfe, ledger.evals["base"], ledger.backward):
        assert (counts == 1).all()
