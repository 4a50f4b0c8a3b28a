"""Caches, guiders and quantisation of other libraries by name: who runs where, what it costs, what is left behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import twins

from evalbench import catalogue, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.preparation import prepare
from evalbench.runner import make_cell

TAYLOR = "diffusers-cache:TaylorSeer(cache_identifiers=transformer_blocks.*attn1)"
RUNS = [
    ("dit", "diffusers-cache:FirstBlockCache(threshold=0.5)"),
    ("dit", TAYLOR),
    ("dit", "diffusers-cache:MagCache(threshold=5)"),
    ("dit", "diffusers-cache:FasterCache"),
    ("sd", "diffusers-cache:PAB"),
    ("sd3", "diffusers-cache:TaylorSeer"),
]
# Rows of six calls. Those that skip a layer start after the share 0.01 of the steps, so not at the first call.
GUIDERS = [
    ("dit", "diffusers-guider:AutoGuidance(layers=[1],guidance_scale=2)", 12.0),
    ("dit", "diffusers-guider:SkipLayerGuidance(layers=[1],guidance_scale=2,skip_layer_guidance_stop=1)", 17.0),
    ("dit", "diffusers-guider:PerturbedAttentionGuidance(layers=[1],guidance_scale=2,perturbed_guidance_stop=1)", 17.0),
    ("sd", "diffusers-guider:AdaptiveProjectedGuidance(guidance_scale=2)", 12.0),
]


def sampled(kind: str, method: str, indices: tuple[int, ...] = (0, 1), nfe: int = 6) -> tuple[torch.Tensor, Ledger]:
    setup = twins.setup(kind)
    cell = make_cell(setup.suite, method, nfe, 1.5, 0)
    chain = registry.build_method(method)
    if chain.prepares:
        chain = chain.equipped(prepare(setup, chain, cell).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    ledger = Ledger(len(indices), budget=nfe)
    return sampling.sample(setup, chain, cell, indices, cond, ledger), ledger


def traces(kind: str) -> list[str]:
    network = twins.setup(kind).door.network
    return [n for n, module in network.named_modules() if {"forward", "_diffusers_hook"} & vars(module).keys()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_a_cache_saves_operations_changes_samples_and_leaves_no_trace(kind: str, method: str) -> None:
    exact, plain = sampled(kind, "ddim")
    found, ledger = sampled(kind, f"ddim+{method}")
    assert ledger.nfe.tolist() == plain.nfe.tolist()
    assert ledger.evals["base"].tolist() == [12.0, 12.0]  # a cached call is a row
    assert bool((ledger.cost < plain.cost).all())
    assert not torch.equal(found, exact)
    assert traces(kind) == []
    assert torch.equal(sampled(kind, "ddim")[0], exact)


def test_a_cached_call_costs_what_it_ran_by_hand() -> None:
    # six steps, both branches: of each branch's calls 3 and 5 reuse the attention of every block (steps 0-2 and 4 run)
    setup = twins.setup("dit")
    network = setup.door.network
    _, ledger = sampled("dit", f"ddim+{TAYLOR}")
    block = network.transformer_blocks[0].attn1  # type: ignore[index, union-attr]
    width = block.to_q.in_features
    side = setup.model.shape[-1] // network.config.patch_size  # type: ignore[union-attr]
    tokens = side * side
    attention = 2 * (4 * tokens * width * width + 2 * tokens * tokens * width)  # four projections, two products
    blocks = len(network.transformer_blocks)  # type: ignore[arg-type]
    assert ledger.flops.tolist() == pytest.approx([12 * ledger.base_flops - 2 * 2 * blocks * attention] * 2)


def test_a_sample_of_a_cache_that_looks_at_it_does_not_depend_on_its_neighbours() -> None:
    method = "ddim+diffusers-cache:FirstBlockCache(threshold=0.5)"
    together, _ = sampled("dit", method)
    torch.testing.assert_close(sampled("dit", method, (1,))[0], together[1:], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dpm-solver++(order=2)", "unipc", "heun"])
def test_caches_compose_with_solvers(solver: str) -> None:
    found, ledger = sampled("dit", f"{solver}+diffusers-cache:PAB")
    assert bool(torch.isfinite(found).all())
    assert bool((ledger.cost < 2 * ledger.nfe).all())


def test_the_classifier_free_guider_is_cfg() -> None:
    exact, plain = sampled("sd", "ddim")
    found, ledger = sampled("sd", "ddim+diffusers-guider:ClassifierFreeGuidance(guidance_scale=1.5)")
    torch.testing.assert_close(found, exact)
    assert ledger.cost.tolist() == plain.cost.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "rows"), GUIDERS)
def test_a_guider_counts_each_of_its_predictions(kind: str, method: str, rows: float) -> None:
    found, ledger = sampled(kind, f"ddim+{method}")
    assert bool(torch.isfinite(found).all())
    assert ledger.evals["base"].tolist() == [rows] * 2
    skips = "AutoGuidance" in method or "SkipLayer" in method
    assert bool((ledger.cost < rows).all()) == (skips or "Perturbed" in method)
    assert traces(kind) == []


@pytest.mark.slow
def test_auto_guidance_that_skips_a_block_is_counted_by_hand() -> None:
    setup = twins.setup("dit")
    blocks = len(setup.door.network.transformer_blocks)  # type: ignore[arg-type]
    _, ledger = sampled("dit", f"ddim+{GUIDERS[0][1]}")
    exact = sampled("dit", "ddim+diffusers-guider:AutoGuidance(layers=[0,1],guidance_scale=2)")[1]
    one = 12 * ledger.base_flops - ledger.flops  # six calls without one block
    assert bool((one > 0).all())
    assert (12 * exact.base_flops - exact.flops).tolist() == pytest.approx((2 * one).tolist())
    assert bool((one < 6 * ledger.base_flops / blocks).all())


@pytest.mark.parametrize(
    ("kind", "method", "reason"),
    [
        ("sd", "diffusers-cache:FirstBlockCache", "^not supported: needs blocks that FirstBlockCache knows; UNet2D"),
        ("sd", "diffusers-cache:TaylorSeer", "^not supported: needs blocks that TaylorSeerCache knows; UNet2D"),
        ("sd", "diffusers-guider:AutoGuidance(layers=[1])", "AutoGuidance on UNet2DConditionModel: ValueError"),
        ("dit", "diffusers-guider:MagnitudeAwareGuidance", "MagnitudeAwareGuidance on DiTTransformer2DModel"),
    ],
)
def test_what_a_library_cannot_do_is_a_row_with_its_complaint(kind: str, method: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as raised:
        sampled(kind, f"ddim+{method}")
    assert "\n" not in str(raised.value)
    assert traces(kind) == []


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_it_is_a_row_that_says_what_to_type() -> None:
    with pytest.raises(Unsupported, match="not supported: needs torchao; type: pip install torchao"):
        sampled("dit", "ddim+quant:torchao")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_rounds_weights_and_leaves_the_network_alone() -> None:
    exact, _ = sampled("sd3", "ddim")  # in float32: torchao refuses float64
    found, _ = sampled("sd3", "ddim+quant:torchao(config=int8wo)")
    assert 0.0 < float((found - exact).abs().mean()) < float(exact.abs().mean())
    assert torch.equal(sampled("sd3", "ddim")[0], exact)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize(("config", "activations"), [("int8wo", 32), ("int8dq", 8)])
def test_torchao_has_the_footprint_of_the_layers_that_it_quantises(config: str, activations: int) -> None:
    setup, method = twins.setup("sd3"), f"ddim+quant:torchao(config={config})"
    made = prepare(setup, registry.build_method(method), make_cell(setup.suite, method, 4, 1.0, 0))
    artifact = made.artifacts[1]
    assert artifact is not None
    found = artifact.facts["footprint"]
    assert 8 < found["weight_bits"] < 32, "Linear layers only"
    assert activations <= found["activation_bits"] < activations + 1, "nearly all of the work is theirs"
    assert 8 * activations / 1024 <= found["bops"] / found["bops_full"] < 1
    assert made.bill["nfe"] == 1


def test_all_are_listed_and_those_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))  # tried here, not remembered
    rows = {row["name"]: row for row in catalogue.rows("methods")}
    for name in ("FirstBlockCache", "TaylorSeer", "MagCache", "FasterCache", "PAB"):
        assert rows[f"diffusers-cache:{name}"]["available"], name
    assert "skips nothing" in rows["diffusers-cache:SeaCache"]["reason"]
    assert rows["diffusers-guider:AutoGuidance"]["available"]
    assert "video and sound" in rows["diffusers-guider:LTX2Guidance"]["reason"]
    assert "quant:torchao" in rows


@pytest.mark.parametrize(
    "method",
    [
        "ddim+diffusers-cache:FistBlockCache",
        "ddim+diffusers-cache:PAB(threshold=1)",
        "ddim+diffusers-cache:PAB(spatial_attention_block_skip_range=0)",
        "ddim+diffusers-guider:AutoGuidance",
        "ddim+diffusers-guider:AutoGuidance(layers=[1],dropout=0.5)",
        "ddim+diffusers-guider:ClassifierFreeGuidance(layers=[1])",
        "ddim+quant:torchao(config=int7)",
        "ddim+quant:other",
    ],
)
def test_settings_that_a_library_does_not_know_are_one_line(method: str) -> None:
    with pytest.raises(UserError) as raised:
        registry.build_method(method)
    assert "\n" not in str(raised.value)
