"""Our solvers against diffusers' schedulers of the same name: same exact network, time steps, start and noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import diffusers
import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench.engine import execute
from evalbench.noise import NoiseSource
from evalbench.paths import Flow, Path, VPDiscrete, make_path

BATCH, N = 16, 1000
SAME = 1e-4  # relative, of float32 schedulers


class RecordedNoise(NoiseSource):
    """Remembers what it handed out."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(3, range(BATCH), shape, dtype=torch.float64)
        self.drawn: list[torch.Tensor] = []

    def increment(self, u_from: float, u_to: float) -> torch.Tensor:
        self.drawn.append(super().increment(u_from, u_to))
        return self.drawn[-1]


@dataclass(frozen=True)
class Run:
    """End states and what was needed to reach them."""

    ours: torch.Tensor
    theirs: torch.Tensor

    @property
    def error(self) -> float:
        return float((self.ours - self.theirs).norm() / self.theirs.norm())


def vp_scheduler(name: str, steps: int, **config: object):
    """A scheduler on Stable Diffusion's betas, without clipping."""
    cls = getattr(diffusers, name)
    # clip_sample exists in some classes only; the others ignore nothing, so it is given where it is known
    known = cls.__init__.__wrapped__.__code__.co_varnames if hasattr(cls.__init__, "__wrapped__") else ()
    if "clip_sample" in known:
        config["clip_sample"] = False
    scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)
    scheduler.set_timesteps(steps)
    return scheduler


def discrete_path(scheduler) -> VPDiscrete:
    return VPDiscrete(alphas_cumprod=tuple(float(a) for a in scheduler.alphas_cumprod))


def grid_times(scheduler, last: float) -> list[float]:
    """Times of the scheduler's own steps, each once."""
    times = [(float(timestep) + 1) / N for timestep in scheduler.timesteps]
    assert all(float(timestep).is_integer() for timestep in scheduler.timesteps)
    return [*dict.fromkeys(times), last]


def loop(scheduler, network: Callable, x: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
    """diffusers' own loop; randn_tensor hands out `noise` in turn, then zeros."""
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    original, left = getattr(module, "randn_tensor", None), list(noise)
    module.randn_tensor = lambda shape, **_: left.pop(0) if left else torch.zeros(shape)
    try:
        for timestep in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network(x_in, timestep), timestep, x, return_dict=False)[0]
    finally:
        module.randn_tensor = original
    return x.double()


def compare(text: str, scheduler, path: Path, times: list[float], *, k: bool = False) -> Run:
    """Both from one start. `k`: the scheduler's state is x / alpha."""
    field = exact(path, BATCH)
    noise = RecordedNoise(field.shape)
    x_T = noise.start()
    ours = execute(solver(text).plan(path, times), field, x_T, COND, noise)

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return field(x.double(), (float(timestep) + 1) / N, COND, "eps")

    start = x_T / float(path.alpha(times[0])) if k else x_T
    theirs = loop(scheduler, network, start, noise.drawn)
    assert theirs.std() > 0.1
    return Run(ours, theirs)


