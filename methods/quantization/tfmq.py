"""TFMQ-DM: "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models" and its journal extension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evalbench.engine import check_least
from evalbench.errors import Unsupported
from evalbench.interfaces import Artifact, Claim, Denoiser, Preparation
from evalbench.registry import register

from ._calibration import check_samples, evenly
from ._core import FULL, Bits, LayerPlan, Rounding, adaround, built, learn, static_ranges
from ._wrap import Quantisation, Quantised, all_layers, observed, packed, unpacked

FIRST = "time_embedding.linear_1"
SECOND = "time_embedding.linear_2"
PROJECTION = ".time_emb_proj"
ACTIVATION = ".nonlinearity"  # of the block, before its projection
TABLE = "table"  # of the artefact's arrays


@dataclass(frozen=True)
class TimeFeatures:
    """What a UNet computes of the time alone: its embedding's two layers, and a projection in every residual block.

    Attributes:
        network: the UNet. projections: names of the blocks' layers, in order.
        parts: the modules that compute them, by name: those of the network even while others stand in their places.
    """

    network: nn.Module
    projections: tuple[str, ...]
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, network: nn.Module) -> TimeFeatures:
        """The time features of a network.

        Raises:
            Unsupported: it computes none that depend on the time alone.
        """
        names = tuple(
            name for name, module in network.named_modules() if name.endswith(PROJECTION) and module is not None
        )
        if not names or not hasattr(network, "time_embedding") or not hasattr(network, "time_proj"):
            raise Unsupported("not supported: needs a UNet's time embedding and time_emb_proj (features of time alone)")
        embedding = ("time_proj", "time_embedding.act", FIRST, SECOND)
        every = (*embedding, *names, names[0].removesuffix(PROJECTION) + ACTIVATION)
        return cls(network, names, {name: network.get_submodule(name) for name in every})

    @contextmanager
    def watched(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the times of every call are noted, in the network's units."""
        met: list[torch.Tensor] = []
        handle = self.parts["time_proj"].register_forward_pre_hook(
            lambda _, args: met.append(args[0].detach().flatten())
        )
        try:
            yield met
        finally:
            handle.remove()

    def embedded(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The sinusoids that the first layer reads, (N, C), of times in the network's units (N,)."""
        wave: torch.Tensor = self.parts["time_proj"](timesteps)
        return wave.to(next(self.network.parameters()).dtype)

    def features(self, timesteps: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """h_i(t) of every residual block, (N, C_i), with the network's weights or with others by name."""
        given = weights or {}

        def run(name: str, x: torch.Tensor) -> torch.Tensor:
            layer = self.parts[name]
            return F.linear(x, given.get(name, layer.weight), layer.bias)

        embedding = run(SECOND, self.parts["time_embedding.act"](run(FIRST, self.embedded(timesteps))))
        act = self.parts[self.projections[0].removesuffix(PROJECTION) + ACTIVATION]
        return [run(name, act(embedding)) for name in self.projections]


@register("tfmq")
@dataclass(frozen=True)
class TFMQ(Quantisation):
    """TFMQ-DM: roundings of what a UNet computes of the time are learned together, ranges are kept per time group.

    Every Linear and Conv layer, weights per output channel with ranges among 80 shrunk ones by |error|^2.4. TIAR
    (`tiar`): AdaRound of the time embedding's second layer and of the projections in all residual blocks learns
    roundings of least sum over blocks of |h'_i(t) - h_i(t)|^2 over times; without, they round to the nearest. FSC:
    static input ranges for each of `groups` time groups (`groups=1`: one range for all times, plain quantisation).
    The time embedding's first layer and the first and last convolution keep weights and inputs; the second time layer
    and the layer after the first convolution keep their inputs. Shortcuts that read a concatenation (h, skip) have a
    quantiser for each side. All other layers: layer-wise AdaRound with `adaround` iterations (the paper reconstructs
    whole blocks), 0 rounds to the nearest. Needs a UNet whose time features depend on the time alone
    (UNet2DConditionModel); a DiT mixes the label in. Fake quantisation: no time saved.

    Attributes:
        bits: wXaY, whole bits in 2..8, 16 or 32. groups: time groups with ranges of their own.
        tiar: iterations of the joint roundings, the paper's 20,000; 0 for none. adaround: iterations of each other
            layer. samples: trajectories to calibrate with. steps: evaluations of each. seed: of noise and batches.
    """

    requires = frozenset({"network", "time features"})

    bits: str | float = "w4a8"
    groups: int = 5
    tiar: int = 200
    adaround: int = 0
    samples: int = 8
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        Bits.parse(self.name, self.bits)
        check_samples(self.name, self.samples)
        check_least(self.name, 1, groups=self.groups, steps=self.steps)
        check_least(self.name, 0, tiar=self.tiar, adaround=self.adaround, seed=self.seed)

    def prepare(self, context: Preparation) -> Artifact:
        network = context.denoiser(1).network
        time = TimeFeatures.of(network)
        states = evenly(context, self.samples, self._walk(context), 1, self.seed)
        names = all_layers(network)
        splits = concat_splits(network)
        own = {FIRST, SECOND, *time.projections}
        keep = [name for name in names if self.adaround and name not in own]
        with time.watched() as met:
            observer = observed(context, network, states, self.groups, names, splits, keep)
        timesteps = torch.tensor(sorted(set(torch.cat(met).tolist())), dtype=met[0].dtype, device=met[0].device)
        plans = {
            name: LayerPlan(
                bits,
                "static",
                measure="mse",
                ranges=static_ranges(observer.seen[name], self.groups, bits, "minmax"),
                split=splits.get(name, 0),
            )
            for name, bits in self._bits(names).items()
            if observer.seen[name].values
        }
        plans |= self._learned_layers(context, network, plans, observer.seen, keep)
        plans, facts, arrays = self._time(time, plans, timesteps)
        return packed(network, plans, observer, self.groups, facts, arrays)

    def _walk(self, context: Preparation) -> int:
        """Evaluations of a calibration trajectory."""
        return self.steps

    def _bits(self, names: Sequence[str]) -> dict[str, tuple[Bits, ...]]:
        """Bits of each layer, those that keep everything left out."""
        wanted = Bits.parse(self.name, self.bits)
        exempt = {names[0], names[-1], FIRST}
        inputs = {SECOND, next(n for n in names if n.startswith("down_blocks.") and n.endswith("conv1"))}
        weights = Bits(wanted.weights, FULL)
        return {n: ((weights if n in inputs else wanted),) * self.groups for n in names if n not in exempt}

    def _learned_layers(
        self, context: Preparation, network: nn.Module, plans: dict[str, LayerPlan], seen: Any, names: Sequence[str]
    ) -> dict[str, LayerPlan]:
        rng = context.rng(self.seed)
        found = {}
        for name in names:
            if name in plans and plans[name].bits[0].weights <= 8:
                inputs = torch.cat([x for group in seen[name].inputs.values() for x in group])
                layer, bits = network.get_submodule(name), plans[name].bits[0].weights
                up = adaround(layer, plans[name], bits, inputs, self.adaround, rng)
                found[name] = replace(plans[name], up=up)
        return found

    def _time(
        self, time: TimeFeatures, plans: dict[str, LayerPlan], timesteps: torch.Tensor
    ) -> tuple[dict[str, LayerPlan], dict[str, Any], dict[str, np.ndarray]]:
        """The plans with the time layers' roundings, the error of the time features before and after, arrays."""
        plain = feature_error(time, plans, timesteps)
        weights = Bits.parse(self.name, self.bits).weights
        if self.tiar and weights <= 8:
            plans = plans | tiar(time, plans, timesteps, self.tiar)
        return plans, {"feature_error_plain": plain, "feature_error": feature_error(time, plans, timesteps)}, {}


def tiar(
    time: TimeFeatures, plans: dict[str, LayerPlan], timesteps: torch.Tensor, iterations: int
) -> dict[str, LayerPlan]:
    """Plans of the time layers with roundings learned together."""
    names = [name for name in (SECOND, *time.projections) if name in plans]
    roundings = {
        name: Rounding.of(time.network.get_submodule(name), plans[name], plans[name].bits[0].weights) for name in names
    }
    exact = time.features(timesteps)

    def loss(_: int) -> torch.Tensor:
        found = time.features(timesteps, {name: rounding.value() for name, rounding in roundings.items()})
        return _distance(found, exact)

    learn(list(roundings.values()), loss, iterations)
    return {name: replace(plans[name], up=rounding.hard()) for name, rounding in roundings.items()}


def feature_error(time: TimeFeatures, plans: dict[str, LayerPlan], timesteps: torch.Tensor) -> float:
    """Mean over times of the sum over blocks of |h'_i(t) - h_i(t)|^2, of the rounded weights alone."""
    chosen = {name: plans[name] for name in (FIRST, SECOND, *time.projections) if name in plans}
    rounded = {name: module.rounded_weight() for name, module in built(time.network, chosen).items()}
    return float(_distance(time.features(timesteps, rounded), time.features(timesteps)))


def _distance(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> torch.Tensor:
    pairs = zip(found, exact, strict=True)
    return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


def concat_splits(network: nn.Module) -> dict[str, int]:
    """Channels of h in the shortcuts that read (h, skip), by name: in diffusers, those of the up blocks."""
    found = {}
    net: Any = network
    widths = list(reversed(net.config.block_out_channels))
    for i, block in enumerate(net.up_blocks):
        for j, resnet in enumerate(block.resnets):
            last = j == len(block.resnets) - 1
            skip = widths[min(i + 1, len(widths) - 1)] if last else widths[i]
            if resnet.conv_shortcut is not None:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = int(resnet.in_channels) - int(skip)
    return found


class _Clock(nn.Module):
    """Stands before the table: the network's own sinusoids, and a note of the times that the call is for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._held = (layer,)
        self.timesteps: torch.Tensor | None = None

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        self.timesteps = timesteps
        out: torch.Tensor = self._held[0](timesteps)
        return out


class _Nothing(nn.Module):
    """Stands in for the time embedding, which nobody reads: projections come from the table."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


class _Lookup(nn.Module):
    """Stands in for a projection: the row of each time, or what full precision computes where there is none."""

    def __init__(
        self, clock: _Clock, time: TimeFeatures, index: int, known: dict[float, int], table: torch.Tensor
    ) -> None:
        super().__init__()
        self._held = (clock, time)
        self.index, self.known, self.table = index, known, table

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        clock, time = self._held
        assert clock.timesteps is not None
        rows = [self.known.get(float(t), -1) for t in clock.timesteps]
        if min(rows) < 0:
            missing: torch.Tensor = time.features(clock.timesteps)[self.index]
            return missing
        return self.table[rows]


@register("tfmq-cache")
@dataclass(frozen=True)
class TFMQCache(TFMQ):
    """TFMQ's journal extension: time features are computed once for the times sampling visits, and looked up.

    All else is `tfmq`; the time embedding and its projections are a table of exact features, one row per time that
    the chain's solver asks for at the cell's budget (found by the calibration walk, so `steps` and `tiar` are not
    read), so their error is zero, at no evaluation: a bound that learned roundings must not beat. A time that the
    table does not hold, as adaptive solvers may ask for, is computed in full precision. The paper also chooses per
    block between table and rounding by the error; the table's is zero, so it always wins here. `table_bytes` is what
    the table takes, beside the weights. Not `tfmq`, which rounds.

    Attributes:
        bits, groups, adaround, samples, seed: as in `tfmq`. tiar, steps: not read.
    """

    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "per-nfe"

    def _walk(self, context: Preparation) -> int:
        return context.nfe

    def _time(
        self, time: TimeFeatures, plans: dict[str, LayerPlan], timesteps: torch.Tensor
    ) -> tuple[dict[str, LayerPlan], dict[str, Any], dict[str, np.ndarray]]:
        plain = feature_error(time, plans, timesteps)
        own = {FIRST, SECOND, *time.projections}
        rest = {name: plan for name, plan in plans.items() if name not in own}
        table = time.features(timesteps)
        arrays = {f"{TABLE}/{i}": rows.cpu().numpy() for i, rows in enumerate(table)}
        stored = [torch.from_numpy(rows).to(timesteps.device) for rows in arrays.values()]
        facts = {
            "feature_error_plain": plain,
            "feature_error": float(_distance(stored, time.features(timesteps))),
            "table_bytes": float(sum(rows.nbytes for rows in arrays.values())),
        }
        return rest, facts, arrays | {f"{TABLE}/times": timesteps.cpu().numpy()}

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        artifact = self.prepared()
        network = denoiser.network
        time = TimeFeatures.of(network)
        like = next(network.parameters())
        table = [torch.from_numpy(artifact.arrays[f"{TABLE}/{i}"]).to(like) for i in range(len(time.projections))]
        known = {float(t): row for row, t in enumerate(artifact.arrays[f"{TABLE}/times"])}
        clock = _Clock(network.time_proj)  # type: ignore[arg-type]
        modules: dict[str, nn.Module] = dict(built(network, unpacked(artifact)))
        modules |= {"time_proj": clock, "time_embedding": _Nothing()}
        modules |= {n: _Lookup(clock, time, i, known, table[i]) for i, n in enumerate(time.projections)}
        groups = int(artifact.facts["groups"])
        return denoiser.within(lambda inner: Quantised(inner, modules, groups, key="time table"))


_SOURCE = "TFMQ-DM and its extension; catalogue A 42, A 38"

CLAIM = (
    Claim(
        text="Learned time features and ranges per time group err less at W4A8 than plain W4A8",
        suite="fashion-sd",
        arm="ddim+tfmq(tiar=500)",
        baseline="ddim+tfmq(groups=1,tiar=0)",
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
        text="Exact time features from a table err less at W4A8 than learned ones",
        suite="fashion-sd",
        arm="ddim+tfmq-cache",
        baseline="ddim+tfmq(tiar=500)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.05,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
)
