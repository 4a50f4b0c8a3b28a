"""The one fake-quantisation core: Linear and Conv layers that compute with rounded weights and rounded inputs.

A number is rounded to one of 2^b evenly spaced levels between lo <= 0 and hi >= 0 (asymmetric, zero is a level) and
computed with in float, so it says what the rounding does to samples and what the weights would weigh; nothing gets
faster, and no latency is claimed. Layers are replaced inside a context (`quantised`) and the network is the same
afterwards, to the bit: its parameters are never written. At 32 bits a layer computes what it always did.

Sources: asymmetric grids and the search over 80 shrunk ranges under |error|^2.4 as in Q-Diffusion, PTQ4DM and TFMQ-DM
(catalogues A 42, B 9, B 40); AdaRound, Nagel et al. 2020, with their constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evalbench.errors import Unsupported, UserError

Measure: TypeAlias = Literal["minmax", "mse", "l1", "cosine", "kl"]
Scope: TypeAlias = Literal["token", "sample", "static"]

FULL = 32  # bits of what is not quantised
SHRINKS = 80  # candidate ranges: 1.00, 0.99 ... 0.21 of (min, max)
POWER = 2.4  # of the error that chooses among them
BINS = 128  # of the histograms of the KL measure
KEPT = 4096  # values of a layer's inputs that calibration keeps per batch and time group
GAMMA, ZETA = -0.1, 1.1  # of AdaRound's stretched sigmoid
TRAVEL = 20.0  # of a rounding's v while it is learned: 20,000 steps of 1e-3
LEAST = 1e-8  # of a step between levels


# --- bits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """Bits of the weights and of the activations of a layer; 32 is not quantised."""

    weights: int
    activations: int

    @property
    def text(self) -> str:
        """`w8a8`."""
        return f"w{self.weights}a{self.activations}"

    @classmethod
    def parse(cls, method: str, text: object) -> Bits:
        """The bits of a setting.

        Raises:
            UserError: no `wXaY` of whole bits in 2..8, 16 or 32.
        """
        found = re.fullmatch(r"w(\d+)a(\d+)", str(text))
        allowed = {*range(2, 9), 16, FULL}
        if not found or not {int(found[1]), int(found[2])} <= allowed:
            raise UserError(f"{method}: bits must be whole, 2..8, 16 or 32, as in bits=w4a8, got {text}")
        return cls(int(found[1]), int(found[2]))


# --- rounding -------------------------------------------------------------------------------------------------------


def fake(
    x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, up: torch.Tensor | None = None
) -> torch.Tensor:
    """x on the 2^bits levels between lo and hi, which broadcast against it.

    Args:
        up: 0..1 of x's shape: how far above its floor a value goes (AdaRound); None rounds to the nearest.
    """
    if bits == FULL:
        return x
    levels = 2**bits - 1
    step = ((hi - lo) / levels).clamp_min(LEAST)
    zero = torch.round(-lo / step)
    whole = torch.round(x / step) if up is None else torch.floor(x / step) + up
    rounded: torch.Tensor = (torch.clamp(whole + zero, 0, levels) - zero) * step
    return rounded


def extent(x: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi) over some dimensions, which stay with length 1; zero lies between them."""
    return x.amin(tuple(dims), keepdim=True).clamp_max(0.0), x.amax(tuple(dims), keepdim=True).clamp_min(0.0)


def fitted(rows: torch.Tensor, bits: int, measure: Measure = "mse") -> torch.Tensor:
    """The range of each row, (R, 2), of values (R, K): (min, max) shrunk by the factor of the least error.

    Args:
        measure: `mse` |error|^2.4, `l1`, `cosine` 1 - cosine, `kl` of the histograms, or `minmax` for no search.
    """
    lo, hi = extent(rows, [1])
    if measure == "minmax" or bits == FULL:
        return torch.cat([lo, hi], dim=1)
    best = torch.full_like(lo, torch.inf)
    found = torch.cat([lo, hi], dim=1)
    for i in range(SHRINKS):
        shrink = 1.0 - 0.01 * i
        error = _error(rows, fake(rows, lo * shrink, hi * shrink, bits), measure)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, torch.cat([lo, hi], dim=1) * shrink, found)
    return found


