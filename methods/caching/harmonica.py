"""HarmoniCa: "Harmonizing Training and Inference for Better Feature Cache in Diffusion Transformer Acceleration".

A table of logits says for each step of a fixed grid and each sub-layer whether it is computed or its last output used
again. It is trained without images, along the sampler's own trajectory with the cache in the loop (step-wise denoising
training, SDT), and each step's error is weighted by what it does to the final image (IEPO).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from evalbench.engine import check_choice
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import (
    Around,
    Artifact,
    Blocks,
    Claim,
    Cond,
    Denoiser,
    Edit,
    Features,
    Preparation,
    Step,
    Time,
    Want,
    Wrap,
    both,
)
from evalbench.predictions import convert
from evalbench.registry import register

from ._kept import Keeping, branch


def _claim(text: str, baseline: str, effect: float, *, baseline_nfe: int = 0) -> Claim:
    return Claim(
        text=text,
        suite="fashion-dit",
        arm="ddim+harmonica(rollouts=30,batch=16,lr=0.05)",
        baseline=baseline,
        nfe=20,
        baseline_nfe=baseline_nfe,
        metric="fd@fashion64",
        samples=512,
        direction="lower",
        effect=effect,
        level="E",
        author="catalogue",
        transfer="weak",
        source="HarmoniCa; methods-a entry 22 (e); sizes are ours",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_harmonica.py",
    )


CLAIM = (
    _claim(
        "At half of the sub-layers reused the learned table is nearer to the data than a cache of every other step.",
        "ddim+interval-cache(every=2)",
        0.1,
    ),
    _claim(
        "A table trained with the cache in the loop is nearer to the data than one trained step by step.",
        "ddim+harmonica(rollouts=30,batch=16,lr=0.05,training=stepwise)",
        0.05,
    ),
    _claim(
        "Half of the sub-layers reused in 20 steps is nearer to the data than 11 full steps; the table has both costs.",
        "ddim",
        0.1,
        baseline_nfe=11,
    ),
)


@register("harmonica")
@dataclass(frozen=True)
class HarmoniCa(Wrap):
    """HarmoniCa: a learned table of which sub-layers (attention, feed-forward) are computed at each step.

    Where it says so, a sub-layer's last output is used again, before the gate that adaptive norms put on it; norms,
    gates and everything else are computed. The first step computes all. One table per budget, for the solver that it
    was trained with.

    Preparing walks the chain's own solver from search noise, guidance included. Each call but those of the first step
    runs the network twice at the same state: once in full, and once with o = s new + (1 - s) old in each sub-layer,
    s = sigmoid(logit). The loss is lambda_i |full - mixed|^2 + beta sum s; AdamW moves the logits of this step,
    clamped to +-5; the walk goes on with the mixed prediction, and what is computed is kept. Every `refresh` updates
    lambda_i becomes the squared difference of the final samples with the table in force up to step i and up to i - 1.
    Before the first time it is 1, and all logits start at 0: both are ours.

    `ratio` fixes how much is reused, so that tables can be held against other caches: beta is then, after each
    roll-out, that quantile of the gradients (the first roll-out sets it), while training a sub-layer is computed where
    s >= 1/2, and in the end those of the lowest logits are reused. The paper fixes beta and computes where s > 0.1:
    `ratio=0`.

    Attributes:
        ratio: share of all runs of sub-layers that are reused, in [0, 1), at most those after the first step.
        training: `sdt`, or `stepwise` where each step is trained alone, at the full network's states with its last
            features: the ablation.
        beta: with ratio=0, weight of what is computed.
        rollouts: of the training. batch: samples of each, at least 1. lr: AdamW's. refresh: updates per new lambda.
        seed: of the search noise.
    """

    requires = frozenset({"blocks"})
    prepares = "per-nfe"

    ratio: float = 0.5
    training: Literal["sdt", "stepwise"] = "sdt"
    beta: float = 7e-8
    rollouts: int = 2
    batch: int = 4
    lr: float = 0.01
    refresh: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.name, "training", self.training, ("sdt", "stepwise"))
        if not 0.0 <= self.ratio < 1.0:
            raise UserError(f"harmonica: ratio must be in [0, 1), got {self.ratio}")
        for setting, least in (("rollouts", 1), ("batch", 1), ("refresh", 1), ("seed", 0)):
            if getattr(self, setting) < least:
                why = ": the table is trained on samples" if setting == "batch" else ""
                raise UserError(f"harmonica: {setting} must be at least {least}, got {getattr(self, setting)}{why}")
        for setting in ("lr", "beta"):
            if not getattr(self, setting) > 0:
                raise UserError(f"harmonica: {setting} must be above 0, got {getattr(self, setting)}")

    def prepare(self, context: Preparation) -> Artifact:
        """Which sub-layers are computed, uint8 (steps, sub-layers), and the logits behind it."""
        router = _Router(self)
        for rollout in range(self.rollouts):
            walked(context, self, lambda inner: _Training(inner, self, router), rollout)
            router.balance()
            if router.updates >= self.refresh:
                router.weights, router.updates = _weights(context, self, router.table()), 0
        table = router.table()
        return Artifact(
            {"compute": table.astype(np.uint8), "logits": router.logits().numpy()},
            {"reused": float(1.0 - table.mean()), "steps": len(table)},
        )

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        table = self.prepared().arrays["compute"].astype(bool)
        return denoiser.within(lambda inner: _Routed(inner, self, table))


def sub_layers(blocks: Blocks) -> list[str]:
    """All sub-layers, in the order of their blocks.

    Raises:
        Unsupported: the network has none.
    """
    found = [part for name in blocks.names for part in blocks.parts(name)]
    if not found:
        raise Unsupported("not supported: needs blocks with attention or feed-forward parts")
    return found


# --- the cache ------------------------------------------------------------------------------------------------------


class _Routed(Keeping):
    """A network whose sub-layers are computed, or not, by a table (steps, sub-layers)."""

    def __init__(self, inner: Denoiser, settings: HarmoniCa, table: np.ndarray) -> None:
        super().__init__(inner, settings.name)
        self.table = table

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable] | None:
        blocks, which, now = self.blocks, branch(cond, rows), self.known(step)
        if now.n != len(self.table):
            raise Unsupported(f"harmonica: the table has {len(self.table)} steps, the solver makes {now.n}")
        if now.i == 0 or which not in self.kept:
            self.kept[which] = {}
        kept, names = self.kept[which], sub_layers(blocks)
        compute = [bool(self.table[now.i, k]) or name not in kept for k, name in enumerate(names)]
        old = {name: kept[name] for name, new in zip(names, compute, strict=True) if not new}
        edit = both(blocks.read([name for name in names if name not in old], kept), blocks.replace(old))
        return edit, (self.method, tuple(compute))


# --- training -------------------------------------------------------------------------------------------------------

_BOUND = 5.0  # of logits
_COMPUTED, _BALANCED = 0.1, 0.5  # s from which a sub-layer is computed: the paper's, and where beta is balanced


class _Router:
    """The logits, one row per step, and what trains them."""

    def __init__(self, settings: HarmoniCa) -> None:
        self.settings = settings
        self.rows: list[torch.Tensor] = []  # (sub-layers,) each
        self.weights: list[float] = []  # lambda_i
        self.beta = 0.0 if settings.ratio else settings.beta
        self.updates = 0
        self._seen: list[torch.Tensor] = []  # what the loss loses per unit of s, of this roll-out
        self._adam: torch.optim.Optimizer | None = None

    def start(self, steps: int, parts: int, like: torch.Tensor) -> None:
        """A table for a grid, once its length is known."""
        if self.rows:
            return
        self.rows = [like.new_zeros(parts) for _ in range(steps)]
        self.rows[0].fill_(_BOUND)
        self.weights = [1.0] * steps
        self._adam = torch.optim.AdamW(self.rows, lr=self.settings.lr)

    def gates(self, i: int) -> torch.Tensor:
        """s of a step, (sub-layers,)."""
        return torch.sigmoid(self.rows[i])

    def computed(self, i: int) -> torch.Tensor:
        """Which sub-layers a step computes while training, bool (sub-layers,)."""
        return self.gates(i) >= (_BALANCED if self.settings.ratio else _COMPUTED)

    def update(self, i: int, slope: torch.Tensor) -> None:
        """One step of AdamW on row i, from the gradient of the loss's first term with respect to s."""
        assert self._adam is not None
        self._seen.append(-slope)
        if not self.beta:
            return  # the first roll-out finds it
        s = self.gates(i)
        self.rows[i].grad = (slope + self.beta) * s * (1.0 - s)
        self._adam.step()
        self.rows[i].grad = None  # other rows stay as they are
        self.rows[i].clamp_(-_BOUND, _BOUND)
        self.updates += 1

    def balance(self) -> None:
        """After a roll-out: beta at which a share `ratio` of its sub-layers gains less than it costs."""
        if self.settings.ratio and self._seen:
            gains = torch.stack(self._seen).double()
            self.beta = max(float(torch.quantile(gains, self.settings.ratio)), torch.finfo(gains.dtype).tiny)
        self._seen.clear()

    def logits(self) -> torch.Tensor:
        """(steps, sub-layers), float64 on the CPU."""
        return torch.stack(self.rows).double().cpu()

    def table(self) -> np.ndarray:
        """What is computed, bool (steps, sub-layers)."""
        logits = self.logits().numpy()
        if not self.settings.ratio:
            return np.asarray(1.0 / (1.0 + np.exp(-logits)) > _COMPUTED)
        later = logits[1:].ravel()
        reused = np.argsort(later, kind="stable")[: round(self.settings.ratio * logits.size)]
        compute = np.ones(logits.size, bool)
        compute[logits.shape[1] + reused] = False
        return compute.reshape(logits.shape)


