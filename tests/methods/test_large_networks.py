"""Every method that reaches into a network, on Stable Diffusion 1.5's UNet and on DiT-XL/2, shrunk in width only.

Weights are random; depths and kinds of blocks are those of the large networks (`twins.KINDS`). What is asked is that a
method runs there, costs what its kind costs, leaves nothing behind, or says what the network lacks.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import twins
from methods_inside import draw
from support import request, run_serial

from evalbench import preparation
from evalbench.cost.ledger import Ledger

NFE = 4
PARTNERS = {"sd-1.5": "sd", "dit-xl": "dit-small"}  # models of role `small`
BLOCKS = {"sd-1.5": 38, "dit-xl": 28}

EVERY_OTHER = "cache_identifiers=.*transformer_blocks.*attn1,cache_interval=2,disable_cache_before_step=1"
FEW = "iterations=1,batch=2,rate=0.001,features=identity"
# what calls cost on SD 1.5 and on DiT-XL, against the plain network's: less, the same, more; or what is lacking
METHODS = {
    "ddim+interval-cache(every=2)": ("<", "<"),
    "ddim+interval-cache(every=3,blocks=1-2)": ("<", "<"),
    "ddim+faster-diffusion(keys=uniform:2)": ("<", "<"),
    "ddim+faster-diffusion(keys=uniform:3,parallel=true)": ("<", "<"),
    "ddim+faster-diffusion(keys=uniform:3,propagate=decoder)": ("<", "<"),
    "ddim+harmonica(batch=1)": ("<", "<"),
    "ddim+layer-skip": ("<", "<"),
    "ddim+layer-skip(blocks=1-2,after=0.5)": ("<", "<"),
    "ddim+deediff(images=2,iterations=1)": ("needs exits", "<"),
    "ddim+t-stitch(r=0.5)": ("<", "<"),
    "ddim+bottleneck": ("<", "<"),
    "autodiffusion(population=4,epochs=1,samples=2,layers=0.9)": ("<", "<"),
    "ddim+ptq4dm(samples=2,steps=2)": ("=", "="),
    "ddim+vidit-q(samples=2,steps=2)": ("=", "="),
    "ddim+tfmq(samples=2,steps=2,groups=2,tiar=1)": ("=", "needs time features"),
    "ddim+tfmq-cache(samples=2,groups=2)": ("<", "needs time features"),
    f"ddim+mmd-ddm({FEW})": ("=", "="),
    f"diversity-distill(steps=2,{FEW})": ("=", "="),
    "ddim+diffusers-cache:FirstBlockCache(threshold=1)": ("needs blocks that FirstBlockCache knows", "<"),
    f"ddim+diffusers-cache:TaylorSeer({EVERY_OTHER})": ("<", "<"),
    "ddim+diffusers-cache:MagCache(threshold=5)": ("needs blocks that MagCache knows", "<"),
    "ddim+diffusers-cache:FasterCache": ("needs blocks that FasterCache knows", "<"),
    "ddim+diffusers-cache:PAB": ("<", "<"),
    "ddim+cfg(scale=2.0)": (">", ">"),
    "ddim+cfg-interval(scale=2,low=0.5,high=2.0)": (">", ">"),
    "ddim+autoguidance(scale=2)": (">", ">"),
}
ROWS = [(kind, method, says[i]) for method, says in METHODS.items() for i, kind in enumerate(PARTNERS)]
RUN = [row for row in ROWS if row[2] in "<=>"]
LACKING = [row for row in ROWS if row[2] not in "<=>"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", PARTNERS)
def test_the_twins_have_the_depth_and_the_blocks_of_the_large_networks(kind: str) -> None:
    network = twins.setup(kind, PARTNERS[kind]).door.network
    assert len(twins.setup(kind, PARTNERS[kind]).door.blocks.names) == BLOCKS[kind]
    config = network.config
    if kind == "dit-xl":
        assert (config["num_layers"], config["patch_size"]) == (28, 2)
        assert (config["sample_size"] // config["patch_size"]) ** 2 == 256, "tokens of DiT-XL/2 at 256x256"
        assert config["out_channels"] == 2 * config["in_channels"], "it predicts a variance beside"
    else:
        assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
        assert config["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
        assert config["layers_per_block"] == 2


@cache
def plain(kind: str) -> tuple[torch.Tensor, Ledger]:
    """The solver alone, before any method ran."""
    return draw("ddim", NFE, kind, small=PARTNERS[kind])


@pytest.mark.parametrize(("kind", "method", "cost"), RUN)
def test_a_method_runs_costs_what_its_kind_costs_and_leaves_nothing_behind(
    kind: str, method: str, cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_REFERENCE_SAMPLES", 100)  # of a search, which finds nothing worth having here
    network = twins.setup(kind, PARTNERS[kind]).door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = dict(network.named_modules())
    exact, whole = plain(kind)
    x, ledger = draw(method, NFE, kind, small=PARTNERS[kind])
    assert torch.isfinite(x).all()
    assert not torch.equal(x, exact)
    assert ledger.nfe.tolist() == whole.nfe.tolist() == [NFE] * len(x)
    ratio = float((ledger.flops / whole.flops).mean())
    assert (ratio < 1 - 1e-9, abs(ratio - 1) <= 1e-9, ratio > 1 + 1e-9)["<=>".index(cost)], ratio
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any({"forward", "_diffusers_hook"} & vars(module).keys() for module in network.modules())
    assert torch.equal(draw("ddim", NFE, kind, small=PARTNERS[kind])[0], exact)


@pytest.mark.parametrize(("kind", "method", "needs"), LACKING)
def test_a_network_without_the_hook_is_a_row_that_says_so(kind: str, method: str, needs: str, tmp_path: Path) -> None:
    suite = twins.suite(kind, PARTNERS[kind]).override(samples=2, batch=2, chunk=2)
    (record,), _ = run_serial(request(suite, [method], nfe=(NFE,), metrics=()), tmp_path)
    assert record.status == "unsupported"
    assert record.failure is not None
    assert record.failure.message.startswith(f"not supported: {needs}"), record.failure.message


def test_a_suite_without_a_partner_is_a_row_that_says_so(tmp_path: Path) -> None:
    suite = twins.suite("dit-xl").override(samples=2, batch=2, chunk=2)
    records, _ = run_serial(request(suite, ["ddim+t-stitch", "ddim+autoguidance"], metrics=()), tmp_path)
    assert [r.failure and r.failure.message for r in records] == ["not supported: needs role small"] * 2
