"""What all quantisations share: they prepare plans for layers, and evaluate the network with those layers replaced."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from evalbench.errors import Unsupported
from evalbench.interfaces import (
    Artifact,
    Cond,
    Denoiser,
    Edit,
    NetworkWrap,
    Share,
    Step,
    Time,
    Want,
    Wrap,
    both,
)
from evalbench.predictions import tangent_of

from ._calibration import States, evaluate, share, times
from ._core import Bits, FakeQuant, LayerPlan, Observer, built, footprint, layers, replaced

if TYPE_CHECKING:
    from torch import nn

    from evalbench.interfaces import Preparation
    from evalbench.paths import Path

_ARRAYS = ("ranges", "balance", "up", "levels")


class Quantisation(Wrap):
    """A wrap that prepares one plan per layer. Other roles of the suite keep their precision."""

    requires = frozenset({"network"})
    replaces_layers = True
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "once"

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        artifact = self.prepared()
        network = denoiser.network
        modules = built(network, unpacked(artifact))
        return denoiser.within(lambda inner: Quantised(inner, modules, int(artifact.facts["groups"])))


class Quantised(NetworkWrap):
    """The network with layers replaced for the length of each call.

    Args:
        modules: what stands in, by name. groups: equal shares of the path's time; a call's time names the group.
        key: names the replacement where it changes what is computed, such as a table instead of layers.
    """

    def __init__(
        self, inner: Denoiser, modules: Mapping[str, nn.Module], groups: int, key: Hashable = "rounded"
    ) -> None:
        super().__init__(inner)
        self.modules, self.groups, self.key = modules, groups, key

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
        return self._grouped(None, x, t, cond, want, self.key, None, step, rows)

    def edited(
        self,
        edit: Edit,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable,
        fraction: Share | None = None,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        return self._grouped(edit, x, t, cond, want, (self.key, key), fraction, step, rows)

    def _grouped(
        self,
        edit: Edit | None,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want,
        key: Hashable,
        fraction: Share | None,
        step: Step | None,
        rows: np.ndarray | None,
    ) -> torch.Tensor:
        """The call, in as many as there are time groups among its rows."""
        if x.requires_grad or tangent_of(x)[1] is not None or tangent_of(t)[1] is not None:
            raise Unsupported("not supported: needs gradients of a quantised network, which are zero almost everywhere")
        group = groups_of(self.path, times(t, x), self.groups)
        if int(group.min()) == int(group.max()):
            own = self._edit(int(group[0]), edit)
            return self.inner.edited(own, x, t, cond, want, key=key, fraction=fraction, step=step, rows=rows)
        if edit is not None:
            raise Unsupported("not supported: a cache or an early exit around a quantised network with a time per row")
        assert isinstance(t, torch.Tensor)  # one float is one group
        out = torch.empty_like(x)
        index = np.arange(len(x)) if rows is None else rows
        for one in sorted(set(group.tolist())):
            chosen = torch.nonzero(group == one).flatten()
            own, mine = self._edit(one, None), index[chosen.cpu().numpy()]
            part = (x[chosen], t[chosen], cond.rows(chosen), want)
            out[chosen] = self.inner.edited(own, *part, key=key, step=step, rows=mine)
        return out

    def _edit(self, group: int, edit: Edit | None) -> Edit:
        network, modules = self.network, self.modules

        @contextmanager
        def quantised() -> Iterator[None]:
            for module in modules.values():
                if isinstance(module, FakeQuant):
                    module.group = group
            with replaced(network, modules):
                yield

        return quantised if edit is None else both(quantised, edit)


def groups_of(path: Path, t: torch.Tensor, groups: int) -> torch.Tensor:
    """Time group of each row, int64 (B,)."""
    return torch.clamp((share(path, t) * groups).floor().long(), 0, groups - 1)


def observed(
    context: Preparation,
    network: nn.Module,
    states: States,
    groups: int,
    names: list[str],
    splits: Mapping[str, int],
    keep: list[str],
) -> Observer:
    """What the layers see at calibration states, by time group."""
    observer = Observer(network, names, splits, keep)
    group = groups_of(context.path, states.t, groups)
    with observer.watching():
        for own in sorted(set(group.tolist())):
            observer.group = own
            evaluate(context, states.chosen(torch.nonzero(group == own).flatten()))
    return observer


def packed(
    network: nn.Module,
    plans: Mapping[str, LayerPlan],
    observer: Observer,
    groups: int,
    facts: Mapping[str, Any],
    others: Mapping[str, np.ndarray] | None = None,
) -> Artifact:
    """Plans as an artefact, with what they would save; ranges of weights that take a search are found here, once."""
    plans = {name: _with_levels(network, name, plan) for name, plan in plans.items()}
    arrays = {
        f"{name}/{key}": value
        for name, plan in plans.items()
        for key in _ARRAYS
        if (value := getattr(plan, key)) is not None
    }
    texts = {
        name: {key: value for key, value in asdict(plan).items() if key not in (*_ARRAYS, "bits")}
        | {"bits": [bits.text for bits in plan.bits]}
        for name, plan in plans.items()
    }
    macs = {name: observer.seen[name].macs for name in observer.names}
    return Artifact(
        arrays | dict(others or {}),
        {"groups": groups, "layers": texts, "footprint": footprint(network, plans, macs)} | dict(facts),
    )


def _with_levels(network: nn.Module, name: str, plan: LayerPlan) -> LayerPlan:
    if plan.measure == "minmax":  # as quickly found as read
        return plan
    return replace(plan, levels=FakeQuant(network.get_submodule(name), plan).fitted_levels())


def unpacked(artifact: Artifact) -> dict[str, LayerPlan]:
    """The plans of an artefact."""
    found = {}
    for name, text in artifact.facts["layers"].items():
        bits = tuple(Bits.parse("artefact", one) for one in text["bits"])
        arrays = {key: artifact.arrays.get(f"{name}/{key}") for key in _ARRAYS}
        found[name] = LayerPlan(**{**text, "bits": bits, **arrays})
    return found


def all_layers(network: nn.Module) -> list[str]:
    """Names of all Linear and Conv2d layers, the first and the last of the network at the ends."""
    return list(layers(network))
