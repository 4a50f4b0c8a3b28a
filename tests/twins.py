"""Networks of diffusers' classes with random weights, as model folders and as suites: small, or shaped like large ones.

Weights are drawn once per process from a seed; adaptive norms and last layers, which start at zero in some classes, are
drawn too, so that every block matters.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from evalbench import sampling
from evalbench.spec import Suite, load_suite

ZOO = Path(str(files("evalbench"))) / "models" / "zoo"
_ROOT = Path(tempfile.mkdtemp(prefix="evalbench-twins-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)

# name -> (the network of the zoo whose other parts it takes, what differs in its configuration)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("fashion-dit", {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}),
    "dit-small": ("fashion-dit", {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "patch_size": 8}),
    "sd": ("fashion-sd", {"block_out_channels": [16, 32], "norm_num_groups": 8, "attention_head_dim": 2}),
    "sd3": (
        "fashion-flow",
        {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16},
    ),
    # Stable Diffusion 1.5 and DiT-XL/2: their depth and their kinds of blocks, a fraction of their width
    "sd-1.5": (
        "fashion-sd",
        {
            "block_out_channels": [16, 32, 64, 64],
            "norm_num_groups": 8,
            "attention_head_dim": 2,
            "layers_per_block": 2,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
    ),
    "dit-xl": (
        "fashion-dit",
        {"num_layers": 28, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "out_channels": 2},
    ),
}


@cache
def folder(kind: str) -> Path:
    """A model folder."""
    import diffusers

    like, changes = KINDS[kind]
    made = _ROOT / kind
    part = "unet" if (ZOO / like / "unet").is_dir() else "transformer"
    shutil.copytree(ZOO / like, made, ignore=shutil.ignore_patterns(part, "*.png", "card.json"))
    config = json.loads((ZOO / like / part / "config.json").read_text()) | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(diffusers, config["_class_name"]).from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
    network.save_pretrained(made / part)
    return made


@cache
def suite(kind: str, small: str = "") -> Suite:
    """A suite of a twin, in float64, with another twin as the model of role `small` and of role `guide`."""
    dtype = "float32" if kind == "sd3" else "float64"  # diffusers keeps SD3's patch embedding in float32
    facts = load_suite(KINDS[kind][0]).override(samples=96, batch=32, chunk=32, dtype=dtype)

    def model(name: str) -> Any:
        options = {key: value for key, value in facts.model.options.items() if key != "sha256"}
        return facts.model.model_copy(update={"options": {**options, "folder": str(folder(name))}})

    roles = {role: model(small) for role in ("small", "guide")} if small else {}
    return facts.model_copy(update={"name": f"twin-{kind}", "model": model(kind), "roles": roles})


def setup(kind: str, small: str = "") -> sampling.Setup:
    """A twin, loaded once however it is asked for: who looks whether a network changed must see the one that ran."""
    return _setup(kind, small)


@cache
def _setup(kind: str, small: str) -> sampling.Setup:
    return sampling.build(suite(kind, small))
