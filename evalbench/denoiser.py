"""The metered door to a network. Solvers know no parameterisation, models know no solver.

Field (counts nfe, holds the budget) -> wraps of the method -> guidance -> NetworkDoor (counts rows) -> model

What a call costs is measured, in units of one unguided full forward of the base model per row:

    door(x, t, cond)                               1; at another resolution, or of another role: the ratio of FLOPs
    door.partial(forward, x, t, cond, key="deep")  a call that runs a part: its FLOPs over the full forward's
    door.partial(..., fraction=f)                  the share that only the caller knows, a float or one per row
    field.gradient(out, x)                         a backward pass: its FLOPs over the full forward's
    field.jvp(x, t, cond, want, dx, dt)            1, and what the tangent takes beside it
    denoiser.role("small")                         the same field of another model of the suite
    denoiser.auxiliary(role, call, n)              a network that is no denoiser: rows and FLOPs, no cost
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD

from evalbench.cost.flops import FlopCount, count, count_forward
from evalbench.cost.ledger import Amount, Ledger
from evalbench.errors import Unsupported
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Model, Operator, Step, Time, Want
from evalbench.paths import Path

Coefficient = float | torch.Tensor


def like_rows(values: Any, x: torch.Tensor) -> Coefficient:
    """A float stays a float; values per row, (B,), or per element, (B, *S), become a tensor that broadcasts over x."""
    if np.ndim(values) == 0:
        return float(values)
    tensor = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return tensor if tensor.ndim == x.ndim > 1 else tensor.reshape(-1, *(1,) * (x.ndim - 1))


def _times(t: Time) -> Any:
    return t.detach().cpu().double().numpy() if isinstance(t, torch.Tensor) else float(t)


def _dual(value: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """A tensor that carries a tangent (forward-mode differentiation)."""
    return fwAD.make_dual(value, tangent)  # type: ignore[no-any-return, no-untyped-call]


def _parts(value: Time) -> tuple[Time, torch.Tensor | None]:
    """A value without its tangent, and the tangent; None where it carries none."""
    if not isinstance(value, torch.Tensor) or fwAD._current_level < 0:
        return value, None
    found = fwAD.unpack_dual(value)  # type: ignore[no-untyped-call]
    return (value, None) if found.tangent is None else (found.primal, found.tangent)


def _on_path(f: Callable[[Any], Any], df: Callable[[Any], Any] | None, t: Time, x: torch.Tensor) -> Coefficient:
    """A coefficient of the path at t, broadcast over x; it carries the tangent of a dual time when `df` is known."""
    plain, tangent = _parts(t)
    value = like_rows(f(_times(plain)), x)
    if tangent is None:
        return value
    if df is None:
        raise Unsupported("not supported: a time derivative of the velocity")
    assert isinstance(value, torch.Tensor)
    slope = like_rows(df(_times(plain)), x) * like_rows(tangent, x)
    assert isinstance(slope, torch.Tensor)
    return _dual(value, slope)


def convert(out: torch.Tensor, x: torch.Tensor, path: Path, t: Time, have: Want, want: Want) -> torch.Tensor:
    """One prediction type into another at state x, time t. Exact: all are affine in each other given x.

    Args:
        out: prediction of type `have`, (B, *S). x: state, (B, *S).
        path: gives alpha, sigma and their derivatives at t.
        t: float or (B,).
        have, want: prediction types.
    """
    if have == want:
        return out
    if "probs" in (have, want):
        raise Unsupported(f"not supported: needs {want}, the model predicts {have}")
    alpha, sigma = _on_path(path.alpha, path.d_alpha, t, x), _on_path(path.sigma, path.d_sigma, t, x)
    if have == "score":  # eps = -sigma score
        return convert(-sigma * out, x, path, t, "eps", want)
    if want == "score":
        return -convert(out, x, path, t, have, "eps") / sigma
    d_alpha: Coefficient = 0.0
    d_sigma: Coefficient = 0.0
    if "velocity" in (have, want):
        d_alpha, d_sigma = _on_path(path.d_alpha, None, t, x), _on_path(path.d_sigma, None, t, x)
    rows: dict[str, tuple[Coefficient, Coefficient]] = {  # prediction = a x0 + b eps
        "x0": (1.0, 0.0),
        "eps": (0.0, 1.0),
        "v": (-sigma, alpha),
        "velocity": (d_alpha, d_sigma),
    }
    a, b = rows[have]
    # x = alpha x0 + sigma eps and out = a x0 + b eps, solved for x0 and eps
    determinant = alpha * b - sigma * a
    c, d = rows[want]
    # want = c x0 + d eps with x0 = (b x - sigma out) / det, eps = (alpha out - a x) / det
    return x * ((c * b - d * a) / determinant) + out * ((d * alpha - c * sigma) / determinant)


class NetworkDoor(Denoiser):
    """Calls the model and writes the rows into the ledger under `role`. Nothing else calls a model.

    FLOPs are counted once per call signature, in an extra call whose result is dropped (measurement, not use).

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
        (x_0, dx), (t_0, dt) = _parts(x), _parts(t)
        assert isinstance(x_0, torch.Tensor)
        flops = self._count("full", self._forward(x_0, t_0, cond), x, t, cond)
        unit = self._unit(x_0, t_0, cond)
        full_size = self.base is None and tuple(x.shape[1:]) == self.shape
        out = self._forward(x, t, cond)()
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
        fraction: Amount | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        """A call that runs a part of the network, or the network changed: a cache, an early exit, a pruned block.

        Args:
            forward: what is run instead; returns the native prediction at (x, t). It is called twice where its FLOPs
                are counted, so it must not change what it reads.
            key: names the way it runs; its FLOPs are counted once per key and call signature.
            fraction: what each row computed, as a share of this network's full forward at x: a float, or (B,) where
                rows stop at different depths. None: the share is the FLOPs of `forward` over the full forward's.
            x, t, cond, want, rows: as in a full call.
        """
        full = self._count("full", self._forward(x, t, cond), x, t, cond)
        unit = self._unit(x, t, cond)
        flops: Amount = self._count(("partial", key), forward, x, t, cond) if fraction is None else fraction * full
        out = forward()
        # where the full forward is the unit, a declared share needs no FLOPs to be exact
        is_unit = self.base is None and tuple(x.shape[1:]) == self.shape
        cost = fraction if fraction is not None and is_unit else flops / unit
        self.ledger.add_network(self.role_name, rows, len(x), cost=cost, flops=flops)
        return convert(out, x, self.path, t, self.model.native, want)

    def _forward(self, x: torch.Tensor, t: Time, cond: Cond) -> Callable[[], torch.Tensor]:
        alpha = _on_path(self.path.alpha, self.path.d_alpha, t, x)
        sigma = _on_path(self.path.sigma, self.path.d_sigma, t, x)
        return lambda: self.model.predict(x, t, alpha, sigma, cond.labels)

    def _unit(self, x: torch.Tensor, t: Time, cond: Cond) -> float:
        """FLOPs of a row of one full forward of the base model, at x's batch; NaN when they cannot be counted."""
        base = self if self.base is None else self.base
        if tuple(x.shape[1:]) != base.shape:
            x = x.new_zeros(len(x), *base.shape)
        base.ledger.base_flops = base._count("full", base._forward(x, t, cond), x, t, cond)
        return base.ledger.base_flops

    def _count(self, key: Hashable, forward: Callable[[], torch.Tensor], x: torch.Tensor, t: Time, cond: Cond) -> float:
        """FLOPs per row of a call, counted once for its key and signature."""
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
        measured = count(lambda: found.extend(torch.autograd.grad(out, x, grad_outputs)))
        self.ledger.uncounted.update(measured.uncounted)
        flops = measured.flops / len(x)
        # the unit is known: the forward that made `out` counted it
        self.ledger.add_backward(rows, len(x), cost=flops / self.ledger.base_flops, flops=flops)
        return found[0]

    def auxiliary(
        self, role: str, call: Callable[[], torch.Tensor], n: int, *, rows: np.ndarray | None = None
    ) -> torch.Tensor:
        found: list[torch.Tensor] = []
        measured = count(lambda: found.append(call()))
        self.ledger.uncounted.update(measured.uncounted)
        self.ledger.add_aux(role, rows, n, flops=measured.flops / n)
        return found[0]

    def reward(self, name: str, x0: torch.Tensor, cond: Cond, *, rows: np.ndarray | None = None) -> torch.Tensor:
        return self.auxiliary(f"reward.{name}", lambda: self.model.reward(name, x0, cond.labels), len(x0), rows=rows)

    @property
    def operator(self) -> Operator:
        return self.model.operator


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
            time: Time = _dual(times, torch.full_like(times, dt)) if dt else float(t)
            out, tangent = _parts(self.inner(_dual(x, dx), time, cond, want))
        assert isinstance(out, torch.Tensor)
        return out, torch.zeros_like(x) if tangent is None else tangent
