"""DPM-Solver-v3: statistics against closed forms and finite differences, steps against quadrature and the engine."""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver
from support import small_suite

from evalbench import preparation, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.engine import exponential_weights, linear_step, multistep_order
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact
from evalbench.noise import NoiseSource
from evalbench.paths import Path, grid, make_path
from evalbench.runner import make_cell

VP = make_path("vp-linear")
v3 = sys.modules[registry.get("method", "dpm-solver-v3").__module__]
PLAIN = "corrector=off,lower_order_final=false"


def equipped(text: str, ell: np.ndarray, s: np.ndarray, b: np.ndarray) -> v3.DPMSolverV3:
    return solver(text).equipped(Artifact({"l": ell, "s": s, "b": b}))


def constant(text: str, nodes: int, ell: float, s: float) -> v3.DPMSolverV3:
    """The solver with the same l and s everywhere and b = 0, d = 8."""
    ones = np.ones((nodes + 1, 8))
    return equipped(text, ell * ones, s * ones, 0.0 * ones)


def end(method, path: Path, nfe: int, batch: int = 8, **options) -> torch.Tensor:
    """Samples of an equipped solver on the exact mixture, float64."""
    field = exact(path, batch, nfe, **options)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    noise = NoiseSource(0, range(batch), field.shape, dtype=torch.float64)
    x = method.sample(field, noise.start() * float(path.sigma(path.t_start)), COND, nfe, noise)
    assert (field.ledger.nfe == nfe).all()
    return x


# --- degenerate statistics: which solver each one is ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "final"), [("vp-linear", "t_end"), ("edm", "zero"), ("flow", "t_end")])
@pytest.mark.parametrize(
    ("ours", "same_as"),
    [
        ("order=1", "ddim"),
        ("order=2", "dpm-solver++(order=2,solver_type=heun)"),
        ("order=3", "dpm-solver++(order=3,solver_type=heun,d2=taylor)"),
        ("order=3,lower_order_final=false", "dpm-solver++(order=3,solver_type=heun,d2=taylor,lower_order_final=false)"),
    ],
)
def test_degenerate_statistics_are_dpm_solver_pp_up_to_the_trapezoids(kind, final, ours, same_as):
    path, nfe = make_path(kind, final=final), 8
    steps = nfe - (final == "zero")
    expected, _ = draw(same_as, path, nfe, 8)
    errors = []
    for per_step in (50, 100):
        method = constant(f"dpm-solver-v3(corrector=off,{ours})", steps * per_step, 1.0, 0.0)
        errors.append(float((end(method, path, nfe) - expected).abs().max()))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)  # nothing but the second-order quadrature differs


