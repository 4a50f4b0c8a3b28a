"""Diversity of samples, copies of training images, and distance class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evalbench.errors import UserError
from evalbench.interfaces import Extractor, Metric, Parts, SampleBatch, Value
from evalbench.metrics.common import (
    Array,
    Rows,
    RowsMetric,
    need_reference,
    reference_rows,
    require_samples,
    rows_of,
    split_labels,
)
from evalbench.metrics.kernel import mmd2
from evalbench.metrics.neighbours import squared_distances
from evalbench.registry import register
from evalbench.stats import normal_interval, t_interval, wilson_interval

if TYPE_CHECKING:
    import torch

_GROUPS = 16  # of the delete-a-group jackknife
_BLOCK = 1024
COPY_RATIO = 1 / 3


def vendi_score(x: Array) -> float:
    """exp of the entropy of the eigenvalues of K / n, K the cosines of rows of x (n, D); 1 to n.

    Friedman & Dieng 2023 (arXiv 2210.02410). K / n has the eigenvalues of the (D, D) matrix of products.
    """
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    products = unit.T @ unit if x.shape[1] < len(x) else unit @ unit.T
    eigenvalues = np.linalg.eigvalsh(products) / len(x)
    kept = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(kept * np.log(kept)).sum()))


@register("vendi")
class VendiScore(RowsMetric):
    """Vendi score with the cosine kernel (Friedman & Dieng 2023): effective number of different samples."""

    unit = "effective samples"
    higher_is_better = True

    @property
    def reference_key(self) -> str:
        return ""

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 2 * _GROUPS, "an interval", allow_small_n=False)
        x = state.joined()
        if not np.linalg.norm(x, axis=1).all():
            raise UserError(f"metric '{self.id}': a feature vector is zero and has no direction; take other features")
        labels, value = split_labels(len(x), _GROUPS), vendi_score(x)
        left_out = np.array([vendi_score(x[labels != group]) for group in range(_GROUPS)])
        se = float(np.sqrt((_GROUPS - 1) / _GROUPS * np.sum((left_out - left_out.mean()) ** 2)))
        interval = t_interval(value, se, _GROUPS - 1)
        return Value(value, len(x), se, interval.low, interval.high)


@register("memorised")
class Memorised(RowsMetric):
    """Share of samples that are three times closer to one training image than to the next (Yoon et al. 2023).

    A check, to be read with the images: the reference must be the training set, whole. A training image that occurs
    twice hides its copies.
    """

    unit = "fraction"

    def compute(self, state: Rows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        require_samples(self.id, state.n, 2, "a share with its error", allow_small_n=False)
        x = state.joined()
        y = reference_rows(self.id, self.reference_key, reference, x.shape[1])
        if len(y) < 2:
            raise UserError(f"metric '{self.id}' needs at least 2 training images, got {len(y)}")
        centre = y.mean(axis=0)
        copies = int((nearest_ratio(x - centre, y - centre) < COPY_RATIO).sum())
        share, interval = copies / len(x), wilson_interval(copies, len(x))
        note = f"{copies} of {len(x)} samples look like copies" if copies else ""
        return Value(
            share, len(x), float(np.sqrt(share * (1 - share) / len(x))), interval.low, interval.high, None, note
        )


def nearest_ratio(x: Array, y: Array) -> Array:
    """Distance to the nearest over distance to the second nearest row of y, (n,), in [0, 1]; 1 where both are zero."""
    ratios = np.ones(len(x))
    for start in range(0, len(x), _BLOCK):
        two = np.partition(squared_distances(x[start : start + _BLOCK], y), 1, axis=1)[:, :2]
        ratios[start : start + _BLOCK] = np.sqrt(
            np.divide(two[:, 0], two[:, 1], out=np.ones(len(two)), where=two[:, 1] > 0)
        )
    return ratios


# --- class by class -------------------------------------------------------------------------------------------------


@register("labels")
class Labels(Extractor):
    """The class of each sample, int64 (B,)."""

    needs = ("labels",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        if batch.cond.labels is None:
            raise UserError("features 'labels' need labels; set [conditions] labels, or give --labels FILE")
        return batch.cond.labels


@dataclass(frozen=True)
class LabelledRows:
    """Features and classes in chunk order."""

    rows: Rows
    labels: Rows


@register("kid-per-class")
class KernelDistancePerClass(Metric[LabelledRows]):
    """Mean over classes of the KID within each: sees classes that swap or collapse, which the whole set may hide.

    KID, because it is unbiased at the few samples that a class has. The reference needs `features` and `labels`.
    """

    unit = "squared MMD"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.arg, "labels")

    @property
    def reference_key(self) -> str:
        return self.arg

    def update(self, parts: Parts) -> LabelledRows:
        return LabelledRows(Rows((rows_of(self.id, parts, self.arg),)), Rows((parts["labels"],)))

    def merge(self, a: LabelledRows, b: LabelledRows) -> LabelledRows:
        return LabelledRows(a.rows + b.rows, a.labels + b.labels)

    def compute(self, state: LabelledRows, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        reference = need_reference(self.id, self.reference_key, reference)
        if "labels" not in reference:
            raise UserError(
                f"metric '{self.id}' needs the classes of reference '{self.reference_key}'; "
                "make it with `evalbench reference make --labels FILE`"
            )
        x, labels = state.rows.joined(), state.labels.joined()
        y, theirs = reference_rows(self.id, self.reference_key, reference, x.shape[1]), reference["labels"]
        theirs = theirs[: len(y)]  # a reference keeps features of its first images
        values, variances = {}, []
        for label in np.unique(labels):
            a, b = x[labels == label], y[theirs == label]
            if min(len(a), len(b)) < 4:
                raise UserError(
                    f"metric '{self.id}' needs 4 samples and 4 reference images per class; class {label:g} has "
                    f"{len(a)} and {len(b)}"
                )
            found = mmd2(a, b)
            values[int(label)] = found.value
            variances.append(found.error.se**2)
        value, se = float(np.mean(list(values.values()))), float(np.sqrt(np.sum(variances)) / len(values))
        worst = max(values, key=lambda label: values[label])
        interval = normal_interval(value, se)
        note = f"worst class {worst}: {values[worst]:.3g}"
        return Value(value, len(x), se, interval.low, interval.high, None, note)
