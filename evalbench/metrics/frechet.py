"""Frechet distance between Gaussians fitted to features, with its standard error and its finite-sample bias.

    FD = |m - m_r|^2 + tr(S) + tr(S_r) - 2 tr (S_r^1/2 S S_r^1/2)^1/2

Dowson & Landau 1982; as a score of generators Heusel et al. 2017 (FID, with the original Inception network only).
m, S are mean and covariance (n - 1) of the samples, m_r, S_r those of the reference. The square root is taken of a
symmetric matrix by its eigenvalues, in float64; `scipy.linalg.sqrtm` is not used.

The statistic in three numbers: the plug-in value, which is biased upwards by O(1/N); its standard error by the
influence function, to second order; its bias by halving the sample. The reference is taken as given. What verdicts use
is in `unbiased.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import (
    Array,
    Rows,
    check_reference,
    clusters_of,
    need_reference,
    require_samples,
    rows_of,
    split_labels,
)
from evalbench.registry import register
from evalbench.stats import StandardError, corrected_standard_error, t_interval


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

    @classmethod
    def empty(cls, dims: int) -> Moments:
        """Those of no sample."""
        return cls(0, np.zeros(dims), np.zeros((dims, dims)))

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


def _eigenvalues(a: Gaussian, b: Gaussian) -> Array:
    """Eigenvalues of S_a S_b, through the Cholesky factor of S_b or, where that is singular, its symmetric root."""
    import torch  # both slow to import; the names of metrics are listed without them
    from scipy.linalg import lapack

    # Half the work of products and of SciPy's `eigh`: one triangle of U S_a U', S_b = U' U, and torch's eigenvalues.
    # Transposed, symmetric matrices lie as LAPACK wants them.
    factor, singular = lapack.dpotrf(b.cov.T, lower=0, clean=0)
    product = _product(a, b) if singular else lapack.dsygst(a.cov.T, factor, itype=2, lower=0)[0]
    return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(product), UPLO="U").numpy(), dtype=np.float64)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians."""
    difference = a.mean - b.mean
    cross = np.sqrt(_clean(_eigenvalues(a, b))).sum()
    return float(difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


@dataclass(frozen=True)
class Influence:
    """First-order effect of each sample on the distance of the Gaussian fitted to them from a fixed one.

    The gradient of FD is 2 (m - m_r) in the mean and I - T in the covariance, T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2
    S_r^1/2 the linear map that carries S to S_r, so a sample x adds psi(x) = 2 (m - m_r).u + u'(I - T)u -
    tr((I - T) S), u = x - m. With a singular S the inverse is the pseudo-inverse: T is then right on the range of S,
    which holds all samples.

    Attributes:
        a: Gaussian of the samples. b: the fixed one.
    """

    a: Gaussian
    b: Gaussian

    @cached_property
    def _spectrum(self) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(_product(self.a, self.b))
        values = _clean(values)
        return values[values > 0], vectors[:, values > 0]

    @property
    def eigenvalues(self) -> Array:
        """Those of S_r^1/2 S S_r^1/2 that are not zero, lambda (r,), ascending."""
        return self._spectrum[0]

    @cached_property
    def axes(self) -> Array:
        """(D, r): u @ axes are the coordinates of u in which S_r^1/2 S S_r^1/2 is diag(lambda)."""
        axes: Array = self.b.root @ self._spectrum[1]
        return axes

    @cached_property
    def distance(self) -> float:
        """FD of the two Gaussians."""
        difference = self.a.mean - self.b.mean
        traces = np.trace(self.a.cov) + np.trace(self.b.cov) - 2 * np.sqrt(self.eigenvalues).sum()
        return float(difference @ difference + traces)

    @cached_property
    def slope(self) -> Array:
        return np.eye(len(self.a.mean)) - (self.axes / np.sqrt(self.eigenvalues)) @ self.axes.T

    def __call__(self, features: np.ndarray) -> Array:
        """psi of features (B, D), float64 (B,)."""
        u = features.astype(np.float64) - self.a.mean
        linear = 2 * (u @ (self.a.mean - self.b.mean))
        quadratic = np.einsum("bd,bd->b", u @ self.slope, u)
        psi: Array = linear + quadratic - np.sum(self.slope * self.a.cov)
        return psi


@dataclass(frozen=True)
class Fit:
    """Samples and two disjoint halves of them, each as a Gaussian against the same fixed one.

    Attributes:
        blocks: features (B, D) in sample order, of any float dtype; kept in blocks so that no float64 copy of all is
            made. reference: the fixed Gaussian.
        moments: of all samples. clusters: int (N,), equal for the samples of a cluster; None for independent samples.
        strata: int (N,), the class of each sample where a plan fixes how many each has; without effect beside clusters.
    """

    blocks: Sequence[np.ndarray]
    reference: Gaussian
    moments: Moments
    clusters: np.ndarray | None = None
    strata: np.ndarray | None = None

    @cached_property
    def half_of(self) -> NDArray[np.int64]:
        """Which half a sample belongs to, 0 or 1, (N,); each half has half of every class."""
        if self.strata is None:
            return split_labels(self.moments.n, 2, self.clusters)
        halves = np.empty(self.moments.n, dtype=np.int64)
        for label in np.unique(self.strata):
            halves[self.strata == label] = split_labels(int(np.sum(self.strata == label)), 2)
        return halves

    @cached_property
    def whole(self) -> Influence:
        """All samples."""
        return Influence(self.moments.gaussian(), self.reference)

    @cached_property
    def halves(self) -> tuple[Influence, Influence]:
        """Each half."""
        sums = [
            sum((moments(block[of == k]) for block, of in self._split()), Moments.empty(len(self.moments.sum)))
            for k in (0, 1)
        ]
        a, b = (Influence(half.gaussian(), self.reference) for half in sums)
        return a, b

    @cached_property
    def influence(self) -> Array:
        """psi of each sample on the distance of all, (N,)."""
        return np.concatenate([self.whole(block) for block in self.blocks])

    @cached_property
    def in_half(self) -> Array:
        """psi of each sample on the distance of its half, (N,)."""
        found = []
        for block, of in self._split():
            psi = np.empty(len(block))
            for k in (0, 1):
                psi[of == k] = self.halves[k](block[of == k])
            found.append(psi)
        return np.concatenate(found)

    @property
    def error(self) -> StandardError:
        """Of the plug-in distance, corrected for the plug-in's own noise."""
        return corrected_standard_error(self.influence, self.in_half, self.half_of, self.clusters, self.strata)

    @property
    def bias(self) -> float:
        """(D_a + D_b) / 2 - D_N: as D_N = D + c/N, this estimates c/N, the bias of D_N."""
        return (self.halves[0].distance + self.halves[1].distance) / 2 - self.whole.distance

    def _split(self) -> Sequence[tuple[np.ndarray, NDArray[np.int64]]]:
        edges = np.cumsum([len(block) for block in self.blocks])[:-1]
        return list(zip(self.blocks, np.split(self.half_of, edges), strict=True))


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

    version = 2  # 2: the interval to second order
    unit = "squared feature units"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    @property
    def reference_key(self) -> str:
        return self.arg

    def update(self, parts: Parts) -> FrechetState:
        features = rows_of(self.id, parts, self.arg)
        return FrechetState(moments(features), Rows((features.astype(np.float32),), clusters_of(parts)))

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

        fit = Fit(state.rows.blocks, target, state.moments, state.rows.clusters)
        value = fit.whole.distance
        if value < -1e-3 * max(1.0, float(np.trace(target.cov))):
            raise EvalbenchError(f"metric '{self.id}' is {value}: reference '{self.reference_key}' is not a covariance")
        error = fit.error
        interval = t_interval(value, error.se, error.df)
        note = "small N; bias-dominated" if small else "bias-dominated" if n < 10 * dims else ""
        return Value(value, n, error.se, interval.low, interval.high, fit.bias, note)


@register("fd_to_converged")
class FrechetToConverged(FrechetDistance):
    """Frechet distance to fine-grid samples of the same model from other noise: solver error alone."""

    @property
    def reference_key(self) -> str:
        return f"converged/{self.arg}"
