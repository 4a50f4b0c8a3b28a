"""Starts below t_start: Analytic-Init and warm start, their formulas, budgets, and where they help."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
import torch
from exact_model import COND, exact
from support import small_suite

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Cond, Denoiser, Modifier, Operator, Solver
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.noise import NoiseSource
from evalbench.paths import Path, make_path
from evalbench.preparation import prepare
from evalbench.runner import make_cell
from evalbench.spec import load_suite

BATCH = 5
KINDS = ("vp-linear", "edm", "flow")


def modifier(text: str, artifact: Artifact | None = None) -> Modifier:
    (found,) = registry.build_method(f"ddim+{text}").modifiers
    return found.equipped(artifact)


@dataclass
class Recorder(Solver):
    """Remembers what it was called with and returns a number per call."""

    calls: list[tuple[Path, torch.Tensor, int, torch.Tensor]] = field(default_factory=list)

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        self.calls.append((denoiser.path, x_T, nfe, noise.normal("test")))
        return torch.full_like(x_T, 10.0 * len(self.calls)) + noise.start()


def source() -> NoiseSource:
    return NoiseSource(3, range(BATCH), (8,), dtype=torch.float64)


def recorded(text: str, kind: str, nfe: int, artifact: Artifact | None = None) -> tuple[Recorder, Path, torch.Tensor]:
    path, solver = make_path(kind), Recorder()
    x_T = source().start() * float(path.sigma(path.t_start))
    x = modifier(text, artifact).modify(solver).sample(exact(path, BATCH), x_T, COND, nfe, source())
    return solver, path, x


# --- analytic-init ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_analytic_init_starts_from_the_gaussian_of_the_formula(kind):
    mean = np.linspace(-1.0, 2.0, 8)
    solver, path, x = recorded("analytic-init(start=0.7)", kind, 9, Artifact({"mean": mean}, {"variance": 0.6}))
    ((inner, x_M, nfe, draws),) = solver.calls
    M = 0.7 * path.t_start
    alpha, sigma = float(path.alpha(M)), float(path.sigma(M))
    unit = source().start().numpy()
    np.testing.assert_allclose(x_M, alpha * mean + np.sqrt(sigma**2 + alpha**2 * 0.6) * unit, rtol=1e-12)
    assert (inner.t_start, inner.t_end, nfe) == (M, path.t_end, 9)
    assert torch.equal(draws, source().normal("test"))
    assert torch.equal(x, torch.full_like(x, 10.0) + source().start())


def test_without_statistics_it_is_the_unit_normal_on_vp():
    solver, _, _ = recorded("analytic-init(start=0.4,statistics=false)", "vp-linear", 9)
    torch.testing.assert_close(solver.calls[0][1], source().start())


def test_it_needs_its_statistics():
    with pytest.raises(Unsupported, match="nothing prepared"):
        recorded("analytic-init", "vp-linear", 9)


@lru_cache
def setup_of(suite: str) -> sampling.Setup:
    return sampling.build(load_suite(suite))


def sampled(setup: sampling.Setup, text: str, nfe: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Samples of a method with what it prepares."""
    chain, cell = registry.build_method(text), make_cell(setup.suite, text, nfe, 1.0, seed)
    chain = chain.equipped(prepare(setup, chain, cell).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, range(rows), setup.device)
    return sampling.sample(setup, chain, cell, range(rows), cond, Ledger(rows, nfe))


def test_statistics_are_those_of_the_data():
    setup = setup_of("gmm-offcentre")
    text = "ddim+analytic-init(samples=2000,seed=5)"
    chain = registry.build_method(text)
    artifact = prepare(setup, chain, make_cell(setup.suite, text, 5, 1.0, 0)).artifacts[1]
    reference = setup.model.reference("identity")
    se = np.sqrt(np.diag(reference["cov"]) / 2000)
    assert (np.abs(artifact.arrays["mean"] - reference["mean"]) < 4.5 * se).all()
    assert artifact.facts["variance"] == pytest.approx(np.trace(reference["cov"]) / 8, rel=0.05)
    other = registry.build_method("ddim+analytic-init(samples=2000)")
    assert not np.array_equal(
        artifact.arrays["mean"],
        prepare(setup, other, make_cell(setup.suite, other.text, 5, 1.0, 0)).artifacts[1].arrays["mean"],
    )


