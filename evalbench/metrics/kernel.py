"""KID: the unbiased squared maximum mean discrepancy with the cubic kernel k(x, y) = (x.y / D + 1)^3.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Binkowski et al. 2018. It is computed once, over all samples, in blocks. clean-fid and torchmetrics average it over
random subsets of 1000: the same expectation with more noise, and a number that depends on the draw of the subsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from evalbench.interfaces import Parts, Value
from evalbench.metrics.common import Array, Rows, RowsMetric, reference_rows, require_samples
from evalbench.registry import register
from evalbench.stats import StandardError, is_plan, t_interval, u_statistic_error, within_strata

Kernel: TypeAlias = Callable[[Array, Array], Array]  # of all pairs of rows, (n, D) and (m, D) -> (n, m)
_BLOCK = 512  # rows per block: 2 MB of kernel values, one product of matrices
_STRIPE = 32  # rows of a block that are worked on at a time: 128 KB, which stay in a core's cache
# Of references, by digest: every cell of a run meets the same one.
_own_means: dict[str, float] = {}
_moments: dict[str, _Moments] = {}


class _Moments(NamedTuple):
    """Sums over rows y (m, D): of 1, y_k, y_i y_j and y_i y_j y_k; pairs i <= j are packed, (P,), P = D (D + 1) / 2."""

    zeroth: int
    first: Array
    second: Array
    third: Array


class Mmd(NamedTuple):
    """MMD^2, or the difference of two, and its standard error with y taken as given; may be negative near zero."""

    value: float
    error: StandardError


def cubic_kernel(x: Array, y: Array) -> Array:
    """(x.y / D + 1)^3 of all pairs, (n, m)."""
    values: Array = (x / x.shape[1]) @ y.T
    squares = np.empty((_STRIPE, len(y)))
    for rows in _stripes(len(x)):
        base = values[rows]
        base += 1.0
        base *= np.multiply(base, base, out=squares[: len(base)])
    return values


def _stripes(n: int) -> Iterator[slice]:
    """Slices of n rows."""
    return (slice(first, min(first + _STRIPE, n)) for first in range(0, n, _STRIPE))


def _row_sums(x: Array, y: Array, kernel: Kernel) -> Array:
    """sum_j k(x_i, y_j), (n,)."""
    dims = x.shape[1]
    if kernel is cubic_kernel and dims * (dims + 1) < len(y):
        return _cubic_row_sums(x, y)
    sums = np.zeros(len(x))
    for i in range(0, len(x), _BLOCK):
        for j in range(0, len(y), _BLOCK):
            sums[i : i + _BLOCK] += kernel(x[i : i + _BLOCK], y[j : j + _BLOCK]).sum(axis=1)
    return sums


def _cubic_row_sums(x: Array, y: Array) -> Array:
    """The same for the cubic kernel: a polynomial in x with moments of y for coefficients. Cheaper where D is small."""
    digest = _digest(y)
    if digest not in _moments:
        _moments[digest] = _moments_of(y)
    y_moments, sums = _moments[digest], np.empty(len(x))
    once = np.equal(*np.triu_indices(x.shape[1]))
    for i in range(0, len(x), _BLOCK):
        rows = x[i : i + _BLOCK] / x.shape[1]
        pairs = _products(rows) * np.where(once, 1.0, 2.0)
        cubes = np.einsum("nk,nk->n", pairs @ y_moments.third, rows)
        sums[i : i + _BLOCK] = y_moments.zeroth + 3 * (rows @ y_moments.first + pairs @ y_moments.second) + cubes
    return sums


def _moments_of(y: Array) -> _Moments:
    blocks = [y[i : i + _BLOCK] for i in range(0, len(y), _BLOCK)]
    second = np.sum([_products(rows).sum(axis=0) for rows in blocks], axis=0)
    third = np.zeros((len(second), y.shape[1]))
    for rows in blocks:
        third += _products(rows).T @ rows
    return _Moments(len(y), y.sum(axis=0), second, third)


def _products(rows: Array) -> Array:
    """The products of each row's entries i <= j, (n, P)."""
    i, j = np.triu_indices(rows.shape[1])
    return rows[:, i] * rows[:, j]


