"""Samples of an inverse problem against the exact posterior of x0 given y: error, consistency, spread, distance.

Whitened, z = L^-1 (x - E[x0 | y]) with L L^T = Cov[x0 | y], every measurement has the same scale: the exact posterior
has mean 0 and covariance I there, whatever y. Intervals are clustered: samples that share a measurement count as one
group, and se is that of a ratio of sums over groups.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Extractor, Metric, Operator, Parts, SampleBatch, Value
from evalbench.metrics.common import Array, Rows, rows_of
from evalbench.registry import register
from evalbench.stats import t_interval

if TYPE_CHECKING:
    import torch

_DRAWS = 256  # exact draws per measurement that the energy distance refers to
_SHIFTS = 8  # pairs (k, k + 1), ..., (k, k + 8) of them for their own mean distance
FACTS = 6  # columns before z


class _Posterior(Protocol):
    def mean(self) -> torch.Tensor: ...
    def covariance(self) -> torch.Tensor: ...
    def draws(self, n: int, seeds: Sequence[int]) -> torch.Tensor: ...


class _Inverse(Protocol):
    @property
    def operator(self) -> Operator: ...
    def posterior(self, y: torch.Tensor, labels: torch.Tensor | None) -> _Posterior: ...
    def reference(self, key: str) -> Parts: ...


class PosteriorRows(NamedTuple):
    """The columns of the extractor `posterior`, one row per sample.

    Attributes:
        key: CRC-32 of y and the label, equal for samples of one measurement.
        square: |x - E[x0 | y]|^2 / D. risk: E[|x - x0|^2 | y] / D, which is `square` plus the posterior variance.
        signal: variance of a coordinate of x0, the same in every row.
        chi2: |y - H x|^2 / (M noise^2).
        distance: 2 mean_k |z - w_k| - mean |w_k - w_l| over exact posterior draws w, whitened.
        z: whitened sample, (B, D).
    """

    key: Array
    square: Array
    risk: Array
    signal: Array
    chi2: Array
    distance: Array
    z: Array


@register("posterior")
class PosteriorFacts(Extractor):
    """What the exact posterior says of each sample of an inverse problem, float64 (B, 6 + D), see `PosteriorRows`."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        import torch

        y, name = batch.cond.measured, batch.model.name
        if y is None or not hasattr(batch.model, "posterior"):
            raise UserError(
                f"features 'posterior' need an inverse problem with an exact posterior, and model '{name}' is none; "
                "run them on suite gmm-inverse"
            )
        model = cast(_Inverse, batch.model)
        keys = _keys(y, batch.cond.labels)
        # everything but x is the same for all samples of a measurement
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        rows, of = torch.from_numpy(first).to(y.device), torch.from_numpy(inverse).to(y.device)
        labels = None if batch.cond.labels is None else batch.cond.labels[rows]
        posterior = model.posterior(y[rows].double(), labels)
        mean, cov = posterior.mean(), posterior.covariance()
        whiten = torch.linalg.inv(torch.linalg.cholesky(cov))  # (G, D, D)
        draws = posterior.draws(_DRAWS, keys[first].tolist()) - mean.unsqueeze(1)
        w = (whiten.unsqueeze(1) * draws.unsqueeze(2)).sum(-1)  # (G, draws, D)
        shifted = torch.stack([(w - w.roll(shift, 1)).norm(dim=-1).mean(1) for shift in range(1, _SHIFTS + 1)])

        x, operator = batch.x.double(), model.operator
        offsets = x - mean[of]
        square = offsets.square().mean(1)
        residual = (y.double() - operator(batch.x).double()) / operator.noise
        signal = float(np.trace(model.reference("identity")["cov"])) / x.shape[1]
        z = (whiten[of] * offsets.unsqueeze(1)).sum(-1)
        facts = (
            torch.from_numpy(keys).to(x),
            square,
            square + cov.diagonal(dim1=1, dim2=2).mean(1)[of],
            torch.full_like(square, signal),
            residual.square().mean(1),
            2 * (z.unsqueeze(1) - w[of]).norm(dim=-1).mean(1) - shifted.mean(0)[of],
        )
        return torch.cat([torch.stack(facts, 1), z], 1)


def _keys(y: torch.Tensor, labels: torch.Tensor | None) -> np.ndarray:
    """CRC-32 of each measurement and its label, int64 (B,)."""
    texts = [row.tobytes() for row in y.cpu().numpy()]
    if labels is not None:
        texts = [text + b"%d" % label for text, label in zip(texts, labels.tolist(), strict=True)]
    return np.array([zlib.crc32(text) for text in texts], dtype=np.int64)


class Grouped(NamedTuple):
    """A statistic of each measurement and the samples it stands for, (G,)."""

    values: Array
    sizes: Array


