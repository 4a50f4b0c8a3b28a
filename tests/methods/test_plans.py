"""Plans of every planned solver: what they spend, what they are exact for, and which settings they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from exact_model import COND, draw, solver
from hypothesis import given, settings
from hypothesis import strategies as st

from evalbench import registry
from evalbench.engine import Plan, PlannedSolver, execute, exponential_weights, polynomial_weights
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Step, Time, Want
from evalbench.noise import NoiseSource
from evalbench.paths import Flow, Path, make_path

KINDS = ("vp-linear", "edm", "flow")
VARIANTS = [
    "ddim(eta=1)",
    "ddpm(variance=large)",
    "heun(S_churn=10)",
    "dpm-solver(order=1)",
    "dpm-solver(order=2)",
    "dpm-solver(lower_order_final=false)",
    "dpm-solver(algorithm=multistep)",
    "dpm-solver++(order=3)",
    "dpm-solver++(order=3,d2=taylor,lower_order_final=false)",
    "dpm-solver++(solver_type=heun)",
    "dpm-solver++(algorithm=singlestep)",
    "dpm-solver++(algorithm=singlestep,order=3,solver_type=heun)",
    "dpm-solver++(algorithm=sde)",
    "dpm-solver++(algorithm=sde,order=3)",
    "unipc(order=1)",
    "unipc(order=3,variant=bh1)",
    "unipc(order=3,prediction=eps)",
    "unipc(corrector=false)",
    "deis(order=2,space=rho)",
    "deis(order=4,space=logrho,lower_order_final=true)",
    "ipndm(order=2)",
    "ipndm(variable_step=true)",
]
STOCHASTIC = ("ddim(eta=1)", "ddpm", "heun(S_churn=10)", "dpm-solver++(algorithm=sde")
PLANNED = [name for name in registry.names("method") if issubclass(registry.get("method", name), PlannedSolver)]
OURS = ["ddim", "ddpm", "euler", "heun", "dpm-solver", "dpm-solver++", "unipc", "deis", "ipndm"]


def test_the_registry_has_all_of_them():
    assert set(OURS) <= set(PLANNED)


def plan_of(text: str, path: Path, grid: str, nfe: int) -> Plan:
    planned = solver(text)
    assert isinstance(planned, PlannedSolver)
    return planned.plan_for(path, grid, nfe)


@pytest.mark.parametrize("text", [*PLANNED, *VARIANTS])
def test_plan_keeps_every_budget(text):
    """Plan.update refuses coefficients that are not finite, Plan.evaluate refuses t = 0."""
    for kind, final, grid in product(KINDS, ("t_end", "zero"), ("logsnr", "karras")):
        path = make_path(kind, final=final)
        for nfe in range(1, 21):
            try:
                plan = plan_of(text, path, grid, nfe)
            except Unsupported:
                assert text.partition("(")[0] not in OURS  # ours run at every budget
                continue
            assert 1 <= plan.nfe <= nfe
            if text.startswith("heun") and final == "zero":
                assert plan.nfe == 2 * ((nfe + 1) // 2) - 1  # the last step has no correction
            elif text.partition("(")[0] in OURS:
                assert plan.nfe == nfe


@pytest.mark.parametrize(
    ("nfe", "orders"),
    [
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
        (8, [3, 3, 2]),
        (9, [3, 3, 2, 1]),
        (10, [3, 3, 3, 1]),
        (20, [3, 3, 3, 3, 3, 3, 2]),
    ],
)
def test_singlestep_orders_are_those_of_dpm_solver_fast(nfe, orders):
    plan = plan_of("dpm-solver", make_path("vp-linear"), "logsnr", nfe)
    assert list(evaluations_per_step(plan)) == orders


def test_singlestep_step_to_zero_is_first_order():
    for nfe in range(1, 21):
        plan = plan_of("dpm-solver", make_path("vp-linear", final="zero"), "logsnr", nfe)
        assert list(evaluations_per_step(plan))[-1] == 1


def evaluations_per_step(plan: Plan) -> list[int]:
    steps = Counter(op.step for op in plan.ops if hasattr(op, "step"))
    return [steps[i] for i in range(plan.steps)]


def test_inner_nodes_are_thirds_of_the_step_on_the_logsnr_grid():
    path = make_path("vp-linear")
    plan = plan_of("dpm-solver", path, "logsnr", 4)  # orders 3, 1
    lam = [path.lam(op.t) for op in plan.ops if hasattr(op, "step")]
    np.testing.assert_allclose((lam[1] - lam[0]) * 3, lam[3] - lam[0], rtol=1e-9)
    np.testing.assert_allclose((lam[2] - lam[0]) * 1.5, lam[3] - lam[0], rtol=1e-9)
    np.testing.assert_allclose(lam[3], 0.5 * (path.lam(path.t_start) + path.lam(path.t_end)), rtol=1e-9)


class Known(Denoiser):
    """A network given as a function of (x, alpha, sigma, t): (x0, eps)."""

    grid, shape, provides = "logsnr", (2,), frozenset()

    def __init__(self, path: Path, predict: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.path, self.predict = path, predict

    def __call__(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        x0, eps = self.predict(x, float(self.path.alpha(t)), float(self.path.sigma(t)), t)
        velocity = self.path.d_alpha(t) * x0 + self.path.d_sigma(t) * eps
        return {"x0": x0, "eps": eps, "velocity": velocity}[want].clone()


C = torch.tensor([[0.7, -1.3]], dtype=torch.float64)


def point(x: torch.Tensor, alpha: float, sigma: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Data at one point: x0 = C."""
    return C, (x - alpha * C) / sigma


