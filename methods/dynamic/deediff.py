"""DeeDiff: "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model
Generation" (later called AdaDiff).

After each block i of a transformer a head g_i turns the tokens L_i into a prediction, and one linear layer estimates
how wrong it is, u_i = f(w_i [L_i, temb] + b_i). A sample leaves after the first block whose u_i is below a threshold.
Trained are (1 - u_i) |g_i - eps|^2 and |u_i - tanh |g_i - eps|^2|^2, summed over the blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from evalbench.engine import check_choice, linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import (
    After,
    Artifact,
    Claim,
    Cond,
    Denoiser,
    Edit,
    Modifier,
    NetworkWrap,
    Preparation,
    Share,
    Solver,
    Step,
    Time,
    Want,
)
from evalbench.noise import NoiseSource
from evalbench.paths import Path, grid
from evalbench.predictions import convert, like_rows
from evalbench.registry import register

Tensor: TypeAlias = torch.Tensor


def _claim(text: str, baseline: str, effect: float, *, baseline_nfe: int = 0) -> Claim:
    return Claim(
        text=text,
        suite="fashion-dit",
        arm="ddim+deediff(images=1024,iterations=1000)",
        baseline=baseline,
        nfe=20,
        baseline_nfe=baseline_nfe,
        metric="paired-median@pixels",
        samples=128,
        direction="lower",
        effect=effect,
        level="E",
        author="catalogue",
        transfer="weak",
        source="DeeDiff; methods-b entry 17 (e); sizes are ours",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_deediff.py",
    )


CLAIM = (
    _claim(
        "Half of the blocks by uncertainty stay nearer to the fine solution than the same half for all.",
        "ddim+deediff(policy=fixed,images=1024,iterations=1000)",
        0.1,
    ),
    _claim(
        "Half of the blocks by uncertainty stay nearer to the fine solution than exits drawn at random as often.",
        "ddim+deediff(policy=random,images=1024,iterations=1000)",
        0.1,
    ),
    _claim(
        "Half of the blocks in 20 steps stay nearer to the fine solution than 11 full steps, which cost a little more.",
        "ddim",
        0.1,
        baseline_nfe=11,
    ),
    _claim(
        "Half of the blocks by uncertainty stay nearer to the fine solution than all blocks cached every other step.",
        "ddim+interval-cache(every=2)",
        0.1,
    ),
)


@register("deediff")
@dataclass(frozen=True)
class DeeDiff(Modifier):
    """DeeDiff: each sample leaves the network after the first block that is certain enough.

    Blocks run for the samples that are still in, so the cost of a row is what it ran; the ledger has it per sample.
    A head is a linear map of the tokens, the identity at first, before the network's own output layers; the estimator
    reads the mean of the layer-normalised tokens and sines of the time. Both are trained in `prepare` on noised data of
    the search split, and the network is frozen (the paper trains it as well): of its loss L_simple is constant, and
    errors are those of the network's own kind of prediction, a mean over the image. The catalogue warns that
    estimators of single time steps fail to learn; here there is one of each block for all times, as in a
    reproduction that worked.

    The threshold is found after training: 25 steps of DDIM from search noise leave after `depth` of the blocks on
    average. Both baselines have the same heads and the same mean depth: `policy=fixed` leaves after round(depth n) of
    the n blocks, `policy=random` draws each sample's exit at each step, as often as the uncertain one leaves there.

    Attributes:
        depth: mean share of the blocks that run, in (0, 1]. policy: `uncertainty`, or the baselines above.
        threshold: the paper's own, in 0..1, in place of the one found by `depth`; 0 finds it.
        images: of the training, at least 1. iterations: of Adam. lr: its step. seed: of data, noise and batches.
    """

    requires = frozenset({"blocks", "exits"})
    prepares = "once"

    depth: float = 0.5
    policy: Literal["uncertainty", "fixed", "random"] = "uncertainty"
    threshold: float = 0.0
    images: int = 64
    iterations: int = 50
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.name, "policy", self.policy, ("uncertainty", "fixed", "random"))
        if not 0.0 < self.depth <= 1.0:
            raise UserError(f"deediff: depth must be in (0, 1], got {self.depth}")
        if not 0.0 <= self.threshold <= 1.0:
            raise UserError(f"deediff: threshold must be in 0..1, got {self.threshold}")
        for setting, why in (("images", ": heads are trained on images"), ("iterations", ""), ("seed", "")):
            least = 0 if setting == "seed" else 1
            if getattr(self, setting) < least:
                raise UserError(f"deediff: {setting} must be at least {least}, got {getattr(self, setting)}{why}")
        if not self.lr > 0:
            raise UserError(f"deediff: lr must be above 0, got {self.lr}")

    def check(self, nfe: int, blocks: int) -> None:
        if blocks and self.depth * blocks < 1.0:
            raise UserError(
                f"deediff: depth={self.depth} is less than one of the network's {blocks} blocks; "
                f"give at least {math.ceil(1000 / blocks) / 1000}"
            )

    def prepare(self, context: Preparation) -> Artifact:
        """Heads and estimators, the threshold, and how often samples left after each block."""
        trained = _train(context, self)
        seen = _on_the_way(context, trained, min(self.images, _CALIBRATION), self.seed)  # (M, n - 1)
        threshold = self.threshold or _threshold(seen, self.depth)
        left = _exits(seen, threshold)
        often = np.bincount(left, minlength=seen.shape[1] + 2)[1:] / len(left)
        facts = {"threshold": threshold, "mean_depth": float(left.mean()) / (seen.shape[1] + 1)}
        return Artifact(trained.arrays() | {"often": often}, facts)

    def modify(self, solver: Solver) -> Solver:
        return _Early(solver, self)


class _Early(Solver):
    """A solver on a network that samples leave early."""

    def __init__(self, solver: Solver, settings: DeeDiff) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> Tensor:
        artifact = self.settings.prepared()
        trained = Trained.of(artifact, x_T)
        policy: _Policy
        if self.settings.policy == "uncertainty":
            policy = _Uncertain(trained, float(artifact.facts["threshold"]))
        elif self.settings.policy == "fixed":
            policy = _Fixed(trained, self.settings.depth)
        else:
            policy = _Random(trained, artifact.arrays["often"], noise)
        early = denoiser.within(lambda inner: _Exiting(inner, self.settings, policy))
        return self.solver.sample(early, x_T, cond, nfe, noise)


# --- heads and estimators -------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What is trained for each block but the last, E = n - 1 of them, of width D.

    Attributes:
        head: (E, D, D), added to the identity. shift: (E, D). weight: (E, D + 8), of the estimator. bias: (E,).
    """

    head: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fresh(cls, exits: int, width: int, like: Tensor) -> Trained:
        """Heads that change nothing, estimators that say 1/2."""
        shapes = (exits, width, width), (exits, width), (exits, width + _FREQUENCIES * 2), (exits,)
        return cls(*(like.new_zeros(shape) for shape in shapes))

    @classmethod
    def of(cls, artifact: Artifact, like: Tensor) -> Trained:
        """From an artefact, in the dtype and on the device of a tensor."""
        return cls(*(like.new_tensor(artifact.arrays[name]) for name in cls._fields))

    def arrays(self) -> dict[str, np.ndarray]:
        """For an artefact."""
        return {name: getattr(self, name).cpu().numpy() for name in self._fields}

    def mapped(self, i: int, tokens: Tensor) -> Tensor:
        """Tokens (b, N, D) after block i for the network's own head."""
        mapped: Tensor = tokens + tokens @ self.head[i].T + self.shift[i]
        return mapped

    def uncertainty(self, i: int, tokens: Tensor, time: Tensor) -> Tensor:
        """u_i in 0..1, (b,), of tokens (b, N, D) at times of `_sines`, (b, 8)."""
        pooled = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:]).mean(1)
        # no matrix product: its bits would depend on the place in the batch
        return torch.sigmoid((torch.cat([pooled, time], -1) * self.weight[i]).sum(-1) + self.bias[i])


