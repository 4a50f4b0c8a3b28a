"""DeeDiff: who leaves when, what the ledger says of it, and what training does."""

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
from evalbench.interfaces import Artifact, Cond
from evalbench.noise import NoiseSource
from evalbench.preparation import Context, prepare
from evalbench.runner import make_cell
from evalbench.spec import load_suite

deediff = sys.modules[registry.get("method", "deediff").__module__]  # nobody imports a method by its name
POLICIES = ("uncertainty", "fixed", "random")


def cost(ran: int, *, head: bool = True) -> float:
    """What a row of the twin costs after so many blocks, by hand."""
    twin = ByHand.of("dit")
    mapped = 2 * twin.tokens * twin.width**2 if head and ran < twin.blocks else 0
    return (twin.ends + ran * twin.block + mapped) / twin.whole


def artifact(kind: str = "dit", *, threshold: float = 0.5, bias: tuple[float, ...] = (), often: Any = None) -> Artifact:
    """Heads that change nothing, and estimators that always say the same."""
    names = twins.setup(kind).door.blocks.names
    like = torch.zeros(1, dtype=torch.float64)
    trained = deediff.Trained.fresh(len(names) - 1, 16, like)._replace(bias=torch.tensor(bias or (9.0,) * 3))
    arrays = trained.arrays() | {"often": np.array(often or [0.25] * 4)}
    return Artifact(arrays, {"threshold": threshold, "mean_depth": 0.5})


# --- who leaves when ------------------------------------------------------------------------------------------------


def test_the_network_ends_where_its_estimate_is_low() -> None:
    """Estimators that are certain at the third block alone: a network of three blocks."""
    x, ledger = draw_with([None, artifact(bias=(9.0, 9.0, -9.0))], "ddim+deediff", 5)
    assert torch.allclose(x, draw("ddim+layer-skip(blocks=3-3)", 5)[0], rtol=1e-12, atol=1e-12)
    assert ledger.nfe.tolist() == ledger.evals["base"].tolist() == [5.0] * B
    np.testing.assert_allclose(ledger.cost, 5 * cost(3))


def test_uncertain_samples_see_the_model_itself_to_the_bit() -> None:
    x, ledger = draw_with([None, artifact(threshold=0.0)], "ddim+deediff", 5)
    plain, whole = draw("ddim", 5)
    assert torch.equal(x, plain)
    np.testing.assert_allclose(ledger.cost, 5.0)
    np.testing.assert_allclose(ledger.flops, whole.flops)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_fixed_exit_costs_what_its_blocks_cost(guidance: float) -> None:
    calls = 4 * (2 if guidance != 1.0 else 1)
    for depth, ran in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        chain = f"ddim+deediff(policy=fixed,depth={depth})"
        x, ledger = draw_with([None, artifact()], chain, 4, guidance=guidance)
        assert ledger.evals["base"][0] == calls
        np.testing.assert_allclose(ledger.cost, calls * cost(ran))
        same = "ddim" if ran == 4 else f"ddim+layer-skip(blocks={ran}-3)"
        torch.testing.assert_close(x, draw(same, 4, guidance=guidance)[0], rtol=1e-12, atol=1e-12)


def test_random_exits_are_those_of_each_sample_and_are_paid_one_by_one() -> None:
    often, nfe, batch = [0.5, 0.0, 0.25, 0.25], 6, [5, 2, 9]
    x, ledger = draw_with([None, artifact(often=often)], "ddim+deediff(policy=random)", nfe, batch=batch)
    made = twins.setup("dit")
    noise = NoiseSource(0, batch, made.model.shape, made.dtype)

    def draws(step: int) -> list[float]:
        return noise.uniform("deediff", step)[:, 0, 0, 0].tolist()

    blocks = [[1 + int(np.searchsorted([0.5, 0.5, 0.75], u, side="right")) for u in draws(i)] for i in range(nfe)]
    assert {ran for step in blocks for ran in step} == {1, 3, 4}
    np.testing.assert_allclose(ledger.cost, [sum(cost(step[row]) for step in blocks) for row in range(3)])
    backwards = draw_with([None, artifact(often=often)], "ddim+deediff(policy=random)", nfe, batch=batch[::-1])
    assert torch.equal(x, backwards[0].flip(0))
    np.testing.assert_array_equal(ledger.cost, backwards[1].cost[::-1])


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_samples_of_one_batch_leave_at_different_blocks(kind: str) -> None:
    chain = "ddim+deediff(depth=0.6)"
    found = prepared(chain, 8, kind).artifacts
    _, ledger = draw_with(found, chain, 8, kind, batch=range(12))
    assert len(np.unique(ledger.cost.round(9))) > 1
    assert (ledger.cost < 8).any()


