"""PPAP, Go et al. 2023: Towards Practical Plug-and-Play Diffusion Models. Classifier guidance by experts in noise.

Classifier guidance (Dhariwal & Nichol 2021, algorithm 2) moves the unconditional prediction,

    eps' = eps(x_t) - s sigma grad_x log p(y | x_t)

and a classifier of clean images is wrong on noisy ones. PPAP cuts the time range into N equal parts and makes an
expert for each: the clean classifier with a low-rank update of its weights, distilled without labels. Its targets are
the clean classifier's softmax at temperature 0.25 on generated samples, its inputs the same samples noised to its
range, its loss the KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from evalbench.engine import check_choice, linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, DenoiserWrap, Preparation, Step, Time, Want, Wrap
from evalbench.paths import Path, grid
from evalbench.registry import register

_SOURCE = "Go et al. 2023, PPAP; methods-a entry 27 (e)"


# A method that guides itself is paired with a fine solution under the same guidance: paired errors are its solver's and
# say nothing of the guidance. The distance to the data and the class of the samples do.
def _claim(text: str, arm: str, baseline: str, metric: str, effect: float) -> Claim:
    return Claim(
        text=text,
        suite="gmm-smooth",
        arm=arm,
        baseline=baseline,
        nfe=25,
        metric=metric,
        direction="higher" if metric.startswith("accuracy") else "lower",
        effect=effect,
        level="E",
        author="catalogue",
        transfer="weak",
        source=f"{_SOURCE}: 5 experts above one noise-trained above the clean classifier, DDIM-25; the size is ours",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_ppap.py",
    )


_FIVE, _ONE, _CLEAN = "ddim+ppap", "ddim+ppap(experts=1)", "ddim+ppap(experts=0)"
CLAIM = (
    _claim(
        "At DDIM-25 five experts give a lower Frechet distance than one noise-trained classifier.",
        _FIVE,
        _ONE,
        "fd@identity",
        0.1,
    ),
    _claim(
        "At DDIM-25 one noise-trained classifier gives a lower Frechet distance than the clean one.",
        _ONE,
        _CLEAN,
        "fd@identity",
        0.1,
    ),
    _claim(
        "At DDIM-25 more samples guided by five experts have their class than by one noise-trained classifier.",
        _FIVE,
        _ONE,
        "accuracy@gmm-class",
        0.02,
    ),
    _claim(
        "At DDIM-25 more samples guided by one noise-trained classifier have their class than by the clean one.",
        _ONE,
        _CLEAN,
        "accuracy@gmm-class",
        0.02,
    ),
)

Tensor: TypeAlias = torch.Tensor


@register("ppap")
@dataclass(frozen=True)
class PPAP(Wrap):
    """PPAP (Go et al. 2023): classifier guidance of the unconditional model by experts for parts of the time range.

    One unconditional network row per evaluation and one row of a classifier (`aux.classifier`: logits and their
    gradient with respect to x); no gradient passes through the network. With the exact p(y | x_t) and scale = 1 the
    guided field is the conditional one. It is not `cfg`, which takes the same gradient from the network's own
    conditional and unconditional rows: `classifier="exact"` does that too (two rows), as the oracle to measure the
    others against.

    Preparing trains the clean classifier on labelled data, generates samples with DDIM (`generated` times 25
    evaluations on the bill), and fits the experts. Classifiers see x / sqrt(alpha^2 + sigma^2) and no time, like the
    off-the-shelf ones of the paper. Where the paper has ImageNet networks and 300 k iterations, here it is a network of
    one hidden tanh layer and `iterations` steps of Adam, shared out among the experts, so that all settings cost the
    same; batches of 256, weights by low-rank updates of rank 16, scale 8 / 16, in both layers.

    Attributes:
        scale: s; 0 is the unconditional model.
        experts: N, >= 0; 1 is one classifier trained at all noise levels, 0 the clean classifier as it is.
        classifier: `trained`, or `exact` for the model's own class posterior; nothing is prepared then.
        teacher: `clean` distils the clean classifier on generated samples, `labels` trains on noised labelled data.
        adapter: `lora` fits low-rank updates of the clean classifier, `full` all its weights.
        ranges: parts equal in `time`, as in the paper, or in `logsnr`.
        temperature: of the clean classifier's softmax, above 0.
        hidden: width of the hidden layer. generated: samples to distil on. iterations: of training, in all, for the
            clean classifier and again for the experts. lr: Adam's, for the experts; the clean classifier has 0.01.
        seed: of data, noise and batches in preparing.
    """

    requires = frozenset({"labels"})
    guides = True
    prepares = "once"

    scale: float = 1.0
    experts: int = 5
    classifier: Literal["trained", "exact"] = "trained"
    teacher: Literal["clean", "labels"] = "clean"
    adapter: Literal["lora", "full"] = "lora"
    ranges: Literal["time", "logsnr"] = "time"
    temperature: float = 0.25
    hidden: int = 64
    generated: int = 2048
    iterations: int = 1000
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("ppap", "classifier", self.classifier, ("trained", "exact"))
        check_choice("ppap", "teacher", self.teacher, ("clean", "labels"))
        check_choice("ppap", "adapter", self.adapter, ("lora", "full"))
        check_choice("ppap", "ranges", self.ranges, ("time", "logsnr"))
        for setting in ("hidden", "generated", "iterations"):
            if getattr(self, setting) < 1:
                raise UserError(f"ppap: {setting} must be at least 1, got {getattr(self, setting)}")
        if self.experts < 0:
            raise UserError(f"ppap: experts must be at least 0, got {self.experts}")
        for setting in ("temperature", "lr"):
            if not getattr(self, setting) > 0:
                raise UserError(f"ppap: {setting} must be above 0, got {getattr(self, setting)}")

    def prepare(self, context: Preparation) -> Artifact:
        """The clean classifier (expert 0 of experts = 0), or the experts, stacked along their first axis."""
        if self.classifier == "exact":
            return Artifact()
        rng = context.rng(self.seed)
        x0, labels = _labelled(context, _DATA, self.seed)
        clean = _train_clean(x0, labels, self.hidden, self.iterations, rng)
        if not self.experts:
            return _artifact([clean])
        if self.teacher == "clean":
            x0 = _generate(context, self.generated, self.seed)
            targets = torch.softmax(clean.logits(_rows(x0)) / self.temperature, -1)
        else:
            targets = torch.nn.functional.one_hot(labels).to(x0)
        experts = range(self.experts)
        return _artifact([self._expert(clean, _rows(x0), targets, context.path, k, rng) for k in experts])

    def _expert(
        self, clean: Layers, x0: Tensor, targets: Tensor, path: Path, k: int, rng: np.random.Generator
    ) -> Layers:
        """The expert of part k: KL(targets || expert) on samples noised to times of its part."""
        free, build = _low_rank(clean, rng) if self.adapter == "lora" else _all_weights(clean)

        def loss() -> Tensor:
            pick = torch.from_numpy(rng.integers(0, len(x0), _BATCH)).to(x0.device)
            times = self._times(path, (k + rng.random(_BATCH)) / self.experts)
            alpha, sigma = _column(path.alpha(times), x0), _column(path.sigma(times), x0)
            eps = torch.from_numpy(rng.standard_normal((_BATCH, x0.shape[1]))).to(x0)
            x = (alpha * x0[pick] + sigma * eps) / (alpha**2 + sigma**2).sqrt()
            # the KL divergence but for the entropy of the targets
            return -(targets[pick] * torch.log_softmax(build().logits(x), -1)).sum(-1).mean()

        _fit(free, loss, max(1, self.iterations // self.experts), self.lr)
        return build().detached()

    def _times(self, path: Path, u: Any) -> Any:
        """Times at shares u in [0, 1] of the range, from the noisiest."""
        if self.ranges == "time":
            return path.t_start + u * (path.t_end - path.t_start)
        return path.t_of_lambda(path.lam(path.t_start) + u * (path.lam(path.t_end) - path.lam(path.t_start)))

    def expert_of(self, path: Path, t: Any) -> Any:
        """Index of the expert for times t: the inverse of `_times`."""
        if self.ranges == "time":
            u = (t - path.t_start) / (path.t_end - path.t_start)
        else:
            u = (path.lam(t) - path.lam(path.t_start)) / (path.lam(path.t_end) - path.lam(path.t_start))
        count = max(self.experts, 1)
        return np.clip(np.floor(np.asarray(u) * count), 0, count - 1).astype(np.int64)

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        if self.classifier == "exact":
            return Guided(denoiser, self, None)
        arrays = self.prepared().arrays
        return Guided(denoiser, self, Layers(*(torch.from_numpy(arrays[name]) for name in Layers._fields)))


class Layers(NamedTuple):
    """A classifier of one hidden tanh layer: w1 (h, D), b1 (h), w2 (C, h), b2 (C), or several along a first axis."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, C) for training, from x (B, D)."""
        return torch.tanh(x @ self.w1.T + self.b1) @ self.w2.T + self.b2

    def detached(self) -> Layers:
        """Without gradients."""
        return Layers(*(tensor.detach() for tensor in self))

    def log_gradient(self, x: Tensor, label: Tensor) -> Tensor:
        """d log p(label | x) / dx, (B, D), for one classifier or one per row; 0 for label -1.

        Written out, so that it can itself be differentiated; sums instead of matrix products, whose bits would depend
        on the place in the batch.
        """
        a = torch.tanh((x.unsqueeze(-2) * self.w1).sum(-1) + self.b1)  # (B, h)
        logits = (a.unsqueeze(-2) * self.w2).sum(-1) + self.b2  # (B, C)
        classes = torch.arange(logits.shape[-1], device=x.device)
        wanted = (label[:, None] == classes).to(x)
        error = torch.where(label[:, None] >= 0, wanted - torch.softmax(logits, -1), torch.zeros_like(logits))
        hidden = (error.unsqueeze(-1) * self.w2).sum(-2) * (1 - a**2)  # (B, h)
        return (hidden.unsqueeze(-1) * self.w1).sum(-2)


