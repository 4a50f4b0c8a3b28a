"""Paired differences of a metric between two cells, new - base, with the effect of each sample on them. No torch.

Row i of both cells comes from the same noise. Every route gives an estimate d without the O(1/N) bias of its metric,
and the standard error of d by the effect of each sample on it, whatever the two cells have in common. An interval is
d +- t se with Student's t at `df` degrees of freedom; the reference is taken as given. The plug-in difference of a set
distance is no route: its bias favours the sampler with too little variance. What each route guarantees stands in its
docstring, as measured (docs/compare.md; `benchmarks/verdict_rates.py` prints it).

`plan` says which samples share a prompt, and whether classes have fixed numbers of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np

from evalbench.interfaces import Metric, Parts
from evalbench.metrics.cmmd import SCALE as CMMD_SCALE
from evalbench.metrics.cmmd import gaussian_kernel
from evalbench.metrics.common import Array, reference_rows
from evalbench.metrics.estimate import INDEPENDENT, Compute, Difference, Plan, TooFewSamples, from_influence, with_error
from evalbench.metrics.exact_differences import nll_difference, pair_tv_difference, posterior_difference
from evalbench.metrics.frechet import unpack_statistics
from evalbench.metrics.kernel import mmd2
from evalbench.metrics.persample import PerSampleScore
from evalbench.metrics.unbiased import paired_difference

Rows: TypeAlias = Literal["features", "scores", "errors"]


@dataclass(frozen=True)
class Route:
    """How two cells are compared in one metric.

    Attributes:
        statistic: what is compared, in words. rows: what it is computed from: the feature rows (N, D) that the metric
            needs, its score of each sample (N,), or the paired error of each sample (N,).
        compute: (base, new, reference) -> Difference; the reference is the metric's, empty for one without.
    """

    statistic: str
    rows: Rows
    compute: Compute


def frechet_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of Frechet distances, each without its finite-sample bias (`unbiased.paired_difference`).

    Guarantees, measured on exact nulls (benchmarks/verdict_rates.py): about 5 % false alarms at a stated 5 %, at most
    7 % for N >= 8 d, from perfect samplers to far ones, noise shared or not; intervals that cover in 92 to 98 % for
    N >= 10 d. Between 4 d and 8 d it is flagged.

    Raises:
        TooFewSamples: N < 4 d, where a half has too few samples for its covariance.
    """
    n, dims = base.shape
    if n < 4 * dims:
        raise TooFewSamples(f"N too small for d: {n} samples, {dims} dimensions; a verdict needs {4 * dims}")
    found = paired_difference(new, base, unpack_statistics(reference), *plan)
    note = f"N < 8 d ({n} samples, {dims} dimensions)" if n < 8 * dims else ""
    return Difference(found.value, found.error.se, n, note, found.error.df)


def kernel_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of the unbiased squared MMDs to the same reference rows; a U-statistic, at any N and D.

    Guarantees: exactly unbiased at every N; 0.2 to 6 % of false alarms at a stated 5 % (benchmarks/verdict_rates.py).
    Near 0.2 % where nearly all of the error is of second order and in few directions, as between scales of one Gaussian
    with a power law at d = 256: a symmetric error in one piece alarmed in 9 % there (`stats.u_statistic_error`).
    """
    if len(base) < 4:
        raise TooFewSamples(f"N too small: {len(base)} samples; a U-statistic with its error needs 4")
    y = reference_rows("kid", "reference", reference, base.shape[1])
    found = mmd2(new, y, plan.clusters, base, strata=plan.strata)
    return with_error(found.value, found.error, len(base))


def cmmd_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of the unbiased squared MMDs with the kernel of CMMD; the published value keeps a bias of O(1 / N)."""
    if len(base) < 4:
        raise TooFewSamples(f"N too small: {len(base)} samples; a U-statistic with its error needs 4")
    y = reference_rows("cmmd", "reference", reference, base.shape[1])
    found = mmd2(new, y, plan.clusters, base, gaussian_kernel, plan.strata)
    error = replace(found.error, se=CMMD_SCALE * found.error.se, slope=CMMD_SCALE * found.error.slope)
    return with_error(CMMD_SCALE * found.value, error, len(base))


