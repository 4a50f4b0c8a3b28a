"""Adaptive DPM-Solver-12 and -23: against a loop for one sample, counts, tolerances, budgets, rows of their own."""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver
from support import small_suite

from evalbench import preparation, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field
from evalbench.errors import BudgetExceeded, Unsupported, UserError
from evalbench.noise import NoiseSource
from evalbench.paths import Path, make_path
from evalbench.runner import make_cell

VP = make_path("vp-linear")


def given(order: int, rtol: float, atol: float = 0.0078) -> str:
    return f"dpm-solver(algorithm=adaptive,order={order},rtol={rtol},atol={atol})"


def run(text: str, path: Path = VP, batch: int = 8, budget: int | None = None, dtype=torch.float64):
    """Samples and the field they were made with."""
    field = exact(path, batch, budget)
    field.inner.model.to(dtype, torch.device("cpu"))
    noise = NoiseSource(0, range(batch), field.shape, dtype=dtype)
    x_T = noise.start() * float(path.sigma(path.t_start))
    return solver(text).sample(field, x_T, COND, budget or 10_000, noise), field


# --- the same numbers as a loop for one sample ------------------------------------------------------------------------


def one_sample(path: Path, x: np.ndarray, order: int, rtol: float, atol: float) -> tuple[np.ndarray, int, int]:
    """(x, evaluations, rejections) of the published algorithm for one sample, a coordinate list and floats."""
    field = exact(path, 1)
    field.inner.model.to(torch.float64, torch.device("cpu"))

    def eps(y, lam):
        t = float(path.t_of_lambda(lam))
        return field(torch.from_numpy(y)[None], t, COND, "eps")[0].numpy()

    def a(lam):
        return float(path.alpha(path.t_of_lambda(lam)))

    def sig(lam):
        return float(path.sigma(path.t_of_lambda(lam)))

    lam, end, h = float(path.lam(path.t_start)), float(path.lam(path.t_end)), 0.05
    x_prev, rejections, at_start = x, 0, None
    while end - lam > 1e-12:
        h = min(h, end - lam)
        to = lam + h
        if at_start is None:
            at_start = eps(x, lam)
        if order == 2:
            u = a(lam + h / 2) / a(lam) * x - sig(lam + h / 2) * math.expm1(h / 2) * at_start
            low = a(to) / a(lam) * x - sig(to) * math.expm1(h) * at_start
            high = low - sig(to) * math.expm1(h) * (eps(u, lam + h / 2) - at_start)
        else:
            m1, m2 = lam + h / 3, lam + 2 * h / 3
            d1 = eps(a(m1) / a(lam) * x - sig(m1) * math.expm1(h / 3) * at_start, m1) - at_start
            first = a(to) / a(lam) * x - sig(to) * math.expm1(h) * at_start
            low = first - 1.5 * sig(to) * math.expm1(h) * d1
            u = a(m2) / a(lam) * x - sig(m2) * math.expm1(2 * h / 3) * at_start
            u = u - 2 * sig(m2) * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
            high = first - 1.5 * sig(to) * (math.expm1(h) / h - 1) * (eps(u, m2) - at_start)
        tolerance = [max(atol, rtol * max(abs(p), abs(q))) for p, q in zip(low, x_prev, strict=True)]
        E = math.sqrt(sum(((p - q) / e) ** 2 for p, q, e in zip(high, low, tolerance, strict=True)) / len(x))
        if E <= 1:
            x, x_prev, lam, at_start = high, low, to, None
        else:
            rejections += 1
        h = min(0.9 * h * E ** (-1 / order), end - lam)
    return x, int(field.ledger.nfe[0]), rejections


@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("rtol", [0.05, 0.3])
def test_each_sample_is_that_of_the_algorithm_run_on_it_alone(kind, order, rtol):
    path = make_path(kind)
    x, field = run(given(order, rtol), path, batch=5)
    x_T = NoiseSource(0, range(5), field.shape, dtype=torch.float64).start() * float(path.sigma(path.t_start))
    rejected = 0
    for i in range(5):
        alone, nfe, rejections = one_sample(path, x_T[i].numpy(), order, rtol, 0.0078)
        np.testing.assert_allclose(x[i].numpy(), alone, rtol=1e-8, atol=1e-8)
        assert field.ledger.nfe[i] == nfe
        rejected += rejections
    assert rejected > 0, "repeated steps are counted too"
    assert len(set(field.ledger.nfe)) > 1, "samples have steps of their own"


