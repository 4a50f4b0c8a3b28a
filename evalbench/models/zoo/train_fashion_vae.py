"""Train the autoencoder of the latent models: diffusers' AutoencoderKL, 32x32 images to 4 x 8 x 8 latents and back.

Loss: mean squared and mean absolute error of the reconstruction, and a small Kullback-Leibler term (Rombach et al.
2022, section 3.1, without the adversarial and perceptual terms).

python -m evalbench.models.zoo.train_fashion_vae --data FOLDER
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from evalbench.models.zoo.generative import (
    Batch,
    Recipe,
    Training,
    arguments,
    diffusers,
    parameters,
    rows,
    save_part,
    train_images,
    write_card,
)
from evalbench.models.zoo.training import Data

NAME = "fashion-vae"
RECIPE = Recipe(steps=4_000, batch=128, seed=31, rate=2e-3, drop=0.0)
LATENT = (8, 8)
CONFIG: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 32,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
KL_WEIGHT = 1e-4  # of the divergence per latent number, against errors per pixel


def seen(data: Data, recipe: Recipe, generator: torch.Generator) -> Batch:
    """A batch of images and the noise of their latents."""
    images = rows(data, recipe, generator)[0]
    return images, torch.randn(len(images), CONFIG["latent_channels"], *LATENT, generator=generator)


def reconstruction_loss(model: Any, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Loss of a batch of images, (B, 1, 32, 32)."""
    posterior = model.encode(images).latent_dist
    found = model.decode(posterior.mean + posterior.std * noise).sample
    error = found - images
    loss: torch.Tensor = (
        (error**2).mean() + error.abs().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
    )
    return loss


def latents(model: Any, images: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Posterior means, (N, 4, 8, 8), not scaled; computed on the device, returned on the CPU."""
    model.to(device)
    with torch.inference_mode():
        blocks = [model.encode(block.to(device)).latent_dist.mean.cpu() for block in torch.split(images, 500)]
    model.cpu()
    return torch.cat(blocks).clone()


def scaled(model: Any, data: Data, device: str = "cpu") -> Data:
    """The data as the denoisers see it: latents of standard deviation 1, with their labels."""
    images, labels = data
    return latents(model, images, device) * model.config.scaling_factor, labels


def load(folder: Path) -> Any:
    """The trained autoencoder, float32, for use only."""
    return diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def main() -> None:
    """Train, measure the scale of the latents, write the folder with its card."""
    args, recipe = arguments(__doc__, RECIPE)
    model = diffusers.AutoencoderKL(**CONFIG)
    data = train_images(args.data)
    training = Training(
        model,
        lambda g, _: seen(data, recipe, g),
        partial(reconstruction_loss, model),
        recipe,
        args.work / NAME,
        args.device,
    )
    training.run()
    scale = 1.0 / float(latents(model, data[0][:10_000]).std())
    model.register_to_config(scaling_factor=round(scale, 5))
    folder = args.out / NAME
    save_part(model, folder)
    stored = load(folder)
    with torch.inference_mode():
        images = data[0][:1000]
        error = float(((stored.decode(stored.encode(images).latent_dist.mean).sample - images) ** 2).mean().sqrt())
    facts = {
        "what": "AutoencoderKL, 1 x 32 x 32 images to 4 x 8 x 8 latents",
        "parameters": parameters([stored]),
        "reconstruction_rms_of_1000_training_images": round(error, 4),
    }
    write_card(folder, recipe, training, facts)


if __name__ == "__main__":
    main()
