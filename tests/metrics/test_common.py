"""Fixed splits that follow no label plan, and references that metrics refuse."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import UserError
from evalbench.metrics import frechet
from evalbench.metrics.common import require_samples, split_labels


@pytest.mark.parametrize(("n", "groups"), [(1000, 2), (1001, 2), (33, 16)])
def test_groups_are_fixed_and_equal(n, groups):
    labels = split_labels(n, groups)
    sizes = np.bincount(labels, minlength=groups)
    assert len(sizes) == groups
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(labels, split_labels(n, groups))


@pytest.mark.parametrize("plan", [np.arange(2000) % 10, np.arange(2000) // 200])
def test_halves_hold_every_class(plan):
    """Neither cyclic nor sorted labels end up in one half: a split by parity, or by position, would do that."""
    for kept in (split_labels(2000, 2) == k for k in (0, 1)):
        assert np.abs(np.bincount(plan[kept], minlength=10) - 100).max() < 30


def test_bias_under_a_cyclic_label_plan():
    """Two classes far apart, in turn: each half must see both."""
    rng, n = np.random.default_rng(0), 400
    x = rng.standard_normal((n, 2)) + np.where(np.arange(n) % 2, 5.0, -5.0)[:, None]
    target = frechet.Gaussian(np.zeros(2), np.eye(2) + 25.0)
    assert abs(frechet.Fit((x,), target, frechet.moments(x)).bias) < 1


def test_clusters_are_never_cut():
    names = np.random.default_rng(1).permutation(np.repeat(np.arange(100, 160), 5))
    labels = split_labels(300, 2, names)
    assert all(len(set(labels[names == name])) == 1 for name in names)
    assert abs(labels.mean() - 0.5) < 0.02
    assert np.array_equal(split_labels(60, 2, np.arange(60)), split_labels(60, 2))


def test_small_n_is_refused_or_reported():
    assert not require_samples("m", 10, 10, "why", allow_small_n=False)
    assert require_samples("m", 9, 10, "why", allow_small_n=True)
    with pytest.raises(UserError, match=r"^metric 'm' needs at least 10 samples \(why\), got 9; raise --samples or "):
        require_samples("m", 9, 10, "why", allow_small_n=False)
