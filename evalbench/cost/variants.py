"""How a network is executed in a run: eager, compiled or as CUDA graphs; in which dtype; with which attention kernel.

A variant is a setting of the run, written into every record by its canonical text. Nothing is switched on silently,
and a baseline is timed in the same variant as what it is compared with.

    text = execution,dtype[,attention]        eager,float32   compile,bfloat16   cuda-graphs,float16,flash
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from evalbench.errors import Unsupported, UserError, unknown
from evalbench.interfaces import Model

Execution: TypeAlias = Literal["eager", "compile", "cuda-graphs"]
Dtype: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]
Attention: TypeAlias = Literal["default", "math", "flash", "efficient", "cudnn"]
_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Predict: TypeAlias = Callable[..., torch.Tensor]
Compiler: TypeAlias = Callable[[Predict], Predict]


@dataclass(frozen=True)
class Variant:
    """One way to execute a network.

    Attributes:
        execution: `compile` is torch.compile of the whole forward; `cuda-graphs` replays a recorded one.
        dtype: of the weights and of what goes through the network; the solver's state keeps the suite's.
        attention: kernel of scaled_dot_product_attention; `default` leaves the choice to torch.
    """

    execution: Execution = "eager"
    dtype: Dtype = "float32"
    attention: Attention = "default"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("execution", self.execution, get_args(Execution)),
            ("dtype", self.dtype, get_args(Dtype)),
            ("attention", self.attention, get_args(Attention)),
        ):
            if value not in known:
                raise unknown(what, value, known, where="variant")

    @property
    def text(self) -> str:
        """Canonical; `parse` reads it back."""
        return ",".join([self.execution, self.dtype, *([] if self.attention == "default" else [self.attention])])

    @property
    def torch_dtype(self) -> torch.dtype:
        """What `Model.to` gets."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A variant from words in any order, each at most once: `bf16` is not one of them, `bfloat16` is.

        Raises:
            UserError: an unknown word, or two of a kind.
        """
        fields: dict[str, str] = {}
        kinds = {"execution": get_args(Execution), "dtype": get_args(Dtype), "attention": get_args(Attention)}
        for word in (part.strip() for part in text.split(",")):
            kind = next((kind for kind, words in kinds.items() if word in words), None)
            if kind is None:
                raise unknown("word", word, [w for words in kinds.values() for w in words], where=f"variant '{text}'")
            if kind in fields:
                raise UserError(f"variant '{text}' names two of a kind: '{fields[kind]}' and '{word}'")
            fields[kind] = word
        return cls(**fields)  # type: ignore[arg-type]

    def check(self, device: torch.device) -> None:
        """Raise Unsupported where this device cannot run it."""
        if self.execution == "cuda-graphs" and device.type != "cuda":
            raise Unsupported(f"not supported: variant '{self.text}' needs a CUDA device")

    def apply(self, model: Model, device: torch.device, *, compiler: Compiler = torch.compile) -> Model:
        """The model, loaded on the device, with a `predict` that is executed this way; all else is the model's own.

        Only whole forwards (`predict`) are compiled or replayed; what a method runs of the network's parts is eager.

        Raises:
            Unsupported: the device cannot run it.
        """
        self.check(device)
        model.to(self.torch_dtype, device)
        predict: Predict = model.predict
        if self.execution == "compile":
            predict = compiler(predict)
        elif self.execution == "cuda-graphs":
            predict = _Replayed(predict)
        executed = copy.copy(model)
        object.__setattr__(executed, "predict", _Executed(self, predict))  # models may be frozen
        object.__setattr__(executed, "predict_eager", _Executed(self, model.predict))
        return executed

    def kernel(self) -> AbstractContextManager[None]:
        """The attention kernel, for the length of a block."""
        return nullcontext() if self.attention == "default" else _kernel(_BACKENDS[self.attention])


@contextmanager
def _kernel(backend: SDPBackend) -> Iterator[None]:
    with sdpa_kernel(backend):
        yield


@dataclass(frozen=True)
class _Executed:
    """`predict` in the variant's dtype and with its attention kernel."""

    variant: Variant
    forward: Predict

    def __call__(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        dtype = self.variant.torch_dtype
        with self.variant.kernel():
            return self.forward(*tree_map(lambda value: _as(value, dtype), (x, *rest))).to(x.dtype)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _Replayed:
    """A forward as CUDA graphs: recorded once for each time, shape and kind of condition, then replayed.

    A float time is a constant of its graph, so every step of a trajectory has one; they share memory.
    """

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Any, ...], torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *arguments: Any) -> torch.Tensor:
        flat, shape = tree_flatten(arguments)
        key = (shape, *((tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in flat))
        if key not in self.graphs:
            self.graphs[key] = self._record(arguments)
        graph, inputs, output = self.graphs[key]
        for own, given in zip(inputs, flat, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(given)
        graph.replay()
        return output.clone()

    def _record(self, arguments: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...], torch.Tensor]:
        inputs = tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, arguments)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # lazy set-up must not be recorded
                self.predict(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.predict(*inputs)
        return graph, tuple(tree_leaves(inputs)), output
