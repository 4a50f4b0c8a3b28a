"""torchao's quantisation by name: `quant:torchao(config=int8wo)`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from evalbench.errors import Unsupported, line, unknown
from evalbench.interfaces import Artifact, Denoiser, Edit, NetworkWrap, Preparation, Step, Wrap
from evalbench.registry import register

from ._core import FULL, Bits, LayerPlan, Observer, footprint, layers

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy as np

    from evalbench.interfaces import Cond

# names as torchao's and diffusers' documents use them, the classes behind them, and what these keep of a Linear layer
_CONFIGS = {
    "int8wo": ("Int8WeightOnlyConfig", Bits(8, FULL)),
    "int8dq": ("Int8DynamicActivationInt8WeightConfig", Bits(8, 8)),
    "int4wo": ("Int4WeightOnlyConfig", Bits(4, FULL)),
    "float8wo": ("Float8WeightOnlyConfig", Bits(8, FULL)),
    "float8dq": ("Float8DynamicActivationFloat8WeightConfig", Bits(8, 8)),
}
_LACKING = "needs torchao; type: pip install torchao"


@register("quant:*")
@dataclass(frozen=True)
class Quant(Wrap):
    """A quantisation library by name: `quant:torchao(config=int8wo)`, as `quantize_(network, config)` applies it.

    Linear layers of the network compute with torchao's own kernels and tensors, so its time is its own; which layers
    it leaves alone, and which devices a configuration needs, is the library's choice. Weights are quantised in a copy,
    the suite's network stays what it is. Operations that the FLOP counter cannot see make the count missing. One
    evaluation on the preparation's bill counts the multiply-accumulates of its footprint.

    Attributes:
        target: the library, `torchao`. config: int8wo (weights only), int8dq (activations too, per token as they are
            computed), int4wo, float8wo or float8dq.
    """

    requires = frozenset({"network"})
    replaces_layers = True
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "once"

    target: str
    config: str = "int8wo"

    def __post_init__(self) -> None:
        if self.target != "torchao":
            raise unknown("quantisation library", self.target, ["torchao"])
        if self.config not in _CONFIGS:
            raise unknown("config", self.config, _CONFIGS, where="quant:torchao")

    @classmethod
    def members(cls) -> list[tuple[str, str]]:
        """The libraries, with the reason one cannot be used, empty when it can."""
        return [("torchao", "" if find_spec("torchao") else _LACKING)]

    def prepare(self, context: Preparation) -> Artifact:
        """Bits, bytes and bit operations of the layers that torchao quantises, as if each had a range per channel."""
        field = context.denoiser(1)
        network = field.network
        chosen = [name for name, layer in self.quantised(network).items() if type(layer.weight) is not nn.Parameter]
        observer = Observer(network, list(layers(network)))
        with observer.watching():
            field(context.x_T(context.noise([0])), context.path.t_start, context.cond([0]))
        plans = {name: LayerPlan((_CONFIGS[self.config][1],), "token") for name in chosen}
        macs = {name: seen.macs for name, seen in observer.seen.items()}
        return Artifact(facts={"footprint": footprint(network, plans, macs)})

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        modules = self.quantised(denoiser.network)
        return denoiser.within(lambda inner: _Swapped(inner, modules, self.config))

    def quantised(self, network: Any) -> dict[str, Any]:
        """The network's Linear layers as torchao makes them, by name.

        Raises:
            Unsupported: torchao is not installed, or refuses this configuration, or this device.
        """
        if find_spec("torchao") is None:
            raise Unsupported(f"not supported: {_LACKING}")
        from torchao import quantization

        twin = copy.deepcopy(network)
        try:
            quantization.quantize_(twin, getattr(quantization, _CONFIGS[self.config][0])())
        except Exception as error:  # any refusal of the library is the reason that the row shows
            raise Unsupported(f"not supported: torchao({self.config}): {line(error)}") from error
        return {name: module for name, module in twin.named_modules() if isinstance(module, nn.Linear)}


class _Swapped(NetworkWrap):
    """Other modules in the place of the network's own."""

    def __init__(self, inner: Denoiser, modules: dict[str, Any], name: str) -> None:
        super().__init__(inner)
        self.modules, self.name = modules, name

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable]:
        return self.blocks.swap(self.modules), ("torchao", self.name)
