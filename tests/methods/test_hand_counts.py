"""The ledger of methods that reach into the network against counts by hand: NFE, rows, FLOPs and cost of every sample.

One method of each kind, on a DiT twin whose operations are counted from its sizes alone (`ByHand`), unguided and
guided; a cached, a skipped and a tabulated call of a UNet from the sizes of the layers that did not run.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import twins
from methods_inside import B, ByHand, draw, draw_with

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.interfaces import Artifact

GUIDED = pytest.mark.parametrize("guidance", [1.0, 2.0])


def check(ledger: Ledger, nfe: int, flops: float, guidance: float, **evals: int) -> None:
    """Every count of every sample; those given are of one call of the field without guidance."""
    twin, calls = ByHand.of("dit"), 1 if guidance == 1.0 else 2
    assert ledger.nfe.tolist() == [nfe] * B
    assert {role: rows.tolist() for role, rows in ledger.evals.items()} == {
        role: [calls * rows] * B for role, rows in evals.items()
    }
    assert ledger.base_flops == twin.whole
    np.testing.assert_allclose(ledger.flops, calls * flops, rtol=1e-12)
    np.testing.assert_allclose(ledger.cost, calls * flops / twin.whole, rtol=1e-12)
    assert not ledger.backward.any()
    assert not ledger.aux


@GUIDED
def test_a_plain_call(guidance: float) -> None:
    check(draw("ddim", 7, "dit", guidance)[1], 7, 7 * ByHand.of().whole, guidance, base=7)


@GUIDED
@pytest.mark.parametrize(
    ("method", "full", "blocks"),
    [
        ("interval-cache(every=3)", 3, 0),  # keys 0, 3, 6; the rest runs no block
        ("interval-cache(every=2,blocks=1-2)", 4, 2),  # keys 0, 2, 4, 6; the rest runs the other two blocks
        ("faster-diffusion(keys=uniform:3,at=3)", 3, 1),  # the rest runs the decoder: the last of four blocks
        ("faster-diffusion(keys=uniform:3,at=3,parallel=true)", 3, 1),
    ],
)
def test_a_cached_call(guidance: float, method: str, full: int, blocks: int) -> None:
    twin = ByHand.of()
    cached = twin.ends + blocks * twin.block
    if method.startswith("faster"):
        cached -= 2 * twin.tokens * twin.width * twin.patch**2  # patches in: the encoder's
    check(draw(f"ddim+{method}", 7, "dit", guidance)[1], 7, full * twin.whole + (7 - full) * cached, guidance, base=7)


@GUIDED
@pytest.mark.parametrize("ran", [1, 2, 3, 4])
def test_an_exited_call(guidance: float, ran: int) -> None:
    """A fixed exit after so many blocks; a head maps the tokens of all but the last."""
    twin, width = ByHand.of(), ByHand.of().width
    like = {"head": (3, width, width), "shift": (3, width), "weight": (3, width + 8), "bias": (3,), "often": (4,)}
    artifact = Artifact({name: np.zeros(shape) for name, shape in like.items()}, {"threshold": 0.0})
    chain = f"ddim+deediff(policy=fixed,depth={ran / 4})"
    mapped = 2 * twin.tokens * width**2 if ran < 4 else 0
    flops = 5 * (twin.ends + ran * twin.block + mapped)
    check(draw_with([None, artifact], chain, 5, "dit", guidance)[1], 5, flops, guidance, base=5)


@GUIDED
def test_a_stitched_call(guidance: float) -> None:
    """Two steps of five by a model of half the blocks and half the width."""
    flops = 2 * ByHand.of("dit-small").whole + 3 * ByHand.of("dit").whole
    _, ledger = draw("ddim+t-stitch(r=0.4)", 5, "dit", guidance, small="dit-small")
    check(ledger, 5, flops, guidance, small=2, base=3)


@GUIDED
@pytest.mark.parametrize(("settings", "late"), [("", 5), ("(after=0.5)", 2), ("(blocks=1-3)", 5)])
def test_a_skipped_call(guidance: float, settings: str, late: int) -> None:
    """One block is left out, or three, in all five steps, or in those from the share 0.5 of the steps on."""
    twin, skipped = ByHand.of(), 3 if "blocks" in settings else 1
    flops = 5 * twin.whole - late * skipped * twin.block
    check(draw(f"ddim+layer-skip{settings}", 5, "dit", guidance)[1], 5, flops, guidance, base=5)


@GUIDED
def test_a_call_that_leaves_out_what_a_search_found(guidance: float) -> None:
    artifact = Artifact(facts={"steps": [99, 499, 899], "skipped": [[0, 2], [], [1]]})
    _, ledger = draw_with([artifact], "autodiffusion(layers=0.75)", 3, "dit", guidance)
    twin = ByHand.of()
    check(ledger, 3, 3 * twin.whole - 3 * twin.block, guidance, base=3)


@GUIDED
def test_a_call_at_half_the_resolution(guidance: float) -> None:
    """Five steps of ten: a quarter of the tokens, and modulations that depend on no token."""
    size = twins.setup("dit").model.shape[-1]
    flops = 5 * ByHand.of().whole + 5 * ByHand.of("dit", size // 2).whole
    check(draw("ddim+bottleneck", 10, "dit", guidance)[1], 10, flops, guidance, base=10)


# --- a UNet ---------------------------------------------------------------------------------------------------------


def resnet(name: str, side: int) -> int:
    """Operations of a ResnetBlock2D's body at a side, without its shortcut: two convolutions and the time."""
    block: Any = twins.setup("sd").door.network.get_submodule(name)
    convolutions = block.conv1.weight.numel() + block.conv2.weight.numel()
    return 2 * int(convolutions) * side**2 + 2 * int(block.time_emb_proj.weight.numel())