class _Training(Keeping):
    """A network that is run in full and through the soft cache, and trains a router by the difference."""

    def __init__(self, inner: Denoiser, settings: HarmoniCa, router: _Router) -> None:
        super().__init__(inner, settings.name)
        self.settings, self.router = settings, router

    def __call__(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        now, which, names = self.known(step), branch(cond, rows), sub_layers(self.blocks)
        self.router.start(now.n, len(names), x)
        last = self.kept.get(which)
        full: Features = {}
        key = (self.method, "full")
        target = self.inner.edited(
            self.blocks.read(names, full), x, t, cond, self.native, key=key, step=step, rows=rows
        )
        out = target
        if now.i == 0 or last is None:
            self.kept[which] = full
        else:
            new: Features = {}
            mixed, slope = self._mixed(x, t, cond, target, last, new, now, rows)
            if self.settings.training == "stepwise":
                self.kept[which] = full
            else:
                out = mixed
                computed = dict(zip(names, self.router.computed(now.i).tolist(), strict=True))
                self.kept[which] = {name: new[name] if computed[name] else old for name, old in last.items()}
            self.router.update(now.i, slope)
        return convert(out, x, self.path, t, self.native, want)

    def _mixed(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        target: torch.Tensor,
        last: Features,
        new: Features,
        now: Step,
        rows: np.ndarray | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction with s new + (1 - s) old everywhere, and d loss / d s, (sub-layers,); fills `new`."""
        names = sub_layers(self.blocks)
        with torch.enable_grad():
            # a copy for each row, so that the backward pass is counted per row
            s = self.router.gates(now.i).expand(len(x), -1).clone().requires_grad_()
            edit = self.blocks.around(
                {
                    name: _mixing(s[:, k, None, None], last[name], new, name)
                    for k, name in enumerate(names)
                    if name in last  # another wrap may leave blocks out
                }
            )
            key = (self.method, "mixed")
            out = self.inner.edited(edit, x, t, cond, self.native, key=key, step=now, rows=rows)
            loss = self.router.weights[now.i] * ((out - target) ** 2).mean()
            slope = self.inner.gradient(loss, s, rows=rows).sum(0)
        return out.detach(), slope


def _mixing(s: torch.Tensor, old: Any, new: Features, name: str) -> Around:
    """A sub-layer whose output is s new + (1 - s) old; what it computes goes into `new`."""

    def function(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        new[name] = _each(lambda one: one.detach(), out)
        return _each(lambda one, before: s * one + (1.0 - s) * before, out, old)

    return function


def _each(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """A function of tensors, or of the members of tuples of them."""
    if isinstance(values[0], tuple):
        return tuple(_each(function, *members) for members in zip(*values, strict=True))
    return None if values[0] is None else function(*values)


def walked(
    context: Preparation, settings: HarmoniCa, wrap: Callable[[Denoiser], Denoiser], rollout: int
) -> torch.Tensor:
    """Samples of the chain's solver through a wrap of the network, from the search noise of a roll-out."""
    indices = range(rollout * settings.batch, (rollout + 1) * settings.batch)
    noise, cond = context.noise(indices, settings.seed), context.cond(indices)
    field = context.denoiser(settings.batch).within(wrap)
    return context.solver.sample(field, context.x_T(noise), cond, context.nfe, noise)


def _weights(context: Preparation, settings: HarmoniCa, table: np.ndarray) -> list[float]:
    """lambda_i: what the table does to the final samples at step i, given that it is in force before it."""
    found, before = [0.0], None
    for until in range(1, len(table) + 1):
        mask = np.ones_like(table)
        mask[1:until] = table[1:until]
        x = walked(context, settings, lambda inner, mask=mask: _Routed(inner, settings, mask), 0)  # type: ignore[misc]
        if before is not None:
            found.append(float(((x - before) ** 2).mean()))
        before = x
    return found
