"""What the training scripts of the generative models share: the loop with its checkpoints, the folder, the card.

Everything random of a step is drawn from a generator seeded by (seed, step), so that a run that was stopped goes on as
if it had not been, and 50 steps from the same seed give the same losses.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from evalbench.models.data import fashion_train
from evalbench.models.zoo.training import Data

ZOO = Path(__file__).parent
# Any: type checkers see stand-ins for its classes, which it shows where an optional library is missing
diffusers: Any = importlib.import_module("diffusers")
_POINT = 50  # steps per point of a loss curve
_STEPS_APART = 1_000_003  # seeds of neighbouring runs do not share steps


@dataclass(frozen=True)
class Recipe:
    """How a generative model is trained.

    Attributes:
        steps, batch: optimiser steps, images per step. seed: draws weights, rows, times and noise.
        rate: peak learning rate of AdamW, reached after `warmup` steps and falling linearly to a twentieth.
        average: rate at which the averaged weights, those that are kept, follow the trained ones.
        drop: fraction of rows whose condition is replaced by the null condition, for guidance.
    """

    steps: int
    batch: int
    seed: int
    rate: float
    warmup: int = 100
    average: float = 0.005
    drop: float = 0.1


Loss = Callable[[torch.Generator], torch.Tensor]


def arguments(description: str | None, recipe: Recipe) -> tuple[argparse.Namespace, Recipe]:
    """--data, --out, --work, --steps, --seed and --threads of a training script, and the recipe they ask for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, recipe)
    args = parser.parse_args()
    return args, chosen(parser, args, recipe)


def add_arguments(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """The options that every script has."""
    parser.add_argument("--data", default=os.environ.get("EVALBENCH_DATA"), help="folder with the idx files")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder for the models' folders")
    parser.add_argument("--work", type=Path, default=Path("results/runs/training"), help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=1)


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe that parsed arguments ask for; sets threads and the seed of the weights."""
    if args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return Recipe(**(asdict(recipe) | {"steps": args.steps, "seed": args.seed}))


def train_images(folder: str) -> Data:
    """The 60,000 training images as float32 (N, 1, 32, 32) in [-1, 1], and their labels."""
    images, labels = fashion_train(folder)
    return torch.from_numpy(images).float() / 127.5 - 1.0, torch.from_numpy(labels)


def rows(data: Data, recipe: Recipe, generator: torch.Generator) -> Data:
    """A batch with replacement."""
    index = torch.randint(len(data[0]), (recipe.batch,), generator=generator)
    return data[0][index], data[1][index]


def dropped(labels: torch.Tensor, null: int, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """The labels, a fraction `recipe.drop` of them replaced by the null label."""
    return torch.where(torch.rand(len(labels), generator=generator) < recipe.drop, null, labels)


class Training:
    """A training run that can be stopped at any time and goes on from its last checkpoint.

    Args:
        network: what is trained, in place; after `run` it holds the averaged weights, those to keep.
        loss: of a step, from its generator. recipe: how. folder: where checkpoints lie.
    """

    def __init__(self, network: nn.Module, loss: Loss, recipe: Recipe, folder: Path) -> None:
        self.network, self.loss, self.recipe = network, loss, recipe
        self.file = folder / "checkpoint.safetensors"
        self.weights: list[torch.Tensor] = [weight for weight in network.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def curve(self) -> list[float]:
        """The loss curve, a mean over `_POINT` steps each."""
        whole = len(self.losses) // _POINT * _POINT
        return [round(sum(self.losses[i : i + _POINT]) / _POINT, 5) for i in range(0, whole, _POINT)]

    def run(self, save_every: int = 250, until: int | None = None) -> None:
        """Train to the end of the recipe, from the last checkpoint if there is one, and load the averaged weights.

        Args:
            save_every: steps between checkpoints. until: stop after this step instead; a later run goes on from it.
        """
        self._resume()
        self.network.train()
        end = self.recipe.steps if until is None else until
        while self.step < end:
            started = time.perf_counter()
            self.losses.append(self.advance())
            self.seconds += time.perf_counter() - started
            if self.step % _POINT == 0:
                print(f"step {self.step}/{end}  loss {self.curve[-1]:.5f}  {self.seconds:.0f} s", flush=True)
            if self.step % save_every == 0 or self.step == end:
                self._save()
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
        self.network.eval()

    def advance(self) -> float:
        """One step; its loss."""
        generator = torch.Generator().manual_seed(self.recipe.seed * _STEPS_APART + self.step)
        progress = self.step / self.recipe.steps
        rate = self.recipe.rate * min(1.0, (self.step + 1) / self.recipe.warmup) * (1.0 - 0.95 * progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = self.loss(generator)
        self.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, self.recipe.average)
        self.step += 1
        return value.item()

    def _tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for i, (weight, average) in enumerate(zip(self.weights, self.average, strict=True)):
            state = self.optimizer.state[weight]
            found |= {f"{i}.weight": weight.detach(), f"{i}.average": average}
            found |= {f"{i}.{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def _save(self) -> None:
        """Under another name first: a stop in between leaves the checkpoint before."""
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "recipe": asdict(self.recipe),
        }
        save_file(self._tensors(), self.file.with_suffix(".new"), metadata={"facts": json.dumps(facts)})
        self.file.with_suffix(".new").replace(self.file)

    def _resume(self) -> None:
        if not self.file.exists():
            return
        with safe_open(self.file, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
        if facts["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.file} is of another recipe; move it away or give another --work")
        tensors = load_file(self.file)
        with torch.no_grad():
            for i, (weight, average) in enumerate(zip(self.weights, self.average, strict=True)):
                weight.copy_(tensors[f"{i}.weight"])
                average.copy_(tensors[f"{i}.average"])
                self.optimizer.state[weight] = {
                    name: tensors[f"{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, self.seconds, self.losses = facts["step"], facts["seconds"], facts["losses"]
        print(f"going on from step {self.step}", flush=True)


def save_part(model: Any, folder: Path) -> None:
    """A diffusers or transformers model as float16 safetensors with its configuration."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """A diffusers pipeline with float16 weights."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline.to(torch.float32)


def parameters(modules: Iterable[nn.Module]) -> int:
    """Number of trained numbers."""
    return sum(weight.numel() for module in modules for weight in module.parameters())


def write_card(folder: Path, recipe: Recipe, training: Training, facts: Mapping[str, Any]) -> None:
    """Write card.json of a model folder; what is known of its quality is added by `models.references.cards`."""
    card = {
        "data": "Fashion-MNIST (MIT): 60,000 training images, 28x28 padded to 32x32, grey values in [-1, 1]",
        **facts,
        "recipe": asdict(recipe),
        "seconds": round(training.seconds),
        "machine": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "loss_curve_steps_per_point": _POINT,
        "loss_curve": training.curve,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
