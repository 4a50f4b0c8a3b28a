"""The inside of diffusers' networks: their residual bodies by name, read, replaced, bypassed and gated for one call.

A network is never rewritten. For the time of a context the `forward` of a few of its modules is another one; the
class's own `forward` runs all the same, and afterwards every module is what it was. So a change costs a few attribute
assignments, works on whatever weights the class has, and an unchanged part has the bits that it always had.

    class                   blocks, in the order they run                    encoder            decoder
    DiTTransformer2DModel   transformer_blocks                               the first 18/28    the others
    SD3Transformer2DModel   transformer_blocks                               the first 18/28    the others
    UNet2DConditionModel    every ResnetBlock2D and Transformer2DModel       conv_in, down, mid up_blocks

Rows of a batch may leave the transformers after any block; a UNet's blocks share no stream that its head could read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from evalbench.errors import Unsupported, UserError, unknown
from evalbench.interfaces import After, Around, Blocks, Edit, Features, Split, both

# Faster Diffusion takes 18 of DiT-XL's 28 blocks for the encoder
_ENCODER_SHARE = 18 / 28


# Rows that run together are filled up to multiples of this: matrix products treat the last few rows by other kernels,
# and a row's bits would depend on its place among those that are left.
_TOGETHER = 8


class _Stop(BaseException):
    """The encoder is done, nothing after it is to run. No `Exception`: whoever counts FLOPs takes one for a failure."""


@contextmanager
def around(module: torch.nn.Module, function: Around) -> Iterator[None]:
    """For a while, `module(*args)` is `function(forward, args, kwargs)`, with the forward that it has now."""
    before = module.__dict__.get("forward")
    forward = module.forward
    module.__dict__["forward"] = lambda *args, **kwargs: function(forward, args, kwargs)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def swapped(network: torch.nn.Module, name: str, module: torch.nn.Module) -> Iterator[None]:
    """For a while, another module stands at a path of the network."""
    parent, _, child = name.rpartition(".")
    owner = network.get_submodule(parent)
    before = owner._modules[child]
    owner._modules[child] = module  # not setattr: the order of the children, and so of the state, stays
    try:
        yield
    finally:
        owner._modules[child] = before


def mixed(old: Any, new: Any, gate: float | torch.Tensor) -> Any:
    """old + gate (new - old) of tensors, or of tuples of them."""
    if isinstance(new, tuple):
        return tuple(mixed(a, b, gate) for a, b in zip(old, new, strict=True))
    return new if new is None or old is None else old + gate * (new - old)


def _combined(a: Any, b: Any, operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """An operation on tensors, or on tuples of them."""
    if isinstance(a, tuple):
        return tuple(_combined(each, other, operation) for each, other in zip(a, b, strict=True))
    return None if a is None else operation(a, b)


class DiffusersBlocks(Blocks):
    """What the networks have in common; a subclass says where its blocks stand and what one returns when skipped.

    Args:
        network: the module.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = network
        self._names = tuple(self._find())

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @abstractmethod
    def _find(self) -> Iterable[str]:
        """Paths of the blocks, in the order they run."""

    @abstractmethod
    def _skipped(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a block returns when its body adds nothing."""

    def around(self, functions: Mapping[str, Around]) -> Edit:
        modules = [(self._module(name), function) for name, function in functions.items()]

        @contextmanager
        def edit() -> Iterator[None]:
            with ExitStack() as stack:
                for module, function in modules:
                    stack.enter_context(around(module, function))
                yield

        return edit

    def read(self, names: Iterable[str], into: MutableMapping[str, Any]) -> Edit:
        def reading(name: str) -> Around:
            def function(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                into[name] = forward(*args, **kwargs)
                return into[name]

            return function

        return self.around({name: reading(name) for name in names})

    def replace(self, outputs: Mapping[str, Any]) -> Edit:
        def constant(output: Any) -> Around:
            return lambda forward, args, kwargs: output

        return self.around({name: constant(output) for name, output in outputs.items()})

    def bypass(self, names: Iterable[str]) -> Edit:
        def skipping(module: torch.nn.Module) -> Around:
            return lambda forward, args, kwargs: self._skipped(module, args, kwargs)

        return self.around({name: skipping(self._module(self._block(name))) for name in names})

    def gate(self, gates: Mapping[str, float | torch.Tensor]) -> Edit:
        def gating(module: torch.nn.Module, gate: float | torch.Tensor) -> Around:
            return lambda forward, args, kwargs: mixed(
                self._skipped(module, args, kwargs), forward(*args, **kwargs), gate
            )

        return self.around({name: gating(self._module(self._block(name)), gate) for name, gate in gates.items()})

    def keep_additions(self, names: Iterable[str], into: MutableMapping[str, Any]) -> Edit:
        def keeping(name: str, module: torch.nn.Module) -> Around:
            def function(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                out = forward(*args, **kwargs)
                into[name] = _combined(out, self._skipped(module, args, kwargs), torch.sub)
                return out

            return function

        return self.around({name: keeping(name, self._module(self._block(name))) for name in names})

    def add(self, additions: Mapping[str, Any]) -> Edit:
        def adding(module: torch.nn.Module, addition: Any) -> Around:
            return lambda forward, args, kwargs: _combined(self._skipped(module, args, kwargs), addition, torch.add)

        return self.around({name: adding(self._module(self._block(name)), old) for name, old in additions.items()})

    def swap(self, modules: Mapping[str, torch.nn.Module]) -> Edit:
        for name in modules:
            self._module(name)

        @contextmanager
        def edit() -> Iterator[None]:
            with ExitStack() as stack:
                for name, module in modules.items():
                    stack.enter_context(swapped(self._network, name, module))
                yield

        return edit

    def _block(self, name: str) -> str:
        if name not in self._names:
            raise unknown("block", name, self._names)
        return name

    def _module(self, name: str) -> torch.nn.Module:
        try:
            return self._network.get_submodule(name)
        except AttributeError:
            raise unknown("module", name, [found for found, _ in self._network.named_modules()]) from None


class _Parted(Split):
    """A split by names: modules whose outputs are the features, and modules that stand idle when those are given.

    Args:
        blocks: of the network. kept: modules of the encoder whose outputs the decoder reads.
        decoder: modules after it, the first one first. idle: modules of the encoder that nothing reads, with what they
            return instead of running.
    """

    def __init__(
        self, blocks: DiffusersBlocks, kept: Sequence[str], decoder: Sequence[str], idle: Mapping[str, Around]
    ) -> None:
        self._blocks, self._kept, self._decoder, self._idle = blocks, tuple(kept), tuple(decoder), dict(idle)

    def keep(self, into: Features) -> Edit:
        return self._blocks.read(self._kept, into)

    def resume(self, features: Mapping[str, Any]) -> Edit:
        return both(self._blocks.replace(features), self._blocks.around(self._idle))

    def keep_decoder(self, into: Features) -> Edit:
        return self._blocks.read(self._decoder, into)

    def reuse_decoder(self, features: Mapping[str, Any]) -> Edit:
        return self._blocks.replace(features)

    def encode(self, call: Callable[[], object]) -> Features:
        features: Features = {}
        with self.keep(features)(), self._blocks.around({self._decoder[0]: _stop})():
            try:
                call()
            except _Stop:
                return features
        raise RuntimeError(f"the call never reached {self._decoder[0]}")


def _stop(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise _Stop


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, place: int = 0) -> Any:
    return kwargs[name] if name in kwargs else args[place]


class TransformerBlocks(DiffusersBlocks):
    """DiTTransformer2DModel: `transformer_blocks`, each with an attention and a feed-forward part."""

    _inputs: tuple[str, ...] = ("pos_embed",)  # run on the state or the text before the first block

    def _find(self) -> Iterable[str]:
        return (f"transformer_blocks.{i}" for i in range(len(self._network.transformer_blocks)))  # type: ignore[arg-type]

    def parts(self, name: str) -> tuple[str, ...]:
        module = self._module(self._block(name))
        return tuple(f"{name}.{part}" for part in ("attn1", "attn", "ff") if hasattr(module, part))

    def _skipped(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return _argument(args, kwargs, "hidden_states")

    def _tokens(self, out: Any) -> torch.Tensor:
        """The image's tokens in what a block returns, (B, N, D)."""
        tokens: torch.Tensor = out
        return tokens

    def _with_tokens(self, out: Any, tokens: torch.Tensor) -> Any:
        """What a block returns, with other tokens of the image."""
        return tokens

    def leave(self, after: After) -> Edit:
        @contextmanager
        def edit() -> Iterator[None]:
            leaving = _Leaving(self, after)  # of this call
            with self.around({name: partial(leaving, i) for i, name in enumerate(self.names)})():
                yield

        return edit

    def end(self, tokens: torch.Tensor) -> Edit:
        def function(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._with_tokens(self._skipped(self._module(self.names[-1]), args, kwargs), tokens)

        return both(self.bypass(self.names[:-1]), self.around({self.names[-1]: function}))

    def split(self, at: int | None = None) -> Split:
        depth = len(self.names)
        at = min(max(round(_ENCODER_SHARE * depth), 1), depth - 1) if at is None else at
        if not 1 <= at < depth:
            raise UserError(f"split after block {at}: the network has {depth} blocks; give 1..{depth - 1}")
        idle = {name: partial(_pass_on, self, self._module(name)) for name in self.names[: at - 1]}
        return _Parted(self, [*self._inputs, self.names[at - 1]], self.names[at:], idle)


class _Leaving:
    """One call of a transformer whose rows leave early; what stands instead of each block's forward.

    Between blocks the stream has all rows of the batch: those that left stand in it as the head will see them.
    """

    def __init__(self, blocks: TransformerBlocks, after: After) -> None:
        self.blocks, self.after = blocks, after
        self.rows = torch.empty(0, dtype=torch.int64)  # still in; set by the first block

    def __call__(self, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.blocks._module(self.blocks.names[i])
        before = self.blocks._skipped(module, args, kwargs)
        size = len(self.blocks._tokens(before))
        if i == 0:
            self.rows = torch.arange(size, device=self.blocks._tokens(before).device)
        rows = self.rows
        if not len(rows):
            return before
        if len(rows) == size:
            out = forward(*args, **kwargs)
        else:
            filled = rows[
                torch.arange(min(-(-len(rows) // _TOGETHER) * _TOGETHER, size), device=rows.device) % len(rows)
            ]
            out = _first(forward(*_chosen(args, filled, size), **_chosen(kwargs, filled, size)), len(rows))
        if i < len(self.blocks.names) - 1:
            out = self._after(i, out)
        return out if len(rows) == size else _put(before, out, rows)

    def _after(self, i: int, out: Any) -> Any:
        """A block's output with the tokens of those that leave after it."""
        tokens = self.blocks._tokens(out)
        found = self.after(i, tokens, self.rows)
        if found is None:
            return out
        gone, heads = found
        tokens = tokens.clone()
        tokens[gone] = heads
        self.rows = self.rows[~gone]
        return self.blocks._with_tokens(out, tokens)


def _chosen(values: Any, rows: torch.Tensor, size: int) -> Any:
    """Arguments of a call for some of its rows: of each tensor that has one entry per row, those of these rows."""
    if isinstance(values, dict):
        return {name: _chosen(value, rows, size) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_chosen(value, rows, size) for value in values)
    per_row = isinstance(values, torch.Tensor) and values.ndim > 0 and len(values) == size
    return values[rows] if per_row else values


def _first(values: Any, n: int) -> Any:
    """The first rows of a tensor, or of a tuple of them."""
    if isinstance(values, tuple):
        return tuple(_first(value, n) for value in values)
    return values if values is None else values[:n]


def _put(whole: Any, part: Any, rows: torch.Tensor) -> Any:
    """A tensor, or a tuple of them, with some of its rows replaced."""
    if isinstance(whole, tuple):
        return tuple(_put(old, new, rows) for old, new in zip(whole, part, strict=True))
    if whole is None or part is None:
        return None
    found = whole.clone()
    found[rows] = part
    return found


def _pass_on(
    blocks: DiffusersBlocks,
    module: torch.nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return blocks._skipped(module, args, kwargs)


class JointBlocks(TransformerBlocks):
    """SD3Transformer2DModel: blocks that carry the text beside the image."""

    _inputs = ("pos_embed", "context_embedder")

    def _skipped(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        text = _argument(args, kwargs, "encoder_hidden_states", 1)
        # the last block hands no text on
        return (None if module.context_pre_only else text), _argument(args, kwargs, "hidden_states")

    def _tokens(self, out: Any) -> torch.Tensor:
        tokens: torch.Tensor = out[1]
        return tokens

    def _with_tokens(self, out: Any, tokens: torch.Tensor) -> Any:
        return out[0], tokens


class UNetBlocks(DiffusersBlocks):
    """UNet2DConditionModel: residual bodies. A skipped ResnetBlock2D is its shortcut, a Transformer2DModel nothing."""

    def _find(self) -> Iterable[str]:
        network: Any = self._network
        for stage in (*(f"down_blocks.{i}" for i in range(len(network.down_blocks))), "mid_block"):
            yield from self._stage(stage)
        for i in range(len(network.up_blocks)):
            yield from self._stage(f"up_blocks.{i}")

    def _stage(self, stage: str) -> Iterator[str]:
        module: Any = self._network.get_submodule(stage)
        if module is None:
            return
        resnets, attentions = len(module.resnets), len(getattr(module, "attentions", ()))
        first = int(stage == "mid_block")  # the middle starts with one more resnet; its pairs are the other way round
        if first:
            yield f"{stage}.resnets.0"
        for i in range(first, resnets):
            pair = [f"{stage}.resnets.{i}"]
            if i - first < attentions:
                pair.append(f"{stage}.attentions.{i - first}")
            yield from reversed(pair) if first else pair

    def parts(self, name: str) -> tuple[str, ...]:
        inner = getattr(self._module(self._block(name)), "transformer_blocks", ())
        return tuple(
            f"{name}.transformer_blocks.{i}.{part}" for i in range(len(inner)) for part in ("attn1", "attn2", "ff")
        )

    def _skipped(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        body: Any = module
        if hasattr(body, "transformer_blocks"):
            return (_argument(args, kwargs, "hidden_states"),)
        x = _argument(args, kwargs, "input_tensor")
        return (x if body.conv_shortcut is None else body.conv_shortcut(x)) / body.output_scale_factor

    def split(self, at: int | None = None) -> Split:
        if at is not None:
            raise UserError("a UNet is split between its middle and its first up block; leave the block out")
        network: Any = self._network
        middle = ["mid_block"] if network.mid_block is not None else []
        encoder = ["conv_in", *(f"down_blocks.{i}" for i in range(len(network.down_blocks))), *middle]
        return _Parted(self, encoder, [f"up_blocks.{i}" for i in range(len(network.up_blocks))], {})


class UnknownBlocks(DiffusersBlocks):
    """Any other class: its modules can be replaced and run otherwise, it shows no blocks."""

    def _find(self) -> Iterable[str]:
        return ()

    def parts(self, name: str) -> tuple[str, ...]:
        return ()

    def _skipped(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise Unsupported("not supported: needs blocks")

    def split(self, at: int | None = None) -> Split:
        raise Unsupported("not supported: needs split")


_KINDS: dict[str, type[DiffusersBlocks]] = {
    "DiTTransformer2DModel": TransformerBlocks,
    "SD3Transformer2DModel": JointBlocks,
    "UNet2DConditionModel": UNetBlocks,
}


def blocks_of(network: torch.nn.Module) -> Blocks:
    """The inside of a network of diffusers."""
    return _KINDS.get(type(network).__name__, UnknownBlocks)(network)


def capabilities(name: str) -> frozenset[str]:
    """What the inside of this class of diffusers allows.

    Only blocks that work on one stream of tokens have `exits`: a network's head can read it after any of them. A UNet
    has `time features`: an embedding of the time, and projections of it in its blocks, from the time alone.
    """
    kind = _KINDS.get(name)
    inside = {"blocks", "split"} if kind else set()
    exits = {"exits"} if kind and issubclass(kind, TransformerBlocks) else set()
    timed = {"time features"} if name.startswith("UNet2D") else set()
    return frozenset(inside | exits | timed)


def depth_of(config: Mapping[str, Any]) -> int:
    """Number of blocks of a network by its configuration, 0 where they are not known; nothing is allocated."""
    import diffusers

    if config["_class_name"] not in _KINDS:
        return 0
    kind = getattr(diffusers, str(config["_class_name"]))
    with torch.device("meta"):
        return len(blocks_of(kind.from_config(dict(config))).names)