@pytest.mark.parametrize("corrector", ["off", "full"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("want", "ell", "s"), [("x0", 1.0, 0.0), ("eps", 0.0, -1.0)])
def test_constant_statistics_are_the_exponential_integrators_of_x0_and_eps(want, ell, s, order, corrector):
    """Predictor and corrector by the engine's own weights; the corrector keeps the evaluation that x0 or eps was."""
    nfe, text = 7, f"dpm-solver-v3(order={order},corrector={corrector})"
    got = end(constant(text, nfe * 800, ell, s), VP, nfe)
    field = exact(VP, 8)
    field.inner.model.to(torch.float64, torch.device("cpu"))
    noise = NoiseSource(0, range(8), field.shape, dtype=torch.float64)
    x = noise.start() * float(VP.sigma(VP.t_start))
    times = grid(VP, "logsnr", nfe)
    history, x_before = [], x
    for i, (t, t_next) in enumerate(pairwise(times)):
        out = field(x, t, COND, want)
        p = multistep_order(order, i - 1, times, lower_order_final=True) if i else 1
        if corrector == "full" and p > 1:
            nodes = [history[0], (t, out), *history[1:]][:p]
            x = _polynomial_step(x_before, times[i - 1], t, nodes, want)
        history, x_before = [(t, out), *history], x
        p = multistep_order(order, i, times, lower_order_final=True)
        x = _polynomial_step(x, t, t_next, history[:p], want)
    torch.testing.assert_close(got, x, rtol=0, atol=3e-5)


def _polynomial_step(x, s, t, nodes, want):
    a = linear_step(VP, s, t, want)[0]
    weights = exponential_weights(VP, s, t, [u for u, _ in nodes], want)
    return a * x + sum(w * out for w, (_, out) in zip(weights, nodes, strict=True))


# --- a step against its definition ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "to"), [((60,), 90), ((60, 35), 90), ((60, 35, 10), 90), ((60, 90, 35), 90)])
def test_a_step_is_exact_where_g_is_a_polynomial(at, to):
    """y' = -l y - f with f = e^S (g + B) is integrated directly, by RK4 in lambda; the last case is a corrector."""
    nodes, d = 12_000, 2
    scale = nodes // 120
    lam = v3.node_times(VP, nodes)[0]
    ell, s, b = (np.stack([f(lam), f(lam + 1.0)], 1) for f in (_l, _s, _b))
    statistics = v3.Statistics(VP, ell, s, b)
    at, to = [i * scale for i in at], to * scale
    start = lam[at[0]]
    coefficients = [0.7, -0.4, 0.3][: len(at)]

    def g(u):
        return sum(c * (u - start) ** k for k, c in enumerate(coefficients))

    first, last = min(*at, to), max(*at, to)
    fine = np.linspace(lam[first], lam[last], 2 * (last - first) + 1)
    f_fine = np.stack([_f(fine, start, g, shift) for shift in (0.0, 1.0)], 1)
    y = np.array([1.3, -0.8])
    t_s, t_t = statistics.times[at[0]], statistics.times[to]
    x_s = torch.tensor(float(VP.alpha(t_s)) * y)[None]
    history = [v3.Node(i, x_s, torch.tensor(f_fine[2 * (i - first)])[None]) for i in at]
    got = statistics.step(history, to, pseudo=False)
    h = lam[1] - lam[0]
    for i in range(at[0] - first, to - first):  # RK4 over one node interval, f and l known at its middle
        u, f = fine[2 * i], f_fine[2 * i : 2 * i + 3]
        ls = [np.array([_l(v), _l(v + 1.0)]) for v in (u, u + h / 2, u + h)]
        k1 = -ls[0] * y - f[0]
        k2 = -ls[1] * (y + h / 2 * k1) - f[1]
        k3 = -ls[1] * (y + h / 2 * k2) - f[1]
        k4 = -ls[2] * (y + h * k3) - f[2]
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert got.shape == (1, d)
    np.testing.assert_allclose(got[0].numpy(), float(VP.alpha(t_t)) * y, rtol=2e-6)


def _l(u):
    return 0.5 - 0.4 * np.tanh(0.5 * u)


def _s(u):
    return -0.3 + 0.2 * np.sin(u)


def _b(u):
    return 0.5 * np.cos(0.7 * u)


def _f(u, start, g, shift):
    """e^S (g + B) with S from its closed form and B by Simpson's rule on a grid of its own."""

    def S(v):
        return -0.3 * (v - start) - 0.2 * (np.cos(v + shift) - math.cos(start + shift))

    fine = np.linspace(min(u[0], start), max(u[-1], start), 20_001)
    integrand = np.exp(-S(fine)) * _b(fine + shift)
    h = fine[1] - fine[0]
    simpson = np.concatenate([[0.0], np.cumsum(h / 3 * (integrand[:-2:2] + 4 * integrand[1:-1:2] + integrand[2::2]))])
    B = np.interp(u, fine[::2], simpson)
    return np.exp(S(u)) * (g(u) + B - np.interp(start, fine[::2], simpson))


def test_divided_differences_are_exact_below_their_order_only():
    weights = v3.divided_differences([0.0, -0.5, -1.2])
    np.testing.assert_allclose(weights @ np.array([1.0, 1.0, 1.0]), [1.0, 0.0, 0.0], atol=1e-12)
    slope, bend = weights[1:] @ np.array([0.0, -0.5, -1.2])
    assert (slope, bend) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    slope, bend = weights[1:] @ np.array([0.0, 0.25, 1.44])  # u^2: the second derivative is right, the first is not
    assert (slope, bend) == (pytest.approx(-0.5), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        (f"order=1,{PLAIN}", 0.9, 1.15),
        (f"order=2,{PLAIN}", 1.85, 2.3),
        (f"order=3,{PLAIN}", 2.7, 3.5),
        ("order=3,lower_order_final=false", 2.7, 3.9),
        (f"order=3,pseudo=true,{PLAIN}", 1.85, 2.3),  # the first derivative from two nodes
    ],
)
def test_the_order_does_not_depend_on_the_statistics(settings, least, most):
    """Any smooth l, s, b make a consistent solver. These are no model's, but near the noise they are those of x0: g is
    constant there, so that the first steps of low order do not count."""
    nodes = 2880
    lam = v3.node_times(VP, nodes)[0]
    away = 1.0 / (1.0 + np.exp(-2.0 * (lam + 1.5)))[:, None]
    ell, s, b = (np.stack([f(lam + 0.3 * i) for i in range(8)], 1) for f in (_l, _s, _b))
    ell, s, b = 1.0 - away * (1.0 - ell), away * s, away * b
    fine, _ = draw("dpm-solver++(order=3,algorithm=singlestep,solver_type=heun)", VP, 900, 16)
    method = equipped(f"dpm-solver-v3({settings})", ell, s, b)
    budgets = (30, 60, 120)
    errors = [float((end(method, VP, n, 16) - fine).norm(dim=1).median()) for n in budgets]
    assert least < -np.polyfit(np.log(budgets), np.log(errors), 1)[0] < most


