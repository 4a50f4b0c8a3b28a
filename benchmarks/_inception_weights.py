"""Seeded random Inception weights in the place of the published ones, to be given to every implementation."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from pathlib import Path

import torch

from evalbench import weights
from evalbench.models.inception import shapes

_TO_BUFFER = (".bn.running_mean", ".bn.bias", "fc.bias")


@functools.cache
def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Kaiming-normal convolutions; batch normalisation with statistics of its own, so that folding is seen."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes().items():
        if name.endswith((".bn.weight", ".bn.running_var")):
            state[name] = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        elif name.endswith(_TO_BUFFER):
            state[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    counts = {name.replace(".weight", ".num_batches_tracked"): torch.tensor(0) for name in state if "bn.weight" in name}
    return state | counts


def pytorch_fid_network():
    """pytorch-fid's network with the random weights."""
    from pytorch_fid import inception

    original = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *args, **kwargs: random_state()
    try:
        return inception.InceptionV3().eval()
    finally:
        inception.load_state_dict_from_url = original


class Layers(torch.nn.Module):
    """What follows resizing and scaling in the published TorchScript; here pytorch-fid's network."""

    def __init__(self) -> None:
        super().__init__()
        network = pytorch_fid_network()
        self.blocks = torch.nn.Sequential(*network.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).flatten(1)


class Script(torch.nn.Module):
    """The published file has its network under `layers`."""

    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - 128) / 128)


def install(cache: Path) -> None:
    """Write both files where `EVALBENCH_CACHE=cache` finds them."""
    folder = cache / "weights"
    folder.mkdir(parents=True)
    torch.save(random_state(), folder / weights.KNOWN["inception-pth"].file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and the published file is a script all the same
        traced = torch.jit.trace(Script(Layers().eval()), torch.zeros(1, 3, 299, 299))
        torch.jit.save(traced, str(folder / weights.KNOWN["inception-torchscript"].file))


def pinned(cache: Path) -> dict[str, weights.Weights]:
    """The table of known weights with the digests of the files in a cache."""
    return {
        name: dataclasses.replace(known, sha256=weights.sha256(cache / "weights" / known.file))
        for name, known in weights.KNOWN.items()
    }
