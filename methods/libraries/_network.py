"""Networks that a library changes in place are afterwards what they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_LEFT = ("forward", "_diffusers_hook")  # attributes that diffusers' hooks set on modules


@contextlib.contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Inside, a library may hook modules of the network; afterwards its hooks and their traces are gone."""
    before = [(module, {name: vars(module).get(name) for name in _LEFT}) for module in network.modules()]
    for module, _ in before:
        vars(module).pop("_diffusers_hook", None)  # the library's hooks of this call alone
    try:
        yield
    finally:
        for module, found in before:
            for name, value in found.items():
                if value is None:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers' loggers report errors only: that a part of theirs is experimental is not news of a run."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def tiny(kind: str) -> Any:
    """A small network of a diffusers class with random weights, to see what a library does with it.

    Args:
        kind: `DiTTransformer2DModel`, `UNet2DConditionModel` or `SD3Transformer2DModel`.
    """
    import diffusers
    import torch

    sizes: dict[str, dict[str, Any]] = {
        "DiTTransformer2DModel": {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 1,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 4,
            "num_embeds_ada_norm": 3,
        },
        "UNet2DConditionModel": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        "SD3Transformer2DModel": {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 8,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
    }
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**sizes[kind]).eval().requires_grad_(False)


KINDS = ("DiTTransformer2DModel", "UNet2DConditionModel", "SD3Transformer2DModel")


def probe_time(i: int) -> float:
    """The time of the i-th call of a tiny network, of 1000: caches that skip late steps need early ones first."""
    return 999.0 - 160.0 * i


def run_tiny(network: Any, i: int) -> Any:
    """The i-th call of a tiny network: a state that moves a little from call to call."""
    import torch

    kind = type(network).__name__
    generator = torch.Generator().manual_seed(0)
    channels = int(network.config.in_channels)
    x = torch.randn(2, channels, 8, 8, generator=generator) + 0.01 * i
    t = torch.full((2,), probe_time(i))
    with torch.no_grad():
        if kind == "DiTTransformer2DModel":
            return network(x, timestep=t, class_labels=torch.tensor([0, 1]), return_dict=False)[0]
        words = torch.randn(2, 3, 8, generator=generator)
        if kind == "UNet2DConditionModel":
            return network(x, t, encoder_hidden_states=words, return_dict=False)[0]
        return network(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=words,
            pooled_projections=words[:, 0],
            return_dict=False,
        )[0]