@pytest.mark.parametrize("order", [2, 3])
def test_every_row_is_entered_for_its_sample(order, monkeypatch):
    """The ledger against a count of the calls themselves."""
    seen = np.zeros(8)
    call = Field.__call__

    def spy(self, x, t, cond, want="x0", *, step=None, rows=None):
        assert len(x) == len(rows) == len(t)
        np.add.at(seen, rows, 1)
        return call(self, x, t, cond, want, step=step, rows=rows)

    monkeypatch.setattr(Field, "__call__", spy)
    _, field = run(given(order, 0.05))
    np.testing.assert_array_equal(field.ledger.nfe, seen)
    np.testing.assert_array_equal(field.ledger.evals["base"], seen)


# --- tolerances -------------------------------------------------------------------------------------------------------


@lru_cache
def _fine() -> torch.Tensor:
    return draw("dpm-solver++(order=3,algorithm=singlestep,solver_type=heun)", VP, 600, 64)[0]


@pytest.mark.parametrize("order", [2, 3])
def test_errors_follow_the_tolerance(order):
    spent, errors = [], []
    tolerances = (0.2, 0.05, 0.0125, 0.003)
    for rtol in tolerances:
        x, field = run(given(order, rtol, 0.0078 * rtol / 0.05), batch=64)
        spent.append(float(field.ledger.nfe.mean()))
        errors.append(float((x - _fine()).square().mean(1).sqrt().median()))
    assert spent == sorted(spent)
    assert errors == sorted(errors, reverse=True)
    assert all(tolerance / 500 < error < tolerance for error, tolerance in zip(errors, tolerances, strict=True))


@pytest.mark.parametrize(("order", "rtol"), [(2, 1e-4), (3, 1e-6)])
def test_evaluations_grow_like_the_root_of_the_tolerance(order, rtol):
    """E of a step falls like h^order, once steps are small."""
    spent = [float(run(given(order, r, r), batch=2)[1].ledger.nfe.mean()) for r in (rtol, rtol / 10)]
    assert math.log10(spent[1] / spent[0]) == pytest.approx(1.0 / order, rel=0.2)


def test_the_absolute_tolerance_counts_where_x_is_small():
    loose, strict = (float(run(given(3, 0.001, atol))[1].ledger.nfe.mean()) for atol in (0.5, 0.001))
    assert loose < 0.7 * strict


def test_a_path_to_zero_spends_one_more():
    (x, field), (_, plain) = (
        run(given(3, 0.005, 0.0008), make_path("edm", final=final)) for final in ("zero", "t_end")
    )
    np.testing.assert_array_equal(field.ledger.nfe, plain.ledger.nfe + 1)
    truth, _ = draw("heun(grid=karras)", make_path("edm", final="zero"), 401, 8)
    assert float((x - truth).norm(dim=1).median()) < 0.005


@pytest.mark.parametrize("final", ["zero", "t_end"])
def test_what_the_fit_counts_is_what_the_ledger_counts(final):
    adaptive = sys.modules[registry.get("method", "dpm-solver").__module__.replace("dpm_solver", "_adaptive")]
    field = exact(make_path("edm", final=final), 4)
    x_T = 80.0 * NoiseSource(0, range(4), field.shape, dtype=torch.float64).start()
    _, spent = adaptive.solve(field, x_T, COND, 3, adaptive.Tolerances(0.01, 0.05))
    np.testing.assert_array_equal(spent, field.ledger.nfe)


def test_a_network_that_returns_nan_ends():
    field = exact(VP, 4)
    field.inner.model.means = torch.full_like(field.inner.model.means, math.nan)
    noise = NoiseSource(0, range(4), field.shape, dtype=torch.float64)
    x = solver(given(3, 0.05)).sample(field, noise.start(), COND, 100, noise)
    assert torch.isnan(x).all()
    assert (field.ledger.nfe <= 6).all()


def test_single_precision_reaches_a_tolerance_below_its_rounding():
    x, _ = run(given(2, 1e-9, 1e-9), make_path("vp-linear", t_end=0.99), batch=2, dtype=torch.float32)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()


# --- in the harness ---------------------------------------------------------------------------------------------------

FITTED = "dpm-solver(algorithm=adaptive)"


@lru_cache
def _setup() -> sampling.Setup:
    return sampling.build(small_suite("gmm-smooth"))


@lru_cache
def _prepared(text: str, nfe: int, guidance: float = 1.0) -> preparation.Prepared:
    setup = _setup()
    return preparation.prepare(setup, registry.build_method(text), make_cell(setup.suite, text, nfe, guidance, 0))


