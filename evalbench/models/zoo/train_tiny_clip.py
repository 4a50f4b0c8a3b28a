"""Train `tiny-fashion-clip`, a CLIP of some 300,000 parameters on Fashion-MNIST and captions from its class names.

open_clip's own model class and tokeniser, with a small vocabulary; the loss is that of CLIP (Radford et al. 2021,
figure 3) with all captions of a class as positives of all its images (Khosla et al. 2020, L_out).

python -m evalbench.models.zoo.train_tiny_clip --data FOLDER
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch.nn import functional as F

from evalbench.models.nets import CLASS_NAMES, TINY_CLIP, TINY_CLIP_MERGES, caption, load_tiny_clip
from evalbench.models.zoo.captions import TEMPLATES, captions, learn_merges
from evalbench.models.zoo.training import (
    Recipe,
    accuracy,
    arguments,
    fit,
    milliseconds,
    save_half,
    test_data,
    train_data,
    write_card,
)

RECIPE = Recipe(epochs=14, batch=256, seed=21, rate=2e-3, decay=5e-2, shift=1)
MEAN, STD = [0.22] * 3, [0.33] * 3  # of the padded training images
TEXTS_PER_CLASS = 2  # templates drawn for each class at each step


def model_config(vocab_size: int) -> dict[str, Any]:
    """open_clip's description of the model."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": vocab_size, "width": 64, "heads": 4, "layers": 2},
    }


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 1, 32, 32) to what the model takes, float32 (B, 3, 32, 32)."""
    return ((images.float() / 255 - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)


def contrastive_loss(model: Any, images: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of both directions; positives are all pairs of one class, equally.

    Args:
        images: float32 (B, 3, 32, 32). tokens: int64 (classes, T, context), T captions of each class.
    """
    seen = model.encode_image(pixels(images), normalize=True)
    read = model.encode_text(tokens.flatten(0, 1), normalize=True)
    logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T  # (B, classes T)
    of_text = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    same = (labels[:, None] == of_text).float()
    to_texts = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_images = F.cross_entropy(logits.T, same.T / same.sum(0).clamp(min=1)[:, None])
    return (to_texts + to_images) / 2


def write_folder(folder: Path, merges: list[tuple[str, str]]) -> None:
    """The merges and the configuration; the same bytes at every run."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / TINY_CLIP_MERGES).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    config = {
        "model_cfg": model_config(2 * 256 + len(merges) + 2),
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def main() -> None:
    """Train, write the folder that open_clip loads, and the card."""
    args, recipe = arguments(__doc__, RECIPE)
    folder = args.out / TINY_CLIP.name
    started = time.perf_counter()
    texts = captions()
    merges = learn_merges([text for of_class in texts for text in of_class])
    write_folder(folder, merges)
    config = model_config(2 * 256 + len(merges) + 2)
    tokenizer = open_clip.SimpleTokenizer(
        str(folder / TINY_CLIP_MERGES), context_length=config["text_cfg"]["context_length"]
    )
    tokens = torch.stack([tokenizer(of_class) for of_class in texts])  # (classes, templates, context)
    model = CLIP(**config)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen = torch.randperm(tokens.shape[1])[:TEXTS_PER_CLASS]
        return contrastive_loss(model, images, labels, tokens[:, chosen])

    curve, steps = fit(model, loss, train_data(args.data), recipe)
    seconds = time.perf_counter() - started
    file = folder / "open_clip_model.safetensors"
    save_half(model.state_dict(), file)
    stored, tokenizer = load_tiny_clip(folder)
    images, labels = test_data()
    with torch.inference_mode():
        classes = stored.encode_text(tokenizer([caption(label) for label in range(len(CLASS_NAMES))]), normalize=True)

    def cosines(rows: torch.Tensor) -> torch.Tensor:
        cosine: torch.Tensor = stored.encode_image(pixels(rows), normalize=True) @ classes.T
        return cosine

    with torch.inference_mode():
        own = torch.cat([cosines(rows) for rows in torch.split(images, 500)]).gather(1, labels[:, None])
    facts = {
        "what": "CLIP of open_clip's classes; its cosine is the score tiny-fashion, which is not a CLIP score",
        "parameters": sum(weight.numel() for weight in stored.parameters()),
        "vocabulary": len(tokenizer.encoder),
        "templates": list(TEMPLATES),
        "steps": steps,
        "seconds": round(seconds, 1),
        "zero_shot_accuracy": accuracy(cosines, (images, labels)),
        "test_images": len(labels),
        "mean_cosine_of_own_caption": round(float(own.mean()), 4),
        "ms_per_image_1_thread_batch_256": round(milliseconds(cosines, images[:256]), 4),
        "loss_curve": curve,
    }
    write_card(args.out / f"{TINY_CLIP.name}.json", file, recipe, facts)


if __name__ == "__main__":
    main()