def mean_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Mean of the differences sample by sample; a paired t interval."""
    _need_two(base)
    gap = new - base
    return from_influence(float(gap.mean()), gap, plan)


def rms_difference(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
    """Difference of root mean squares; psi by the delta method."""
    _need_two(base)
    (a, psi_a), (b, psi_b) = (_rms(x) for x in (new, base))
    return from_influence(a - b, psi_a - psi_b, plan)


def quantile_difference(q: float) -> Compute:
    """Difference of the q-quantiles; psi = (q - [x <= Q]) / f(Q), f from `_sparsity`."""

    def compute(base: Array, new: Array, reference: Parts, plan: Plan = INDEPENDENT, /) -> Difference:
        if len(base) < 20:
            raise TooFewSamples(f"N too small: {len(base)} samples; a difference of quantiles needs 20")
        (a, psi_a), (b, psi_b) = (_quantile(x, q) for x in (new, base))
        return from_influence(a - b, psi_a - psi_b, plan)

    return compute


def _need_two(x: Array) -> None:
    if len(x) < 2:
        raise TooFewSamples(f"N too small: {len(x)} samples; a mean with its error needs 2")


def _rms(x: Array) -> tuple[float, Array]:
    squares: Array = np.square(x)
    value = float(np.sqrt(squares.mean()))
    return value, (squares - value**2) / (2 * value) if value > 0 else squares


def _quantile(x: Array, q: float) -> tuple[float, Array]:
    value = float(np.quantile(x, q))
    return value, np.where(x <= value, q - 1.0, q) * np.float64(_sparsity(x, q))


def _sparsity(x: Array, q: float) -> float:
    """1 / f(Q) by the difference quotient of the quantile function, Bofinger's bandwidth (Koenker 2005, 3.4.1)."""
    normal = NormalDist()
    z = normal.inv_cdf(q)
    h: float = len(x) ** -0.2 * (4.5 * normal.pdf(z) ** 4 / (2 * z**2 + 1) ** 2) ** 0.2
    h = min(h, 0.9 * q, 0.9 * (1 - q))
    low, high = np.quantile(x, [q - h, q + h])
    return float(high - low) / (2 * h)


__all__ = ["ROUTES", "Difference", "Plan", "Route", "TooFewSamples", "route_of"]

MEAN = "mean"  # the route of every metric with one number per sample

ROUTES: Mapping[str, Route] = {
    "fd": Route("paired difference without its bias", "features", frechet_difference),
    "kid": Route("unbiased paired difference", "features", kernel_difference),
    "cmmd": Route("unbiased paired difference", "features", cmmd_difference),
    MEAN: Route("paired difference of means", "scores", mean_difference),
    "paired-median": Route("paired difference of medians", "errors", quantile_difference(0.5)),
    "paired-p90": Route("paired difference of 90th percentiles", "errors", quantile_difference(0.9)),
    "paired-rms": Route("paired difference of root mean squares", "errors", rms_difference),
    "posterior-energy": Route(
        "paired difference over measurements", "features", posterior_difference("posterior-energy")
    ),
    "posterior-rmse": Route("paired difference over measurements", "features", posterior_difference("posterior-rmse")),
    "recovery-snr": Route("paired difference over measurements", "features", posterior_difference("recovery-snr")),
    "nll-gap": Route("paired difference of distances to the entropy", "scores", nll_difference),
    "pair-tv": Route("paired difference, extrapolated in N^-1/2", "features", pair_tv_difference),
}


def route_of(metric: Metric[Any]) -> Route | None:
    """How two cells are compared in a metric; None where there is no way.

    By its own name, else as what it derives from: `fid`, `sfid` and `fd_to_converged` as `fd`, and any
    `PerSampleScore` by its mean. A metric of a plug-in is compared in the same way.
    """
    names = [vars(kind).get("name", "") for kind in type(metric).__mro__]
    names += [MEAN] if isinstance(metric, PerSampleScore) else []
    return next((ROUTES[name] for name in names if name in ROUTES), None)