@pytest.fixture(autouse=True)
def _deprecations():
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
# our method, their class and settings, their steps
CASES = [
    ("ddim", "DDIMScheduler", {}, 10),
    ("ddpm", "DDPMScheduler", {}, 20),
    ("ddpm(variance=large)", "DDPMScheduler", {"variance_type": "fixed_large"}, 20),
    ("ddim", "EulerDiscreteScheduler", {}, 10),
    ("heun", "HeunDiscreteScheduler", {}, 10),
    ("dpm-solver++(order=1)", MULTI, {"solver_order": 1}, 10),
    ("dpm-solver++", MULTI, {"solver_order": 2}, 10),
    ("dpm-solver++(lower_order_final=false)", MULTI, {"solver_order": 2}, 20),
    ("dpm-solver++", MULTI, {"solver_order": 2, **SIGMA_MIN}, 10),
    ("dpm-solver++(lower_order_final=false)", MULTI, {"solver_order": 2, **SIGMA_MIN}, 20),
    ("dpm-solver++(solver_type=heun)", MULTI, {"solver_order": 2, "solver_type": "heun"}, 10),
    ("dpm-solver++(order=3)", MULTI, {"solver_order": 3}, 10),
    ("dpm-solver++(order=3,lower_order_final=false)", MULTI, {"solver_order": 3}, 20),
    ("dpm-solver++(order=1,algorithm=sde)", MULTI, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, 10),
    ("dpm-solver++(algorithm=sde)", MULTI, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, 10),
    (
        "dpm-solver++(algorithm=sde,solver_type=heun)",
        MULTI,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        10,
    ),
    (
        "dpm-solver(order=2,algorithm=multistep)",
        MULTI,
        {"solver_order": 2, "algorithm_type": "dpmsolver", **SIGMA_MIN},
        10,
    ),
    (
        "dpm-solver(order=3,algorithm=multistep)",
        MULTI,
        {"solver_order": 3, "algorithm_type": "dpmsolver", **SIGMA_MIN},
        10,
    ),
    ("dpm-solver++(algorithm=singlestep)", SINGLE, {"solver_order": 2, "lower_order_final": True}, 9),
    ("dpm-solver++(algorithm=singlestep)", SINGLE, {"solver_order": 2, "lower_order_final": True}, 10),
    (
        "dpm-solver(order=2)",
        SINGLE,
        {"solver_order": 2, "algorithm_type": "dpmsolver", "lower_order_final": True, **SIGMA_MIN},
        9,
    ),
    *(
        (
            "dpm-solver++(order=3,algorithm=singlestep,solver_type=heun)",
            SINGLE,
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": True},
            n,
        )
        for n in (9, 10, 11)
    ),
    *(
        (
            f"unipc(order={p},variant={b})",
            "UniPCMultistepScheduler",
            {"solver_order": p, "solver_type": b, **end},
            10,
        )
        for p in (1, 2, 3)
        for b, end in (("bh1", SIGMA_MIN), ("bh2", {}))
    ),
    ("unipc(order=3)", "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2", **SIGMA_MIN}, 20),
    (
        "unipc(order=3,prediction=eps)",
        "UniPCMultistepScheduler",
        {"solver_order": 3, "predict_x0": False, **SIGMA_MIN},
        10,
    ),
    (
        "unipc(order=3,corrector=false)",
        "UniPCMultistepScheduler",
        {"solver_order": 3, "disable_corrector": list(range(10))},
        10,
    ),
    *((f"deis(order={p},space=logrho)", "DEISMultistepScheduler", {"solver_order": p}, 20) for p in (1, 2, 3)),
    (
        "deis(order=3,space=logrho,lower_order_final=true)",
        "DEISMultistepScheduler",
        {"solver_order": 3},
        10,
    ),
]


def run_case(text: str, name: str, config: dict, steps: int) -> Run:
    scheduler = vp_scheduler(name, steps, **config)
    path = discrete_path(scheduler)
    ends_at_sigma_min = name == "DEISMultistepScheduler" or config.get("final_sigmas_type") == "sigma_min"
    times = grid_times(scheduler, 1 / N if ends_at_sigma_min else 0.0)
    return compare(text, scheduler, path, times, k=name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"))


@pytest.mark.parametrize(("text", "name", "config", "steps"), CASES)
def test_equals_the_scheduler_of_the_same_name(text, name, config, steps):
    run = run_case(text, name, config, steps)
    print(f"{text} {name} {steps}: {run.error:.1e}")
    assert run.error < SAME


# What the docstrings say is different, is.
DIFFERENT = [
    # the second inner node: midpoint formula there, phi_2 here
    (
        "dpm-solver++(order=3,algorithm=singlestep)",
        SINGLE,
        {"solver_order": 3, "lower_order_final": True},
        10,
    ),
    # lower orders at the end only below 15 steps there
    ("dpm-solver++", MULTI, {"solver_order": 2, **SIGMA_MIN}, 20),
    # the correct third-order update
    ("dpm-solver++(order=3,d2=taylor)", MULTI, {"solver_order": 3}, 10),
    ("deis(order=3,space=t)", "DEISMultistepScheduler", {"solver_order": 3}, 20),
    ("euler", "EulerDiscreteScheduler", {}, 10),
    # the sign of 1/2 before the second difference
    ("dpm-solver++(order=3,algorithm=sde)", MULTI, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, 10),
]


@pytest.mark.parametrize(("text", "name", "config", "steps"), DIFFERENT)
def test_differs_where_the_docstring_says_so(text, name, config, steps):
    run = run_case(text, name, config, steps)
    print(f"{text} {name} {steps}: {run.error:.1e}")
    assert run.error > 10 * SAME


def test_euler_equals_the_flow_match_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(0.99, 0.05, 10))
    times = [float(sigma) for sigma in scheduler.sigmas]
    field, noise = exact(Flow(), BATCH), RecordedNoise((8,))
    x_T = noise.start()
    ours = execute(solver("euler").plan(Flow(), times), field, x_T, COND, noise)
    theirs = loop(scheduler, lambda x, t: field(x.double(), float(t) / N, COND, "velocity"), x_T, [])
    assert Run(ours, theirs).error < SAME