@pytest.mark.parametrize(("block", "scale"), [(0, 1), (1, 2)])
def test_a_skipped_resnet_of_a_unet_is_its_shortcut(block: int, scale: int) -> None:
    """The first, at full resolution, has the identity for a shortcut; the second, at half, one of its own."""
    setup = twins.setup("sd")
    name = setup.door.blocks.names[block]
    assert name == f"down_blocks.{block}.resnets.0"
    _, plain = draw("ddim", 4, "sd")
    _, ledger = draw(f"ddim+layer-skip(blocks={block}-{block})", 4, "sd")
    saved = 4 * resnet(name, setup.model.shape[-1] // scale)
    np.testing.assert_allclose(plain.flops - ledger.flops, saved, rtol=1e-12)
    np.testing.assert_allclose(ledger.cost, 4 - saved / ledger.base_flops, rtol=1e-12)
    assert ledger.nfe.tolist() == ledger.evals["base"].tolist() == [4.0] * B


def test_a_cached_resnet_of_a_unet_costs_its_shortcut_once_more_at_the_key() -> None:
    """What is kept is the body's part: out minus shortcut."""
    setup = twins.setup("sd")
    name, side = setup.door.blocks.names[1], setup.model.shape[-1] // 2
    shortcut: Any = setup.door.network.get_submodule(f"{name}.conv_shortcut")
    _, plain = draw("ddim", 4, "sd")
    _, ledger = draw("ddim+interval-cache(every=2,blocks=1-1)", 4, "sd")
    expected = 2 * (2 * shortcut.weight.numel() * side**2) - 2 * resnet(name, side)
    np.testing.assert_allclose(ledger.flops - plain.flops, expected, rtol=1e-12)


def test_features_of_a_call_by_table_are_those_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """tfmq-cache has no temporal-feature error: what its calls put into the blocks is what plain calls compute."""
    lookup = sys.modules[registry.get("method", "tfmq-cache").__module__]._Lookup
    found: dict[int, list[torch.Tensor]] = {}
    looked_up = lookup.forward

    def noted(self: Any, x: torch.Tensor) -> torch.Tensor:
        found.setdefault(self.index, []).append(looked_up(self, x))
        return found[self.index][-1]

    monkeypatch.setattr(lookup, "forward", noted)
    draw("ddim+tfmq-cache(samples=2,groups=2,bits=w3a4)", 3, "sd")
    network = twins.setup("sd").door.network
    names = [name for name, _ in network.named_modules() if name.endswith("time_emb_proj")]
    exact: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(names))}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, i=i: exact[i].append(out))
        for i, name in enumerate(names)
    ]
    try:
        draw("ddim", 3, "sd")
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(names) > 3
    for i in exact:
        ours, networks = ([*dict.fromkeys(map(_text, calls))] for calls in (found[i], exact[i]))
        assert ours == networks
        assert len(ours) == 3, "one of each step, whatever counting repeats"


def _text(features: torch.Tensor) -> str:
    """The features of a call of rows at one time, to twelve digits."""
    assert torch.equal(features, features[:1].expand_as(features))
    return " ".join(f"{value:.12g}" for value in features[0].tolist())
