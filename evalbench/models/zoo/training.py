"""What the training scripts share: arguments, augmentation, the loop of the classifiers, folding, and the card."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evalbench.models.data import fashion_test, fashion_train

ZOO = Path(__file__).parent
Data = tuple[torch.Tensor, torch.Tensor]  # images uint8 (N, 1, 32, 32), labels int64 (N,)
_CURVE_EVERY = 50  # steps per point of a loss curve


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs, batch: passes over the data, images per step. seed: draws weights, order and augmentation.
        rate: peak of the one-cycle learning rate. decay: weight decay of AdamW. shift: largest move in pixels.
    """

    epochs: int
    batch: int
    seed: int
    rate: float
    decay: float
    shift: int


def arguments(description: str | None, recipe: Recipe) -> tuple[argparse.Namespace, Recipe]:
    """--data, --out, --epochs, --seed and --threads of a training script, and the recipe they ask for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=os.environ.get("EVALBENCH_DATA"), help="folder with the idx files")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder for weights and card")
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args, Recipe(args.epochs, recipe.batch, args.seed, recipe.rate, recipe.decay, recipe.shift)


def train_data(folder: str) -> Data:
    """The 60,000 training images as tensors."""
    images, labels = fashion_train(folder)
    return torch.from_numpy(images), torch.from_numpy(labels)


def test_data() -> Data:
    """The 10,000 shipped test images as tensors."""
    images, labels = fashion_test()
    return torch.from_numpy(images), torch.from_numpy(labels)


def augmented(images: torch.Tensor, shift: int) -> torch.Tensor:
    """Half of the images mirrored, and the batch moved by up to `shift` pixels each way."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if not shift:
        return images
    down, right = (int(move) for move in torch.randint(0, 2 * shift + 1, (2,)))
    height, width = images.shape[-2:]
    return F.pad(images, [shift] * 4)[..., down : down + height, right : right + width]


def fit(
    network: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], data: Data, recipe: Recipe
) -> tuple[list[float], int]:
    """Train in place with AdamW under a one-cycle rate.

    Args:
        loss: of a batch of augmented images and their labels.

    Returns:
        The loss curve, each point a mean over 50 steps, and the number of steps.
    """
    images, labels = data
    steps = recipe.epochs * (len(images) // recipe.batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.25)
    curve: list[float] = []
    recent: list[float] = []
    network.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images))
        for rows in torch.split(order[: len(images) // recipe.batch * recipe.batch], recipe.batch):
            value = loss(augmented(images[rows], recipe.shift), labels[rows])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            recent.append(value.item())
            if len(recent) == _CURVE_EVERY:
                curve.append(round(sum(recent) / len(recent), 4))
                recent.clear()
        print(f"epoch {epoch + 1}/{recipe.epochs}  loss {curve[-1] if curve else value.item():.4f}", flush=True)
    network.eval()
    return curve, steps


def fold(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network in eval mode with each batch normalisation folded into the convolution before it."""
    for block in network.modules():
        if isinstance(block, nn.Sequential) and len(block) > 1:
            conv, norm = block[0], block[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[0], block[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return dict(network.state_dict())


def save_half(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write float16 safetensors."""
    file.write_bytes(save({name: tensor.half().contiguous() for name, tensor in weights.items()}))


def accuracy(logits: Callable[[torch.Tensor], torch.Tensor], data: Data) -> float:
    """Fraction of images whose largest logit is their label."""
    images, labels = data
    with torch.inference_mode():
        seen = torch.cat([logits(rows).argmax(1) for rows in torch.split(images, 500)])
    return float((seen == labels).double().mean())


def milliseconds(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> float:
    """Median time per image of 15 calls on one thread, after 3 to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.inference_mode():
        for _ in range(18):
            started = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 1000 * sorted(times[3:])[7] / len(images)


def write_card(file: Path, weights: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write the card of a weights file and print it."""
    card = {
        "data": "Fashion-MNIST (MIT): 60,000 training images, padded to 32x32; quality on the 10,000 test images",
        **facts,
        "batch": recipe.batch,
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "peak_learning_rate": recipe.rate,
        "weight_decay": recipe.decay,
        "augmentation": "mirror" + (f", shift up to {recipe.shift} pixels" if recipe.shift else ""),
        "machine": "2 CPU cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    file.write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    print(json.dumps({name: value for name, value in card.items() if name != "loss_curve"}, indent=1))
