"""ViDiT-Q: "ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from evalbench.engine import check_choice, check_least
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Preparation
from evalbench.registry import register

from ._calibration import States, check_samples, evaluate, evenly
from ._core import FULL, Bits, LayerPlan, Seen, built, layers
from ._wrap import Quantisation, Quantised, groups_of, observed, packed

if TYPE_CHECKING:
    from torch import nn

WIDE = 8  # bits of what mixed precision spares
FLOOR = 1e-5  # of a balancing factor's ingredients: a channel that is always zero is left alone


@register("vidit-q")
@dataclass(frozen=True)
class ViDiTQ(Quantisation):
    """ViDiT-Q: dynamic per-token quantisation of transformer blocks, with balancing by time range, mixed precision.

    Linear layers of transformer blocks only; patch and time embeddings, modulations (adaLN) and the final layer keep
    their precision. Weights per output channel, min-max, to the nearest; inputs by the min-max of each token of each
    sample when it is computed (the release takes one scale per token position over the whole batch, which would make a
    sample depend on its neighbours). Balancing first: inputs are divided and weights multiplied by
    s_c = (max over tokens of |X_c|)^alpha / (max over rows of |W_c|)^(1 - alpha), the peaks averaged over samples and,
    with momentum 0.95, over calls; an s of its own in each of `ranges` equal ranges of time. Mixed precision keeps 8
    bits (w8a8): with `released` in the MLPs; with `sensitivity` in that half of (kind of layer, time range) whose
    quantisation alone moves the network's output most on the calibration states (one metric for all kinds, not the
    paper's one per kind). `bits=w32a32` is the network itself. Fake quantisation: no time saved. Not `ptq4dm`, which
    is static and per tensor (`dynamic=false` makes this one so: the paper's baseline).

    Attributes:
        bits: wXaY, whole bits in 2..8, 16 or 32.
        alpha: of the balancing, 0.11 for video and 0.3 for images in the release; -1 for none.
        ranges: of time, with an s each; 2 in the release for video, 1 for images. mixed: `none`, `released` or
            `sensitivity`. dynamic: false for one static range per layer and time range.
        samples: trajectories to calibrate with. steps: evaluations of each; every one is seen. seed: of their noise.
    """

    bits: str | float = "w8a8"
    alpha: float = 0.11
    ranges: int = 2
    mixed: Literal["none", "released", "sensitivity"] = "none"
    dynamic: bool = True
    samples: int = 8
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        Bits.parse("vidit-q", self.bits)
        check_samples("vidit-q", self.samples)
        check_choice("vidit-q", "mixed", self.mixed, ("none", "released", "sensitivity"))
        if self.alpha != -1.0 and not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"vidit-q: alpha must lie in 0..1, or be -1 for no balancing, got {self.alpha}")
        check_least("vidit-q", 1, ranges=self.ranges, steps=self.steps)
        check_least("vidit-q", 0, seed=self.seed)

    def prepare(self, context: Preparation) -> Artifact:
        network = context.denoiser(1).network
        names = list(layers(network, lambda name: bool(kind_of(name))))
        if not names:
            raise Unsupported("not supported: needs transformer blocks with Linear layers")
        states = evenly(context, self.samples, self.steps, 1, self.seed)
        everything = list(layers(network))
        observer = observed(context, network, states, self.ranges, everything, {}, [])
        narrow = Bits.parse("vidit-q", self.bits)
        plans = {
            name: self._plan(network, name, observer.seen[name], (narrow,) * self.ranges)
            for name in names
            if observer.seen[name].values
        }
        spared = self._spared(context, network, plans, states)
        wide = Bits(max(narrow.weights, WIDE), max(narrow.activations, WIDE))
        chosen = {
            name: tuple(wide if (kind_of(name), group) in spared else narrow for group in range(self.ranges))
            for name in plans
        }
        plans = {
            name: self._plan(network, name, observer.seen[name], bits) if spared else plans[name]
            for name, bits in chosen.items()
        }
        table = [[kind, group] for kind, group in sorted(spared)]
        return packed(network, plans, observer, self.ranges, {"spared": table})

    def _plan(self, network: nn.Module, name: str, seen: Seen, bits: tuple[Bits, ...]) -> LayerPlan:
        scope: Literal["token", "static"] = "token" if self.dynamic else "static"
        balance = None
        if self.alpha != -1.0:
            weight: torch.Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
            balance = balancing(seen, weight, self.ranges, self.alpha)
        ranges = None if self.dynamic else _extents(seen, balance, self.ranges)
        return LayerPlan(bits, scope, ranges=ranges, balance=balance)

    def _spared(
        self, context: Preparation, network: nn.Module, plans: dict[str, LayerPlan], states: States
    ) -> set[tuple[str, int]]:
        """(kind, time range) that keep 8 bits."""
        kinds = sorted({kind_of(name) for name in plans})
        if self.mixed == "none":
            return set()
        if self.mixed == "released":
            return {("mlp", group) for group in range(self.ranges)}
        group = groups_of(context.path, states.t, self.ranges)
        full = Bits(FULL, FULL)
        moved: dict[tuple[str, int], float] = {}
        for own in range(self.ranges):
            rows = torch.nonzero(group == own).flatten()
            if not len(rows):
                continue
            some = states.chosen(rows)
            exact = evaluate(context, some)
            for kind in kinds:
                alone = {
                    name: replace(plan, bits=tuple(plan.bits[g] if g == own else full for g in range(self.ranges)))
                    for name, plan in plans.items()
                    if kind_of(name) == kind
                }
                modules = built(network, alone)
                found = evaluate(context, some, partial(Quantised, modules=modules, groups=self.ranges))
                moved[kind, own] = float((found - exact).square().mean())
        return set(sorted(moved, key=lambda entry: -moved[entry])[: len(moved) // 2])


def kind_of(name: str) -> str:
    """`self`, `cross` or `mlp` of a Linear layer in a transformer block; empty for a layer that is left alone."""
    _, inside, rest = name.partition("transformer_blocks.")
    if not inside or "norm" in rest:
        return ""
    if ".attn2." in rest:
        return "cross"
    if ".attn" in rest:
        return "self"
    return "mlp" if ".ff" in rest else ""


def balancing(seen: Seen, weight: torch.Tensor, groups: int, alpha: float) -> np.ndarray:
    """s of each time group and input channel, (groups, C); a group that saw nothing has its nearest neighbour's."""
    rows = []
    largest = weight.detach().abs().amax(0).clamp_min(FLOOR)
    for group in range(groups):
        peaks = seen.peaks[min(seen.peaks, key=lambda known: abs(known - group))].clamp_min(FLOOR)
        rows.append((peaks**alpha / largest ** (1.0 - alpha)).double().cpu().numpy())
    return np.array(rows)


def _extents(seen: Seen, balance: np.ndarray | None, groups: int) -> np.ndarray:
    """Static min-max of the inputs as they are rounded, (groups, 1, 2): of the values, or of the balanced peaks."""
    rows = []
    for group in range(groups):
        nearest = min(seen.peaks, key=lambda known: abs(known - group))
        values = seen.values[nearest][0]
        lo, hi = float(values.min().clamp_max(0.0)), float(values.max().clamp_min(0.0))
        if balance is not None:  # one bound for both signs: only the size of a channel's peak is known
            bound = float((seen.peaks[nearest].double().cpu() / torch.from_numpy(balance[group])).max())
            lo, hi = -bound, bound
        rows.append([[lo, hi]])
    return np.array(rows)


_SOURCE = "ViDiT-Q; catalogue A 14"

CLAIM = (
    Claim(
        text="Dynamic ranges of each token err less at W8A8 than static ranges of each layer",
        suite="fashion-dit",
        arm="ddim+vidit-q(bits=w8a8)",
        baseline="ddim+vidit-q(bits=w8a8,dynamic=false,alpha=-1)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.3,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
    Claim(
        text="Balancing by time range errs less at W4A8 than no balancing",
        suite="fashion-dit",
        arm="ddim+vidit-q(bits=w4a8)",
        baseline="ddim+vidit-q(bits=w4a8,alpha=-1)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
    Claim(
        text="Sparing the sensitive half errs less at W4A8 than sparing the MLPs, as the release does",
        suite="fashion-dit",
        arm="ddim+vidit-q(bits=w4a8,mixed=sensitivity)",
        baseline="ddim+vidit-q(bits=w4a8,mixed=released)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
)
