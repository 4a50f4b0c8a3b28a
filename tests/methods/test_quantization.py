"""Quantisations on networks of diffusers' classes: what is exact, what it costs, what it composes with."""

from __future__ import annotations

import re
import sys
from functools import cache

import numpy as np
import pytest
import torch
import twins

from evalbench import cli, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Denoiser
from evalbench.preparation import Prepared, prepare
from evalbench.registry import Chain
from evalbench.runner import make_cell

# nobody imports a method by its name
tfmq = sys.modules[registry.get("method", "tfmq").__module__]
core = sys.modules[tfmq.built.__module__]
FakeQuant, layers, TimeFeatures = core.FakeQuant, core.layers, tfmq.TimeFeatures
kind_of = sys.modules[registry.get("method", "vidit-q").__module__].kind_of

SMALL = "samples=3,steps=3"
EVERYWHERE = [f"ptq4dm({SMALL}", f"vidit-q({SMALL}"]
PAIRS = [(kind, method) for kind in ("dit", "sd", "sd3") for method in EVERYWHERE] + [
    ("sd", f"tfmq({SMALL},groups=2,tiar=5"),
    ("sd", "tfmq-cache(samples=3,groups=2"),
]

ONE_OF_EACH = [("dit", PAIRS[0][1]), ("sd3", PAIRS[1][1]), *PAIRS[6:]]


@cache
def prepared(kind: str, method: str, nfe: int = 4, guidance: float = 1.5) -> Prepared:
    setup = twins.setup(kind)
    return prepare(setup, registry.build_method(method), make_cell(setup.suite, method, nfe, guidance, 0))


def chain_of(kind: str, method: str, nfe: int = 4, guidance: float = 1.5) -> Chain:
    chain = registry.build_method(method)
    return chain.equipped(prepared(kind, method, nfe, guidance).artifacts) if chain.prepares else chain


def artifact(kind: str, method: str) -> Artifact:
    found = prepared(kind, method).artifacts[1]
    assert found is not None
    return found


def sampled(kind: str, method: str, nfe: int = 4, guidance: float = 1.5) -> tuple[torch.Tensor, Ledger]:
    setup = twins.setup(kind)
    indices = [0, 1, 2]
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    ledger = Ledger(len(indices), budget=nfe)
    cell = make_cell(setup.suite, method, nfe, guidance, 0)
    return sampling.sample(setup, chain_of(kind, method, nfe, guidance), cell, indices, cond, ledger), ledger


def field(kind: str, method: str, guidance: float = 1.0) -> tuple[Denoiser, Ledger]:
    """The door inside a method's wraps, for a batch of three."""
    setup, chain = twins.setup(kind), chain_of(kind, method, 4, guidance)  # which may prepare, on a bill of its own
    setup.door.ledger = Ledger(3)
    return sampling.wrapped(setup.door, chain, guidance), setup.door.ledger


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_unquantised_bits_reproduce_the_model_to_the_bit(kind: str, method: str) -> None:
    exact, _ = sampled(kind, "ddim")
    found, _ = sampled(kind, f"ddim+{method},bits=w32a32)")
    if "cache" in method:  # one row per time, whose last digits may differ from a batch's
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    else:
        assert torch.equal(found, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), ONE_OF_EACH)
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++(order=2)", "unipc"])
def test_it_composes_with_solvers_and_leaves_the_network_alone(kind: str, method: str, solver: str) -> None:
    network = twins.setup(kind).door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = dict(network.named_modules())
    exact, plain = sampled(kind, solver)
    found, ledger = sampled(kind, f"{solver}+{method},bits=w4a8)")
    assert bool(torch.isfinite(found).all())
    assert not torch.equal(found, exact)
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(sampled(kind, solver)[0], exact)
    # guided: two rows for each of four evaluations, each as many operations as the network's
    assert ledger.nfe.tolist() == plain.nfe.tolist() == [4.0] * 3
    assert ledger.evals["base"].tolist() == [8.0] * 3
    if "cache" not in method:
        np.testing.assert_allclose(ledger.flops, plain.flops)
        np.testing.assert_allclose(ledger.cost, 8.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"), [("dit", "ptq4dm(samples=3,steps=3)"), ("sd", "vidit-q(samples=3,steps=3)")]
)
def test_more_bits_are_nearer_to_the_network(kind: str, method: str) -> None:
    exact, _ = sampled(kind, "ddim")
    errors = [
        float((sampled(kind, f"ddim+{method[:-1]},bits={bits})")[0] - exact).square().mean())
        for bits in ("w3a3", "w5a5", "w8a8")
    ]
    assert errors[0] > errors[1] > errors[2] > 0.0