def _digest(y: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(y).tobytes() + str(y.shape).encode()).hexdigest()


def mmd2(
    x: Array,
    y: Array,
    clusters: np.ndarray | None = None,
    base: Array | None = None,
    kernel: Kernel = cubic_kernel,
    strata: np.ndarray | None = None,
) -> Mmd:
    """Unbiased MMD^2 of samples x (n, D), n >= 4, and reference y (m, D), m >= 2, float64.

    With `base` (n, D), whose row i comes from the noise of row i of x: MMD^2 of x less that of base. Another kernel
    than the cubic one needs `base`.

    It is a U-statistic of the kernel h_ij = k(x_i, x_j) - c_i - c_j, c_i = mean_j k(x_i, y_j), and its error is that of
    `stats.u_statistic_error`. With clusters the pairs within a cluster are left out of the first mean: they say nothing
    of independent samples. A cluster then counts as one, by the sums of its kernel. With strata, int (n,), a plan fixes
    how many samples of each class there are: pairs within a class are too few by its samples with themselves, and weigh
    n_a / (n_a - 1); only what varies within classes is error.
    """
    if clusters is not None or (strata is not None and not is_plan(strata)):
        strata = None
    arms = ((1.0, x),) if base is None else ((1.0, x), (-1.0, base))
    pairs, n = _Pairs(arms, clusters, kernel), len(x)
    sizes, rows = pairs.sizes, pairs.row_sums()
    cross = pairs.summed(np.sum([sign * _row_sums(arm, y, kernel) for sign, arm in arms], axis=0) / len(y))
    if strata is not None:  # as if every sample met another one like itself, of all n
        rows = (rows + pairs.within(strata)) * ((n - 1) / n)
    groups, apart = len(sizes), n * n - float(sizes @ sizes)  # pairs of samples of different clusters
    own = float(rows.sum()) / apart
    theta = own - 2 * float(cross @ (n - sizes)) / apart
    # mean over h of the centred kernel of clusters, which counts a pair of clusters as a pair of samples
    scale = groups * (groups - 1) / apart
    effects = rows - cross * (n - sizes) - sizes * (cross.sum() - cross) - theta * sizes * (n - sizes)
    g = effects * scale / (groups - 1)
    g -= g.mean()

    value = own - 2 * float(cross.sum()) / n + (_own_mean(y) if base is None else 0.0)
    return Mmd(value, u_statistic_error(g, *_second_part(pairs, cross, theta, g, scale, strata), strata))


def _second_part(
    pairs: _Pairs, cross: Array, theta: float, g: Array, scale: float, strata: np.ndarray | None
) -> tuple[float, float]:
    """Mean over pairs of psi^2 and of g psi g, psi_gh the kernel of clusters less what g, c and theta say of it.

    With strata g and psi are less their means within classes: sum (psi_ij - psi_ib - psi_aj + psi_ab)^2 over i in a and
    j in b needs the means psi_ib alone.
    """
    sizes, groups = pairs.sizes, len(pairs.sizes)
    _, of = np.unique(np.zeros(groups) if strata is None else strata, return_inverse=True)
    member = np.eye(of.max() + 1)[of]  # (G, K)
    residual = g if strata is None else within_strata(g, strata)
    squares, along, sums = 0.0, 0.0, np.zeros_like(member)
    for a, b, psi in pairs.blocks():  # the kernel, until the stripes have made it psi
        for rows in _stripes(len(psi)):
            c, size, part = cross[a][rows], sizes[a][rows], psi[rows]
            part -= np.outer(c, sizes[b]) + np.outer(size, cross[b]) + theta * np.outer(size, sizes[b])
            part *= scale
            part -= g[a][rows, None]
            part -= g[b]
        if a == b:
            np.fill_diagonal(psi, 0.0)
        times = 1 if a == b else 2
        squares += times * float(np.einsum("ij,ij->", psi, psi))
        along += times * float(residual[a] @ psi @ residual[b])
        if strata is not None:
            sums[a] += psi @ member[b]
            if a != b:
                sums[b] += psi.T @ member[a]
    ordered = groups * (groups - 1)
    if strata is not None:
        counts = member.sum(axis=0)
        squares += float(np.sum((member.T @ sums) ** 2 / np.outer(counts, counts)) - 2 * np.sum(sums**2 / counts))
        squares /= (1 - len(counts) / groups) ** 2
    return squares / ordered, along / ordered


