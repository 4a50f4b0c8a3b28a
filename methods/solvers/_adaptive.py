"""Adaptive step size of DPM-Solver, Lu et al. 2022 (arXiv 2206.00927): DPM-Solver-12 and DPM-Solver-23.

A step is tried with an embedded pair of singlestep solvers of order p - 1 and p on the same evaluations. With D the
difference of their results x_low, x_high, and x_prev the x_low of the last accepted step,

    E = RMS over coordinates of D / max(atol, rtol max(|x_low|, |x_prev|))
    accepted where E <= 1, then x = x_high; in either case h <- min(theta h E^(-1/p), what is left)

Each sample has its own lambda and h, so what it becomes does not depend on its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evalbench.errors import Unsupported
from evalbench.interfaces import Cond, Denoiser, Preparation
from evalbench.paths import Path

if TYPE_CHECKING:
    import torch

ATOL, RTOL = 0.0078, 0.05  # the paper's
_FIRST, _THETA = 0.05, 0.9  # h of the first trial, safety factor
_LEAST = 1e-6  # steps below this share of the range of lambda are accepted: their E is rounding

_SEARCH_SAMPLES, _BATCH = 128, 64
_BISECTIONS = 12
_LEAST_RTOL, _LARGEST_RTOL = 1e-6, 1.0  # of the bisection; a difference as large as x itself is no control of errors


class Tolerances(NamedTuple):
    """Of a step: absolute, in units of x, and relative to |x|."""

    atol: float
    rtol: float


def solve(
    denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, order: int, tolerances: Tolerances, limit: float = np.inf
) -> tuple[torch.Tensor, np.ndarray]:
    """Samples (B, *S) and the evaluations each has spent, float64 (B,).

    Args:
        order: p, 2 or 3. limit: gives up, with unfinished samples, when the mean of the evaluations is above it.
    """
    import torch

    path, x, x_prev = denoiser.path, x_T.clone(), x_T.clone()
    end = float(path.lam(path.t_end))
    lam = np.full(len(x), float(path.lam(path.t_start)))
    least = _LEAST * (end - lam[0])
    h = np.minimum(_FIRST, end - lam)
    eps, known = torch.zeros_like(x), np.zeros(len(x), dtype=bool)  # eps at (x, lambda) outlives a rejection
    spent = np.zeros(len(x))
    while (lam < end).any() and spent.mean() <= limit:
        rows = np.flatnonzero(lam < end)
        new = rows[~known[rows]]
        if len(new):
            eps[new] = _evaluate(denoiser, x[new], lam[new], cond, new)
            known[new] = True
        low, high = _trial(denoiser, x[rows], eps[rows], lam[rows], h[rows], cond, rows, order)
        spent[new] += 1
        spent[rows] += order - 1
        scale = torch.maximum(low.abs(), x_prev[rows].abs()).mul_(tolerances.rtol).clamp_(min=tolerances.atol)
        error = ((high - low) / scale).flatten(1).square().mean(1).sqrt().double().cpu().numpy()
        # not E > 1: a NaN ends its sample, which is then reported
        accepted = ~(error > 1.0) | (h[rows] <= least)
        done = rows[accepted]
        x[done], x_prev[done] = high[accepted], low[accepted]
        # the last step ends exactly at the end
        lam[done] = np.where(h[done] >= end - lam[done], end, lam[done] + h[done])
        known[done] = False
        with np.errstate(divide="ignore"):
            fitting = np.where(error > 0, _THETA * h[rows] * error ** (-1.0 / order), np.inf)
        h[rows] = np.minimum(np.maximum(fitting, least), end - lam[rows])
    if path.final == "zero" and (lam >= end).all():
        alpha, sigma = float(path.alpha(path.t_end)), float(path.sigma(path.t_end))
        x = (x - sigma * denoiser(x, path.t_end, cond, "eps")) / alpha
        spent += 1
    return x, spent


def _trial(
    denoiser: Denoiser,
    x: torch.Tensor,
    eps: torch.Tensor,
    lam: np.ndarray,
    h: np.ndarray,
    cond: Cond,
    rows: np.ndarray,
    order: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of order p - 1 and p of a step h from lam, with eps at its start; p - 1 evaluations of each row."""
    path = denoiser.path
    r1 = 1.0 / order
    e1 = np.expm1(r1 * h)
    u1 = _combine(path, x, lam, r1 * h, (e1, eps))
    D1 = _evaluate(denoiser, u1, lam + r1 * h, cond, rows) - eps
    e = np.expm1(h)
    second = _combine(path, x, lam, h, (e, eps), (e / (2.0 * r1), D1))
    if order == 2:
        return _combine(path, x, lam, h, (e, eps)), second
    r2 = 2.0 / 3.0
    e2 = np.expm1(r2 * h)
    u2 = _combine(path, x, lam, r2 * h, (e2, eps), (r2 / r1 * (e2 / (r2 * h) - 1.0), D1))
    D2 = _evaluate(denoiser, u2, lam + r2 * h, cond, rows) - eps
    return second, _combine(path, x, lam, h, (e, eps), ((e / h - 1.0) / r2, D2))