# --- statistics -------------------------------------------------------------------------------------------------------


class Search:
    """What `prepare` asks of a Preparation, on an unconditional mixture."""

    def __init__(self, path: Path = VP, **options) -> None:
        self.path, self.options = path, options
        self.shape, self.fields = (8,), []

    def model(self):
        field = exact(self.path, 1, **self.options)
        field.inner.model.to(torch.float64, torch.device("cpu"))
        return field.inner.model

    def data(self, n, seed=0):
        return self.model().data(range(n), None, 100 + seed), COND

    def noise(self, indices, seed=0):
        return NoiseSource(100 + seed, indices, self.shape, dtype=torch.float64)

    def denoiser(self, batch):
        self.fields.append(exact(self.path, batch, **self.options))
        self.fields[-1].inner.model.to(torch.float64, torch.device("cpu"))
        return self.fields[-1]

    def equip(self, text: str) -> v3.DPMSolverV3:
        method = solver(text)
        with torch.no_grad():
            return method.equipped(method.prepare(self))


GAUSSIAN = {"components": 1, "std": 0.5}


def test_statistics_of_a_gaussian_have_a_closed_form():
    """eps is linear in x, so f = -l mu is the same for all x: no slope, and b is its derivative."""
    search = Search(**GAUSSIAN)
    arrays = search.equip("dpm-solver-v3(nodes=120,samples=8)").artifact.arrays
    lam = v3.node_times(VP, 120)[0]
    # sigma^2 / (alpha^2 std^2 + sigma^2) = 1 / (1 + std^2 e^{2 lambda})
    ell = 1.0 / (1.0 + 0.25 * np.exp(2 * lam))
    np.testing.assert_allclose(arrays["l"], ell[:, None] + np.zeros(8), rtol=1e-9)
    np.testing.assert_array_equal(arrays["s"], 0.0)
    d_l = -2.0 * ell * (1.0 - ell)
    mu = search.model().means[0].numpy()
    np.testing.assert_allclose(arrays["b"], -d_l[:, None] * mu, atol=3e-3)


