"""torchao's quantisation by name: `quant:torchao(config=int8wo)`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from evalbench.errors import Unsupported, unknown
from evalbench.interfaces import Denoiser, Edit, NetworkWrap, Step, Wrap
from evalbench.registry import register

from ._network import line

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy as np

    from evalbench.interfaces import Cond

# names as torchao's and diffusers' documents use them, and the classes behind them
_CONFIGS = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "float8wo": "Float8WeightOnlyConfig",
    "float8dq": "Float8DynamicActivationFloat8WeightConfig",
}
_LACKING = "needs torchao; type: pip install torchao"


@register("quant:*")
@dataclass(frozen=True)
class Quant(Wrap):
    """A quantisation library by name: `quant:torchao(config=int8wo)`, as `quantize_(network, config)` applies it.

    Linear layers of the network compute with torchao's own kernels and tensors, so its time is its own; which layers
    it leaves alone, and which devices a configuration needs, is the library's choice. Weights are quantised in a copy,
    the suite's network stays what it is. Operations that the FLOP counter cannot see make the count missing.

    Attributes:
        target: the library, `torchao`. config: int8wo (weights only), int8dq (activations too, per token as they are
            computed), int4wo, float8wo or float8dq.
    """

    requires = frozenset({"network"})
    replaces_layers = True

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

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        if find_spec("torchao") is None:
            raise Unsupported(f"not supported: {_LACKING}")
        modules = self.quantised(denoiser.network)
        return denoiser.within(lambda inner: _Swapped(inner, modules, self.config))

    def quantised(self, network: Any) -> dict[str, Any]:
        """The network's Linear layers as torchao makes them, by name.

        Raises:
            Unsupported: torchao refuses this configuration, or this device.
        """
        from torch import nn
        from torchao import quantization

        twin = copy.deepcopy(network)
        try:
            quantization.quantize_(twin, getattr(quantization, _CONFIGS[self.config])())
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