@pytest.mark.parametrize("start", [0.3, 0.6, 1.0])
def test_gaussian_data_are_met_exactly_from_any_start(start):
    """Data N(m, s^2 I): the start is the marginal itself, so fine sampling gives the mean and deviation of the data.

    400 x 8 numbers: standard errors 0.009 of the mean, 0.006 of the deviation.
    """
    suite = load_suite("gmm-smooth")
    options = {"components": 1, "classes": 0, "std": 0.5, "spread": 0.0, "offset": 1.5, "dim": 8}
    suite = suite.model_copy(
        update={
            "model": suite.model.model_copy(update={"options": options}),
            "conditions": suite.conditions.model_copy(update={"labels": "none", "classes": 0}),
        }
    )
    setup = sampling.build(suite)
    x = sampled(setup, f"dpm-solver+++analytic-init(start={start})", 100, 400)
    assert float(x.mean()) == pytest.approx(1.5, abs=0.035)
    assert float(x.std()) == pytest.approx(0.5, abs=0.025)
    if start < 1:
        plain = sampled(setup, f"dpm-solver+++analytic-init(start={start},statistics=false)", 100, 400)
        assert abs(float(plain.mean()) - 1.5) > 0.05


def frechet(setup: sampling.Setup, x: torch.Tensor) -> float:
    reference = setup.model.reference("identity")
    return frechet_distance(moments(x.numpy()).gaussian(), Gaussian(reference["mean"], reference["cov"]))


def test_statistics_help_where_the_data_are_off_centre_and_the_path_ends_early():
    """methods-b entry 21 and A11: the same M, with and without the two statistics; N = 2048, 5 seeds."""
    gains = {}
    for suite in ("gmm-offcentre", "gmm-smooth"):
        setup = setup_of(suite)
        text = "dpm-solver+++analytic-init(start=0.8"
        pairs = [
            (
                frechet(setup, sampled(setup, f"{text})", 20, 2048, seed)),
                frechet(setup, sampled(setup, f"{text},statistics=false)", 20, 2048, seed)),
            )
            for seed in range(5)
        ]
        print(suite, [f"{a:.4f} {b:.4f}" for a, b in pairs])
        gains[suite] = [b - a for a, b in pairs]
    assert min(gains["gmm-offcentre"]) > 1.0
    assert max(map(abs, gains["gmm-smooth"])) < 0.02  # means about 0, alpha-bar(0.8) = 0.002: nothing to gain


def test_the_off_centre_suite_ends_where_it_says():
    path = setup_of("gmm-offcentre").path
    assert float(path.alpha(path.t_start)) ** 2 == pytest.approx(0.026, abs=5e-4)
    assert float(make_path("vp-linear").alpha(1.0)) ** 2 == pytest.approx(4e-5, rel=0.1)


# --- warm-start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_noises_its_draft(kind):
    solver, path, x = recorded("warm-start(start=0.4,draft=3)", kind, 10)
    (whole, x_T, draft, first), (rest, x_s, left, second) = solver.calls
    assert (whole, draft) == (path, 3)
    torch.testing.assert_close(x_T, source().start() * float(path.sigma(path.t_start)))
    s = 0.4 * path.t_start
    assert (rest.t_start, left) == (s, 7)
    z = 10.0 + source().candidate(1).start()  # what the first call returned
    eps = source().normal("warm-start")
    torch.testing.assert_close(x_s, float(path.alpha(s)) * z + float(path.sigma(s)) * eps)
    assert not torch.equal(first, second)
    assert not torch.equal(eps, source().start())
    torch.testing.assert_close(x, 20.0 + source().start())


@pytest.mark.parametrize(("nfe", "spent"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (4, [3, 1]), (5, [3, 2])])
def test_small_budgets_shorten_the_draft(nfe, spent):
    solver, _, _ = recorded("warm-start(draft=3)", "vp-linear", nfe)
    assert [call[2] for call in solver.calls] == spent


class Half(Operator):
    """Every other element; its pseudo-inverse fills with zeros."""

    noise = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]

    def pinv(self, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y, torch.zeros_like(y)], 2).flatten(1)


