"""Train `fashion-flow`, SD3's transformer as a flow on the latents of `fashion-vae`, and its 2-rectified version.

Flow matching (Lipman et al. 2023; Esser et al. 2024, with their logit-normal times): x_t = (1 - t) x_0 + t eps, the
network predicts eps - x_0. Two small CLIP text encoders stand where SD3 has its two; there is no T5. `--reflow`
trains on pairs (noise, sample of `fashion-flow`) instead (Liu et al. 2023, 2-rectified flow), from its weights.

python -m evalbench.models.zoo.train_fashion_flow --data FOLDER             (after train_fashion_vae)
python -m evalbench.models.zoo.train_fashion_flow --reflow --data FOLDER    (after fashion-flow)
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from evalbench.models.zoo import train_fashion_vae as vae
from evalbench.models.zoo.captions import CONTEXT, clip_tokenizer, token_table
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
    save_pipeline,
    train_images,
    write_card,
)
from evalbench.models.zoo.train_fashion_sd import text_config
from evalbench.models.zoo.training import Data

NAME, REFLOW_NAME = "fashion-flow", "fashion-flow-2rf"
RECIPE = Recipe(steps=10_000, batch=256, seed=61, rate=1e-3)
REFLOW_RECIPE = Recipe(steps=3_000, batch=64, seed=62, rate=5e-4)
WIDTH = 32  # of each text encoder
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": 8,
}
PAIRS, PAIR_STEPS, PAIR_BATCH = 8_192, 10, 512  # pairs of the reflow, Heun steps each, per batch
PAIR_SEED = 63
ABSENT = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))  # of SD3


class Flow(nn.Module):
    """The transformer with its two text encoders, as StableDiffusion3Pipeline joins them."""

    def __init__(self, transformer: Any, text: Any, text_2: Any) -> None:
        super().__init__()
        self.transformer, self.text, self.text_2 = transformer, text, text_2

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts (n, context) as (n, context, 2 WIDTH) and pooled (n, 2 WIDTH)."""
        found = [encoder(tokens, output_hidden_states=True) for encoder in (self.text, self.text_2)]
        words = torch.cat([out.hidden_states[-2] for out in found], dim=-1)
        return words, torch.cat([out.text_embeds for out in found], dim=-1)

    def velocity(self, z: torch.Tensor, t: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """dz/dt at time t in [0, 1], (B,); texts one per row."""
        found: torch.Tensor = self.transformer(
            hidden_states=z, timestep=1000 * t, encoder_hidden_states=words, pooled_projections=pooled
        ).sample
        return found


def untrained(vocabulary: int) -> Flow:
    """The model before training; blocks start as the identity."""
    transformer = diffusers.SD3Transformer2DModel(**TRANSFORMER)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    texts = [CLIPTextModelWithProjection(text_config(vocabulary, WIDTH)) for _ in range(2)]
    return Flow(transformer, *texts)


def stored(folder: Path) -> Flow:
    """A trained model, float32."""
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **ABSENT)
    return Flow(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)


def seen(z_0: torch.Tensor, eps: torch.Tensor, given: torch.Tensor, tokens: torch.Tensor, g: torch.Generator) -> Batch:
    """Latents on the way to noise at logit-normal times, the times, texts, which row reads which, and eps - z_0.

    Args:
        tokens: int64 (11, templates, context), captions of each class; the last "class" is the empty text.
    """
    t = torch.sigmoid(torch.randn(len(z_0), generator=g))
    at = t[:, None, None, None]
    template = int(torch.randint(tokens.shape[1], (1,), generator=g))
    return (1 - at) * z_0 + at * eps, t, tokens[:, template].contiguous(), given, eps - z_0


def flow_loss(
    model: Flow, z_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, given: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the velocity."""
    words, pooled = model.read(tokens)
    return F.mse_loss(model.velocity(z_t, t, words[given], pooled[given]), v)


@torch.no_grad()
def coupled(model: Flow, tokens: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, the latents the flow takes it to by Heun's method, and their labels, classes in turn; on the CPU."""
    g = torch.Generator().manual_seed(PAIR_SEED)
    noise = torch.randn(PAIRS, 4, 8, 8, generator=g)
    labels = torch.arange(PAIRS) % (len(tokens) - 1)
    words, pooled = model.read(tokens[:, 0].to(device))
    times = torch.linspace(1.0, 0.0, PAIR_STEPS + 1, device=device)
    ends = []
    for first, label in zip(torch.split(noise, PAIR_BATCH), torch.split(labels, PAIR_BATCH), strict=True):
        z = first.to(device)
        for s, t in pairwise(times):
            slope = model.velocity(z, s.expand(len(z)), words[label], pooled[label])
            there = z + (t - s) * slope
            slope = (slope + model.velocity(there, t.expand(len(z)), words[label], pooled[label])) / 2
            z = z + (t - s) * slope
        ends.append(z.cpu())
        print(f"pairs {sum(map(len, ends))}/{PAIRS}", flush=True)
    return noise, torch.cat(ends), labels


def main() -> None:
    """Train one of the two and write the pipeline's folder with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reflow", action="store_true", help="train the 2-rectified flow")
    reflow = parser.parse_known_args()[0].reflow
    name, recipe = (REFLOW_NAME, REFLOW_RECIPE) if reflow else (NAME, RECIPE)
    add_arguments(parser, recipe)
    args = parser.parse_args()
    recipe = chosen(parser, args, recipe)
    tokenizer = clip_tokenizer(CONTEXT)
    tokens = token_table(tokenizer)
    null = len(tokens) - 1
    autoencoder = vae.load(args.out / (f"{NAME}/vae" if reflow else vae.NAME))
    autoencoder.register_to_config(shift_factor=0.0)  # which the pipeline of SD3 adds
    if reflow:
        model = stored(args.out / NAME)
        pairs = coupled(model.to(args.device), tokens, args.device)

        def draw(g: torch.Generator, step: int) -> Batch:
            i = torch.randint(PAIRS, (recipe.batch,), generator=g)
            return seen(pairs[1][i], pairs[0][i], dropped(pairs[2][i], null, recipe, g), tokens, g)
    else:
        model = untrained(len(tokenizer))
        data: Data = vae.scaled(autoencoder, train_images(args.data), args.device)

        def draw(g: torch.Generator, step: int) -> Batch:
            z_0, labels = rows(data, recipe, g)
            eps = torch.randn(z_0.shape, generator=g)
            return seen(z_0, eps, dropped(labels, null, recipe, g), tokens, g)

    training = Training(model, draw, partial(flow_loss, model), recipe, args.work / name, args.device)
    training.run()
    folder = args.out / name
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=model.text,
        tokenizer=tokenizer,
        text_encoder_2=model.text_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    save_pipeline(pipeline, folder)
    facts = {
        "what": "StableDiffusion3Pipeline: SD3Transformer2DModel on latents of 4 x 8 x 8, two text encoders",
        "parameters": parameters([model]),
        "pairs": f"{PAIRS} of {NAME} by {PAIR_STEPS} Heun steps" if reflow else "none",
    }
    write_card(folder, recipe, training, facts)


if __name__ == "__main__":
    main()
