"""The Inception network of FID: Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow released it on 2015-12-05.

Written from the architecture; what distinguishes it from torchvision's network is that average pools do not count their
padding, that the last block pools by maximum, and that there are 1008 classes (pytorch-fid's notes on the port).
Batch normalisation (epsilon 0.001) is folded into the convolutions when weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

_EPSILON = 1e-3  # of batch normalisation
_SPATIAL = 7  # channels of sFID: Nash et al. 2021, as the ADM evaluator takes them

Step: TypeAlias = "str | tuple[Any, ...] | list[Any]"  # a pool, a convolution, or branches whose outputs are joined


def conv(name: str, out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padded: bool = True) -> Step:
    """A convolution with ReLU: name, channels out, kernel, stride, padding."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    return (name, out, size, stride, tuple(k // 2 if padded else 0 for k in size))


def _a(pool: int) -> list[Step]:
    return [
        [conv("branch1x1", 64)],
        [conv("branch5x5_1", 48), conv("branch5x5_2", 64, 5)],
        [conv("branch3x3dbl_1", 64), conv("branch3x3dbl_2", 96, 3), conv("branch3x3dbl_3", 96, 3)],
        ["average", conv("branch_pool", pool)],
    ]


def _b() -> list[Step]:
    last = conv("branch3x3dbl_3", 96, 3, 2, padded=False)
    return [
        [conv("branch3x3", 384, 3, 2, padded=False)],
        [conv("branch3x3dbl_1", 64), conv("branch3x3dbl_2", 96, 3), last],
        ["shrink"],
    ]


def _c(c7: int) -> list[Step]:
    wide, tall = (1, 7), (7, 1)
    double = [(c7, tall), (c7, wide), (c7, tall), (192, wide)]
    return [
        [conv("branch1x1", 192)],
        [conv("branch7x7_1", c7), conv("branch7x7_2", c7, wide), conv("branch7x7_3", 192, tall)],
        [conv("branch7x7dbl_1", c7), *(conv(f"branch7x7dbl_{i + 2}", *shape) for i, shape in enumerate(double))],
        ["average", conv("branch_pool", 192)],
    ]


def _d() -> list[Step]:
    seven = [conv("branch7x7x3_1", 192), conv("branch7x7x3_2", 192, (1, 7)), conv("branch7x7x3_3", 192, (7, 1))]
    return [
        [conv("branch3x3_1", 192), conv("branch3x3_2", 320, 3, 2, padded=False)],
        [*seven, conv("branch7x7x3_4", 192, 3, 2, padded=False)],
        ["shrink"],
    ]


def _e(pool: str) -> list[Step]:
    def halves(name: str) -> list[Step]:
        return [[conv(f"{name}a", 384, (1, 3))], [conv(f"{name}b", 384, (3, 1))]]

    return [
        [conv("branch1x1", 320)],
        [conv("branch3x3_1", 384), halves("branch3x3_2")],
        [conv("branch3x3dbl_1", 448), conv("branch3x3dbl_2", 384, 3), halves("branch3x3dbl_3")],
        [pool, conv("branch_pool", 192)],
    ]