def same_noise(x: torch.Tensor, alpha: float, sigma: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """eps = C."""
    return (x - sigma * C) / alpha, C


@st.composite
def falling_times(draw_: Callable) -> tuple[str, list[float]]:
    """A path and times uniform in log-SNR up to factors, possibly ending at 0."""
    kind = draw_(st.sampled_from(KINDS))
    path = make_path(kind)
    gaps = np.array(draw_(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=8)))
    share = np.concatenate([[0.0], np.cumsum(gaps) / gaps.sum()])
    lam = path.lam(path.t_start) + share * (path.lam(path.t_end) - path.lam(path.t_start))
    times = [float(path.t_of_lambda(value)) for value in lam]
    return kind, [*times, 0.0] if draw_(st.booleans()) else times


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind_times=falling_times(), network=st.sampled_from([point, same_noise]))
@pytest.mark.parametrize("text", [*OURS, *VARIANTS])
def test_exact_when_x0_and_eps_are_constant_along_the_path(text, kind_times, network):
    """One x0 or one eps for all x: both stay constant along the flow, so every solver must land on the line."""
    kind, times = kind_times
    if (text == "euler" and kind == "vp-linear") or text.startswith(STOCHASTIC):
        return
    path = make_path(kind)
    x_T = torch.tensor([[1.1, 0.4]], dtype=torch.float64) * float(path.sigma(path.t_start))
    noise = NoiseSource(0, [0], (2,), dtype=torch.float64)
    x = execute(solver(text).plan(path, times), Known(path, network), x_T, COND, noise)
    s, t = times[0], times[-1]
    x0, eps = network(x_T, float(path.alpha(s)), float(path.sigma(s)), s)
    expected = float(path.alpha(t)) * x0 + float(path.sigma(t)) * eps
    # extrapolation weights amplify rounding, most of all of x0 = (x - sigma eps) / alpha near t_start
    np.testing.assert_allclose(x, expected, rtol=1e-7, atol=1e-7 * float(x0.abs().max()))


@pytest.mark.parametrize("text", ["ddim(eta=1)", "ddpm", "ddpm(variance=large)", "heun(S_churn=10)", VARIANTS[12]])
@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_solvers_end_in_x0(text, kind):
    path = make_path(kind, final="zero")
    noise = NoiseSource(0, range(8), (2,), dtype=torch.float64)
    x_T = noise.start() * float(path.sigma(path.t_start))
    x = execute(plan_of(text, path, "logsnr", 9), Known(path, point), x_T, COND, noise)
    np.testing.assert_allclose(x, C.expand_as(x), atol=1e-9)


SPREAD = {"components": 1, "classes": 0, "spread": 0.0, "std": 0.5}


@pytest.mark.parametrize(
    "text", ["ddim(eta=1)", "ddpm", "ddpm(variance=large)", "heun(S_churn=40)", "dpm-solver++(algorithm=sde)"]
)
@pytest.mark.parametrize("kind", ["vp-linear", "edm"])
def test_stochastic_solvers_keep_the_variance(text, kind):
    """Data N(0, 0.25 I), 200 evaluations: the standard deviation of 256 x 8 numbers, standard error 0.008."""
    x, _ = draw(text, make_path(kind), 200, batch=256, grid="karras", **SPREAD)
    assert 0.46 < float(x.std()) < 0.54