@dataclass(frozen=True)
class Trigonometric(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the path of diffusers' IPNDMScheduler."""

    t_start: float = 0.999
    t_end: float = 1e-3

    def log_alpha(self, t):
        return np.log(np.cos(0.5 * np.pi * np.asarray(t)))[()]

    def sigma(self, t):
        return np.sin(0.5 * np.pi * np.asarray(t))[()]

    def t_of_lambda(self, lam):
        return 2 / np.pi * np.arctan(np.exp(-np.asarray(lam)))[()]

    def d_alpha(self, t):
        return -0.5 * np.pi * np.sin(0.5 * np.pi * np.asarray(t))[()]

    def d_sigma(self, t):
        return 0.5 * np.pi * np.cos(0.5 * np.pi * np.asarray(t))[()]


def ipndm_run(text: str) -> Run:
    """Without its first step, which takes x0 = 0, and its last, of order 4 into sigma = 0."""
    scheduler, path = diffusers.IPNDMScheduler(), Trigonometric()
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(1)
    timesteps = scheduler.timesteps[1:]
    field, noise = exact(path, BATCH), RecordedNoise((8,))
    x_T = noise.start()
    ours = execute(solver(text).plan(path, timesteps.tolist()), field, x_T, COND, noise)
    x = x_T
    for timestep in timesteps[:-1]:
        out = field(x.double(), float(timestep), COND, "v")
        x = scheduler.step(out, timestep, x, return_dict=False)[0]
    return Run(ours, x.double())


def test_ipndm_equals_diffusers_between_its_first_and_last_step():
    assert ipndm_run("ipndm").error < SAME
    assert ipndm_run("ipndm(variable_step=true)").error > 10 * SAME


@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
def test_named_equalities_between_our_own_solvers(kind):
    """What docstrings call equal is equal to rounding."""
    path = make_path(kind)
    final = replace(path, final="zero")
    pairs = [
        ("ddpm", "ddim(eta=1)"),
        ("dpm-solver++(order=1,algorithm=sde)", "ddpm"),
        ("dpm-solver++(order=1)", "ddim"),
        ("dpm-solver(order=1)", "ddim"),
        ("unipc(order=1,corrector=false)", "ddim"),
        ("unipc(corrector=false)", "dpm-solver++"),
        ("deis(order=1)", "ddim"),
        ("ipndm(order=1)", "ddim"),
        ("ipndm(order=3,variable_step=true)", "deis(order=3,space=rho)"),
    ]
    if kind != "vp-linear":
        pairs.append(("euler", "ddim"))
    for a, b in pairs:
        for p in (path, final):
            xa, xb = draw(a, p, 7, batch=4)[0], draw(b, p, 7, batch=4)[0]
            assert (xa - xb).abs().max() < 1e-8, (a, b)
    if kind == "vp-linear":
        assert (draw("euler", path, 7)[0] - draw("ddim", path, 7)[0]).abs().max() > 1e-2
