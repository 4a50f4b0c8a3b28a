"""Train `fashion-sd`: UNet2DConditionModel and a small CLIP text encoder on the latents of `fashion-vae`.

Latent diffusion from captions (Rombach et al. 2022) on Stable Diffusion's schedule with eps-prediction; the folder is
one that StableDiffusionPipeline loads. Guidance: a tenth of the captions are empty.

python -m evalbench.models.zoo.train_fashion_sd --data FOLDER    (after train_fashion_vae)
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from evalbench.models.zoo import train_fashion_vae as vae
from evalbench.models.zoo.captions import CONTEXT, clip_tokenizer, token_table
from evalbench.models.zoo.generative import (
    Batch,
    Recipe,
    Training,
    arguments,
    diffusers,
    dropped,
    parameters,
    rows,
    save_pipeline,
    train_images,
    write_card,
)
from evalbench.models.zoo.training import Data

NAME = "fashion-sd"
RECIPE = Recipe(steps=12_000, batch=256, seed=51, rate=1e-3)
WIDTH = 64  # of the text encoder
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 16,
    "norm_num_groups": 16,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def text_config(vocabulary: int, width: int) -> CLIPTextConfig:
    """A text encoder of two layers over the small vocabulary, whose last two words start and end a text."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=CONTEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


@cache
def scheduler() -> Any:
    """The noise of the training, and the pipeline's."""
    return diffusers.DDIMScheduler(**SCHEDULER)


def seen(data: Data, tokens: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Noisy latents at uniform time steps, the steps, one text of each class, which row reads which, and the noise.

    Args:
        tokens: int64 (11, templates, context), captions of each class; the last "class" is the empty text.
    """
    z_0, labels = rows(data, recipe, generator)
    t = torch.randint(SCHEDULER["num_train_timesteps"], (len(z_0),), generator=generator)
    noise = torch.randn(z_0.shape, generator=generator)
    template = int(torch.randint(tokens.shape[1], (1,), generator=generator))
    given = dropped(labels, len(tokens) - 1, recipe, generator)
    return scheduler().add_noise(z_0, noise, t), t, tokens[:, template].contiguous(), given, noise


def eps_loss(
    unet: Any,
    text: Any,
    z_t: torch.Tensor,
    t: torch.Tensor,
    tokens: torch.Tensor,
    given: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted eps."""
    read = text(tokens).last_hidden_state  # (11, context, width)
    return F.mse_loss(unet(z_t, t, read[given]).sample, eps)


def main() -> None:
    """Train, and write the pipeline's folder with its card."""
    args, recipe = arguments(__doc__, RECIPE)
    autoencoder = vae.load(args.out / vae.NAME)
    data = vae.scaled(autoencoder, train_images(args.data), args.device)
    tokenizer = clip_tokenizer(CONTEXT)
    text = CLIPTextModel(text_config(len(tokenizer), WIDTH))
    unet = diffusers.UNet2DConditionModel(**UNET)
    tokens = token_table(tokenizer)
    networks = nn.ModuleList([unet, text])
    training = Training(
        networks,
        lambda g, _: seen(data, tokens, recipe, g),
        partial(eps_loss, unet, text),
        recipe,
        args.work / NAME,
        args.device,
    )
    training.run()
    folder = args.out / NAME
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, folder)
    facts = {
        "what": "StableDiffusionPipeline: UNet2DConditionModel on 4 x 8 x 8 latents, CLIPTextModel, AutoencoderKL",
        "parameters": parameters([unet, text]),
    }
    write_card(folder, recipe, training, facts)


if __name__ == "__main__":
    main()