def test_churn_stays_below_t_start():
    path = make_path("edm")
    plan = plan_of("heun(S_churn=1000)", path, "karras", 80)
    times = [op.t for op in plan.ops if hasattr(op, "step")]
    assert max(times) <= path.t_start
    assert any(a > b for a, b in zip(times[2::2], times[1::2], strict=False))  # churn did raise t


@pytest.mark.parametrize("text", [*OURS, *VARIANTS])
def test_first_step_needs_no_history(text):
    """One evaluation can only be a first-order step: the same as ddim's, as euler's on VP, or with noise."""
    path = make_path("edm")
    if text.startswith(STOCHASTIC) or text == "ddpm(variance=large)":
        return
    assert_allclose_plans(plan_of(text, path, "logsnr", 1), plan_of("ddim", path, "logsnr", 1), path)


def assert_allclose_plans(a: Plan, b: Plan, path: Path) -> None:
    noise = NoiseSource(0, [0], (2,), dtype=torch.float64)
    x_T = noise.start()

    def curved(x: torch.Tensor, alpha: float, sigma: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(x), (x - alpha * torch.tanh(x)) / sigma

    ends = [execute(plan, Known(path, curved), x_T, COND, noise) for plan in (a, b)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9)


@pytest.mark.parametrize(("space", "order"), [("t", 2), ("t", 3), ("t", 4), ("rho", 3), ("logrho", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_polynomials_are_integrated_exactly(kind, space, order):
    """x / alpha moves by the integral of eps d rho; here with eps = z^(order-1), against many small steps."""
    path = make_path(kind)
    nodes = [float(u) for u in path.t_of_lambda(path.lam(path.t_start) + np.array([4.0, 3.2, 2.7, 1.5])[:order])]
    t = float(path.t_of_lambda(path.lam(nodes[0]) + 1.1))

    def z(u):
        rho = path.rho(u)
        return {"t": u, "rho": rho, "logrho": np.log(rho)}[space]

    a, weights = polynomial_weights(path, nodes[0], t, nodes, space)
    assert a == pytest.approx(path.alpha(t) / path.alpha(nodes[0]))
    fine = path.t_of_lambda(np.linspace(path.lam(nodes[0]), path.lam(t), 20_001))
    values = z(fine) ** (order - 1)
    integral = float(path.alpha(t) * np.sum(0.5 * (values[1:] + values[:-1]) * np.diff(path.rho(fine))))
    got = sum(c * z(u) ** (order - 1) for c, u in zip(weights, nodes, strict=True))
    assert got == pytest.approx(integral, rel=1e-6)


def test_logrho_weights_are_the_exponential_weights():
    path, nodes = Flow(), [0.5, 0.6, 0.8]
    _, weights = polynomial_weights(path, 0.5, 0.3, nodes, "logrho")
    np.testing.assert_allclose(weights, exponential_weights(path, 0.5, 0.3, nodes, "eps"), rtol=1e-10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ddpm(variance=medium)", "variance"),
        ("heun(S_churn=-1)", "S_churn >= 0"),
        ("heun(S_min=2,S_max=1)", "S_min <= S_max"),
        ("dpm-solver(order=4)", "order must be one of 1, 2, 3, got 4"),
        ("dpm-solver(algorithm=both)", "algorithm"),
        ("dpm-solver++(order=0)", "order must be one of 1, 2, 3, got 0"),
        ("dpm-solver++(d2=other)", "d2"),
        ("unipc(order=5)", "order must be one of"),
        ("unipc(variant=bh3)", "variant"),
        ("unipc(prediction=v)", "prediction"),
        ("deis(order=5)", "order must be one of"),
        ("deis(space=x)", "space"),
        ("ipndm(order=5)", "order must be one of"),
        *((f"{name}(grid=linear)", "unknown grid 'linear'") for name in OURS),
    ],
)
def test_bad_settings_are_refused(text, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        registry.build_method(text)


@pytest.mark.parametrize("name", OURS)
def test_summary_says_what_it_is(name):
    summary = registry.get("method", name).summary()
    assert summary.endswith(".")
    assert len(summary) <= 110