def _error(x: torch.Tensor, y: torch.Tensor, measure: Measure) -> torch.Tensor:
    """(R, 1) distance of rows of values to their rounded ones."""
    if measure == "mse":
        return (x - y).abs().pow(POWER).mean(1, keepdim=True)
    if measure == "l1":
        return (x - y).abs().mean(1, keepdim=True)
    if measure == "cosine":
        return 1.0 - F.cosine_similarity(x, y, dim=1).unsqueeze(1)
    return torch.stack([_divergence(a, b) for a, b in zip(x, y, strict=True)]).unsqueeze(1)


def _divergence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KL of the histogram of x from that of y, on x's extent; empty bins hold a thousandth of a count."""
    lo, hi = float(x.min()), float(x.max())
    p, q = (torch.histc(v, BINS, lo, hi) + 1e-3 for v in (x, y))
    p, q = p / p.sum(), q / q.sum()
    return (p * (p / q).log()).sum()


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantised, all that is not its weights.

    Attributes:
        bits: of each time group.
        scope: where the range of the inputs comes from: of each token or of each sample as it is computed (dynamic),
            or `ranges` (static). A convolution's token is its sample.
        channels: whether each output channel of the weight has its own range, or all share one.
        measure: how the weight's ranges are fitted.
        ranges: static (lo, hi) of the inputs by time group and part, (groups, parts, 2).
        split: inputs below this channel are one part and the others another, with weights of their own; 0 for one.
        balance: s of each time group and input channel, (groups, C): inputs are divided by it, weights multiplied.
        up: what AdaRound chose, 0 or 1 of the weight's shape; None rounds to the nearest.
        levels: ranges of the weight as they were fitted, (groups, parts, R, 2), R = 1 or output channels, so that
            sampling need not search again; None fits them.
    """

    bits: tuple[Bits, ...]
    scope: Scope
    channels: bool = True
    measure: Measure = "minmax"
    ranges: np.ndarray | None = None
    split: int = 0
    balance: np.ndarray | None = None
    up: np.ndarray | None = None
    levels: np.ndarray | None = None


class FakeQuant(nn.Module):
    """A Linear or Conv layer with rounded weights and inputs; everything else about it is the layer's.

    Args:
        layer: nn.Linear or nn.Conv2d; it is read, never written. plan: how.

    Attributes:
        group: the time group in force.
    """

    def __init__(self, layer: nn.Module, plan: LayerPlan) -> None:
        super().__init__()
        self._held = (layer,)  # in a tuple, so that it is no sub-module: state and names stay the network's
        self.plan, self.group = plan, 0
        self._weights: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        layer: Any = self._held[0]
        balance = self._balance(self.group, x)
        if balance is not None:
            x = x / (balance if isinstance(layer, nn.Linear) else balance[:, None, None])
        x = self._rounded(x)
        if isinstance(layer, nn.Linear):
            return F.linear(x, self._weight(), layer.bias)
        out: torch.Tensor = layer._conv_forward(x, self._weight(), layer.bias)
        return out

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        bits, plan = self.plan.bits[self.group].activations, self.plan
        if bits == FULL:
            return x
        if plan.scope != "static":
            token = plan.scope == "token" and isinstance(self._held[0], nn.Linear)
            return fake(x, *extent(x, [x.ndim - 1] if token else list(range(1, x.ndim))), bits)
        assert plan.ranges is not None
        ranges = torch.as_tensor(plan.ranges[self.group], dtype=x.dtype, device=x.device)
        pieces = parts(x, plan.split, channel_axis(self._held[0], x))
        done = [fake(piece, lo, hi, bits) for piece, (lo, hi) in zip(pieces, ranges, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done, dim=channel_axis(self._held[0], x))

    def _balance(self, group: int, like: torch.Tensor) -> torch.Tensor | None:
        balance, bits = self.plan.balance, self.plan.bits[group]
        if balance is None or bits == Bits(FULL, FULL):
            return None
        return torch.as_tensor(balance[group], dtype=like.dtype, device=like.device)

    def _weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._held[0].weight  # type: ignore[assignment]
        if self.plan.bits[self.group] == Bits(FULL, FULL):
            return weight
        if self.group not in self._weights:
            self._weights[self.group] = self.rounded_weight(self.group)
        return self._weights[self.group]

    def rounded_weight(self, group: int = 0) -> torch.Tensor:
        """The weight that a time group computes with, of the layer's shape."""
        weight = self._balanced_weight(group)
        up = None if self.plan.up is None else torch.as_tensor(self.plan.up, dtype=weight.dtype, device=weight.device)
        return round_weight(weight, self.plan, self.plan.bits[group].weights, up, group)

    def fitted_levels(self) -> np.ndarray:
        """`LayerPlan.levels` of the layer's weight."""
        found: list[np.ndarray] = []
        for group, bits in enumerate(self.plan.bits):
            if self.plan.balance is None and bits.weights in (known := [b.weights for b in self.plan.bits[:group]]):
                found.append(found[known.index(bits.weights)])
                continue
            pieces = parts(self._balanced_weight(group), self.plan.split, 1)
            ranges = [fitted(weight_rows(piece, self.plan), bits.weights, self.plan.measure) for piece in pieces]
            found.append(torch.stack(ranges).cpu().numpy())
        return np.stack(found)

    def _balanced_weight(self, group: int) -> torch.Tensor:
        weight = weight_of(self._held[0])
        balance = self._balance(group, weight)
        return weight if balance is None else weight * balance.reshape(1, -1, *[1] * (weight.ndim - 2))


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a Linear or Conv2d layer, without its gradient."""
    weight: torch.Tensor = layer.weight.detach()
    return weight


def round_weight(
    weight: torch.Tensor, plan: LayerPlan, bits: int, up: torch.Tensor | None = None, group: int = 0
) -> torch.Tensor:
    """A weight on its levels, by output channel or as a whole, each part of its input channels alone."""
    if bits == FULL:
        return weight
    done = []
    ups = [None] * 2 if up is None else parts(up, plan.split, 1)
    for part, (piece, above) in enumerate(zip(parts(weight, plan.split, 1), ups, strict=False)):
        lo, hi = weight_range(piece, plan, bits, None if plan.levels is None else plan.levels[group, part])
        done.append(fake(piece, lo, hi, bits, above))
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def weight_rows(weight: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """A weight, or a part of one, as the rows that share a range, (R, K)."""
    return weight.reshape(len(weight) if plan.channels else 1, -1)


def weight_range(
    weight: torch.Tensor, plan: LayerPlan, bits: int, known: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi) that broadcast against a weight, or a part of one: known, (R, 2), or fitted."""
    if known is None:
        found = fitted(weight_rows(weight, plan), bits, plan.measure)
    else:
        found = torch.as_tensor(known, dtype=weight.dtype, device=weight.device)
    shape = [len(found), *[1] * (weight.ndim - 1)]
    return found[:, 0].reshape(shape), found[:, 1].reshape(shape)