def _combine(
    path: Path, x: torch.Tensor, lam: np.ndarray, h: np.ndarray, *terms: tuple[np.ndarray, torch.Tensor]
) -> torch.Tensor:
    """(alpha_t / alpha_s) x - sigma_t (sum of weight times term) at lam + h, each row with its own."""
    s, t = _times(path, lam), _times(path, lam + h)
    result = x * _rows(np.exp(path.log_alpha(t) - path.log_alpha(s)), x)
    for weight, term in terms:
        result = result - term * _rows(path.sigma(t) * weight, x)
    return result


def _evaluate(denoiser: Denoiser, x: torch.Tensor, lam: np.ndarray, cond: Cond, rows: np.ndarray) -> torch.Tensor:
    import torch

    t = x.new_tensor(_times(denoiser.path, lam))
    return denoiser(x, t, cond.rows(torch.as_tensor(rows, device=x.device)), "eps", rows=rows)


def _times(path: Path, lam: np.ndarray) -> np.ndarray:
    return np.clip(path.t_of_lambda(lam), path.t_end, path.t_start)  # type: ignore[no-any-return]


def _rows(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """(b,) as a tensor that broadcasts over x, (b, *S)."""
    return x.new_tensor(values).reshape(-1, *(1,) * (x.ndim - 1))


def fitted(context: Preparation, order: int, tolerances: Tolerances, seed: int) -> tuple[Tolerances, np.ndarray]:
    """The smallest multiple of the tolerances that keeps to the budget, and what 128 search samples spent with it.

    It keeps to it when the mean over a batch of 64 samples does, three standard errors included.

    Raises:
        Unsupported: the budget asks for rtol above 1.
    """
    indices = range(_SEARCH_SAMPLES)
    x_T, cond = context.x_T(context.noise(indices, seed)), context.cond(indices)
    denoiser = context.denoiser(len(indices))

    def at(rtol: float) -> Tolerances:
        return Tolerances(rtol / tolerances.rtol * tolerances.atol, rtol)

    def spent(rtol: float, limit: float) -> np.ndarray:
        return solve(denoiser, x_T, cond, order, at(rtol), limit)[1]

    low, high = _LEAST_RTOL, _LARGEST_RTOL
    best = spent(high, np.inf)
    if _needed(best) > context.nfe:
        raise Unsupported(
            f"dpm-solver(algorithm=adaptive,order={order}): a budget of {context.nfe} is too small for error control; "
            f"rtol={high:g} takes {np.ceil(_needed(best)):g}"
        )
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        counts = spent(middle, context.nfe)
        if _needed(counts) <= context.nfe:
            high, best = middle, counts
        else:
            low = middle
    return at(high), best


def _needed(counts: np.ndarray) -> float:
    """The budget that the mean over a batch keeps to, with three standard errors of it and of this estimate."""
    return float(counts.mean() + 3.0 * counts.std() * np.sqrt(1.0 / len(counts) + 1.0 / _BATCH))
