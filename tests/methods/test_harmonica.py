"""HarmoniCa: what its table computes and reuses, what the ledger says of it, and what trains it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import twins
from methods_inside import B, ByHand, draw, draw_with, prepared

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Cond, Step
from evalbench.preparation import Context, prepare
from evalbench.runner import make_cell
from evalbench.spec import load_suite

harmonica = sys.modules[registry.get("method", "harmonica").__module__]  # nobody imports a method by its name
KINDS = ("dit", "sd", "sd3")


def artifact(table: Any) -> Artifact:
    return Artifact({"compute": np.asarray(table, dtype=np.uint8)}, {})


def sub_layers(kind: str) -> list[str]:
    found: list[str] = harmonica.sub_layers(twins.setup(kind).door.blocks)
    return found


def routed(table: Any, nfe: int, kind: str = "dit", guidance: float = 1.0) -> tuple[torch.Tensor, Ledger]:
    return draw_with([None, artifact(table)], "ddim+harmonica", nfe, kind, guidance)


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_table_that_computes_all_is_the_model_itself_to_the_bit(kind: str, guidance: float) -> None:
    x, ledger = routed(np.ones((4, len(sub_layers(kind)))), 4, kind, guidance)
    plain, whole = draw("ddim", 4, kind, guidance)
    assert torch.equal(x, plain)
    np.testing.assert_allclose(ledger.cost, whole.cost)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_reused_sub_layer_is_not_paid_for(guidance: float) -> None:
    twin = ByHand.of("dit")
    parts = np.tile([twin.attention, twin.feed_forward], twin.blocks)
    rest = twin.whole - parts.sum()
    table = np.random.default_rng(0).random((5, 8)) < 0.6
    table[0] = True
    x, ledger = routed(table, 5, guidance=guidance)
    calls = 1 if guidance == 1.0 else 2
    assert ledger.nfe.tolist() == [5.0] * B
    assert ledger.evals["base"].tolist() == [5.0 * calls] * B
    np.testing.assert_allclose(ledger.cost, calls * (5 * rest + (table * parts).sum()) / (rest + parts.sum()))
    np.testing.assert_allclose(ledger.flops, calls * (5 * rest + (table * parts).sum()))
    assert not torch.allclose(x, draw("ddim", 5, guidance=guidance)[0], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reused_at_the_same_state_is_the_model(kind: str) -> None:
    made = twins.setup(kind)
    cond, names = sampling.conditions(made.suite, made.model, range(B), made.device), sub_layers(kind)
    made.door.ledger = Ledger(B)
    method = registry.build_method("ddim+harmonica").wraps[0]
    table = np.zeros((4, len(names)))
    x = torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    field = method.equipped(artifact(table)).wrap(made.door)
    with torch.no_grad():
        full, cached, next_walk = (field(x, 0.5, cond, step=Step(i, 4, 0.5, 0.4)) for i in (0, 1, 0))
        moved = field(x + 1.0, 0.5, cond, step=Step(2, 4, 0.5, 0.4))
        plain = made.door(x, 0.5, cond)
    assert torch.equal(full, plain), "the first step computes all, whatever the table says"
    assert torch.equal(next_walk, plain)
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, full)


def test_outputs_are_kept_before_the_gate_of_the_norm() -> None:
    """At another time the last block adds gate(t) times its old feed-forward output."""
    made = twins.setup("dit")
    cond, names = sampling.conditions(made.suite, made.model, range(B), made.device), sub_layers("dit")
    made.door.ledger = Ledger(B)
    blocks, last = made.door.blocks, made.door.blocks.names[-1]
    block = made.model.network.net.get_submodule(last)
    table = np.ones((2, len(names)))
    table[1, -1] = 0
    field = registry.build_method("ddim+harmonica").wraps[0].equipped(artifact(table)).wrap(made.door)
    x = torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    cached: dict[str, Any] = {}
    with torch.no_grad():
        with blocks.read([f"{last}.ff"], old)():
            field(x, 0.7, cond, step=Step(0, 2, 0.7, 0.3))
        with blocks.read([f"{last}.ff", last], new)():
            made.door(x, 0.3, cond)
        with blocks.read([last], cached)():
            field(x, 0.3, cond, step=Step(1, 2, 0.3, 0.0))
        t = made.model.timesteps(0.3, x)
        gate = block.norm1(torch.zeros(B, 1, 16, dtype=made.dtype), t, cond.labels, hidden_dtype=made.dtype)[4]
    expected = new[last] + gate[:, None] * (old[f"{last}.ff"] - new[f"{last}.ff"])
    torch.testing.assert_close(cached[last], expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(cached[last], new[last])


def test_a_table_of_other_steps_is_refused() -> None:
    with pytest.raises(Unsupported, match="the table has 5 steps, the solver makes 4"):
        routed(np.ones((5, 8)), 4)


# --- training -------------------------------------------------------------------------------------------------------


def context(text: str, nfe: int = 4, kind: str = "dit") -> Context:
    made = twins.setup(kind)
    return Context(made, registry.build_method(text), make_cell(made.suite, text, nfe, 1.0, 0), 1, [])


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_is_that_of_the_weighted_error(kind: str) -> None:
    """Against differences of the loss of predictions with o = s new + (1 - s) old."""
    made, settings = twins.setup(kind), registry.build_method("ddim+harmonica").wraps[0]
    field, router = context("ddim+harmonica", kind=kind).denoiser(B), harmonica._Router(settings)
    networks: list[Any] = []
    field = field.within(lambda inner: networks.append(harmonica._Training(inner, settings, router)) or networks[-1])
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, *made.model.shape, dtype=made.dtype, generator=generator) for _ in range(2))
    (network,) = networks
    with torch.no_grad():
        field(x, 0.8, cond, step=Step(0, 2, 0.8, 0.5))
        (last,) = network.kept.values()
        router.rows[1] = torch.randn(len(router.rows[1]), dtype=made.dtype, generator=generator)
        router.weights[1] = 3.0
        target = made.door(y, 0.5, cond, made.door.native)

        def loss() -> float:
            out, _ = network._mixed(y, 0.5, cond, target, last, {}, Step(1, 2, 0.5, 0.0), None)
            return 3.0 * float(((out - target) ** 2).mean())

        _, slope = network._mixed(y, 0.5, cond, target, last, {}, Step(1, 2, 0.5, 0.0), None)
        s, small = router.gates(1).double(), 1e-5 if made.dtype == torch.float64 else 3e-2
        for k in range(0, len(s), 3):
            ends = []
            for sign in (1.0, -1.0):
                moved = s.clone()
                moved[k] += sign * small
                router.rows[1] = torch.logit(moved).to(made.dtype)
                ends.append(loss())
            router.rows[1] = torch.logit(s).to(made.dtype)
            expected = (ends[0] - ends[1]) / (2 * small)
            assert float(slope[k]) == pytest.approx(expected, rel=1e-4 if small < 1e-3 else 0.05, abs=1e-5)


@pytest.mark.parametrize("training", ["sdt", "stepwise"])
def test_the_cache_is_in_the_loop_or_the_full_network_is(training: str) -> None:
    """What a training step keeps and hands to the solver, on both sides of the threshold of s."""
    made = twins.setup("dit")
    settings = registry.build_method(f"ddim+harmonica(training={training})").wraps[0]
    field, router = context("ddim+harmonica").denoiser(B), harmonica._Router(settings)
    networks: list[Any] = []
    field = field.within(lambda inner: networks.append(harmonica._Training(inner, settings, router)) or networks[-1])
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    x = torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = field(x, 0.8, cond, step=Step(0, 2, 0.8, 0.5))
        (before,) = [dict(kept) for kept in networks[0].kept.values()]
        names = list(before)
        router.rows[1][:] = torch.tensor([1.0, -1.0] * 4)
        second = field(x + 1.0, 0.5, cond, step=Step(1, 2, 0.5, 0.0))
        (after,) = networks[0].kept.values()
        plain = made.door(x + 1.0, 0.5, cond)
    assert torch.equal(first, made.door(x, 0.8, cond))
    stays = [torch.equal(after[name], before[name]) for name in names]
    assert stays == ([False, True] * 4 if training == "sdt" else [False] * 8)
    assert torch.equal(second, plain) == (training == "stepwise")
    assert not second.requires_grad


def test_lambda_is_what_a_step_does_to_the_final_samples() -> None:
    made, settings = context("ddim+harmonica(batch=3)", 5), registry.build_method("ddim+harmonica(batch=3)").wraps[0]
    table = np.ones((5, 8), bool)
    with torch.no_grad():
        assert harmonica._weights(made, settings, table) == [0.0] * 5
        table[2, 3:] = table[4, :2] = False
        weights = harmonica._weights(made, settings, table)
        ends = []
        for mask in (np.ones((5, 8), bool), np.vstack([np.ones((2, 8)), table[2:3], np.ones((2, 8))]) > 0, table):
            ends.append(
                harmonica.walked(made, settings, lambda inner, m=mask: harmonica._Routed(inner, settings, m), 0)
            )
    assert [weight > 0 for weight in weights] == [False, False, True, False, True]
    assert weights[2] == pytest.approx(float(((ends[1] - ends[0]) ** 2).mean()))
    assert weights[4] == pytest.approx(float(((ends[2] - ends[1]) ** 2).mean()))


@pytest.mark.parametrize("nfe", [1, 2, 6])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_a_ratio_of_the_sub_layers_is_reused_and_none_of_the_first_step(nfe: int, ratio: float) -> None:
    (_, found) = prepared(f"ddim+harmonica(ratio={ratio})", nfe).artifacts
    assert found is not None
    table = found.arrays["compute"]
    assert table.shape == (nfe, 8)
    assert table[0].all()
    assert (table == 0).sum() == min(round(ratio * nfe * 8), (nfe - 1) * 8)
    assert found.facts["reused"] == pytest.approx((table == 0).mean())
    later = found.arrays["logits"][1:]
    if 0 < (table == 0).sum() < (nfe - 1) * 8:
        assert later[table[1:] == 0].max() <= later[table[1:] == 1].min(), "the lowest logits"


def test_a_fixed_beta_moves_logits_and_the_paper_computes_where_s_is_above_a_tenth() -> None:
    few, many = (
        prepared(f"ddim+harmonica(ratio=0,beta={beta},rollouts=40,lr=0.2)", 4).artifacts[1] for beta in (1e3, 1e-12)
    )
    assert few is not None
    assert many is not None
    assert not few.arrays["compute"][1:].any()
    assert few.arrays["logits"][1:].max() < -2.2
    assert few.arrays["logits"].min() >= -5.0
    assert many.arrays["compute"].all()
    assert (many.arrays["logits"][0] == 5.0).all()


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_a_learned_table_is_nearer_to_the_model_than_its_opposite(kind: str) -> None:
    nfe, plain = 8, draw("ddim", 8, kind)[0]
    (_, found) = prepared("ddim+harmonica(rollouts=12,lr=0.1,batch=8)", nfe, kind).artifacts
    assert found is not None
    table, later = found.arrays["compute"], found.arrays["logits"][1:]
    opposite = np.ones(table.size)
    opposite[table.shape[1] + np.argsort(-later.ravel())[: int((table == 0).sum())]] = 0
    errors = [float((routed(one, nfe, kind)[0] - plain).norm()) for one in (table, opposite.reshape(table.shape))]
    assert errors[0] < 0.8 * errors[1]


def test_training_is_billed_and_depends_on_its_seed() -> None:
    text = "ddim+harmonica(rollouts=3,batch=4,refresh=6)"
    found = prepared(text, 5)
    # the first roll-out only finds beta; then 4 updates in each, and lambda after the third
    training, weights = 3 * 5 * 4, 5 * 5 * 4
    assert found.bill["nfe"] == training + weights
    assert found.bill["evals.base"] == training + 3 * 4 * 4 + weights
    assert found.bill["backward"] == 3 * 4 * 4
    again, other = prepared.__wrapped__(text, 5).artifacts[1], prepared(text.replace(")", ",seed=1)"), 5).artifacts[1]
    assert found.artifacts[1] is not None
    np.testing.assert_array_equal(found.artifacts[1].arrays["logits"], again.arrays["logits"])
    assert not np.array_equal(again.arrays["logits"], other.arrays["logits"])


# --- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_composes_with_solvers_and_leaves_the_network_as_it_was(kind: str) -> None:
    network = twins.setup(kind).door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for solver in ("ddim", "heun", "dpm-solver++(order=2)", "unipc"):
        plain, _ = draw(solver, 7, kind)
        x, ledger = draw(f"{solver}+harmonica", 7, kind)
        assert torch.isfinite(x).all()
        assert not torch.equal(x, plain), solver
        assert (ledger.cost < ledger.nfe).all()
        assert torch.equal(draw(solver, 7, kind)[0], plain), "nothing stays"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("forward" in vars(module) for module in network.modules())


def test_it_composes_with_blocks_that_are_left_out() -> None:
    _, ledger = draw("ddim+layer-skip(blocks=1-1)+harmonica", 5)
    _, skipped = draw("ddim+layer-skip(blocks=1-1)", 5)
    assert ledger.cost[0] < skipped.cost[0]


def test_a_model_without_blocks_is_not_supported() -> None:
    made = sampling.build(load_suite("gmm-smooth").override(batch=2))
    cell, chain = make_cell(made.suite, "ddim+harmonica", 4, 1.0, 0), registry.build_method("ddim+harmonica")
    with pytest.raises(Unsupported, match=r"^not supported: needs blocks$"):
        sampling.sample(made, chain, cell, range(2), Cond(), Ledger(2, 4))
    with pytest.raises(Unsupported, match=r"^not supported: needs blocks$"):
        prepare(made, chain, cell)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("batch=0", "batch must be at least 1, got 0: the table is trained on samples"),
        ("rollouts=0", "rollouts must be at least 1"),
        ("refresh=0", "refresh must be at least 1"),
        ("ratio=1", r"ratio must be in \[0, 1\), got 1"),
        ("lr=0", "lr must be above 0"),
        ("beta=-1", "beta must be above 0"),
        ("training=never", "Input should be"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_a_line(settings: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        registry.build_method(f"ddim+harmonica({settings})")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd-1.5", "dit-xl"])
def test_it_runs_on_the_depth_and_blocks_of_large_networks(kind: str) -> None:
    x, ledger = draw("ddim+harmonica(batch=1)", 3, kind)
    assert torch.isfinite(x).all()
    assert 0 < ledger.cost[0] < ledger.nfe[0] == 3