class _Pairs:
    """The kernel of all pairs, signed and summed over the arms and within clusters, in blocks.

    Attributes:
        sizes: samples of each cluster, (G,); without clusters every sample is one.
    """

    def __init__(self, arms: Sequence[tuple[float, Array]], clusters: np.ndarray | None, kernel: Kernel):
        n, self._kernel = len(arms[0][1]), kernel
        self._order = np.arange(n) if clusters is None else np.argsort(clusters, kind="stable")
        self._starts = np.arange(n)
        if clusters is not None:
            self._starts = np.unique(clusters[self._order], return_index=True)[1]
        self._arms = [(sign, rows if clusters is None else rows[self._order]) for sign, rows in arms]
        self.sizes = np.diff(np.append(self._starts, n)).astype(np.float64)

    def summed(self, values: Array) -> Array:
        """Sum over each cluster of a number per sample, (G,)."""
        sums: Array = np.add.reduceat(values[self._order], self._starts)
        return sums

    def row_sums(self) -> Array:
        """sum_{h != g} of the kernel, (G,); every pair is computed once."""
        sums = np.zeros_like(self.sizes)
        for a, b, k in self.blocks():
            if a == b:
                np.fill_diagonal(k, 0.0)
            else:
                sums[b] += k.sum(axis=0)
            sums[a] += k.sum(axis=1)
        return sums

    def within(self, strata: np.ndarray) -> Array:
        """Mean over j != i of the class of i of the kernel, (n,)."""
        found = np.zeros(len(strata))
        for label in np.unique(strata):
            members = np.flatnonzero(strata == label)
            parts = _Pairs([(sign, x[members]) for sign, x in self._arms], None, self._kernel)
            found[members] = parts.row_sums() / (len(members) - 1)
        return found

    def blocks(self) -> Iterator[tuple[slice, slice, Array]]:
        """(a, b, kernel of the clusters a and b), a the same as b or before it."""
        groups, ends = len(self.sizes), np.append(self._starts, len(self._order))
        step = max(1, _BLOCK * groups // len(self._order))  # clusters per block
        cuts = [slice(first, min(first + step, groups)) for first in range(0, groups, step)]
        for i, a in enumerate(cuts):
            for b in cuts[i:]:
                rows, columns = (slice(ends[cut.start], ends[cut.stop]) for cut in (a, b))
                k = self._signed(rows, columns)
                if groups < len(self._order):
                    k = np.add.reduceat(k, self._starts[a] - rows.start, axis=0)
                    k = np.add.reduceat(k, self._starts[b] - columns.start, axis=1)
                yield a, b, k

    def _signed(self, rows: slice, columns: slice) -> Array:
        """The kernel of some samples, signed and summed over the arms."""
        (sign, x), *others = self._arms
        k = self._kernel(x[rows], x[columns])
        k *= sign
        for sign, x in others:
            k += sign * self._kernel(x[rows], x[columns])
        return k


def _own_mean(y: Array) -> float:
    """mean_{i != j} k(y_i, y_j), remembered: a reference is larger than any cell and is met once per cell."""
    digest = _digest(y)
    if digest not in _own_means:
        _own_means[digest] = float(_Pairs(((1.0, y),), None, cubic_kernel).row_sums().sum()) / (len(y) * (len(y) - 1))
    return _own_means[digest]


@register("kid")
class KernelDistance(RowsMetric):
    """KID: unbiased squared MMD with the cubic kernel, over all samples."""

    version = 3  # 2: the interval to second order; 3: its parts apart, longer on one side
    unit = "squared MMD"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 4, "a U-statistic with its error", allow_small_n=False)
        x = state.joined()
        mmd = mmd2(x, reference_rows(self.id, self.reference_key, reference, x.shape[1]), state.clusters)
        error = mmd.error
        interval = t_interval(mmd.value, error.se, error.df, error.slope)
        return Value(mmd.value, state.n, error.se, interval.low, interval.high)
