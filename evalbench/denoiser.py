"""The metered door to a network. Solvers know no parameterisation, models know no solver.

Field (counts nfe, holds the budget) -> wraps of the method -> guidance -> NetworkDoor (counts rows) -> model

What a call costs is measured, in units of one unguided full forward of the base model per row:

    door(x, t, cond)                               1; at another resolution, or of another role: the ratio of FLOPs
    door.partial(forward, x, t, cond, key="deep")  a call that runs a part: its FLOPs over the full forward's
    door.edited(edit, x, t, cond, key="skip")      the same, of the network's own forward while an edit is in force
    door.partial(..., fraction=f)                  the share that only the caller knows, a float or one per row
    field.gradient(out, x)                         a backward pass: its FLOPs over the full forward's
    field.jvp(x, t, cond, want, dx, dt)            1, and what the tangent takes beside it
    denoiser.role("small")                         the same field of another model of the suite
    denoiser.auxiliary(role, call, n)              a network that is no denoiser: rows and FLOPs, no cost
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD

from evalbench.cost.breakdown import Stopwatch, span
from evalbench.cost.flops import FlopCount, count, count_forward
from evalbench.cost.ledger import Amount, Ledger
from evalbench.errors import Unsupported
from evalbench.interfaces import (
    Blocks,
    Cond,
    Denoiser,
    DenoiserWrap,
    Edit,
    Model,
    Operator,
    Share,
    Split,
    Step,
    Time,
    Want,
)
from evalbench.paths import Path
from evalbench.predictions import convert, dual, on_path, tangent_of


class NetworkDoor(Denoiser):
    """Calls the model and writes the rows into the ledger under `role`. Nothing else calls a model.

    FLOPs are counted once per call signature, in an extra call whose result is dropped (measurement, not use). A door
    that is timed does not count them: `counting = False` makes costs and FLOPs NaN, and every call a plain one.

    Args:
        model: the network. path: its path, with start and end.
        ledger: replaced for each batch by `Field`; doors of other roles share the base door's.
        role: `base` for the model under test; another denoiser (`small`, `guide`) has its own name, and a `base`.
        grid: the suite's time grid.
        base: the door whose full forward is the unit of cost; None for the base model's own.
        roles: the suite's other models by role.
    """

    def __init__(
        self,
        model: Model,
        path: Path,
        grid: str,
        role: str = "base",
        *,
        base: NetworkDoor | None = None,
        roles: Mapping[str, Model] | None = None,
    ) -> None:
        if (base is None) != (role == "base"):
            raise ValueError(f"role '{role}': every door but the base model's own needs base=, the base model's door")
        self.model, self.path, self.grid, self.role_name = model, path, grid, role
        self.shape, self.provides = model.shape, model.provides | {f"role {name}" for name in roles or {}}
        self._roles = {name: NetworkDoor(other, path, grid, name, base=self) for name, other in (roles or {}).items()}
        self.base = base
        self._ledger = Ledger(0)
        self._counting = True
        self._stopwatch: Stopwatch | None = None
        self._counted: dict[tuple[Any, ...], FlopCount] = {}

    @property
    def ledger(self) -> Ledger:
        """Where rows are written."""
        return self._ledger if self.base is None else self.base.ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        if self.base is None:
            self._ledger = ledger
        else:
            self.base.ledger = ledger

    @property
    def counting(self) -> bool:
        """Whether FLOPs are counted; of all roles at once."""
        return self._counting if self.base is None else self.base.counting

    @counting.setter
    def counting(self, counting: bool) -> None:
        (self.base or self)._counting = counting

    @property
    def stopwatch(self) -> Stopwatch | None:
        """Told of the time inside networks, those of all roles; None outside metered passes."""
        return self._stopwatch if self.base is None else self.base.stopwatch

    @stopwatch.setter
    def stopwatch(self, stopwatch: Stopwatch | None) -> None:
        (self.base or self)._stopwatch = stopwatch

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
        (x_0, dx), (t_0, dt) = tangent_of(x), tangent_of(t)
        assert isinstance(x_0, torch.Tensor)
        flops = self._count("full", self._forward(x_0, t_0, cond), x, t, cond)
        unit = self._unit(x_0, t_0, cond)
        full_size = self.base is None and tuple(x.shape[1:]) == self.shape
        forward = self._forward(x, t, cond)
        with span(self.stopwatch, "denoiser"):
            out = forward()
        self.ledger.add_network(self.role_name, rows, len(x), cost=1.0 if full_size else flops / unit, flops=flops)
        if dx is not None or dt is not None:  # what the tangent takes beside the forward
            tangent = self._count("dual", self._forward(x, t, cond), x, t, cond) - flops
            self.ledger.add_backward(rows, len(x), cost=tangent / unit, flops=tangent)
        return convert(out, x, self.path, t, self.model.native, want)

    def partial(
        self,
        forward: Callable[[], torch.Tensor],
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable = "",
        fraction: Share | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        """A call that runs a part of the network, or the network changed: a cache, an early exit, a pruned block.

        Args:
            forward: what is run instead; returns the native prediction at (x, t). It is called twice where its FLOPs
                are counted, so it must not change what it reads.
            key: names the way it runs; its FLOPs are counted once per key and call signature.
            fraction: what each row computed, as a share of this network's full forward at x: a float, or (B,) where
                rows stop at different depths, or a function that says it after the call. None: the share is the
                FLOPs of `forward` over the full forward's.
            x, t, cond, want, rows: as in a full call.
        """
        full = self._count("full", self._forward(x, t, cond), x, t, cond)
        unit = self._unit(x, t, cond)
        counted = self._count(("partial", key), forward, x, t, cond) if fraction is None else math.nan
        with span(self.stopwatch, "denoiser"):
            out = forward()
        if callable(fraction):
            fraction = fraction()
        flops: Amount = counted if fraction is None else fraction * full
        # where the full forward is the unit, a declared share needs no FLOPs to be exact
        is_unit = self.base is None and tuple(x.shape[1:]) == self.shape
        cost = fraction if fraction is not None and is_unit else flops / unit
        self.ledger.add_network(self.role_name, rows, len(x), cost=cost, flops=flops)
        return convert(out, x, self.path, t, self.model.native, want)

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
        forward = self._edited(edit, x, t, cond)
        return self.partial(forward, x, t, cond, want, key=key, fraction=fraction, rows=rows)

    def share(self, edit: Edit, x: torch.Tensor, t: Time, cond: Cond, *, key: Hashable) -> float:
        part = self._count(("partial", key), self._edited(edit, x, t, cond), x, t, cond)
        return part / self._count("full", self._forward(x, t, cond), x, t, cond)

    def _edited(self, edit: Edit, x: torch.Tensor, t: Time, cond: Cond) -> Callable[[], torch.Tensor]:
        # what was compiled or recorded as a whole would not see the edit
        predict = getattr(self.model, "predict_eager", self.model.predict)
        plain = self._forward(x, t, cond, predict)

        def forward() -> torch.Tensor:
            with edit():
                return plain()

        return forward

    @property
    def native(self) -> Want:
        return self.model.native

    @property
    def network(self) -> torch.nn.Module:
        return self.blocks.network

    @property
    def blocks(self) -> Blocks:
        return self.model.blocks

    def split(self, at: int | None = None) -> Split:
        return self.blocks.split(at)

    def _forward(
        self, x: torch.Tensor, t: Time, cond: Cond, predict: Callable[..., torch.Tensor] | None = None
    ) -> Callable[[], torch.Tensor]:
        alpha = on_path(self.path.alpha, self.path.d_alpha, t, x)
        sigma = on_path(self.path.sigma, self.path.d_sigma, t, x)
        with span(self.stopwatch, "conditioning"):
            given = self.model.given(cond)
        return lambda: (predict or self.model.predict)(x, t, alpha, sigma, given)

    def _unit(self, x: torch.Tensor, t: Time, cond: Cond) -> float:
        """FLOPs of a row of one full forward of the base model, at x's batch; NaN when they cannot be counted."""
        if not self.counting:
            return math.nan
        base = self if self.base is None else self.base
        if tuple(x.shape[1:]) != base.shape:
            x = x.new_zeros(len(x), *base.shape)
        base.ledger.base_flops = base._count("full", base._forward(x, t, cond), x, t, cond)
        return base.ledger.base_flops

    def _count(self, key: Hashable, forward: Callable[[], torch.Tensor], x: torch.Tensor, t: Time, cond: Cond) -> float:
        """FLOPs per row of a call, counted once for its key and signature; NaN where they are not counted."""
        if not self.counting:
            return math.nan
        signature = (key, tuple(x.shape), x.dtype, isinstance(t, torch.Tensor), cond.labels is None)
        if signature not in self._counted:
            self._counted[signature] = count_forward(forward)
        found = self._counted[signature]
        self.ledger.uncounted.update(found.uncounted)
        return found.flops / len(x)

    def role(self, name: str) -> NetworkDoor:
        if name == self.role_name:
            return self
        doors = self._roles if self.base is None else self.base._roles
        if name not in doors:
            raise Unsupported(f"not supported: needs role {name}")
        return doors[name]

    def gradient(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        *,
        grad_outputs: torch.Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        found: list[torch.Tensor] = []
        flops = self._run(lambda: found.extend(torch.autograd.grad(out, x, grad_outputs))) / len(x)
        # the unit is known: the forward that made `out` counted it
        self.ledger.add_backward(rows, len(x), cost=flops / self.ledger.base_flops, flops=flops)
        return found[0]

    def auxiliary(
        self, role: str, call: Callable[[], torch.Tensor], n: int, *, rows: np.ndarray | None = None
    ) -> torch.Tensor:
        found: list[torch.Tensor] = []
        flops = self._run(lambda: found.append(call())) / n
        self.ledger.add_aux(role, rows, n, flops=flops)
        return found[0]

    def _run(self, call: Callable[[], object]) -> float:
        """Run what cannot be run twice; its FLOPs, NaN where they are not counted."""
        with span(self.stopwatch, "denoiser"):
            if not self.counting:
                call()
                return math.nan
            measured = count(call)
        self.ledger.uncounted.update(measured.uncounted)
        return measured.flops

    def reward(self, name: str, x0: torch.Tensor, cond: Cond, *, rows: np.ndarray | None = None) -> torch.Tensor:
        return self.auxiliary(f"reward.{name}", lambda: self.model.reward(name, x0, cond.labels), len(x0), rows=rows)

    @property
    def operator(self) -> Operator:
        return self.model.operator

    @property
    def modalities(self) -> Mapping[str, slice]:
        return self.model.modalities


class Field(DenoiserWrap):
    """The outermost denoiser, which the solver sees: one evaluation here is one NFE.

    Args:
        inner: the network door with guidance and wraps around it.
        ledger: counts of this batch, with the budget.
    """

    def __init__(self, inner: Denoiser, ledger: Ledger) -> None:
        super().__init__(inner)
        self.ledger = ledger

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
        self.ledger.add_field(rows, len(x))
        return self.inner(x, t, cond, want, step=step, rows=rows)

    def jvp(
        self, x: torch.Tensor, t: float, cond: Cond, want: Want, dx: torch.Tensor, dt: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.ledger.add_field(None, len(x))
        times = x.new_full((len(x),), float(t))
        with fwAD.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of what it loads at the first dual number
            time: Time = dual(times, torch.full_like(times, dt)) if dt else float(t)
            out, tangent = tangent_of(self.inner(dual(x, dx), time, cond, want))
        assert isinstance(out, torch.Tensor)
        return out, torch.zeros_like(x) if tangent is None else tangent