class Guided(DenoiserWrap):
    """The unconditional field moved by the classifier's gradient."""

    def __init__(self, inner: Denoiser, method: PPAP, layers: Layers | None) -> None:
        super().__init__(inner)
        self.method, self.layers = method, layers

    def __call__(
        self,
        x: Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> Tensor:
        if want == "probs":
            raise Unsupported("not supported: classifier guidance of token probabilities")
        if self.layers is not None and isinstance(t, torch.Tensor) and t.ndim > 1:
            raise Unsupported("ppap: needs one time per sample, because an expert sees a whole sample")
        unconditional = self.inner(x, t, cond.null(), want, step=step, rows=rows)
        if self.method.scale == 0.0:
            return unconditional
        if self.layers is None:
            conditional = self.inner(x, t, cond, want, step=step, rows=rows)
            return unconditional + self.method.scale * (conditional - unconditional)
        times = t.detach().cpu().double().numpy() if isinstance(t, torch.Tensor) else np.float64(t)
        gradient = self._gradient(x, times, cond, self.layers, rows)
        moved: Tensor = unconditional + self.method.scale * _column(_shift(self.path, times, want), x) * gradient
        return moved

    def _gradient(self, x: Tensor, times: Any, cond: Cond, layers: Layers, rows: np.ndarray | None) -> Tensor:
        """grad_x log p(y | x) by the experts of the times, a number or one per row; counted."""
        assert cond.labels is not None
        labels = cond.labels
        scale = _column((self.path.alpha(times) ** 2 + self.path.sigma(times) ** 2) ** -0.5, x)
        pick = torch.as_tensor(self.method.expert_of(self.path, times))
        experts = Layers(*(tensor[pick].to(x) for tensor in layers))

        def call() -> Tensor:
            slope: Tensor = scale * experts.log_gradient(_rows(scale * x), labels).view_as(x)
            return slope

        return self.inner.auxiliary("classifier", call, len(x), rows=rows)


def _shift(path: Path, t: Any, want: Want) -> Any:
    """What a unit of grad log p(y | x) adds to a prediction: eps moves by -sigma, x0 by sigma^2 / alpha."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if want == "score":
        return np.ones_like(sigma)
    x0, eps = {
        "x0": (1.0, 0.0),
        "eps": (0.0, 1.0),
        "v": (-sigma, alpha),
        "velocity": (path.d_alpha(t), path.d_sigma(t)),
    }[want]
    return x0 * sigma**2 / alpha - eps * sigma


def _column(values: Any, x: Tensor) -> Any:
    """A float stays one; values per row, (B,), are made to broadcast over x."""
    if np.ndim(values) == 0:
        return float(values)
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))


# --- training -------------------------------------------------------------------------------------------------------

_BATCH, _DATA, _STEPS, _CLEAN_LR = 256, 4096, 25, 0.01
_RANK, _LORA_SCALE = 16, 8 / 16


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1)


def _artifact(found: Sequence[Layers]) -> Artifact:
    stacked = {name: torch.stack([getattr(one, name) for one in found]) for name in Layers._fields}
    return Artifact({name: tensor.cpu().numpy() for name, tensor in stacked.items()})


def _labelled(context: Preparation, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x0, cond = context.data(n, seed)
    if cond.labels is None:
        raise Unsupported("not supported: needs labels")
    return x0, cond.labels


def _train_clean(x0: Tensor, labels: Tensor, hidden: int, iterations: int, rng: np.random.Generator) -> Layers:
    """The off-the-shelf classifier: cross-entropy on clean labelled data."""
    x, classes = _rows(x0), int(labels.max()) + 1

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape) / np.sqrt(shape[-1])).to(x)

    layers = Layers(normal(hidden, x.shape[1]), x.new_zeros(hidden), normal(classes, hidden), x.new_zeros(classes))
    free, build = _all_weights(layers)

    def loss() -> Tensor:
        pick = torch.from_numpy(rng.integers(0, len(x), _BATCH)).to(labels.device)
        return torch.nn.functional.cross_entropy(build().logits(x[pick]), labels[pick])

    _fit(free, loss, iterations, _CLEAN_LR)
    return build().detached()


def _fit(free: Sequence[Tensor], loss: Callable[[], Tensor], iterations: int, lr: float) -> None:
    """Adam on fresh values of a loss, in place."""
    adam = torch.optim.Adam(free, lr=lr)
    for _ in range(iterations):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), free)
        for tensor, gradient in zip(free, gradients, strict=True):
            tensor.grad = gradient
        adam.step()


def _all_weights(layers: Layers) -> tuple[list[Tensor], Callable[[], Layers]]:
    """The free parameters of a full fit, and the classifier they make."""
    free = Layers(*(tensor.detach().clone().requires_grad_() for tensor in layers))
    return list(free), lambda: free


def _low_rank(layers: Layers, rng: np.random.Generator) -> tuple[list[Tensor], Callable[[], Layers]]:
    """W + (8 / 16) B A with B = 0 at first (Hu et al. 2022, LoRA), and free biases."""

    def update(weight: Tensor) -> tuple[Tensor, Tensor]:
        a = rng.standard_normal((_RANK, weight.shape[1])) / np.sqrt(weight.shape[1])
        return torch.from_numpy(a).to(weight).requires_grad_(), weight.new_zeros(len(weight), _RANK).requires_grad_()

    (a1, up1), (a2, up2) = update(layers.w1), update(layers.w2)
    b1, b2 = layers.b1.clone().requires_grad_(), layers.b2.clone().requires_grad_()

    def build() -> Layers:
        return Layers(layers.w1 + _LORA_SCALE * up1 @ a1, b1, layers.w2 + _LORA_SCALE * up2 @ a2, b2)

    return [a1, up1, a2, up2, b1, b2], build


def _generate(context: Preparation, n: int, seed: int) -> Tensor:
    """Samples of the unconditional model by DDIM with 25 steps."""
    noise = context.noise(range(n), seed)
    denoiser, cond, path = context.denoiser(n), context.cond(range(n)).null(), context.path
    x = context.x_T(noise)
    for s, t in pairwise(grid(path, context.grid, _STEPS)):
        a, b = linear_step(path, s, t, "eps")
        x = a * x + b * denoiser(x, s, cond, "eps")
    return x
