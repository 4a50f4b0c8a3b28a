"""Methods that reach into the network: exact facts, and a ledger that says what ran, on diffusers' own classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import twins
from methods_inside import B, draw

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.engine import Plan, execute, nudged
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Solver, Step
from evalbench.noise import NoiseSource
from evalbench.runner import make_cell

SOLVERS = ("ddim", "heun", "dpm-solver++(order=2)", "unipc")
KINDS = ("dit", "sd", "sd3")


def share(kind: str, edit: Any) -> float:
    """FLOPs of an edited call over those of a full one, by one call each."""
    made = twins.setup(kind)
    x = torch.zeros(B, *made.model.shape, dtype=made.dtype)
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    with torch.no_grad():
        return made.door.share(edit, x, 0.5, cond, key=object())


def decoder_share(kind: str) -> float:
    made = twins.setup(kind)
    x = torch.zeros(B, *made.model.shape, dtype=made.dtype)
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    with torch.no_grad():
        features = made.door.split().encode(lambda: made.door(x, 0.5, cond))
    return share(kind, made.door.split().resume(features))


# --- faster-diffusion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_non_key_step_the_prediction_does_not_depend_on_the_state(kind: str) -> None:
    asked: list[torch.Tensor] = []

    class Probe(Solver):
        def sample(self, denoiser: Any, x_T: Any, cond: Cond, nfe: int, noise: Any) -> torch.Tensor:
            native = denoiser.native
            key, step = denoiser(x_T, 0.9, cond, native, step=Step(0, 4, 0.9, 0.8)), Step(1, 4, 0.8, 0.7)
            asked.extend([key, denoiser(x_T, 0.9, cond, native, step=Step(0, 4, 0.9, 0.8))])
            asked.extend(denoiser(x, 0.8, cond, native, step=step) for x in (x_T, x_T + 1.0, 0.0 * x_T))
            asked.append(denoiser(x_T, 0.7, cond, native, step=step))
            asked.append(denoiser(x_T + 1.0, 0.8, cond, native, step=Step(2, 4, 0.8, 0.7)))
            return x_T

    made = twins.setup(kind)
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    solver = registry.build_method("ddim+faster-diffusion(keys=uniform:2)").modifiers[0].modify(Probe())
    x_T = made.model.start(NoiseSource(0, range(B), made.model.shape, made.dtype), made.path)
    with torch.no_grad():
        solver.sample(made.door, x_T, cond, 9, None)  # type: ignore[arg-type]
    key, again, one, moved, zero, later, next_key = asked
    assert torch.equal(key, again)
    assert torch.equal(one, moved)
    assert torch.equal(one, zero)
    assert not torch.allclose(one, later), "its own time is read"
    assert not torch.allclose(one, next_key), "a key step reads the state"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_parallel_decoding_is_the_sequential_one(kind: str, guidance: float) -> None:
    sequential, one = draw("ddim+faster-diffusion(keys=uniform:3)", 7, kind, guidance)
    parallel, many = draw("ddim+faster-diffusion(keys=uniform:3,parallel=true)", 7, kind, guidance)
    tight = {"rtol": 1e-4, "atol": 1e-4} if kind == "sd3" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(parallel, sequential, **tight)
    assert not torch.allclose(parallel, draw("ddim", 7, kind, guidance)[0], rtol=1e-3)
    for name in ("nfe", "cost", "flops"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-12)
    np.testing.assert_array_equal(many.evals["base"], one.evals["base"])


@pytest.mark.parametrize("solver", ["heun", "dpm-solver++(order=2)", "diffusers:DPMSolverMultistepScheduler"])
def test_parallel_decoding_follows_any_solver_with_fixed_times(solver: str) -> None:
    sequential, parallel = (
        draw(f"{solver}+faster-diffusion(keys=uniform:3,parallel={parallel})", 10)[0] for parallel in ("false", "true")
    )
    torch.testing.assert_close(parallel, sequential, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_cached_steps_is_counted(kind: str) -> None:
    _, ledger = draw("ddim+faster-diffusion(keys=uniform:3)", 7, kind)
    _, plain = draw("ddim", 7, kind)
    decoder = decoder_share(kind)
    assert 0.05 < decoder < 0.95
    assert ledger.nfe[0] == ledger.evals["base"][0] == 7
    assert ledger.cost[0] == pytest.approx(3 + 4 * decoder)  # keys 0, 3, 6
    assert ledger.flops[0] == pytest.approx(plain.flops[0] * (3 + 4 * decoder) / 7)


def test_all_keys_are_the_model_itself_to_the_bit() -> None:
    for kind in KINDS:
        assert torch.equal(draw("ddim+faster-diffusion(keys=uniform:1)", 3, kind)[0], draw("ddim", 3, kind)[0])


def test_a_propagated_decoder_repeats_the_key_prediction_and_pays_for_the_encoder() -> None:
    frozen, ledger = draw("ddim+faster-diffusion(keys=uniform:6,propagate=decoder)", 6, "sd")
    assert not torch.allclose(frozen, draw("ddim+faster-diffusion(keys=uniform:6)", 6, "sd")[0])
    assert 1.0 < ledger.cost[0] < 6.0
    # the head of a UNet reads no time: another state at another time has the key's prediction
    made = twins.setup("sd")
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    asked = []

    class Probe(Solver):
        def sample(self, denoiser: Any, x_T: Any, cond: Cond, nfe: int, noise: Any) -> torch.Tensor:
            for i, (x, t) in enumerate(((x_T, 0.9), (x_T + 1.0, 0.5), (0.0 * x_T, 0.1))):
                asked.append(denoiser(x, t, cond, denoiser.native, step=Step(i, 3, t, 0.0)))
            return x_T

    chain = registry.build_method("ddim+faster-diffusion(keys=uniform:3,propagate=decoder)")
    x_T = made.model.start(NoiseSource(0, range(B), made.model.shape, made.dtype), made.path)
    with torch.no_grad():
        chain.modifiers[0].modify(Probe()).sample(made.door, x_T, cond, 3, None)  # type: ignore[arg-type]
    assert torch.equal(asked[0], asked[1])
    assert torch.equal(asked[0], asked[2])
    assert torch.equal(asked[0], made.door(x_T, 0.9, cond, made.door.native))


def test_injected_noise_moves_the_state_once_per_step_in_the_second_half() -> None:
    plan = Plan("x0")
    x = plan.x_T
    for t, t_next in ((1.0, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0)):
        x = plan.update({x: 0.5}, {plan.evaluate(x, t, t_next): 0.25})
    seen = []

    class Zero:
        path = None

        def __call__(self, x: torch.Tensor, t: float, *rest: Any, **more: Any) -> torch.Tensor:
            seen.append((t, float(x)))
            return 0.0 * x

    moved = nudged(plan.finish(x), lambda t: 0.1 if t < 0.5 else 0.0)
    end = execute(moved, Zero(), torch.ones(1, dtype=torch.float64), Cond(), None)  # type: ignore[arg-type]
    # 1 -> 1/2 -> 1/4, evaluated; (1/4 + 0.1) / 2, evaluated; that + 0.1, halved
    np.testing.assert_allclose([value for _, value in seen], [1.0, 0.5, 0.25, 0.175])
    assert float(end) == pytest.approx(0.1375)
    still, injected = (draw(f"ddim+faster-diffusion(inject={inject})", 5)[0] for inject in (0.0, 0.003))
    assert 0 < (injected - still).abs().max() < 0.1
    with pytest.raises(Unsupported, match="needs a solver that is a plan"):
        draw("diffusers:DDIMScheduler+faster-diffusion(inject=0.003)", 5)


def test_named_keys_are_those_of_the_paper_at_fifty_steps() -> None:
    from evalbench.registry import get

    keys = __import__(get("method", "faster-diffusion").__module__, fromlist=["key_steps"]).key_steps
    assert keys("m", "50ls", 50) == {0, 1, 2, 3, 5, 10, 15, 25, 35}
    assert len(keys("m", "50ls-late", 50)) == 9
    assert keys("m", "uniform:4", 10) == {0, 4, 8}
    assert keys("m", "2/5", 10) == {0, 2, 5}
    assert all(max(keys("m", name, n)) < n for name in ("50ls", "50ls-late") for n in range(1, 60))


# --- interval-cache and layer-skip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_cache_computes_the_head_alone_in_between(kind: str) -> None:
    made = twins.setup(kind)
    x, ledger = draw("ddim+interval-cache(every=3)", 7, kind)
    blocks = made.door.blocks
    rest = share(kind, blocks.bypass(blocks.names))
    key = share(kind, blocks.keep_additions(blocks.names, {}))  # a UNet's shortcuts run once more beside their bodies
    assert key == pytest.approx(1.0) if kind != "sd" else 1.0 < key < 1.1
    assert ledger.nfe[0] == ledger.evals["base"][0] == 7
    assert ledger.cost[0] == pytest.approx(3 * key + 4 * rest)
    assert not torch.allclose(x, draw("ddim", 7, kind)[0], rtol=1e-3)
    assert torch.equal(draw("ddim+interval-cache(every=1)", 3, kind)[0], draw("ddim", 3, kind)[0])


def test_cached_additions_at_the_same_state_are_the_model() -> None:
    made = twins.setup("dit")
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    field = registry.build_method("ddim+interval-cache(every=2)").wraps[0].wrap(made.door)
    x = torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, cached = (field(x, 0.5, cond, step=Step(i, 4, 0.5, 0.4)) for i in (0, 1))
    torch.testing.assert_close(cached, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_blocks_are_not_paid_for(kind: str) -> None:
    made = twins.setup(kind)
    names = made.door.blocks.names
    for method, skipped in (("layer-skip", [names[len(names) // 2]]), ("layer-skip(blocks=1-2)", names[1:3])):
        _, ledger = draw(f"ddim+{method}", 4, kind)
        assert ledger.cost[0] == pytest.approx(4 * share(kind, made.door.blocks.bypass(skipped)))
        assert ledger.evals["base"][0] == 4
    _, late = draw("ddim+layer-skip(blocks=1-2,after=0.5)", 4, kind)
    assert late.cost[0] == pytest.approx((4 + ledger.cost[0]) / 2)


# --- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_in_an_interval_is_two_rows_inside_and_one_outside() -> None:
    _, ledger = draw("ddim+cfg-interval(scale=2,low=0.5,high=2.0)", 10, guidance=3.0)
    made = twins.setup("dit")
    plan = registry.build_method("ddim").solver.plan_for(made.path, made.door.grid, 10)  # type: ignore[attr-defined]
    levels = [float(made.path.sigma(op.t) / made.path.alpha(op.t)) for op in plan.ops if hasattr(op, "want")]
    inside = sum(0.5 < level <= 2.0 for level in levels)
    assert 0 < inside < 10
    assert ledger.evals["base"][0] == 10 + inside
    everywhere = "ddim+cfg-interval(scale=2,low=0,high=1e9)"
    assert torch.equal(draw(everywhere, 5)[0], draw("ddim+cfg(scale=2.0)", 5)[0])
    assert torch.equal(draw("ddim+cfg-interval(scale=2,low=1e8,high=1e9)", 5)[0], draw("ddim", 5)[0])


def test_autoguidance_is_the_linear_combination_of_both_models() -> None:
    made = twins.setup("dit", "dit-small")
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    field = registry.build_method("ddim+autoguidance(scale=3)").wraps[0].wrap(made.door)
    x = torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, guide, model = field(x, 0.5, cond), made.door.role("small")(x, 0.5, cond), made.door(x, 0.5, cond)
    torch.testing.assert_close(found, guide + 3 * (model - guide))
    _, ledger = draw("ddim+autoguidance(scale=3)", 4, small="dit-small")
    assert ledger.evals["base"][0] == ledger.evals["small"][0] == ledger.nfe[0] == 4
    assert 4.0 < ledger.cost[0] < 8.0


# --- all of them ----------------------------------------------------------------------------------------------------

METHODS = (
    "faster-diffusion(keys=uniform:3)",
    "faster-diffusion(keys=uniform:3,parallel=true)",
    "faster-diffusion(keys=uniform:3,propagate=decoder)",
    "interval-cache(every=3)",
    "interval-cache(every=3,blocks=1-2)",
    "layer-skip(blocks=1-2)",
)


@pytest.mark.parametrize("method", METHODS)
def test_methods_compose_with_solvers_and_leave_the_network_as_it_was(method: str) -> None:
    network = twins.setup("dit").door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for solver in SOLVERS:
        plain, _ = draw(solver, 7)
        x, ledger = draw(f"{solver}+{method}", 7)
        assert torch.isfinite(x).all()
        assert not torch.equal(x, plain), solver
        assert (ledger.cost < ledger.nfe).all()
        assert torch.equal(draw(solver, 7)[0], plain), "nothing stays"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("forward" in vars(module) for module in network.modules())


def test_wraps_of_the_network_compose_with_each_other_and_with_guidance() -> None:
    chain = "dpm-solver++(order=2)+faster-diffusion(keys=uniform:3)+layer-skip(blocks=3-3)"
    x, ledger = draw(chain, 7, guidance=2.0)
    assert torch.isfinite(x).all()
    assert ledger.evals["base"][0] == 14
    _, cached = draw("dpm-solver++(order=2)+faster-diffusion(keys=uniform:3)", 7, guidance=2.0)
    assert ledger.cost[0] < cached.cost[0]
    _, other = draw("dpm-solver++(order=2)+layer-skip(blocks=3-3)+faster-diffusion(keys=uniform:3)", 7, guidance=2.0)
    assert other.cost[0] == pytest.approx(ledger.cost[0])


@pytest.mark.parametrize(
    ("method", "needs"), [("faster-diffusion", "split"), ("interval-cache", "blocks"), ("layer-skip", "blocks")]
)
def test_a_model_without_the_hook_is_not_supported(method: str, needs: str) -> None:
    from evalbench.spec import load_suite

    made = sampling.build(load_suite("gmm-smooth").override(batch=2))
    cell = make_cell(made.suite, f"ddim+{method}", 4, 1.0, 0)
    with pytest.raises(Unsupported, match=f"^not supported: needs {needs}$"):
        sampling.sample(made, registry.build_method(f"ddim+{method}"), cell, range(2), Cond(), Ledger(2, 4))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("faster-diffusion(keys=0/7)", "key 7 is beyond the grid of 5 steps"),
        ("faster-diffusion(at=4)", "the network has 4 blocks"),
        ("interval-cache(blocks=2-9)", "block 9 does not exist: the network has 4"),
        ("layer-skip(blocks=4-4)", "block 4 does not exist: the network has 4"),
    ],
)
def test_steps_and_blocks_that_do_not_exist_are_refused_before_anything_runs(method: str, says: str) -> None:
    from support import request

    from evalbench.plan import make_plan

    with pytest.raises(UserError, match=says) as error:
        make_plan(request(twins.suite("dit"), [f"ddim+{method}"], metrics=()))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "method",
    [
        "faster-diffusion(keys=often)",
        "faster-diffusion(keys=uniform:0)",
        "faster-diffusion(parallel=true,propagate=decoder)",
        "interval-cache(every=0)",
        "interval-cache(blocks=5-2)",
        "layer-skip(after=1.5)",
        "cfg-interval(low=2,high=1)",
    ],
)
def test_settings_that_mean_nothing_are_refused_in_a_line(method: str) -> None:
    with pytest.raises(UserError, match=method.partition("(")[0]) as error:
        registry.build_method(f"ddim+{method}")
    assert "\n" not in str(error.value)
