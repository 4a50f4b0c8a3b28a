"""The Frechet distance without its finite-sample bias, and the paired difference that verdicts use.

The plug-in distance is a smooth function of mean and covariance, so its bias is the mean of its higher terms. In the
coordinates v of `Influence.axes`, where S_r^1/2 S S_r^1/2 is diag(lambda), FD = ... + |dm|^2 + sum_ij w_ij dP_ij^2 with
w_ij = 1 / (2 l_i l_j (l_i + l_j)), l = lambda^1/2 (the second derivative of the trace of the square root, by divided
differences). Two parts are taken off:

1. The second order, from the samples themselves and so for any distribution: it is a mean over all pairs (x_i, x_j)
   whose diagonal i = j is the bias. With clusters every pair within a cluster belongs to that diagonal. Where a plan
   fixes how many samples each class has, only what varies within classes does.
2. Third and higher orders, which grow as d (d/N)^2: where d/N is not small the sample's eigenvalues spread about the
   true ones by the law of Marchenko & Pastur (1967), and the trace that one would see without the spread has a closed
   form (`population_root_trace`). Of this only what lies beyond the second order is used.

Compared with the half-split extrapolation 2 D_N - (D_a + D_b) / 2 the noise of second order is smaller by sqrt(2),
nothing depends on a random split, and what that leaves of the bias, about -2 c_2 / N^2, is gone: with d = 256, N = 4 d
and samplers (1 - e) x and (1 + e) x it was 1.9 standard errors (`benchmarks/verdict_rates.py` prints both).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from evalbench.errors import EvalbenchError
from evalbench.metrics.common import Array
from evalbench.metrics.frechet import Fit, Gaussian, moments
from evalbench.stats import StandardError, corrected_standard_error, is_plan

_NODES = 8  # of the quadrature; more change nothing at 1e-6 on spectra of samples, whose eigenvalues repel each other


def population_root_trace(eigenvalues: Array, n: int) -> float:
    """Trace of the square root of a covariance, estimated from the eigenvalues of a sample covariance.

    By the Marchenko-Pastur equation the sample's companion Stieltjes transform m(z) and the true spectrum nu are tied
    by z = -1/m + (d/n) int t / (1 + t m) dnu(t) (Silverstein & Bai 1995). Solved for the Stieltjes transform of nu and
    integrated against t^1/2 on a contour around the spectrum, then by parts, it gives

        d int t^1/2 dnu = (2 n / pi) sum_i int_{xi_i}^{lambda_i} m(x)^1/2 dx,

    with xi_i the zero of m below lambda_i: the eigenvalues of diag(lambda) - lambda^1/2 (lambda^1/2)' / n. Couillet &
    Tiomoko (2019) estimate distances of covariances in this way. The error vanishes as d and n grow together.

    Args:
        eigenvalues: lambda > 0, ascending, (d,), d < n. n: degrees of freedom of the covariance.
    """
    from scipy.special import roots_jacobi

    roots = np.sqrt(eigenvalues)
    zeros = np.linalg.eigvalsh(np.diag(eigenvalues) - np.outer(roots, roots) / n)
    zeros = np.clip(zeros, np.concatenate([[0.0], eigenvalues[:-1]]), eigenvalues)  # rounding may leave the interval
    width = eigenvalues - zeros
    open_ = width > 0  # tied eigenvalues enclose nothing
    total = 0.0
    # m has a pole at lambda_i and a zero at xi_i: m = (x - xi_i) / (lambda_i - x) times something smooth
    for node, weight in zip(*roots_jacobi(_NODES, -0.5, 0.5), strict=True):
        share = (node + 1) / 2
        x = (zeros + share * width)[open_]
        m = np.sum(1 / (eigenvalues - x[:, None]), axis=1) / n - (1 - len(eigenvalues) / n) / x
        total += weight / 2 * float(np.sum(width[open_] * np.sqrt(np.maximum(m * (1 - share) / share, 0.0))))
    return 2 * n / np.pi * total


def unbiased_distance(fit: Fit) -> float:
    """FD of all samples, its bias taken off; may be negative near zero. Needs N > D + 1."""
    lam, n = fit.whole.eigenvalues, fit.moments.n
    if n - 1 <= len(lam):
        raise EvalbenchError(f"{n} samples do not determine a covariance of rank {len(lam)}")
    roots = np.sqrt(lam)
    w = 0.5 / (np.outer(roots, roots) * np.add.outer(roots, roots))
    higher = 2 * (population_root_trace(lam, n - 1) - float(roots.sum())) - float(lam @ w @ lam) / (n - 1)
    second = _second_order_bias if fit.strata is None else _planned_second_order_bias
    return float(fit.whole.distance - second(fit, w) - higher)


def _second_order_bias(fit: Fit, w: Array) -> float:
    """1 / N^2 sum_g |U_g|^2 + sum_ij w_ij V_gij^2 over clusters g (or samples), of U_g = sum_{b in g} u_b and V_g =
    sum_{b in g} v_b v_b' - diag(lambda), with the factor G / (G - 1) for the means that were taken off.
    """
    n, lam, of = fit.moments.n, fit.whole.eigenvalues, fit.clusters
    if of is None:
        order, lags, sizes, clusters = np.arange(n), range(1), np.ones(n), n
    else:
        _, inverse, counts = np.unique(of, return_inverse=True, return_counts=True)
        order, lags = np.argsort(inverse, kind="stable"), range(int(counts.max()))
        sizes, of, clusters = counts[inverse][order].astype(np.float64), inverse[order], len(counts)
    u = np.concatenate([block.astype(np.float64) for block in fit.blocks])[order] - fit.whole.a.mean
    v = u @ fit.whole.axes  # (N, r)
    mean, products = 0.0, np.zeros_like(w)
    for lag in lags:  # pairs of one cluster lie side by side
        left, right = slice(0, n - lag), slice(lag, n)
        same = np.ones(n, bool) if of is None else of[left] == of[right]
        times = 1 if lag == 0 else 2  # (b, c) and (c, b)
        mean += times * float(np.einsum("bd,bd->", u[left][same], u[right][same]))
        y = v[left][same] * v[right][same]
        products += times * (y.T @ y)
    centre = lam * (2 * (sizes @ v**2) - lam * sizes.sum())  # what - lambda_i delta_ij takes from the diagonal
    total = mean + float(np.sum(w * products)) - float(np.diag(w) @ centre)
    return total / n**2 * clusters / (clusters - 1)


def _planned_second_order_bias(fit: Fit, w: Array) -> float:
    """1 / N^2 sum over classes of n_a times the mean of h_ii less that of h_ij, i and j two samples of the class.

    h is the second-order kernel, h_ij = u_i.u_j + sum w (v_i v_i' - diag(lambda)) (v_j v_j' - diag(lambda)). As
    the covariance is divided by n - 1, it is too large by what varies between classes, over n - 1.
    """
    assert fit.strata is not None
    n, lam = fit.moments.n, fit.whole.eigenvalues
    u = np.concatenate([block.astype(np.float64) for block in fit.blocks]) - fit.whole.a.mean
    v = u @ fit.whole.axes
    y, weights = v**2, np.diag(w)
    own = np.einsum("bd,bd->b", u, u) + np.einsum("bd,bd->b", y @ w, y) + (lam * weights) @ (lam[:, None] - 2 * y.T)
    total, between = 0.0, -fit.whole.a.cov
    for label in np.unique(fit.strata):
        members = fit.strata == label
        count, mean = int(members.sum()), u[members].mean(axis=0)
        gap = v[members].T @ v[members] / count - np.diag(lam)
        alike = float(mean @ mean + np.sum(w * gap**2))
        total += count / (count - 1) * (float(own[members].sum()) - count * alike)
        between = between + count / n * np.cov(u[members], rowvar=False).reshape(between.shape)
    return total / n**2 - float(np.sum(fit.whole.slope * between)) / (n - 1)


class PairedDifference(NamedTuple):
    """FD(a) - FD(b) without its bias, the standard error, and the bias that was taken off the plug-in difference."""

    value: float
    error: StandardError
    bias: float


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    reference: Gaussian,
    clusters: np.ndarray | None = None,
    strata: np.ndarray | None = None,
) -> PairedDifference:
    """FD(a) - FD(b), the statistic of verdicts; negative when a is better.

    The difference of two plug-in distances may not decide: it favours the sampler with too little variance.

    Args:
        a, b: features (N, D) of two methods, N > D + 1; row i of both comes from the same noise.
        reference: the fixed Gaussian. clusters: int (N,), equal for the samples of a prompt; None without.
        strata: int (N,), the class of each sample where a plan fixes how many each has; without effect beside clusters,
            or where a class has one sample.
    """
    if clusters is not None or (strata is not None and not is_plan(strata)):
        strata = None
    if a.shape != b.shape:
        raise EvalbenchError(f"paired features differ in shape: {a.shape} and {b.shape}")
    fits = [Fit((x,), reference, moments(x), clusters, strata) for x in (a, b)]
    value = unbiased_distance(fits[0]) - unbiased_distance(fits[1])
    influence, in_half = (fits[0].influence - fits[1].influence), (fits[0].in_half - fits[1].in_half)
    error = corrected_standard_error(influence, in_half, fits[0].half_of, clusters, strata)
    return PairedDifference(value, error, fits[0].whole.distance - fits[1].whole.distance - value)
