"""Train `fashion-dit` and `fashion-dit-s`: diffusers' DiTTransformer2DModel in pixel space, class-conditional.

Peebles & Xie 2023 (DiT) with v-prediction (Salimans & Ho 2022) on the linear schedule of Ho et al. 2020, label 10 for
"any class". Both sizes see the same data on the same path. Every eighth step of the large one is on images halved to
16x16, so that it also denoises those.

python -m evalbench.models.zoo.train_fashion_dit --size base --data FOLDER
python -m evalbench.models.zoo.train_fashion_dit --size small --data FOLDER
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from evalbench.models.zoo.generative import (
    Batch,
    Recipe,
    Training,
    add_arguments,
    chosen,
    diffusers,
    dropped,
    parameters,
    rows,
    save_part,
    train_images,
    write_card,
)
from evalbench.models.zoo.training import Data

CLASSES = 10  # label 10 is the null label
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


@dataclass(frozen=True)
class Size:
    """One of the two models.

    Attributes:
        name: of its folder. width, depth, heads: of the transformer; patches are 8x8 pixels.
        low_every: every so many steps one on 16x16 images; 0 for never.
    """

    name: str
    width: int
    depth: int
    heads: int
    low_every: int
    recipe: Recipe


SIZES = {
    "base": Size("fashion-dit", 128, 6, 4, 8, Recipe(steps=9_000, batch=64, seed=41, rate=1e-3)),
    "small": Size("fashion-dit-s", 64, 4, 4, 0, Recipe(steps=8_000, batch=64, seed=42, rate=2e-3)),
}


def network(size: Size) -> Any:
    """The untrained model; blocks start as the identity (adaLN-Zero, Peebles & Xie, section 3.2)."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=1,
        out_channels=1,
        num_layers=size.depth,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=CLASSES,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped by the loss, from the step's generator
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


@cache
def scheduler() -> Any:
    """The noise of the training, and what the folder says of it."""
    return diffusers.DDIMScheduler(**SCHEDULER)


def seen(data: Data, recipe: Recipe, generator: torch.Generator, low: bool) -> Batch:
    """Noisy images at uniform time steps, the steps, labels, v = alpha eps - sigma x0; with `low`, of halved images."""
    x_0, labels = rows(data, recipe, generator)
    if low:
        x_0 = F.avg_pool2d(x_0, 2)  # (B, 1, 16, 16)
    t = torch.randint(SCHEDULER["num_train_timesteps"], (len(x_0),), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    given = dropped(labels, CLASSES, recipe, generator)
    return scheduler().add_noise(x_0, noise, t), t, given, scheduler().get_velocity(x_0, noise, t)


def v_loss(model: Any, x_t: torch.Tensor, t: torch.Tensor, given: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted v."""
    return F.mse_loss(model(x_t, timestep=t, class_labels=given).sample, v)


def main() -> None:
    """Train one size and write its folder with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    size = SIZES[parser.parse_known_args()[0].size]
    add_arguments(parser, size.recipe)
    args = parser.parse_args()
    recipe = chosen(parser, args, size.recipe)
    model = network(size)
    data = train_images(args.data)

    def draw(generator: torch.Generator, step: int) -> Batch:
        low = size.low_every > 0 and step % size.low_every == size.low_every - 1
        return seen(data, recipe, generator, low)

    training = Training(model, draw, partial(v_loss, model), recipe, args.work / size.name, args.device)
    training.run()
    folder = args.out / size.name
    save_part(model, folder / "transformer")
    scheduler().save_pretrained(folder / "scheduler")
    facts = {
        "what": f"DiTTransformer2DModel in pixel space, width {size.width}, depth {size.depth}, patches 4x4",
        "parameters": parameters([model]),
        "halved_images": f"every {size.low_every}th step" if size.low_every else "none",
    }
    write_card(folder, recipe, training, facts)


if __name__ == "__main__":
    main()