_FREQUENCIES = 4


def _sines(path: Path, t: Time, x: Tensor) -> Tensor:
    """Cosines and sines of pi k t / t_start, k = 1..4, one row per row of x: (B, 8)."""
    if isinstance(t, Tensor) and t.ndim > 1:
        raise Unsupported("deediff: needs one time per sample, because a sample leaves as a whole")
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)) / path.t_start
    angles = math.pi * times[:, None] * torch.arange(1, _FREQUENCIES + 1, device=x.device)
    return torch.cat([angles.cos(), angles.sin()], -1)


# --- leaving --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What a policy may look at besides the tokens."""

    sines: Tensor
    step: Step | None
    rows: np.ndarray | None


class _Policy(ABC):
    """Who leaves when."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    @abstractmethod
    def leaving(self, i: int, tokens: Tensor, inside: Tensor, call: _Call) -> Tensor:
        """Which of the rows `inside`, whose tokens these are, leave after block i, bool (b,)."""


class _Uncertain(_Policy):
    """Leaves where the estimated error is below a threshold."""

    def __init__(self, trained: Trained, threshold: float) -> None:
        super().__init__(trained)
        self.threshold = threshold

    def leaving(self, i: int, tokens: Tensor, inside: Tensor, call: _Call) -> Tensor:
        return self.trained.uncertainty(i, tokens, call.sines[inside]) < self.threshold


class _Fixed(_Policy):
    """Leaves after a share of the blocks."""

    def __init__(self, trained: Trained, depth: float) -> None:
        super().__init__(trained)
        self.blocks = max(round(depth * (len(trained.bias) + 1)), 1)

    def leaving(self, i: int, tokens: Tensor, inside: Tensor, call: _Call) -> Tensor:
        return torch.full_like(inside, i + 1 == self.blocks, dtype=torch.bool)


class _Random(_Policy):
    """Leaves by chance, with given probabilities of each number of blocks; one draw per sample and step."""

    def __init__(self, trained: Trained, often: np.ndarray, noise: NoiseSource) -> None:
        super().__init__(trained)
        self.noise = noise
        self.until = np.cumsum(often)[:-1]

    def leaving(self, i: int, tokens: Tensor, inside: Tensor, call: _Call) -> Tensor:
        if call.step is None:
            raise Unsupported("not supported: deediff(policy=random) needs a solver that says its steps")
        draws = self.noise.uniform("deediff", call.step.i).flatten(1)[:, 0].double().cpu().numpy()
        blocks = 1 + np.searchsorted(self.until, draws if call.rows is None else draws[call.rows], side="right")
        return torch.as_tensor(blocks, device=inside.device)[inside] == i + 1


class _Exiting(NetworkWrap):
    """A network that rows leave early; the cost of each is that of the blocks that it ran."""

    def __init__(self, inner: Denoiser, settings: DeeDiff, policy: _Policy) -> None:
        super().__init__(inner)
        if isinstance(inner, NetworkWrap):
            raise Unsupported("deediff cannot stand around another change of the network: a row's cost is not known")
        self.settings, self.policy = settings, policy

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
        call = _Call(_sines(self.path, t, x), step, rows)
        ran = np.full(len(x), len(self.blocks.names))

        def leaving(i: int, tokens: Tensor, inside: Tensor) -> Tensor:
            gone = self.policy.leaving(i, tokens, inside, call)
            ran[inside[gone].cpu().numpy()] = i + 1
            return gone

        def share() -> np.ndarray:
            by_depth = {int(n): self._share(int(n), call, x, t, cond) for n in np.unique(ran)}
            return np.array([by_depth[int(n)] for n in ran])

        edit, key = self.blocks.leave(self._after(leaving)), self.settings
        return self.inner.edited(edit, x, t, cond, want, key=key, fraction=share, step=step, rows=rows)

    def _after(self, leaving: Callable[[int, Tensor, Tensor], Tensor]) -> After:
        def after(i: int, tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor] | None:
            gone = leaving(i, tokens, inside)
            return (gone, self.policy.trained.mapped(i, tokens[gone])) if bool(gone.any()) else None

        return after

    def _share(self, blocks: int, call: _Call, x: Tensor, t: Time, cond: Cond) -> float:
        """What all rows would compute, as a share of a full forward, if they left after so many blocks."""

        def leaving(i: int, tokens: Tensor, inside: Tensor) -> Tensor:
            self.policy.leaving(i, tokens, inside, call)  # what deciding costs
            return torch.full_like(inside, i + 1 == blocks, dtype=torch.bool)

        edit = self.blocks.leave(self._after(leaving))
        return self.inner.share(edit, x, t, cond, key=(self.settings, "exit", blocks))

    def edited(
        self,
        edit: Edit,
        x: Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable,
        fraction: Share | None = None,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> Tensor:
        raise Unsupported("deediff cannot stand inside another change of the network: a row's cost is not known")


# --- training -------------------------------------------------------------------------------------------------------

_BATCH, _CALIBRATION, _STEPS = 32, 64, 25


class _Seen(NamedTuple):
    """One call of the network with the tokens after each of its blocks but the last, (E, B, N, D)."""

    x: Tensor
    t: Time
    cond: Cond
    tokens: Tensor


class _Watched(NetworkWrap):
    """A network that shows what its blocks made in its calls, guidance's two apart."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.seen: list[_Seen] = []

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
        exits = len(self.blocks.names) - 1
        tokens: list[Tensor] = []

        def after(i: int, found: Tensor, inside: Tensor) -> None:
            tokens.append(found)

        edit = self.blocks.leave(after)
        out = self.inner.edited(edit, x, t, cond, want, key="deediff watched", step=step, rows=rows)
        self.seen.append(_Seen(x, t, cond, torch.stack(tokens[-exits:])))  # counting may have run it twice
        return out