class PosteriorMetric(Metric[Rows]):
    """A statistic of the samples of each measurement, averaged with the number of its samples."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    def update(self, parts: Parts) -> Rows:
        rows = rows_of(self.id, parts, self.arg)
        if rows.shape[1] <= FACTS:
            raise UserError(f"metric '{self.id}' reads the features 'posterior'; write {self.name}@posterior")
        return Rows((rows,))

    def merge(self, a: Rows, b: Rows) -> Rows:
        return a + b

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        table = state.joined()
        key, square, risk, signal, chi2, distance = table[:, :FACTS].T
        rows = PosteriorRows(key, square, risk, signal, chi2, distance, table[:, FACTS:])
        found = self.grouped(rows)
        if not len(found.values):
            raise UserError(f"metric '{self.id}' needs measurements with at least 2 samples; raise --samples")
        total, groups = found.sizes.sum(), len(found.values)
        mean = float(found.values @ found.sizes / total)
        if groups < 2:
            value, _ = self.scaled(mean, 0.0, rows)
            return Value(value, len(table), note="one measurement: no interval")
        influence = found.sizes * (found.values - mean)
        se = float(np.sqrt(groups / (groups - 1) * (influence @ influence)) / total)
        value, se = self.scaled(mean, se, rows)
        interval = t_interval(value, se, groups - 1)
        return Value(value, len(table), se, interval.low, interval.high, note=self.note(interval.low, interval.high))

    @abstractmethod
    def grouped(self, rows: PosteriorRows) -> Grouped:
        """The statistic of each measurement."""

    def scaled(self, mean: float, se: float, rows: PosteriorRows) -> tuple[float, float]:
        """The reported number and its standard error (delta method)."""
        return mean, se

    def note(self, low: float, high: float) -> str:
        """What must be said beside the value, from its interval."""
        return ""


def _means(key: Array, scores: Array) -> Grouped:
    _, group = np.unique(key, return_inverse=True)
    sizes = np.bincount(group).astype(np.float64)
    return Grouped(np.bincount(group, scores) / sizes, sizes)


def _shared(rows: PosteriorRows) -> list[np.ndarray]:
    """Indices of the samples of each measurement that has at least two."""
    order = np.argsort(rows.key, kind="stable")
    cuts = np.flatnonzero(np.diff(rows.key[order])) + 1
    return [group for group in np.split(order, cuts) if len(group) > 1]


@register("posterior-rmse")
class PosteriorRmse(PosteriorMetric):
    """Root mean square distance per coordinate to the exact posterior mean (exact samples do not score 0)."""

    unit = "RMS per coordinate"

    def grouped(self, rows: PosteriorRows) -> Grouped:
        return _means(rows.key, rows.square)

    def scaled(self, mean: float, se: float, rows: PosteriorRows) -> tuple[float, float]:
        root = float(np.sqrt(mean))
        return root, se / (2 * root) if root > 0 else 0.0


@register("recovery-snr")
class RecoverySnr(PosteriorMetric):
    """10 log10(variance of x0 / E|x - x0|^2): as PSNR, with the variance for the peak, in expectation over x0 given y.

    Differences between methods are those of PSNR. The posterior mean has the highest value that a method can have.
    """

    higher_is_better = True
    unit = "dB"

    def grouped(self, rows: PosteriorRows) -> Grouped:
        return _means(rows.key, rows.risk)

    def scaled(self, mean: float, se: float, rows: PosteriorRows) -> tuple[float, float]:
        if not mean > 0:
            raise EvalbenchError(f"metric '{self.id}': the mean square error is {mean}")
        decibel = 10 / np.log(10)
        return float(decibel * np.log(rows.signal[0] / mean)), float(decibel * se / mean)


@register("consistency")
class Consistency(PosteriorMetric):
    """|y - H x|^2 / (M noise^2): 1 for exact posterior samples, less for overfitted noise, more for a neglected y."""

    unit = "x the noise (exact: 1)"

    def grouped(self, rows: PosteriorRows) -> Grouped:
        return _means(rows.key, rows.chi2)


@register("posterior-spread")
class PosteriorSpread(PosteriorMetric):
    """Variance among the samples of one measurement over the exact posterior variance, whitened; 1 is exact.

    No score to rank by: too much spread is as wrong as too little, and the note says which.
    """

    higher_is_better = True  # the usual failure is too little
    unit = "x the posterior variance (exact: 1)"

    def grouped(self, rows: PosteriorRows) -> Grouped:
        groups = _shared(rows)
        values = [rows.z[group].var(axis=0, ddof=1).mean() for group in groups]
        return Grouped(np.array(values), np.array([float(len(group)) for group in groups]))

    def note(self, low: float, high: float) -> str:
        return "narrower than the posterior" if high < 1 else "wider than the posterior" if low > 1 else ""


@register("posterior-energy")
class PosteriorEnergy(PosteriorMetric):
    """Energy distance 2 E|z - w| - E|z - z'| - E|w - w'| to the exact posterior of each measurement, whitened.

    Székely & Rizzo 2013. An unbiased U-statistic: exact posterior samples score 0 on average, at any number of samples
    per measurement (so it may come out below 0); anything else scores above.
    """

    unit = "whitened distance (exact: 0)"

    def grouped(self, rows: PosteriorRows) -> Grouped:
        groups = _shared(rows)
        values = [rows.distance[group].mean() - _mean_distance(rows.z[group]) for group in groups]
        return Grouped(np.array(values), np.array([float(len(group)) for group in groups]))


def _mean_distance(z: Array) -> float:
    """Mean |z_i - z_j| over i != j of (R, D)."""
    first, second = np.triu_indices(len(z), 1)
    gaps: Any = np.linalg.norm(z[first] - z[second], axis=1)
    return float(gaps.mean())