def parts(x: torch.Tensor, split: int, axis: int) -> list[torch.Tensor]:
    """x, or what stands below and above channel `split` of it."""
    return [x] if not split else [x.narrow(axis, 0, split), x.narrow(axis, split, x.shape[axis] - split)]


def channel_axis(layer: nn.Module, x: torch.Tensor) -> int:
    """Where the input channels of a layer's input stand."""
    return x.ndim - 1 if isinstance(layer, nn.Linear) else 1


# --- networks -------------------------------------------------------------------------------------------------------


def layers(network: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers of a network by their dotted names, in order, those that a filter chooses."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and chosen(name)
    }


def built(network: nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, FakeQuant]:
    """The layers that stand in for those of the plans."""
    return {name: FakeQuant(network.get_submodule(name), plan) for name, plan in plans.items()}


@contextmanager
def replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the modules stand at their names in the network; outside, those that stood there."""
    kept: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in modules.items():
            owner, _, attribute = name.rpartition(".")
            parent = network.get_submodule(owner)
            old = parent._modules[attribute]
            assert old is not None
            parent._modules[attribute] = module
            kept.append((parent, attribute, old))
        yield
    finally:
        for parent, attribute, old in kept:
            parent._modules[attribute] = old


# --- calibration ----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What calibration saw of the inputs of one layer.

    Attributes:
        values: of each time group and part, (K,) values taken evenly from every batch, extremes included.
        peaks: of each time group, per input channel: the largest |value| of a sample, averaged over samples, (C,).
        inputs: of each time group, whole inputs, where they are kept.
        macs: multiply-accumulates of a row.
    """

    values: dict[int, list[torch.Tensor]]
    peaks: dict[int, torch.Tensor]
    inputs: dict[int, list[torch.Tensor]]
    macs: float = 0.0