_STEM: tuple[Step, ...] = (
    conv("Conv2d_1a_3x3", 32, 3, 2, padded=False),  # (B, 32, 149, 149)
    conv("Conv2d_2a_3x3", 32, 3, padded=False),
    conv("Conv2d_2b_3x3", 64, 3),
    "shrink",
    conv("Conv2d_3b_1x1", 80),
    conv("Conv2d_4a_3x3", 192, 3, padded=False),
    "shrink",  # (B, 192, 35, 35)
)
_BLOCKS: dict[str, list[Step]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),  # (B, 768, 17, 17)
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),  # (B, 1280, 8, 8)
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in a state dict of the published network, those it needs at inference."""
    found: dict[str, tuple[int, ...]] = {}

    def walk(step: Step, prefix: str, channels: int) -> int:
        if isinstance(step, str):
            return channels
        if isinstance(step, list):
            return sum(_last(walk, branch, prefix, channels) for branch in step)
        name, out, kernel, _, _ = step
        found[f"{prefix}{name}.conv.weight"] = (out, channels, *kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{prefix}{name}.bn.{part}"] = (out,)
        return int(out)

    channels = _last(walk, _STEM, "", 3)
    for name, block in _BLOCKS.items():
        channels = walk(block, f"{name}.", channels)
    return {**found, "fc.weight": (1008, channels), "fc.bias": (1008,)}


def _last(walk: Any, steps: Any, prefix: str, channels: int) -> int:
    for step in steps:
        channels = walk(step, prefix, channels)
    return channels


class Inception(nn.Module):
    """The network on inputs (B, 3, 299, 299) in [-1, 1].

    Args:
        state: a state dict with the names of the published port, such as `Mixed_5b.branch1x1.conv.weight`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.arrays = nn.ParameterDict()
        for name in (key.removesuffix(".conv.weight") for key in shapes() if key.endswith(".conv.weight")):
            weight, bias = _folded(state, name)
            self.arrays[_key(name)] = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            self.arrays[_key(name) + "/bias"] = nn.Parameter(bias)
        self.arrays["fc"] = nn.Parameter(state["fc.weight"].clone())
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pool` (B, 2048), `spatial` (B, 17 x 17 x 7) in the order height, width, channel, and `logits` (B, 1008)."""
        spatial = x
        x = self._chain(x.contiguous(memory_format=torch.channels_last), _STEM, "")
        for name, block in _BLOCKS.items():
            if name == "Mixed_6d":
                weight, bias = self._arrays("Mixed_6d.branch1x1")
                spatial = F.relu(F.conv2d(x, weight[:_SPATIAL], bias[:_SPATIAL]))
            x = self._step(x, block, f"{name}.")
        pool = x.mean(dim=(2, 3))
        logits = pool @ self.arrays["fc"].T  # without bias, as Inception Scores are computed
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1), "logits": logits}

    def _chain(self, x: torch.Tensor, steps: Any, prefix: str) -> torch.Tensor:
        for step in steps:
            x = self._step(x, step, prefix)
        return x

    def _step(self, x: torch.Tensor, step: Step, prefix: str) -> torch.Tensor:
        if isinstance(step, str):
            return _pool(x, step)
        if isinstance(step, list):
            return torch.cat([self._chain(x, branch, prefix) for branch in step], dim=1)
        name, _, _, stride, padding = step
        weight, bias = self._arrays(prefix + name)
        return F.relu_(F.conv2d(x, weight, bias, stride, padding))

    def _arrays(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.arrays[_key(name)], self.arrays[_key(name) + "/bias"]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a dot separates modules


def _pool(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "shrink":
        return F.max_pool2d(x, 3, stride=2)
    if kind == "maximum":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _folded(state: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with its batch normalisation, computed in float64."""
    weight = state[f"{name}.conv.weight"]
    gamma, beta, mean, variance = (
        state[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / torch.sqrt(variance + _EPSILON)
    folded = weight.double() * scale[:, None, None, None]
    return folded.to(weight.dtype), (beta - mean * scale).to(weight.dtype)


def load_state(file: Path, dtype: torch.dtype = torch.float32) -> Inception:
    """The network from the published state dict `pt_inception-2015-12-05-6726825d.pth`."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return Inception({name: array.to(dtype) for name, array in state.items() if array.is_floating_point()})


class Scripted(nn.Module):
    """The published TorchScript `inception-2015-12-05.pt`, its pooled features on inputs in [-1, 1].

    Args:
        layers: the part that follows resizing and scaling, `layers` in the file.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pool` (B, 2048)."""
        pool: torch.Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))  # a third faster on a CPU
        return {"pool": pool.flatten(1)}


def load_script(file: Path, dtype: torch.dtype = torch.float32) -> Scripted:
    """The network from the published TorchScript file; only operations of PyTorch run, no pickle is loaded."""
    script = torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return Scripted(script.layers.to(dtype))