def _watched(context: Preparation, batch: int) -> tuple[Denoiser, _Watched]:
    """The field on a watched network, and that network."""
    found: list[_Watched] = []

    def watch(inner: Denoiser) -> Denoiser:
        found.append(_Watched(inner))
        return found[-1]

    return context.denoiser(batch).within(watch), found[0]


def _train(context: Preparation, settings: DeeDiff) -> Trained:
    """Adam on noised data, at times drawn evenly."""
    x0, cond = context.data(settings.images, settings.seed)
    rng, batch = context.rng(settings.seed), min(_BATCH, settings.images)
    field, network = _watched(context, batch)
    if len(network.blocks.names) < 2:
        raise Unsupported("deediff: a network of one block has nothing to leave early")
    trained: Trained | None = None
    for _ in range(settings.iterations):
        pick = torch.as_tensor(rng.choice(len(x0), batch, replace=False), device=x0.device)
        u = torch.as_tensor(rng.random(batch), dtype=x0.dtype, device=x0.device)
        t = context.path.t_end + u * (context.path.t_start - context.path.t_end)
        eps = torch.as_tensor(rng.standard_normal((batch, *x0.shape[1:])), dtype=x0.dtype, device=x0.device)
        times = t.double().cpu().numpy()
        x = like_rows(context.path.alpha(times), x0) * x0[pick] + like_rows(context.path.sigma(times), x0) * eps
        network.seen.clear()
        field(x, t, cond.rows(pick), network.native)
        target = convert(eps, x, context.path, t, "eps", network.native)
        if trained is None:
            tokens = network.seen[0].tokens
            trained = Trained.fresh(len(tokens), tokens.shape[-1], tokens)
            adam = torch.optim.Adam(list(trained), lr=settings.lr)
        for tensor, gradient in zip(trained, _gradients(trained, network, target), strict=True):
            tensor.grad = gradient
        adam.step()
    assert trained is not None
    return trained


