"""Prediction types: x0, eps, v, velocity and score are affine in each other given x; derivatives pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD

from evalbench.errors import Unsupported
from evalbench.interfaces import Time, Want
from evalbench.paths import Path

Coefficient = float | torch.Tensor


def like_rows(values: Any, x: torch.Tensor) -> Coefficient:
    """A float stays a float; values per row, (B,), or per element, (B, *S), become a tensor that broadcasts over x."""
    if np.ndim(values) == 0:
        return float(values)
    dtype = x.dtype if x.is_floating_point() else torch.float64  # tokens are integers, coefficients are not
    tensor = torch.as_tensor(values, dtype=dtype, device=x.device)
    return tensor if tensor.ndim == x.ndim > 1 else tensor.reshape(-1, *(1,) * (x.ndim - 1))


def times_of(t: Time) -> Any:
    """A time as the path's functions take it: a float, or a float64 array."""
    return t.detach().cpu().double().numpy() if isinstance(t, torch.Tensor) else float(t)


def dual(value: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """A tensor that carries a tangent (forward-mode differentiation)."""
    return fwAD.make_dual(value, tangent)  # type: ignore[no-any-return, no-untyped-call]


def tangent_of(value: Time) -> tuple[Time, torch.Tensor | None]:
    """A value without its tangent, and the tangent; None where it carries none."""
    if not isinstance(value, torch.Tensor) or fwAD._current_level < 0:
        return value, None
    found = fwAD.unpack_dual(value)  # type: ignore[no-untyped-call]
    return (value, None) if found.tangent is None else (found.primal, found.tangent)


def on_path(f: Callable[[Any], Any], df: Callable[[Any], Any] | None, t: Time, x: torch.Tensor) -> Coefficient:
    """A coefficient of the path at t, broadcast over x; it carries the tangent of a dual time when `df` is known."""
    plain, tangent = tangent_of(t)
    value = like_rows(f(times_of(plain)), x)
    if tangent is None:
        return value
    if df is None:
        raise Unsupported("not supported: a time derivative of the velocity")
    assert isinstance(value, torch.Tensor)
    slope = like_rows(df(times_of(plain)), x) * like_rows(tangent, x)
    assert isinstance(slope, torch.Tensor)
    return dual(value, slope)


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
    alpha, sigma = on_path(path.alpha, path.d_alpha, t, x), on_path(path.sigma, path.d_sigma, t, x)
    if have == "score":  # eps = -sigma score
        return convert(-sigma * out, x, path, t, "eps", want)
    if want == "score":
        return -convert(out, x, path, t, have, "eps") / sigma
    d_alpha: Coefficient = 0.0
    d_sigma: Coefficient = 0.0
    if "velocity" in (have, want):
        d_alpha, d_sigma = on_path(path.d_alpha, None, t, x), on_path(path.d_sigma, None, t, x)
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