def test_one_step_is_exact_on_a_gaussian():
    errors = []
    for nodes in (40, 80):
        search = Search(**GAUSSIAN)
        x = end(search.equip(f"dpm-solver-v3(nodes={nodes},samples=8)"), VP, 1, **GAUSSIAN)
        mu = search.model().means[0]
        x_T = NoiseSource(0, range(8), (8,), dtype=torch.float64).start() * float(VP.sigma(VP.t_start))
        scale = [math.sqrt(float(VP.alpha(t)) ** 2 * 0.25 + float(VP.sigma(t)) ** 2) for t in (VP.t_start, VP.t_end)]
        true = VP.alpha(VP.t_end) * mu + scale[1] / scale[0] * (x_T - VP.alpha(VP.t_start) * mu)
        errors.append(float((x - true).abs().max()))
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)  # what is left is the quadrature's


@pytest.mark.parametrize("kind", ["vp-linear", "flow"])
def test_statistics_of_a_mixture_against_finite_differences(kind):
    """l by the Jacobian, f1 by moving along the flow, s and b by an ordinary fit, on the same draws."""
    path, n, nodes = make_path(kind), 48, 40
    search = Search(path)
    artifact = search.equip(f"dpm-solver-v3(nodes={nodes},samples={n},seed=5)").artifact
    lam, times = v3.node_times(path, nodes)
    source = search.noise(range(n), 5)
    x_0, noise = search.data(n, 5)[0], source.normal("forward")
    v = torch.where(source.uniform("rademacher") < 0.5, -1.0, 1.0).double()
    slopes = np.gradient(artifact.arrays["l"], lam, axis=0, edge_order=2)
    field = search.denoiser(n)

    def eps(x, u):
        return field(x, float(path.t_of_lambda(u)), COND, "eps")

    def flow(x, u):  # d x / d lambda by the path's own finite difference
        h = 1e-5
        low, high = (float(path.log_alpha(float(path.t_of_lambda(w)))) for w in (u - h, u + h))
        return (high - low) / (2 * h) * x - float(path.sigma(float(path.t_of_lambda(u)))) * eps(x, u)

    for k in (8, 20, 30):
        u, t = lam[k], times[k]
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        x = alpha * x_0 + sigma * noise
        sampled = sigma * v * torch.einsum("bij,bj->bi", _jacobian(field, x, t), v)
        ell = artifact.arrays["l"][k]
        np.testing.assert_allclose(ell, sampled.mean(0).numpy(), rtol=1e-8, atol=1e-10)

        def f(y, w, ell=ell, k=k):
            scale, l_w = math.exp(-w), torch.from_numpy(ell + slopes[k] * (w - lam[k]))
            return scale * eps(y, w) - l_w * y / float(path.alpha(float(path.t_of_lambda(w))))

        h = 1e-4
        f1 = (f(_along(flow, x, u, h), u + h) - f(_along(flow, x, u, -h), u - h)) / (2 * h)
        for i in range(8):
            s, b = np.polyfit(f(x, u)[:, i].numpy(), f1[:, i].numpy(), 1)
            assert (artifact.arrays["s"][k, i], artifact.arrays["b"][k, i]) == (
                pytest.approx(s, abs=2e-5),
                pytest.approx(b, abs=2e-5),
            )


def _jacobian(field, x, t):
    """d eps_i / d x_j of each row, (B, 8, 8), by backward passes."""
    x = x.clone().requires_grad_()
    rows = [torch.autograd.grad(field(x, t, COND, "eps")[:, i].sum(), x)[0] for i in range(x.shape[1])]
    return torch.stack(rows, 1)


def _along(flow, x, u, h):
    return x + h * flow(x + 0.5 * h * flow(x, u), u + 0.5 * h)


def test_the_jacobian_is_unbiased_on_the_diagonal():
    """Rademacher probes against the exact diagonal: they agree within what 512 draws leave."""
    search = Search()
    ell = search.equip("dpm-solver-v3(nodes=8,samples=512)").artifact.arrays["l"][4]
    t = v3.node_times(VP, 8)[1][4]
    x = float(VP.alpha(t)) * search.data(512)[0] + float(VP.sigma(t)) * search.noise(range(512)).normal("forward")
    field = search.denoiser(512)
    jacobian = _jacobian(field, x, t)
    diagonal = float(VP.sigma(t)) * torch.diagonal(jacobian, dim1=1, dim2=2)
    off = (float(VP.sigma(t)) ** 2 * (jacobian**2).sum(2) - diagonal**2).mean(0).numpy()  # variance of a probe
    assert np.abs(ell - diagonal.mean(0).numpy()).max() < 4 * np.sqrt(off / 512).max()
    assert np.abs(ell).max() > 0.1


