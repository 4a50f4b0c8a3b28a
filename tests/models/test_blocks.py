"""The inside of diffusers' networks: what an edit changes, what it leaves, and that nothing of it stays."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import numpy as np
import pytest
import torch
import twins

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Edit, NetworkWrap, Step, both
from evalbench.paths import VPLinear
from evalbench.sampling import conditions

KINDS = ("dit", "sd", "sd3")
B = 3


def door(kind: str) -> NetworkDoor:
    made = twins.setup(kind).door
    made.ledger = Ledger(B)
    return made


def call(kind: str, edit: Edit | None = None, seed: int = 0, t: float = 0.6) -> torch.Tensor:
    """The network's own prediction, with an edit in force."""
    made, x = door(kind), state(kind, seed)
    with torch.no_grad():
        if edit is None:
            return made(x, t, cond(kind), made.native)
        return made.edited(edit, x, t, cond(kind), made.native, key=object())


def state(kind: str, seed: int = 0) -> torch.Tensor:
    made = twins.setup(kind)
    return torch.randn(B, *made.model.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(seed))


def cond(kind: str) -> Cond:
    made = twins.setup(kind)
    return conditions(made.suite, made.model, range(B), made.device)


def digest(network: torch.nn.Module) -> str:
    """Weights by their names in their order, and every module's own attributes that are callable or modules."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    for name, module in network.named_modules():
        found.update(f"{name} {type(module).__name__} {sorted(vars(module))} {id(module)}".encode())
    return found.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_the_forward_to_the_bit(kind: str) -> None:
    split, whole = door(kind).split(), call(kind)
    features: dict = {}
    assert torch.equal(call(kind, split.keep(features)), whole), "reading changes nothing"
    assert torch.equal(call(kind, split.resume(features)), whole)
    alone = split.encode(lambda: call(kind))
    assert alone.keys() == features.keys()
    assert torch.equal(call(kind, split.resume(alone)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_call_reads_no_state_but_time_and_conditions(kind: str) -> None:
    split = door(kind).split()
    features = split.encode(lambda: call(kind))
    resumed = split.resume(features)
    assert torch.equal(call(kind, resumed, seed=0), call(kind, resumed, seed=1))
    assert not torch.equal(call(kind, resumed, t=0.6), call(kind, resumed, t=0.5))
    # and an encoder's features do depend on the state
    assert not torch.equal(call(kind, split.resume(split.encode(lambda: call(kind, seed=1)))), call(kind, resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_decoder_leaves_nothing_of_the_state(kind: str) -> None:
    split = door(kind).split()
    features: dict = {}
    whole = call(kind, split.keep_decoder(features))
    assert torch.equal(call(kind, split.reuse_decoder(features)), whole)
    assert torch.equal(call(kind, split.reuse_decoder(features), seed=1), whole)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_transformer_is_split_after_any_block(at: int) -> None:
    split = door("dit").split(at)
    assert torch.equal(call("dit", split.resume(split.encode(lambda: call("dit")))), call("dit"))


@pytest.mark.parametrize(("kind", "at"), [("dit", 0), ("dit", 4), ("sd", 1)])
def test_a_split_that_cannot_be_is_refused_in_a_line(kind: str, at: int) -> None:
    with pytest.raises(UserError, match="split") as error:
        door(kind).split(at)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_leave_weights_and_outputs_as_they_were(kind: str) -> None:
    made = door(kind)
    blocks, network = made.blocks, made.network
    before, whole = digest(network), call(kind)
    first, last = blocks.names[0], blocks.names[-1]
    features: dict = {}
    linear = next(name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear))
    edits = [
        blocks.bypass([first, last]),
        blocks.gate({first: 0.5, last: torch.zeros(B, 1, 1, 1) if kind == "sd" else torch.zeros(B, 1, 1)}),
        made.split().keep(features),
        blocks.swap({linear: torch.nn.Identity()}),
        blocks.around({first: _raises}),
    ]
    for edit in edits:
        with suppress(RuntimeError, ZeroDivisionError):  # an identity has another width, and the last raises
            call(kind, edit)
        assert digest(network) == before
        assert torch.equal(call(kind), whole)


def _raises(forward: object, args: object, kwargs: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_one_is_the_network_and_of_zero_the_bypass(kind: str) -> None:
    blocks = door(kind).blocks
    whole = call(kind)
    for name in blocks.names[:: 3 if kind == "sd" else 1]:
        torch.testing.assert_close(call(kind, blocks.gate({name: 1.0})), whole)
        bypassed = call(kind, blocks.bypass([name]))
        torch.testing.assert_close(call(kind, blocks.gate({name: 0.0})), bypassed)
        assert not torch.allclose(bypassed, whole), f"{name} adds something"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_named_in_the_order_they_run(kind: str) -> None:
    blocks, ran = door(kind).blocks, {}
    call(kind, blocks.read(blocks.names, ran))
    assert tuple(ran) == blocks.names
    parts = [part for name in blocks.names for part in blocks.parts(name)]
    ran = {}
    call(kind, blocks.read(parts, ran))
    assert list(ran) == parts


def test_a_bypassed_dit_is_the_dit_without_that_block() -> None:
    import copy

    made = door("dit")
    network = made.network
    shorter = copy.deepcopy(network)
    del shorter.transformer_blocks[2]
    model = twins.setup("dit").model
    with torch.no_grad():
        out = shorter(state("dit"), timestep=model.timesteps(0.6, state("dit")), class_labels=cond("dit").labels).sample
    torch.testing.assert_close(call("dit", made.blocks.bypass(["transformer_blocks.2"])), out[:, :1])


def test_edits_inside_each_other_add_up() -> None:
    blocks = door("dit").blocks
    names = blocks.names
    kept: dict = {}
    together = call("dit", both(blocks.bypass([names[0]]), blocks.bypass([names[2]]), blocks.read([names[3]], kept)))
    assert torch.equal(together, call("dit", blocks.bypass([names[0], names[2]])))
    assert list(kept) == [names[3]]


def test_an_unknown_block_is_refused_with_the_nearest_name() -> None:
    blocks = door("dit").blocks
    for edit in (
        blocks.bypass,
        lambda names: blocks.read(names, {}),
        lambda names: blocks.replace(dict.fromkeys(names)),
    ):
        with pytest.raises(UserError, match=r"transformer_blocks\.4.*did you mean 'transformer_blocks\.") as error:
            edit(["transformer_blocks.4"])
        assert "\n" not in str(error.value)


def test_an_edited_call_is_metered_by_what_runs() -> None:
    made = door("dit")
    names = made.blocks.names
    whole = call("dit")
    assert whole.shape == state("dit").shape
    full = made.ledger.flops[0]
    assert made.ledger.cost[0] == 1.0
    call("dit", made.blocks.bypass(names[:2]))
    made.ledger = Ledger(B)
    with torch.no_grad():
        made.edited(made.blocks.bypass(names[:2]), state("dit"), 0.6, cond("dit"), key="two")
    config = made.network.config
    width, tokens = config.num_attention_heads * config.attention_head_dim, (32 // config.patch_size) ** 2
    # a block of width d: time and label embeddings (256 d, d d), six modulations (6 d d), and per token queries, keys,
    # values and output (4 d d), an MLP (8 d d), attention over the tokens (2 tokens d)
    per_block = 2 * (256 * width + 7 * width**2 + tokens * (12 * width**2 + 2 * tokens * width))
    assert full - made.ledger.flops[0] == 2 * per_block
    assert made.ledger.cost[0] == pytest.approx(made.ledger.flops[0] / full)
    assert made.ledger.evals["base"][0] == 1


class Bypassed(NetworkWrap):
    """Leaves one block out."""

    def __init__(self, inner: Denoiser, name: str) -> None:
        super().__init__(inner)
        self.name = name

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, str]:
        return self.blocks.bypass([self.name]), self.name


def test_wraps_at_the_network_add_up_beneath_guidance() -> None:
    made = door("dit")
    names = made.blocks.names
    guided = registry.build_guidance(2.0).wrap(made)
    for name in names[:2]:
        guided = guided.within(lambda inner, name=name: Bypassed(inner, name))
    found = guided(state("dit"), 0.6, cond("dit"), made.native)
    assert made.ledger.evals["base"][0] == 2
    edit = made.blocks.bypass(names[:2])
    c, u = (
        made.edited(edit, state("dit"), 0.6, given, made.native, key=names[:2])
        for given in (cond("dit"), cond("dit").null())
    )
    assert torch.equal(found, u + 2.0 * (c - u))
    assert made.ledger.evals["base"][0] == 4
    assert made.ledger.cost[0] < 3.0


def test_models_without_an_inside_say_so() -> None:
    plain = NetworkDoor(registry.build_model("gmm", {}), VPLinear(), "logsnr")
    for asked, needs in (("blocks", "blocks"), ("network", "blocks")):
        with pytest.raises(Unsupported, match=f"not supported: needs {needs}"):
            getattr(plain, asked)
    assert not {"network", "blocks", "split"} & plain.provides


# --- rows that leave early ------------------------------------------------------------------------------------------

STREAMS = ("dit", "sd3")


def leaving(exits: list[int], seen: list[torch.Tensor] | None = None):
    """Row r leaves after block exits[r], with its tokens times 2."""

    def after(i: int, tokens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if seen is not None:
            seen.append(rows)
        gone = torch.tensor(exits)[rows] == i
        return (gone, 2.0 * tokens[gone]) if bool(gone.any()) else None

    return after


@pytest.mark.parametrize("kind", STREAMS)
def test_rows_leave_one_by_one_and_blocks_run_for_those_that_are_in(kind: str) -> None:
    blocks = twins.setup(kind).model.blocks
    last = len(blocks.names) - 1
    assert torch.equal(call(kind, blocks.leave(lambda i, tokens, rows: None)), call(kind)), "nobody leaves"
    # a row's prediction is the one it has when all leave where it does
    alone = {k: call(kind, blocks.leave(leaving([k] * B))) for k in (0, 1, last)}
    assert torch.equal(alone[last], call(kind)), "nobody is asked after the last block"
    seen: list[torch.Tensor] = []
    mixed = call(kind, blocks.leave(leaving([1, 0, last], seen)))
    for row, k in enumerate((1, 0, last)):
        torch.testing.assert_close(mixed[row], alone[k][row])
    asked = [rows.tolist() for rows in seen[-last:]]
    assert asked == [[0, 1, 2], [0, 2], [2]][:last]
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("kind", STREAMS)
def test_the_head_reads_tokens_that_no_block_made(kind: str) -> None:
    made = twins.setup(kind)
    blocks, kept = made.model.blocks, {}
    plain = call(kind, blocks.read(blocks.names[-1:], kept))
    out = kept[blocks.names[-1]]
    tokens = out[-1] if isinstance(out, tuple) else out
    assert torch.equal(call(kind, blocks.end(tokens)), plain)
    assert torch.equal(call(kind, blocks.end(tokens), seed=1), plain), "the state is not read"


def test_a_batch_that_left_pays_for_no_further_block() -> None:
    made = door("dit")
    names, x = made.blocks.names, state("dit")
    left = made.share(made.blocks.leave(leaving([1] * B)), x, 0.6, cond("dit"), key=object())
    assert left == pytest.approx(made.share(made.blocks.bypass(names[2:]), x, 0.6, cond("dit"), key=object()))


def test_a_unet_has_no_exits() -> None:
    assert "exits" not in twins.setup("sd").door.provides
    with pytest.raises(Unsupported, match="needs exits"):
        twins.setup("sd").model.blocks.leave(lambda i, tokens, rows: None)
