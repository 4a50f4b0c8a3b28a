"""Mode coverage of exact mixtures: 1 - TV(p, w), p the frequencies of the samples' modes, w the exact weights.

TV(p, w) = 1/2 sum_k |p_k - w_k|, the total-variation distance. 1 means every mode has its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evalbench.errors import EvalbenchError
from evalbench.interfaces import Metric, Parts, Value
from evalbench.metrics.common import check_reference, need_reference, require_samples, scores_of
from evalbench.registry import register
from evalbench.stats import normal_interval

_EXPECTED = 5  # an empty mode is called missing where a perfect sampler leaves it empty with probability < e^-5


@dataclass(frozen=True)
class Counts:
    """Samples per mode, int64 (K',), K' the highest mode seen so far plus one."""

    counts: np.ndarray


@register("mode-coverage")
class ModeCoverage(Metric[Counts]):
    """1 - total-variation distance between the samples' mode frequencies and the exact weights."""

    higher_is_better = True
    unit = "fraction"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg,)

    @property
    def reference_key(self) -> str:
        return "modes"

    def update(self, parts: Parts) -> Counts:
        modes = scores_of(self.id, parts, self.arg)
        if np.any(modes < 0) or np.any(modes != np.round(modes)):
            raise EvalbenchError(f"metric '{self.id}': '{self.arg}' must give mode indices 0, 1, ...")
        return Counts(np.bincount(modes.astype(np.int64)))

    def merge(self, a: Counts, b: Counts) -> Counts:
        counts = np.zeros(max(len(a.counts), len(b.counts)), dtype=np.int64)
        counts[: len(a.counts)] += a.counts
        counts[: len(b.counts)] += b.counts
        return Counts(counts)

    def compute(self, state: Counts, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        n = int(state.counts.sum())
        require_samples(self.id, n, 2, "frequencies with an error", allow_small_n=False)
        reference = need_reference(self.id, self.reference_key, reference)
        weights = reference["weights"].astype(np.float64).reshape(-1)
        check_reference(self.id, self.reference_key, weights, max(len(weights), len(state.counts)))
        if np.any(weights < 0) or abs(weights.sum() - 1) > 1e-6:
            raise EvalbenchError(f"metric '{self.id}': the weights of reference 'modes' do not sum to 1")

        counts = np.zeros(len(weights), dtype=np.int64)
        counts[: len(state.counts)] = state.counts
        shares = counts / n
        value = 1 - float(np.abs(shares - weights).sum() / 2)
        # delta method: dTV/dp_k = sign(p_k - w_k) / 2, so a sample scores -/+ 1/2 by the mode it falls into
        signs = np.sign(shares - weights) / 2
        variance = max(0.0, float(shares @ signs**2 - (shares @ signs) ** 2))
        se = float(np.sqrt(variance / n))
        interval = normal_interval(value, se)
        missing = np.flatnonzero((counts == 0) & (n * weights >= _EXPECTED))
        note = f"missing modes: {', '.join(map(str, missing))}" if len(missing) else ""
        return Value(value, n, se, max(0.0, interval.low), min(1.0, interval.high), note=note)