def _gradients(trained: Trained, network: _Watched, target: Tensor) -> list[Tensor]:
    """Of the loss, a mean over the rows of the calls that were seen, for all that is trained."""
    totals = [torch.zeros_like(tensor) for tensor in trained]
    for seen in network.seen:
        with torch.enable_grad():
            free = Trained(*(tensor.detach().clone().requires_grad_() for tensor in trained))
            mapped = torch.stack([free.mapped(i, tokens) for i, tokens in enumerate(seen.tokens)])
            error, back = _errors(network.inner, seen, mapped.detach(), target)
            sines = _sines(network.path, seen.t, seen.x)
            u = torch.stack([free.uncertainty(i, tokens, sines) for i, tokens in enumerate(seen.tokens)])  # (E, B)
            rows = len(network.seen) * len(seen.x)
            loss = ((u - torch.tanh(error)) ** 2 + (1 - u) * error).sum() / rows
            estimator = torch.autograd.grad(loss, [free.weight, free.bias])
            head = torch.autograd.grad(mapped, [free.head, free.shift], back(1 - u.detach()) / rows)
        for total, gradient in zip(totals, (*head, *estimator), strict=True):
            total += gradient
    return totals


def _errors(
    network: Denoiser, seen: _Seen, mapped: Tensor, target: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """|g_i - target|^2, a mean over each image, (E, B), and the gradient of its weighted sum for the mapped tokens.

    All heads are one batch of E B rows, in which no block runs.
    """
    exits, size = mapped.shape[:2]
    rows = np.tile(np.arange(size), exits)
    tokens = mapped.flatten(0, 1).requires_grad_()
    x, t = seen.x.repeat(exits, *(1,) * (seen.x.ndim - 1)), torch.as_tensor(seen.t, dtype=seen.x.dtype)
    cond = seen.cond.rows(torch.as_tensor(rows, device=x.device))
    edit, times = network.blocks.end(tokens), t.to(x.device).expand(size).repeat(exits)
    out = network.edited(edit, x, times, cond, network.native, key="deediff heads", rows=rows)
    error = ((out.view(exits, size, *out.shape[1:]) - target) ** 2).flatten(2).mean(-1)

    def back(weights: Tensor) -> Tensor:
        return network.gradient((weights * error).sum(), tokens, rows=rows).view_as(mapped)

    return error.detach(), back


def _on_the_way(context: Preparation, trained: Trained, n: int, seed: int) -> np.ndarray:
    """u of all states that 25 steps of DDIM pass, one row per row of the network: (M, E)."""
    noise = context.noise(range(n), seed)
    field, network = _watched(context, n)
    cond, path, found = context.cond(range(n)), context.path, []
    x = context.x_T(noise)
    for s, t in pairwise(grid(path, context.grid, _STEPS)):
        a, b = linear_step(path, s, t, "eps")
        x = a * x + b * field(x, s, cond, "eps")
        for seen in network.seen:
            sines = _sines(path, seen.t, seen.x)
            found.append([trained.uncertainty(i, tokens, sines) for i, tokens in enumerate(seen.tokens)])
        network.seen.clear()
    return torch.cat([torch.stack(each, -1) for each in found]).double().cpu().numpy()


def _exits(u: np.ndarray, threshold: float) -> np.ndarray:
    """Blocks that each row of u, (M, E), runs: up to the first whose u is below the threshold, else E + 1."""
    certain = np.hstack([u < threshold, np.ones((len(u), 1), bool)])
    found: np.ndarray = certain.argmax(1) + 1
    return found


def _threshold(u: np.ndarray, depth: float) -> float:
    """The threshold at which rows leave after a share of the blocks on average; the mean falls as it rises."""
    blocks = u.shape[1] + 1
    between: Sequence[float] = [0.0, *np.unique(u), np.nextafter(u.max(), 2.0)]
    low, high = 0, len(between) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _exits(u, between[middle]).mean() >= depth * blocks else (low, middle)
    return float(min(between[low], between[high], key=lambda one: abs(_exits(u, one).mean() - depth * blocks)))