# --- training -------------------------------------------------------------------------------------------------------


def context(text: str = "ddim+deediff", guidance: float = 1.0, kind: str = "dit") -> Context:
    made = twins.setup(kind)
    return Context(made, registry.build_method(text), make_cell(made.suite, text, 4, guidance, 0), 1, [])


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_gradients_are_those_of_the_loss(kind: str) -> None:
    """Against one graph through the network's head."""
    field, network = deediff._watched(context(kind=kind), 3)
    made = twins.setup(kind)
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(3, *made.model.shape, dtype=made.dtype, generator=generator) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=made.dtype)
    with torch.no_grad():
        field(x, t, sampling.conditions(made.suite, made.model, range(3), made.device), network.native)
        tokens = network.seen[0].tokens
        shapes = [one.shape for one in deediff.Trained.fresh(len(tokens), tokens.shape[-1], tokens)]
        trained = deediff.Trained(*(0.1 * torch.randn(s, dtype=made.dtype, generator=generator) for s in shapes))
        ours = deediff._gradients(trained, network, target)
    free = deediff.Trained(*(one.requires_grad_() for one in trained))
    given = made.model.given(network.seen[0].cond)
    sines, loss = deediff._sines(made.path, t, x), torch.zeros((), dtype=made.dtype)
    for i, each in enumerate(tokens):
        with network.blocks.end(free.mapped(i, each))():
            out = made.model.predict(x, t, 0.0, 0.0, given)
        error = ((out - target) ** 2).flatten(1).mean(1)
        u = free.uncertainty(i, each, sines)
        loss = loss + ((u - torch.tanh(error.detach())) ** 2 + (1 - u) * error).mean()
    for one, other in zip(ours, torch.autograd.grad(loss, list(free)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_brings_the_heads_nearer_and_the_estimates_to_their_errors() -> None:
    def errors(found: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of heads and of estimators, (E,), on noised data that training did not see."""
        trained = deediff.Trained.of(Artifact(found), torch.zeros(1, dtype=torch.float64))
        made, n = context(), 128
        field, network = deediff._watched(made, n)
        x0, cond = made.data(n, 7)
        rng = np.random.default_rng(0)
        t = torch.as_tensor(rng.uniform(made.path.t_end, made.path.t_start, n))
        eps = torch.as_tensor(rng.standard_normal(x0.shape))
        alpha, sigma = (torch.as_tensor(f(t.numpy())).view(-1, 1, 1, 1) for f in (made.path.alpha, made.path.sigma))
        with torch.no_grad():
            field(alpha * x0 + sigma * eps, t, cond, network.native)
            (seen,) = network.seen
            mapped = torch.stack([trained.mapped(i, tokens) for i, tokens in enumerate(seen.tokens)])
            error, _ = deediff._errors(network.inner, seen, mapped, eps)
            sines = deediff._sines(made.path, t, seen.x)
            u = torch.stack([trained.uncertainty(i, tokens, sines) for i, tokens in enumerate(seen.tokens)])
            return error.mean(1).numpy(), ((u - torch.tanh(error)) ** 2).mean(1).numpy()

    text = "ddim+deediff(iterations={},lr={})"
    (_, before), (_, after) = (prepared(text.format(*setting)).artifacts for setting in ((1, 1e-9), (150, 1e-2)))
    assert before is not None
    assert after is not None
    for worse, better in zip(errors(before.arrays), errors(after.arrays), strict=True):
        assert (better < 0.9 * worse).all()


def test_what_is_prepared_is_billed_and_depends_on_its_seed() -> None:
    text = "ddim+deediff(images=8,iterations=3)"
    found = prepared(text)
    images, steps, exits = 8, 25, 3
    assert found.bill["nfe"] == 3 * images + steps * images
    assert found.bill["evals.base"] == found.bill["nfe"] + 3 * exits * images
    assert found.bill["backward"] == 3 * exits * images
    assert found.bill["cost"] == pytest.approx(found.bill["nfe"] + 3 * exits * images * 2 * cost(0), rel=0.2)
    other = prepared("ddim+deediff(images=8,iterations=3,seed=1)").artifacts[1]
    again = prepared.__wrapped__(text).artifacts[1]
    assert found.artifacts[1] is not None
    for name, array in found.artifacts[1].arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert not np.array_equal(found.artifacts[1].arrays["head"], other.arrays["head"])


@pytest.mark.parametrize("depth", [0.3, 0.5, 0.8, 1.0])
def test_the_threshold_makes_the_mean_depth(depth: float) -> None:
    u = np.random.default_rng(0).random((4000, 5)) ** 2
    threshold = deediff._threshold(u, depth)
    # row by row: blocks are run until one is certain
    ran = [next((i + 1 for i in range(5) if row[i] < threshold), 6) for row in u]
    assert np.mean(ran) / 6 == pytest.approx(depth, abs=1e-3)


def test_baselines_have_the_same_heads_and_depth() -> None:
    found = {
        policy: prepared(f"ddim+deediff(policy={policy},images=8,iterations=3)").artifacts[1] for policy in POLICIES
    }
    first = found["uncertainty"]
    assert first is not None
    for other in found.values():
        assert other is not None
        assert other.facts == first.facts
        np.testing.assert_array_equal(other.arrays["head"], first.arrays["head"])
    often = first.arrays["often"]
    assert often.sum() == pytest.approx(1.0)
    assert often @ np.arange(1, 5) / 4 == pytest.approx(first.facts["mean_depth"])
    assert first.facts["mean_depth"] == pytest.approx(0.5, abs=0.01)


# --- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_it_composes_with_solvers_and_leaves_the_network_as_it_was(policy: str) -> None:
    network = twins.setup("dit").door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for solver in ("ddim", "heun", "dpm-solver++(order=2)", "unipc"):
        plain, _ = draw(solver, 7)
        x, ledger = draw(f"{solver}+deediff(policy={policy},images=8,iterations=5)", 7)
        assert torch.isfinite(x).all()
        assert not torch.equal(x, plain), solver
        assert (ledger.cost < ledger.nfe).all()
        assert torch.equal(draw(solver, 7)[0], plain), "nothing stays"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("chain", ["layer-skip+deediff", "deediff+faster-diffusion", "interval-cache+deediff"])
def test_other_changes_of_the_network_are_refused(chain: str) -> None:
    artifacts = [artifact() if part == "deediff" else None for part in ("ddim", *chain.split("+"))]
    with pytest.raises(Unsupported, match="another change of the network"):
        draw_with(artifacts, f"ddim+{chain}", 4)


@pytest.mark.parametrize(("suite", "needs"), [("gmm-smooth", "blocks, exits"), ("fashion-sd", "exits")])
def test_a_model_without_exits_is_not_supported(suite: str, needs: str) -> None:
    made = sampling.build(load_suite(suite).override(batch=2)) if suite.startswith("gmm") else twins.setup("sd")
    cell = make_cell(made.suite, "ddim+deediff", 4, 1.0, 0)
    with pytest.raises(Unsupported, match=f"^not supported: needs {needs}$"):
        sampling.sample(made, registry.build_method("ddim+deediff"), cell, range(2), Cond(), Ledger(2, 4))
    with pytest.raises(Unsupported, match=f"^not supported: needs {needs}$"):
        prepare(made, registry.build_method("ddim+deediff"), cell)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("images=0", "images must be at least 1, got 0: heads are trained on images"),
        ("iterations=0", "iterations must be at least 1"),
        ("depth=0", r"depth must be in \(0, 1\]"),
        ("depth=1.1", r"depth must be in \(0, 1\]"),
        ("threshold=-1", "threshold must be in 0..1"),
        ("lr=0", "lr must be above 0"),
        ("policy=none", "Input should be"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_a_line(settings: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        registry.build_method(f"ddim+deediff({settings})")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_depth_of_less_than_a_block_is_refused_before_anything_runs() -> None:
    from support import request

    from evalbench.plan import make_plan

    with pytest.raises(UserError, match=r"less than one of the network's 4 blocks; give at least 0.25$"):
        make_plan(request(twins.suite("dit"), ["ddim+deediff(depth=0.2)"], metrics=()))
