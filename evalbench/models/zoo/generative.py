"""What the training scripts of the generative models share: the loop with its checkpoints, the folder, the card.

Everything random of a step is drawn on the CPU from a generator seeded by (seed, step), so that a run that was stopped
goes on as if it had not been, 50 steps from the same seed give the same losses, and a GPU sees the batches that a CPU
sees.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
_AHEAD = 4  # batches drawn before a GPU asks for them
_WARM = 3  # steps a GPU runs as written before it captures one


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
    warmup: int = 500
    average: float = 0.001
    drop: float = 0.1


Batch = tuple[torch.Tensor, ...]
Draw = Callable[[torch.Generator, int], Batch]
Loss = Callable[..., torch.Tensor]


def arguments(description: str | None, recipe: Recipe) -> tuple[argparse.Namespace, Recipe]:
    """The options of a training script, and the recipe they ask for."""
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe that parsed arguments ask for; sets threads and the seed of the weights."""
    if args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
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


class Graphed:
    """Calls of a function as replays of one CUDA graph: small networks spend most of a step launching kernels.

    The first `_WARM` calls run as written, and so does every call whose shapes are not those of the first.

    Args:
        call: reads and changes only tensors that stay where they are.
    """

    def __init__(self, call: Loss) -> None:
        self.call, self.calls = call, 0
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # nothing is captured on the default one
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shapes: list[torch.Size] = []
        self.given: Batch = ()
        self.value = torch.zeros(())

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        found = self._run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def _run(self, batch: Batch) -> torch.Tensor:
        shapes = [tensor.shape for tensor in batch]
        self.shapes = self.shapes or shapes
        with torch.cuda.stream(self.stream):
            if shapes != self.shapes or self.calls < _WARM:
                self.calls += shapes == self.shapes
                return self.call(*(tensor.to("cuda", non_blocking=True) for tensor in batch)).detach().clone()
            if self.graph is None:
                self.graph = self._captured(batch)
            for held, tensor in zip(self.given, batch, strict=True):
                held.copy_(tensor, non_blocking=True)
            self.graph.replay()
            return self.value.clone()

    def _captured(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """A call, recorded and not run."""
        self.given = tuple(tensor.to("cuda") for tensor in batch)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads pin the next batches meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.value = self.call(*self.given).detach()
        return graph


class Training:
    """A training run that can be stopped at any time and goes on from its last checkpoint.

    Args:
        network: what is trained, in place; after `run` it holds the averaged weights, those to keep, on the CPU.
        draw: what step number i sees, from its generator, on the CPU. loss: of that, on the device.
        recipe: how. folder: where checkpoints lie. device: `cpu` or `cuda`.
    """

    def __init__(
        self, network: nn.Module, draw: Draw, loss: Loss, recipe: Recipe, folder: Path, device: str = "cpu"
    ) -> None:
        self.network, self.draw, self.loss, self.recipe = network.to(device), draw, loss, recipe
        self.file = folder / "checkpoint.safetensors"
        self.weights: list[torch.Tensor] = [weight for weight in network.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.on_gpu = device != "cpu"
        # a captured step reads its rate from the device
        self.rate: Any = torch.tensor(recipe.rate, device=device) if self.on_gpu else recipe.rate
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=self.on_gpu
        )
        self.advance: Loss = Graphed(self._advance) if self.on_gpu else self._advance
        cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}"
        self.machine = torch.cuda.get_device_name() if self.on_gpu else cores
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def curve(self) -> list[float]:
        """The loss curve, a mean over `_POINT` steps each."""
        whole = len(self.losses) // _POINT * _POINT
        return [round(sum(self.losses[i : i + _POINT]) / _POINT, 5) for i in range(0, whole, _POINT)]

    def run(self, save_every: int = 500, until: int | None = None) -> None:
        """Train to the end of the recipe, from the last checkpoint if there is one, and load the averaged weights.

        Args:
            save_every: steps between checkpoints. until: stop after this step instead; a later run goes on from it.
        """
        self._resume()
        self.network.train()
        end = self.recipe.steps if until is None else until
        started, before = time.perf_counter(), self.seconds
        recent: list[torch.Tensor] = []  # a loss is read only now and then: reading waits for the device
        for batch in self._batches(self.step, end):
            self._set_rate()
            recent.append(self.advance(*batch))
            self.step += 1
            saving = self.step % save_every == 0 or self.step == end
            if saving or self.step % _POINT == 0:
                self.losses += torch.stack(recent).tolist()
                recent.clear()
                self.seconds = before + time.perf_counter() - started
            if self.step % save_every == 0:
                print(f"step {self.step}/{end}  loss {self.losses[-1]:.5f}  {self.seconds:.0f} s", flush=True)
            if saving:
                self._save()
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
        self.network.cpu().eval()

    def _batches(self, start: int, end: int) -> Iterator[Batch]:
        """What the steps see, in order; for a GPU drawn ahead by threads, in memory it copies from without waiting."""
        if not self.on_gpu:
            yield from map(self._drawn, range(start, end))
            return
        with ThreadPoolExecutor(_AHEAD) as pool:
            waiting: deque[Future[Batch]] = deque()
            for step in range(start, end):
                waiting.append(pool.submit(lambda i: tuple(x.pin_memory() for x in self._drawn(i)), step))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _drawn(self, step: int) -> Batch:
        return self.draw(torch.Generator().manual_seed(self.recipe.seed * _STEPS_APART + step), step)

    def _set_rate(self) -> None:
        progress = self.step / self.recipe.steps
        rate = self.recipe.rate * min(1.0, (self.step + 1) / self.recipe.warmup) * (1.0 - 0.95 * progress)
        if self.on_gpu:
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate if self.on_gpu else rate

    def _advance(self, *batch: torch.Tensor) -> torch.Tensor:
        """One step; its loss."""
        self.optimizer.zero_grad()
        value = self.loss(*batch)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, self.recipe.average)
        return value.detach()

    def _tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for i, (weight, average) in enumerate(zip(self.weights, self.average, strict=True)):
            state = self.optimizer.state[weight]
            found |= {f"{i}.weight": weight.detach(), f"{i}.average": average}
            found |= {f"{i}.{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

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
                    name: tensors[f"{i}.{name}"].to(weight.device) for name in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, self.seconds, self.losses = facts["step"], facts["seconds"], facts["losses"]
        print(f"going on from step {self.step}", flush=True)


def save_part(model: Any, folder: Path) -> None:
    """A diffusers or transformers model as float16 safetensors with its configuration."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
    _forget_paths(folder)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """A diffusers pipeline with float16 weights."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline.to(torch.float32)
    _forget_paths(folder)


def _forget_paths(folder: Path) -> None:
    """Drop from configurations where a part was loaded from: a folder of this machine."""
    for file in folder.rglob("config.json"):
        facts = json.loads(file.read_text("utf-8"))
        if facts.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")


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
        "machine": training.machine,
        "torch": torch.__version__,
        "loss_curve_steps_per_point": _POINT,
        "loss_curve": training.curve,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
