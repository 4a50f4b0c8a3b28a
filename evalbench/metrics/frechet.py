"""Frechet distance between Gaussians fitted to features, with its standard error and its finite-sample bias.

    FD = |m - m_r|^2 + tr(S) + tr(S_r) - 2 tr (S_r^1/2 S S_r^1/2)^1/2

Dowson & Landau 1982; as a score of generators Heusel et al. 2017 (FID, with the original Inception network only).
m, S are mean and covariance (n - 1) of the samples, m_r, S_r those of the reference. The square root is taken of a
symmetric matrix by its eigenvalues, in float64; `scipy.linalg.sqrtm` is not used.

The statistic in three numbers: the plug-in value, which is biased upwards by O(1/N); its standard error by the
influence function; its bias by halving the sample. The reference is taken as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import (
    Array,
    Rows,
    check_reference,
    need_reference,
    require_samples,
    rows_of,
    split_labels,
)
from evalbench.registry import register
from evalbench.stats import normal_interval


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mean: Array
    cov: Array

    @cached_property
    def root(self) -> Array:
        """The symmetric square root of the covariance."""
        return sqrt_psd(self.cov)


@dataclass(frozen=True)
class Moments:
    """Sums over samples, float64: n, sum (D,), sum of outer products (D, D). They add exactly as shards do."""

    n: int
    sum: Array
    outer: Array

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; needs n >= 2."""
        mean = self.sum / self.n
        cov = (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)
        return Gaussian(mean, (cov + cov.T) / 2)


def moments(features: np.ndarray) -> Moments:
    """Moments of features (B, D) of any float dtype."""
    x = features.astype(np.float64)
    return Moments(len(x), x.sum(axis=0), x.T @ x)


def sqrt_psd(cov: Array) -> Array:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues at the level of rounding count as zero."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    root: Array = (vectors * np.sqrt(_clean(eigenvalues))) @ vectors.T
    return root


def _clean(eigenvalues: np.ndarray) -> Array:
    """Eigenvalues with those below rounding error set to zero."""
    floor = eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    return np.where(eigenvalues > floor, eigenvalues, 0.0)