def _sample(text: str, nfe: int, indices, guidance: float = 1.0) -> tuple[torch.Tensor, Ledger]:
    setup, chain = _setup(), registry.build_method(text)
    if chain.prepares:
        chain = chain.equipped(_prepared(text, nfe, guidance).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    ledger = Ledger(len(indices), budget=nfe)
    return sampling.sample(setup, chain, make_cell(setup.suite, text, nfe, guidance, 3), indices, cond, ledger), ledger


@pytest.mark.parametrize("order", [2, 3])
def test_a_sample_does_not_depend_on_its_neighbours(order):
    indices, shuffled = list(range(12)), [7, 3, 11, 0, 5, 9, 1, 8, 2, 10, 4, 6]
    straight, counts = _sample(given(order, 0.05), 200, indices)
    moved, moved_counts = _sample(given(order, 0.05), 200, shuffled)
    assert torch.equal(straight[shuffled], moved)
    np.testing.assert_array_equal(counts.nfe[shuffled], moved_counts.nfe)
    for i in (2, 7):
        alone, count = _sample(given(order, 0.05), 200, [i])
        torch.testing.assert_close(straight[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        assert count.nfe[0] == counts.nfe[i]


def test_guidance_doubles_the_rows():
    _, ledger = _sample(given(3, 0.05), 400, list(range(6)), guidance=3.0)
    np.testing.assert_array_equal(ledger.evals["base"], 2 * ledger.nfe)


@pytest.mark.parametrize("nfe", [20, 40])
def test_fitted_tolerances_use_the_budget_and_keep_it(nfe):
    _, ledger = _sample(FITTED, nfe, list(range(200)))
    assert 0.8 * nfe < ledger.nfe.mean() <= nfe
    facts = _prepared(FITTED, nfe).artifacts[0].facts
    assert facts["mean nfe"] == pytest.approx(ledger.nfe.mean(), rel=0.1)
    assert facts["atol"] / facts["rtol"] == pytest.approx(0.0078 / 0.05)
    assert _prepared(FITTED, nfe).bill["nfe"] > 128 * nfe


def test_a_larger_budget_has_a_tighter_tolerance():
    wide, tight = (_prepared(FITTED, nfe).artifacts[0].facts["rtol"] for nfe in (20, 40))
    assert tight < wide / 4


def test_search_seeds_differ_and_repeat():
    def fitted(seed):
        text = f"dpm-solver(algorithm=adaptive,seed={seed})"
        cell = make_cell(_setup().suite, text, 30, 1.0, 0)
        return preparation.prepare(_setup(), registry.build_method(text), cell).artifacts[0].facts["rtol"]

    first = fitted(0)
    assert fitted(0) == first
    assert fitted(1) == pytest.approx(first, rel=0.5)
    assert fitted(1) != first


@pytest.mark.parametrize("order", [2, 3])
def test_a_budget_without_error_control_is_refused(order):
    with pytest.raises(Unsupported, match=r"a budget of 8 is too small for error control; rtol=1 takes \d+"):
        _prepared(f"dpm-solver(algorithm=adaptive,order={order})", 8)


def test_a_given_tolerance_is_kept_and_stops_over_its_budget():
    with pytest.raises(BudgetExceeded, match=r"budget 20, spent 20.* at rtol=0.05, atol=0.0078: type a larger rtol"):
        _sample(given(3, 0.05), 20, list(range(32)))


def test_only_fitted_tolerances_are_prepared():
    assert registry.build_method(FITTED).prepares == "per-nfe"
    assert registry.build_method(given(3, 0.05)).prepares == ""
    assert registry.build_method("dpm-solver").prepares == ""
    assert registry.build_method(given(3, 0.05)).text == "dpm-solver(algorithm=adaptive,rtol=0.05)"


def test_without_a_fit_it_cannot_run():
    with pytest.raises(Unsupported, match="nothing prepared"):
        run(FITTED)


def test_it_has_no_plan():
    with pytest.raises(Unsupported, match="it has no plan"):
        solver(FITTED).plan_for(VP, "logsnr", 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("algorithm=adaptive,order=1", "order=2 or order=3, and no grid"),
        ("algorithm=adaptive,grid=time", "order=2 or order=3, and no grid"),
        ("algorithm=adaptive,rtol=-1", "rtol and seed are at least 0, atol above 0; got rtol=-1.0"),
        ("algorithm=adaptive,atol=0", "atol above 0"),
        ("rtol=0.05", "belong to adaptive steps; type algorithm=adaptive"),
        ("seed=1", "belong to adaptive steps"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        solver(f"dpm-solver({settings})")