def test_what_is_quantised_is_what_the_methods_say() -> None:
    network = twins.setup("dit").door.network
    wanted = {name for name in layers(network) if kind_of(name)}
    assert set(artifact("dit", "ddim+vidit-q(samples=3,steps=3)").facts["layers"]) == wanted
    assert all(re.match(r"transformer_blocks\.\d+\.(attn1|ff)\.", name) for name in wanted)
    every = list(layers(network))
    found = artifact("dit", "ddim+ptq4dm(bits=w4a4,samples=3,steps=3)").facts["layers"]
    assert set(found) == set(every)
    assert [found[every[0]]["bits"], found[every[-1]]["bits"]] == [["w8a8"]] * 2  # the ends
    assert found[every[1]]["bits"] == ["w4a4"]


def test_size_and_bit_operations_are_reported() -> None:
    facts = artifact("dit", "ddim+ptq4dm(bits=w8a8,samples=3,steps=3)").facts["footprint"]
    network = twins.setup("dit").door.network
    weights = sum(layer.weight.numel() for layer in layers(network).values())  # type: ignore[operator, union-attr]
    assert facts["weight_bytes_full"] == 4 * sum(p.numel() for p in network.parameters())
    saved = facts["weight_bytes_full"] - 3 * weights
    rows = sum(len(layer.weight) for layer in layers(network).values())  # type: ignore[arg-type]
    assert facts["weight_bytes"] == saved + rows * (32 + 8) / 8
    assert facts["activation_bits"] == 8
    assert facts["bops"] / facts["bops_full"] == pytest.approx(64 / 1024)


def test_calibration_is_billed() -> None:
    # three trajectories of three evaluations, then each chosen state once, both branches of guidance
    bill = prepared("dit", "ddim+ptq4dm(samples=3,steps=3)").bill
    assert bill["nfe"] == 3 * 3 + 3
    assert bill["evals.base"] == 2 * bill["nfe"]
    assert bill["seconds"] > 0
    assert prepared("dit", "ddim+vidit-q(samples=3,steps=3)").bill["nfe"] == 3 * 3 + 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["ndtc", "uniform", "noise", "images", "forward"])
def test_calibration_sets_are_where_they_say(calibration: str) -> None:
    method = f"ddim+ptq4dm(calibration={calibration},samples=6,steps=20)"
    path = twins.setup("dit").path
    times = np.array(artifact("dit", method).facts["times"])
    assert len(times) == 6
    assert bool(((times > 0) & (times <= path.t_start)).all())
    if calibration == "ndtc":  # 0.4 +- sqrt(500) / 1000, on a grid of twenty times
        assert bool((abs(times - 0.4) < 4 * np.sqrt(500) / 1000 + 0.05).all())
    if calibration == "noise":
        assert bool((times == path.t_start).all())
    if calibration == "images":
        np.testing.assert_allclose(times, path.t_end)
    assert bool(torch.isfinite(sampled("dit", method)[0]).all())


def test_a_batch_of_several_time_groups_is_as_each_row_alone() -> None:
    x = torch.randn(3, *twins.setup("sd").model.shape, dtype=torch.float64)
    setup = twins.setup("sd")
    cond = sampling.conditions(setup.suite, setup.model, [0, 1, 2], setup.device)
    t = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)
    quantised, ledger = field("sd", f"ddim+tfmq({SMALL},groups=2,tiar=0,bits=w4a4,adaround=false)")
    together = quantised(x, t, cond)
    assert ledger.evals["base"].tolist() == [1.0] * 3
    for i in range(3):
        one, own = torch.tensor([i]), np.array([i])
        alone = quantised(x[one], float(t[i]), cond.rows(one), rows=own)
        torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-9)
    late = quantised(x[:1], 0.4, cond.rows(torch.tensor([0])), rows=np.array([0]))
    assert not torch.allclose(late, together[:1])


def test_time_features_are_the_ones_that_the_network_computes() -> None:
    network = twins.setup("sd").door.network
    time = TimeFeatures.of(network)
    setup = twins.setup("sd")
    cond = sampling.conditions(setup.suite, setup.model, [0, 1, 2], setup.device)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in time.projections
    ]
    with time.watched() as met:
        field("sd", "ddim")[0](torch.zeros(3, *setup.model.shape, dtype=torch.float64), 0.3, cond)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(time.projections) > 3
    for name, found in zip(time.projections, time.features(met[0]), strict=True):
        torch.testing.assert_close(found, seen[name])