def test_warm_start_from_the_pseudo_inverse_spends_all_on_the_rest(monkeypatch):
    path, solver = make_path("vp-linear"), Recorder()
    field = exact(path, BATCH)
    method = modifier("warm-start(start=0.5,estimate=pinv)").modify(solver)
    with pytest.raises(Unsupported, match="operator"):
        method.sample(field, source().start(), COND, 6, source())
    monkeypatch.setattr(type(field.inner.model), "operator", Half())
    with pytest.raises(Unsupported, match="measurements"):
        method.sample(field, source().start(), COND, 6, source())
    measured = torch.arange(4.0, dtype=torch.float64).expand(BATCH, 4)
    method.sample(field, source().start(), Cond(measured=measured), 6, source())
    ((rest, x_s, nfe, _),) = solver.calls
    assert (rest.t_start, nfe) == (0.5, 6)
    z = torch.tensor([0.0, 0, 1, 0, 2, 0, 3, 0], dtype=torch.float64)
    expected = float(path.alpha(0.5)) * z + float(path.sigma(0.5)) * source().normal("warm-start")
    torch.testing.assert_close(x_s, expected)


@pytest.mark.parametrize("estimate", ["exact", "draft"])
def test_a_perfect_estimate_would_give_the_data(estimate):
    """With z from the data, x_s has the marginal at s, whatever s; a draft of two evaluations shows at small s."""
    setup = setup_of("gmm-smooth")
    reference = setup.model.reference("identity")
    rows = 2048
    cond = sampling.conditions(setup.suite, setup.model, range(rows), setup.device)
    noise = NoiseSource(0, range(rows), (8,), dtype=torch.float64)
    inner = registry.build_method("dpm-solver++").solver

    class Draws(Solver):
        """The data as the draft, the inner solver afterwards."""

        def sample(self, denoiser, x_T, cond, nfe, noise):
            if estimate == "exact" and denoiser.path.t_start == 1.0:
                return setup.model.data(range(rows), cond.labels, 99)
            return inner.sample(denoiser, x_T, cond, nfe, noise)

    field_ = exact(setup.path, rows, None, dim=8, components=6, classes=3, std=0.5, spread=1.0, seed=1)
    x = modifier("warm-start(start=0.1)").modify(Draws()).sample(field_, noise.start(), cond, 40, noise)
    distance = frechet_distance(moments(x.numpy()).gaussian(), Gaussian(reference["mean"], reference["cov"]))
    print(f"{estimate}: {distance:.3f}")
    assert (distance < 0.06) if estimate == "exact" else (distance > 0.1)


# --- both ------------------------------------------------------------------------------------------------------------


@lru_cache
def small(suite: str) -> sampling.Setup:
    return sampling.build(small_suite(suite))


@pytest.mark.parametrize(
    "part", ["analytic-init", "analytic-init(statistics=false)", "warm-start", "warm-start(draft=4)"]
)
@pytest.mark.parametrize(
    "method", ["ddim", "dpm-solver++(order=2)", "unipc", "heun", "ddim(eta=1)", "pndm", "ddim+time-shift"]
)
def test_any_solver_keeps_its_budget(method, part):
    setup = small("gmm-smooth")
    text = f"{method}+{part}"
    chain = registry.build_method(text)
    chain = chain.equipped(prepare(setup, chain, make_cell(setup.suite, text, 20, 1.0, 0)).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, range(4), setup.device)
    for nfe in (1, 2, 7, 20):
        ledger = Ledger(4, nfe)
        x = sampling.sample(setup, chain, make_cell(setup.suite, text, nfe, 1.0, 0), range(4), cond, ledger)
        assert torch.isfinite(x).all()
        assert ledger.nfe.max() == nfe


def test_diffusers_schedulers_say_that_they_need_the_whole_path():
    with pytest.raises(Unsupported, match="needs a path with t_start = 1"):
        sampled(small("gmm-smooth"), "diffusers:DDIMScheduler+analytic-init", 5, 4)


@pytest.mark.parametrize("part", ["analytic-init(start=0.0009)", "warm-start(start=0.001)"])
def test_a_start_beyond_the_end_is_refused(part):
    with pytest.raises(Unsupported, match="at or below the path's end"):
        sampled(small("gmm-smooth"), f"ddim+{part}", 5, 4)


@pytest.mark.parametrize(
    "part",
    [
        "analytic-init(start=0)",
        "analytic-init(start=1.1)",
        "analytic-init(samples=1)",
        "analytic-init(seed=-1)",
        "warm-start(start=0)",
        "warm-start(draft=0)",
        "warm-start(estimate=gan)",
    ],
)
def test_bad_settings_are_refused(part):
    with pytest.raises(UserError):
        registry.build_method(f"ddim+{part}")
