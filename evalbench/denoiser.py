"""The metered door to a network. Solvers know no parameterisation, models know no solver.

Field (counts nfe, holds the budget) -> wraps of the method -> guidance -> NetworkDoor (counts rows) -> model
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from evalbench.cost.flops import count_flops
from evalbench.cost.ledger import Ledger
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Model, Step, Time, Want
from evalbench.paths import Path

Coefficient = float | torch.Tensor


def like_rows(values: Any, x: torch.Tensor) -> Coefficient:
    """A float stays a float; per-row values become a tensor that broadcasts over x."""
    if np.ndim(values) == 0:
        return float(values)
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))


def _times(t: Time) -> Any:
    return t.detach().cpu().double().numpy() if isinstance(t, torch.Tensor) else float(t)


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
    times = _times(t)
    alpha, sigma = like_rows(path.alpha(times), x), like_rows(path.sigma(times), x)
    if have == "score":  # eps = -sigma score
        return convert(-sigma * out, x, path, t, "eps", want)
    if want == "score":
        return -convert(out, x, path, t, have, "eps") / sigma
    d_alpha: Coefficient = 0.0
    d_sigma: Coefficient = 0.0
    if "velocity" in (have, want):
        d_alpha, d_sigma = like_rows(path.d_alpha(times), x), like_rows(path.d_sigma(times), x)
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

    Args:
        model: the network. path: its path, with start and end.
        ledger: replaced for each batch by `Field`.
        role: `base` for the model under test; other roles for auxiliary networks.
        grid: the suite's time grid.
    """

    def __init__(self, model: Model, path: Path, grid: str, role: str = "base") -> None:
        self.model, self.path, self.grid, self.role = model, path, grid, role
        self.shape, self.provides = model.shape, model.provides
        self.ledger = Ledger(0)
        self._flops: dict[tuple[Any, ...], float] = {}

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
        times = _times(t)
        alpha, sigma = like_rows(self.path.alpha(times), x), like_rows(self.path.sigma(times), x)

        def forward() -> torch.Tensor:
            return self.model.predict(x, t, alpha, sigma, cond.labels)

        flops = self._flops_per_row(forward, x, t)
        out = forward()
        self.ledger.add_network(self.role, rows, len(x), cost=1.0, flops=flops)
        return convert(out, x, self.path, t, self.model.native, want)

    def _flops_per_row(self, forward: Any, x: torch.Tensor, t: Time) -> float:
        """Counted once per call signature, in an extra call whose result is dropped (it is measurement, not use)."""
        signature = (tuple(x.shape), x.dtype, isinstance(t, torch.Tensor))
        if signature not in self._flops:
            self._flops[signature] = count_flops(forward) / len(x)
        return self._flops[signature]


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