def test_blocks_change_rounding_only(monkeypatch):
    whole = Search().equip("dpm-solver-v3(nodes=20,samples=40)").artifact.arrays
    monkeypatch.setattr(v3, "_ELEMENTS", 8 * 16)
    search = Search()
    parts = search.equip("dpm-solver-v3(nodes=20,samples=40)").artifact.arrays
    assert [len(field.ledger.nfe) for field in search.fields] == [16, 16, 8]
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-4, atol=1e-4)  # s magnifies rounding


def test_seeds_are_different_draws():
    first, again, other = (
        Search().equip(f"dpm-solver-v3(nodes=6,samples=32,seed={seed})").artifact.arrays["l"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert 1e-4 < np.abs(first - other).max() < 0.3


# --- the catalogue's figures ------------------------------------------------------------------------------------------

# Section A item 5 of the catalogue: median RMS per coordinate at 5, 8 and 10 evaluations, another draw of the means.
FIGURES = {
    "dpm-solver-v3(nodes=60,samples=256)": (0.047, 0.019, 0.011),
    "dpm-solver++(order=2)": (0.11, 0.044, 0.033),
    "dpm-solver++(order=3)": (0.12, 0.15, 0.074),
}


@lru_cache
def medians(text: str) -> tuple[float, ...]:
    """Median error on the unconditional mixture of gmm-smooth, per coordinate, at 5, 8 and 10 evaluations."""
    options = {"seed": 1, "std": 0.5}
    method = solver(text)
    if text.startswith("dpm-solver-v3"):
        method = Search(**options).equip(text)
    return tuple(
        float((end(method, VP, n, 256, **options) - _fine()).square().mean(1).sqrt().median()) for n in (5, 8, 10)
    )


@lru_cache
def _fine() -> torch.Tensor:
    return draw("dpm-solver++(order=3,algorithm=singlestep,solver_type=heun)", VP, 300, 256, seed=1, std=0.5)[0]


@pytest.mark.parametrize("text", FIGURES)
def test_errors_are_the_catalogues_within_a_factor_of_two(text):
    for measured, stated in zip(medians(text), FIGURES[text], strict=True):
        assert stated / 2 < measured < stated * 2


def test_the_gain_is_that_of_the_statistics():
    ours, two_m, three_m = (np.array(medians(text)) for text in FIGURES)
    assert (ours < two_m).all()
    assert (ours < three_m).all()
    assert (np.array(medians("dpm-solver-v3(degenerate=true)")) > two_m).all()


def test_l_goes_from_one_at_the_noise_to_zero_at_the_data():
    artifact = Search(seed=1).equip("dpm-solver-v3(nodes=30,samples=64)").artifact
    ell = artifact.arrays["l"].mean(1)
    assert ell[0] == pytest.approx(1.0, abs=2e-3)
    assert ell[-1] == pytest.approx(0.0, abs=2e-3)
    assert (np.diff(ell) < 0.01).all()
    assert artifact.facts["l at the noise"] == pytest.approx(ell[0])


# --- in the harness ---------------------------------------------------------------------------------------------------


@lru_cache
def _prepared(text: str, guidance: float = 1.0) -> preparation.Prepared:
    setup = _setup()
    return preparation.prepare(setup, registry.build_method(text), make_cell(setup.suite, text, 5, guidance, 0))


@lru_cache
def _setup() -> sampling.Setup:
    return sampling.build(small_suite("gmm-smooth"))


def test_preparing_is_billed_and_the_ablation_is_free():
    bill = _prepared("dpm-solver-v3(nodes=10,samples=32)").bill
    assert (bill["nfe"], bill["backward"]) == (2 * 11 * 32, 2 * 11 * 32)
    free = _prepared("dpm-solver-v3(degenerate=true,nodes=10)")
    assert free.bill["nfe"] == 0
    assert free.artifacts[0].arrays["l"].shape == (11, 8)


def test_statistics_belong_to_the_guidance():
    plain, guided = (_prepared("dpm-solver-v3(nodes=10,samples=32)", g).artifacts[0].arrays["l"] for g in (1.0, 3.0))
    assert np.abs(plain - guided).max() > 0.05


def test_one_preparation_serves_every_budget():
    text = "dpm-solver-v3(nodes=40,samples=64)"
    setup, chain = _setup(), registry.build_method(text).equipped(_prepared(text).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, range(4), setup.device)
    for nfe in (1, 2, 7, 20):
        ledger = Ledger(4, nfe)
        x = sampling.sample(setup, chain, make_cell(setup.suite, text, nfe, 1.0, 0), range(4), cond, ledger)
        assert torch.isfinite(x).all()
        assert (ledger.nfe == nfe).all()


@pytest.mark.parametrize(("variant", "early"), [("paper", False), ("released", True)])
def test_half_corrects_one_side_of_the_middle(monkeypatch, variant, early):
    corrected = []
    step = v3.Statistics.step

    def spy(self, nodes, to, *, pseudo):
        if any(node.at == to for node in nodes):
            corrected.append(self.times[to])
        return step(self, nodes, to, pseudo=pseudo)

    monkeypatch.setattr(v3.Statistics, "step", spy)
    end(constant(f"dpm-solver-v3(corrector=half,variant={variant})", 120, 1.0, 0.0), VP, 10)
    inner = v3.Statistics(VP, *np.zeros((3, 121, 8)))
    times = [inner.times[i] for i in inner.snapped(grid(VP, "logsnr", 10))][2:-1]  # the first step is of order 1
    assert corrected == [t for t in times if (t > 0.5) == early]
    assert 0 < len(corrected) < len(times)


def test_the_pseudo_corrector_takes_a_node_more(monkeypatch):
    lengths = []
    step = v3.Statistics.step

    def spy(self, nodes, to, *, pseudo):
        lengths.append((len(nodes), any(node.at == to for node in nodes), pseudo))
        return step(self, nodes, to, pseudo=pseudo)

    monkeypatch.setattr(v3.Statistics, "step", spy)
    end(constant("dpm-solver-v3(order=2,corrector_pseudo=true)", 120, 1.0, 0.0), VP, 4)
    predict, correct = (1, False, False), (2, True, True)
    assert lengths == [
        predict,
        correct,
        (2, False, False),
        (3, True, True),
        (2, False, False),
        (3, True, True),
        predict,
    ]


def test_sampling_times_are_nodes():
    statistics = v3.Statistics(VP, *np.zeros((3, 121, 8)))
    times = grid(VP, "time", 9)
    at = statistics.snapped(times)
    assert (at[0], at[-1]) == (0, 120)
    assert (statistics.times[0], statistics.times[-1]) == (VP.t_start, VP.t_end)
    spacing = statistics.lam[1] - statistics.lam[0]
    assert np.abs(statistics.lam[at] - VP.lam(np.array(times))).max() <= spacing / 2 * (1 + 1e-9)


def test_too_few_nodes_say_how_many():
    with pytest.raises(Unsupported, match="nodes=12 are too few for this grid at 20 steps; type nodes=48"):
        end(constant("dpm-solver-v3(nodes=12)", 12, 1.0, 0.0), VP, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("order=4", "order must be one of 1, 2, 3, got 4"),
        ("nodes=1", "nodes and samples are at least 2"),
        ("samples=1", "nodes and samples are at least 2"),
        ("seed=-1", "seed at least 0"),
        ("grid=cosine", "unknown grid 'cosine'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        solver(f"dpm-solver-v3({settings})")


def test_without_statistics_it_cannot_run():
    with pytest.raises(Unsupported, match="nothing prepared"):
        end(solver("dpm-solver-v3"), VP, 4)