MOMENTUM = 0.95  # of the running mean of peaks over batches


class Observer:
    """Watches the inputs of layers while the network runs in full precision.

    Args:
        network, names: which layers. splits: channel at which a layer's inputs are two parts.
        keep: names whose whole inputs are kept.

    Attributes:
        group: time group of what runs now.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        splits: Mapping[str, int] | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        self.network, self.names, self.splits, self.keep = network, names, splits or {}, frozenset(keep)
        self.group = 0
        self.seen = {name: Seen({}, {}, {}) for name in names}

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Inside, every call of the layers is noted."""
        handles = [
            self.network.get_submodule(name).register_forward_hook(self._note(name, self.seen[name]))
            for name in self.names
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, seen: Seen) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        split = self.splits.get(name, 0)

        def hook(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x = args[0].detach()
            axis = channel_axis(layer, x)
            kept = seen.values.setdefault(self.group, [x.new_empty(0)] * (2 if split else 1))
            for i, piece in enumerate(parts(x, split, axis)):
                kept[i] = torch.cat([kept[i], _thinned(piece)])
            # |x| over everything but samples and channels, then the mean over samples
            peak = x.abs().movedim(axis, -1).reshape(len(x), -1, x.shape[axis]).amax(1).mean(0)
            before = seen.peaks.get(self.group)
            seen.peaks[self.group] = peak if before is None else MOMENTUM * before + (1 - MOMENTUM) * peak
            if name in self.keep:
                seen.inputs.setdefault(self.group, []).append(x)
            seen.macs = macs(layer, out)

        return hook


def _thinned(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten()
    return torch.cat([flat[:: max(len(flat) // KEPT, 1)], torch.stack([flat.min(), flat.max()])])


def macs(layer: nn.Module, out: torch.Tensor) -> float:
    """Multiply-accumulates of one row of a Linear or Conv2d layer that returned `out`."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return out[0].numel() * weight[0].numel()


def static_ranges(seen: Seen, groups: int, bits: Sequence[Bits], measure: Measure) -> np.ndarray:
    """(groups, parts, 2) ranges of inputs; a group that saw nothing has that of the nearest group that did.

    Raises:
        Unsupported: nothing was seen at all.
    """
    if not seen.values:
        raise Unsupported("a layer was never run while calibrating")
    rows = []
    for group in range(groups):
        nearest = min(seen.values, key=lambda known: abs(known - group))
        rows.append([fitted(v.unsqueeze(0), bits[group].activations, measure)[0] for v in seen.values[nearest]])
    return np.array([[pair.double().cpu().numpy() for pair in row] for row in rows])


# --- AdaRound -------------------------------------------------------------------------------------------------------


@dataclass
class Rounding:
    """Learned roundings of one weight: h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1) above the floor.

    Attributes:
        v: of the weight's shape; starts where h is the fraction that rounding would take away.
    """

    weight: torch.Tensor
    plan: LayerPlan
    bits: int
    v: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Module, plan: LayerPlan, bits: int) -> Rounding:
        """The roundings of a layer's weight, not learned yet."""
        weight = weight_of(layer)
        fractions = []
        for piece in parts(weight, plan.split, 1):
            lo, hi = weight_range(piece, plan, bits)
            scaled = piece / ((hi - lo) / (2**bits - 1)).clamp_min(LEAST)
            fractions.append(scaled - torch.floor(scaled))
        share = (torch.cat(fractions, dim=1) - GAMMA) / (ZETA - GAMMA)
        return cls(weight, plan, bits, torch.logit(share).requires_grad_(True))

    def soft(self) -> torch.Tensor:
        """h, with a gradient."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)

    def value(self) -> torch.Tensor:
        """The weight rounded by h."""
        return round_weight(self.weight, self.plan, self.bits, self.soft())

    def hard(self) -> np.ndarray:
        """What was chosen: 1 up, 0 down."""
        chosen: np.ndarray = (self.soft().detach() >= 0.5).to(torch.uint8).cpu().numpy()
        return chosen


def learn(
    roundings: Sequence[Rounding], loss: Callable[[int], torch.Tensor], iterations: int, weight: float = 0.01
) -> None:
    """Learn roundings together: minimise loss(i) + weight sum(1 - |2h - 1|^b), b from 20 to 2 after a fifth.

    Adam at the rate that lets v travel as far as the papers' 20,000 iterations at 1e-3 do, at most 0.1: with their
    rate a few hundred iterations would leave every rounding the nearest.
    """
    rate = min(max(TRAVEL / max(iterations, 1), 1e-3), 0.1)
    optimiser = torch.optim.Adam([rounding.v for rounding in roundings], lr=rate)
    warm = iterations // 5
    with torch.enable_grad():
        for i in range(iterations):
            total = loss(i)
            if i >= warm:
                power = 20.0 + (2.0 - 20.0) * (i - warm) / max(iterations - warm, 1)
                for rounding in roundings:
                    total = total + weight * (1.0 - (2.0 * rounding.soft() - 1.0).abs().pow(power)).sum()
            optimiser.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def adaround(
    layer: nn.Module, plan: LayerPlan, bits: int, inputs: torch.Tensor, iterations: int, rng: np.random.Generator
) -> np.ndarray:
    """Roundings of one layer's weight that keep its outputs on inputs (N, ...): 0 or 1 of the weight's shape."""
    rounding = Rounding.of(layer, plan, bits)
    with torch.no_grad():
        wanted = applied(layer, inputs, rounding.weight)

    def loss(_: int) -> torch.Tensor:
        rows = torch.as_tensor(rng.integers(0, len(inputs), min(32, len(inputs))), device=inputs.device)
        error = applied(layer, inputs[rows], rounding.value()) - wanted[rows]
        return error.square().flatten(1).sum(1).mean()

    learn([rounding], loss, iterations)
    return rounding.hard()


def applied(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A Linear or Conv2d layer with another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    out: torch.Tensor = layer._conv_forward(x, weight, layer.bias)
    return out


# --- what it would save ---------------------------------------------------------------------------------------------


def footprint(network: nn.Module, plans: Mapping[str, LayerPlan], macs_of: Mapping[str, float]) -> dict[str, float]:
    """Bits, bytes and bit operations of a quantised network; never seconds: computing with rounded floats saves none.

    Args:
        plans: of the layers that are quantised, by name. macs_of: multiply-accumulates of one row by name, of every
            Linear and Conv layer that runs.

    Returns:
        weight_bits: mean over all parameters. weight_bytes: of all parameters with 4 bytes for each range's step and
        one level for its zero; weight_bytes_full: in 32 bits. activation_bits: of the layers' inputs, mean over
        multiply-accumulates and time groups. bops: multiply-accumulates of a row in Linear and Conv layers times the
        bits of weight and input, the mean over time groups; bops_full: at 32 x 32. Products of attention are not in
        it: no method here quantises them.
    """
    parameters = sum(p.numel() for p in network.parameters())
    bits = float(FULL) * parameters
    extra = 0.0
    for name, plan in plans.items():
        weight: torch.Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
        stored = max(b.weights for b in plan.bits)  # a network that keeps a layer at several keeps the widest
        bits += (stored - FULL) * weight.numel()
        if stored != FULL:
            ranges = (len(weight) if plan.channels else 1) * (2 if plan.split else 1)
            extra += ranges * (FULL + stored)
    every = {name: (Bits(FULL, FULL),) for name in macs_of} | {name: plan.bits for name, plan in plans.items()}

    def summed(bits_of: Callable[[Bits], int]) -> float:
        """Over multiply-accumulates, the mean over time groups."""
        means = {name: float(np.mean([bits_of(b) for b in chosen])) for name, chosen in every.items()}
        return sum(macs_of.get(name, 0.0) * mean for name, mean in means.items())

    return {
        "weight_bits": bits / parameters,
        "weight_bytes": (bits + extra) / 8,
        "weight_bytes_full": 4.0 * parameters,
        "activation_bits": summed(lambda b: b.activations) / sum(macs_of.values()),
        "bops": summed(lambda b: b.weights * b.activations),
        "bops_full": float(FULL * FULL) * sum(macs_of.values()),
    }