def _product(a: Gaussian, b: Gaussian) -> Array:
    """S_b^1/2 S_a S_b^1/2, symmetric to the last bit."""
    product = b.root @ a.cov @ b.root
    return (product + product.T) / 2


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians. Only `b.root` is computed, once per object."""
    difference = a.mean - b.mean
    cross = np.sqrt(_clean(np.linalg.eigvalsh(_product(a, b)))).sum()
    return float(difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def transport_map(a: Gaussian, b: Gaussian) -> Array:
    """The linear map T that carries covariance S_a to S_b: S_b^1/2 (S_b^1/2 S_a S_b^1/2)^-1/2 S_b^1/2.

    With a singular S_a the inverse is the pseudo-inverse: T is then right on the range of S_a, which holds all samples.
    """
    eigenvalues, vectors = np.linalg.eigh(_product(a, b))
    roots = np.sqrt(_clean(eigenvalues))
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    half = b.root @ vectors
    carry: Array = (half * inverse) @ half.T
    return carry


@dataclass(frozen=True)
class Influence:
    """First-order effect of each sample on the distance of the Gaussian fitted to them from a fixed one.

    The gradient of FD is 2 (m - m_r) in the mean and I - T in the covariance, T the transport map, so a sample x adds
    psi(x) = 2 (m - m_r).u + u'(I - T)u - tr((I - T) S), u = x - m. The standard error is sd(psi) / sqrt(n).

    Attributes:
        a: Gaussian of the samples. b: the fixed one.
    """

    a: Gaussian
    b: Gaussian

    @cached_property
    def _slope(self) -> Array:
        return np.eye(len(self.a.mean)) - transport_map(self.a, self.b)

    def __call__(self, features: np.ndarray) -> Array:
        """psi of features (B, D), float64 (B,)."""
        u = features.astype(np.float64) - self.a.mean
        linear = 2 * (u @ (self.a.mean - self.b.mean))
        quadratic = np.einsum("bd,bd->b", u @ self._slope, u)
        psi: Array = linear + quadratic - np.sum(self._slope * self.a.cov)
        return psi


def half_split_bias(features: np.ndarray, whole: float, reference: Gaussian) -> float:
    """(D_a + D_b) / 2 - D_N over two disjoint halves: as D_N = D + c/N, this estimates c/N, the bias of D_N.

    Args:
        features: (N, D), N >= 4, in sample order. whole: D_N. reference: the fixed Gaussian.
    """
    labels = split_labels(len(features), 2)
    halves = [frechet_distance(moments(features[labels == k]).gaussian(), reference) for k in (0, 1)]
    return sum(halves) / 2 - whole


def paired_difference(a: np.ndarray, b: np.ndarray, reference: Gaussian) -> Value:
    """FD(a) - FD(b), the statistic of verdicts: extrapolated to N = infinity, with the paired standard error.

    2 D_N - (D_a + D_b) / 2 over disjoint halves, D the difference. Neither term alone may decide: the plug-in
    difference favours the sampler with too little variance.

    Args:
        a, b: features (N, D) of two methods; row i of both comes from the same noise.
        reference: the fixed Gaussian.

    Returns:
        The difference; negative when a is better. `bias` is what was subtracted.
    """
    if a.shape != b.shape:
        raise EvalbenchError(f"paired features differ in shape: {a.shape} and {b.shape}")
    gaussians = [moments(x).gaussian() for x in (a, b)]
    whole = [frechet_distance(g, reference) for g in gaussians]
    bias_a, bias_b = (half_split_bias(x, d, reference) for x, d in zip((a, b), whole, strict=True))
    psi_a, psi_b = (Influence(g, reference)(x) for g, x in zip(gaussians, (a, b), strict=True))
    value, bias = whole[0] - whole[1] - (bias_a - bias_b), bias_a - bias_b
    se = float(np.std(psi_a - psi_b, ddof=1) / np.sqrt(len(a)))
    interval = normal_interval(value, se)
    return Value(value, len(a), se, interval.low, interval.high, bias)


# --- references -----------------------------------------------------------------------------------------------------


def pack_statistics(features: np.ndarray) -> dict[str, np.ndarray]:
    """Reference statistics of features (N, D): `mean` (D,), `cov_triu` (D (D + 1) / 2,) row by row, `n`; float64."""
    gaussian = moments(features).gaussian()
    triangle = gaussian.cov[np.triu_indices(len(gaussian.mean))]
    return {"mean": gaussian.mean, "cov_triu": triangle, "n": np.array(len(features))}


def unpack_statistics(reference: Parts) -> Gaussian:
    """The Gaussian of a reference with `mean` and `cov` (D, D), or `cov_triu` as `pack_statistics` writes it.

    Raises:
        UserError: an array is missing.
    """
    if "mean" not in reference or not {"cov", "cov_triu"} & reference.keys():
        raise UserError(
            f"a Frechet reference holds `mean` and `cov` or `cov_triu`, this one holds {sorted(reference)}; "
            "make it with frechet.pack_statistics"
        )
    mean = reference["mean"].astype(np.float64).reshape(-1)
    if "cov" in reference:
        cov = reference["cov"].astype(np.float64)
    else:
        cov = np.zeros((len(mean), len(mean)))
        cov[np.triu_indices(len(mean))] = reference["cov_triu"]
        cov = cov + np.triu(cov, 1).T
    return Gaussian(mean, (cov + cov.T) / 2)


# --- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrechetState:
    """Moments for the value, and the features (float32, in chunk order) for its standard error and bias."""

    moments: Moments
    rows: Rows


@register("fd")
class FrechetDistance(Metric[FrechetState]):
    """Frechet distance of features to the suite's data (plug-in value at this N)."""

    unit = "squared feature units"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    @property
    def reference_key(self) -> str:
        return self.arg

    def update(self, parts: Parts) -> FrechetState:
        features = rows_of(self.id, parts, self.arg)
        return FrechetState(moments(features), Rows((features.astype(np.float32),)))

    def merge(self, a: FrechetState, b: FrechetState) -> FrechetState:
        return FrechetState(a.moments + b.moments, a.rows + b.rows)

    def compute(self, state: FrechetState, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n, dims = state.moments.n, len(state.moments.sum)
        require_samples(self.id, n, 4, "two halves with a covariance", allow_small_n=False)
        rule = f"2 x {dims} dimensions"
        small = require_samples(self.id, n, 2 * dims, rule, allow_small_n=allow_small_n)
        target = unpack_statistics(need_reference(self.id, self.reference_key, reference))
        for array in (target.mean, target.cov):
            check_reference(self.id, self.reference_key, array, dims)

        gaussian = state.moments.gaussian()
        value = frechet_distance(gaussian, target)
        if value < -1e-3 * max(1.0, float(np.trace(target.cov))):
            raise EvalbenchError(f"metric '{self.id}' is {value}: reference '{self.reference_key}' is not a covariance")
        influence = Influence(gaussian, target)
        psi = np.concatenate([influence(block) for block in state.rows.blocks])
        se = float(np.std(psi, ddof=1) / np.sqrt(n))
        interval = normal_interval(value, se)
        bias = half_split_bias(np.concatenate(state.rows.blocks), value, target)
        note = "small N; bias-dominated" if small else "bias-dominated" if n < 10 * dims else ""
        return Value(value, n, se, interval.low, interval.high, bias, note)


@register("fd_to_converged")
class FrechetToConverged(FrechetDistance):
    """Frechet distance to fine-grid samples of the same model from other noise: solver error alone."""

    @property
    def reference_key(self) -> str:
        return f"converged/{self.arg}"