def test_learned_roundings_lower_the_error_of_time_features_and_the_table_has_none() -> None:
    tiar = artifact("sd", f"ddim+tfmq({SMALL},groups=2,tiar=200,bits=w3a8)").facts
    table = artifact("sd", "ddim+tfmq-cache(samples=3,groups=2,bits=w3a8)").facts
    assert 0.0 < tiar["feature_error"] < tiar["feature_error_plain"]
    assert table["feature_error"] == 0.0
    assert table["feature_error_plain"] > 0.0


def test_a_call_by_table_costs_the_network_without_its_time_layers() -> None:
    method = "ddim+tfmq-cache(samples=3,groups=2,bits=w4a8)"
    setup = twins.setup("sd")
    network = setup.door.network
    _, ledger = sampled("sd", method, guidance=1.0)
    time = TimeFeatures.of(network)
    names = ["time_embedding.linear_1", "time_embedding.linear_2", *time.projections]
    saved = sum(2 * network.get_submodule(name).weight.numel() for name in names)  # type: ignore[operator, union-attr]
    assert saved > 0
    np.testing.assert_allclose(ledger.flops, 4 * (ledger.base_flops - saved))
    np.testing.assert_allclose(ledger.cost, 4 * (1 - saved / ledger.base_flops))


def test_a_time_that_the_table_does_not_hold_is_computed() -> None:
    setup = twins.setup("sd")
    cond = sampling.conditions(setup.suite, setup.model, [0, 1, 2], setup.device)
    x = torch.randn(3, *setup.model.shape, dtype=torch.float64)
    exact = field("sd", "ddim")[0](x, 0.1234, cond)
    found = field("sd", "ddim+tfmq-cache(samples=3,groups=2,bits=w32a32)")[0](x, 0.1234, cond)
    torch.testing.assert_close(found, exact)


@pytest.mark.slow
def test_mixed_precision_spares_the_more_sensitive_half() -> None:
    facts = artifact("sd", f"ddim+vidit-q({SMALL},bits=w3a4,mixed=sensitivity)").facts
    kinds = {"cross", "mlp", "self"}
    assert len(facts["spared"]) == len(kinds) * 2 // 2
    for name, plan in facts["layers"].items():
        for group, bits in enumerate(plan["bits"]):
            assert bits == ("w8a8" if [kind_of(name), group] in facts["spared"] else "w3a4")
    released = artifact("sd", f"ddim+vidit-q({SMALL},bits=w3a4,mixed=released)").facts
    assert released["spared"] == [["mlp", 0], ["mlp", 1]]


@pytest.mark.parametrize(
    ("kind", "method", "reason"),
    [
        ("dit", f"ddim+tfmq({SMALL})", "not supported: needs time features"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(kind: str, method: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        sampled(kind, method)
    assert not any(isinstance(module, FakeQuant) for module in twins.setup(kind).door.network.modules())


def test_two_quantisations_in_one_chain_are_refused() -> None:
    with pytest.raises(UserError, match="vidit-q and ptq4dm replace layers of one network; leave one out"):
        registry.build_method(f"ddim+vidit-q({SMALL})+ptq4dm({SMALL})")


def test_a_gradient_through_rounding_is_refused() -> None:
    setup = twins.setup("dit")
    cond = sampling.conditions(setup.suite, setup.model, [0, 1, 2], setup.device)
    x = torch.zeros(3, *setup.model.shape, dtype=torch.float64, requires_grad=True)
    with pytest.raises(Unsupported, match="needs gradients of a quantised network"):
        field("dit", f"ddim+vidit-q({SMALL})")[0](x, 0.5, cond)


@pytest.mark.parametrize(
    "method",
    [
        "ddim+ptq4dm(bits=3.5)",
        "ddim+ptq4dm(samples=0)",
        "ddim+ptq4dm(calibration=nothing)",
        "ddim+vidit-q(bits=w3.5a8)",
        "ddim+vidit-q(samples=0)",
        "ddim+vidit-q(alpha=2)",
        "ddim+tfmq(bits=w0a8)",
        "ddim+tfmq(groups=0)",
        "ddim+tfmq-cache(samples=0)",
    ],
)
def test_settings_that_mean_nothing_are_one_line(method: str) -> None:
    with pytest.raises(UserError) as raised:
        registry.build_method(method)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["ddim+ptq4dm(bits=3.5)", "ddim+ptq4dm(samples=0)"])
def test_the_command_line_says_it_and_exits_with_2(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evalbench", "run", "fashion-dit", "--methods", method, "--nfe", "5", "--plan"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
