"""Precision, recall, density, coverage: brute force, closed forms, other implementations, errors that are right."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import EvalbenchError, UserError
from evalbench.metrics import neighbours
from evalbench.metrics.common import split_labels
from evalbench.registry import build_metric

RNG = np.random.default_rng
NAMES = ("precision", "recall", "density", "coverage")


def score(name, x, y):
    metric = build_metric(f"{name}@identity")
    return metric.compute(metric.update({"identity": x}), {"features": y})


def distance(a, b):
    return float(np.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True))))


def reach(points, k):
    return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def brute(name, x, y):
    """The definitions of the papers, point by point."""
    if name == "precision":
        r = reach(y, 3)
        return np.mean([any(distance(a, b) <= r[j] for j, b in enumerate(y)) for a in x])
    if name == "recall":
        r = reach(x, 3)
        return np.mean([any(distance(a, b) <= r[i] for i, a in enumerate(x)) for b in y])
    r = reach(y, 5)
    if name == "density":
        return np.mean([sum(distance(a, b) < r[j] for j, b in enumerate(y)) for a in x]) / 5
    return np.mean([any(distance(a, b) < r[j] for a in x) for j, b in enumerate(y)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [1024, 7])
def test_agrees_with_brute_force(monkeypatch, name, block):
    """Also far from the origin, and when the samples do not fill whole blocks."""
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    monkeypatch.setattr(neighbours, "_radii_known", {})
    x, y = 1e7 + 0.8 * RNG(0).standard_normal((43, 3)), 1e7 + 0.3 + RNG(1).standard_normal((37, 3))
    assert score(name, x, y).value == pytest.approx(brute(name, x, y), abs=1e-12)
    assert 0.1 < brute(name, x, y) < 2  # says something


@pytest.mark.parametrize("k", [1, 3, 48])
def test_nearest_are_the_nearest(k):
    x = RNG(0).standard_normal((900, 2))
    squares = ((x[:, None] - x) ** 2).sum(axis=2)
    np.fill_diagonal(squares, np.inf)
    distances, indices = neighbours.nearest(x, k)
    assert distances == pytest.approx(np.sort(squares, axis=1)[:, :k], abs=1e-12)
    assert np.array_equal(indices, np.argsort(squares, axis=1)[:, :k])


def test_the_four_differ_where_the_papers_say():
    """Samples of one of two clusters are precise and lack recall; samples of both and noise the other way round."""
    left, right = RNG(0).standard_normal((200, 2)), 50 + RNG(1).standard_normal((200, 2))
    y = np.concatenate([left, right])
    half = RNG(2).standard_normal((200, 2))
    values = {name: score(name, half, y).value for name in NAMES}
    assert values["precision"] > 0.9
    assert values["density"] > 0.8
    assert values["recall"] == pytest.approx(0.5, abs=0.05)
    assert values["coverage"] == pytest.approx(0.5, abs=0.05)
    noisy = np.concatenate([half, 50 + RNG(3).standard_normal((200, 2)), RNG(4).uniform(100, 900, (400, 2))])
    values = {name: score(name, noisy, y).value for name in NAMES}
    assert values["precision"] == pytest.approx(0.5, abs=0.05)
    assert values["recall"] > 0.9


def test_closed_forms_for_two_draws_of_one_distribution():
    """Naeem et al. 2020, section 3.3: density is 1, coverage 1 - (M-1)...(M-k) / (M+N-1)...(M+N-k) for any such."""
    n, m, k = 300, 250, 5
    expected = 1 - np.prod([(m - i) / (n + m - i) for i in range(1, k + 1)])
    draws = [(RNG(s).standard_normal((n, 4)), RNG(1000 + s).standard_normal((m, 4))) for s in range(40)]
    for name, truth in (("density", 1.0), ("coverage", expected)):
        values = [score(name, x, y).value for x, y in draws]
        assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(len(values)))


@pytest.mark.parametrize("name", NAMES)
def test_standard_error_is_the_spread_over_samples(name):
    """The reference is fixed. A jackknife may be conservative, and must not be too short."""
    y = RNG(9).standard_normal((400, 3))
    found = [score(name, 0.7 * RNG(s).standard_normal((300, 3)), y) for s in range(40)]
    spread = np.std([value.value for value in found], ddof=1)
    assert 0.75 * spread < np.mean([value.se for value in found]) < 2.2 * spread
    assert all(value.low <= value.value <= value.high for value in found)


def test_recall_without_a_group_is_recall_of_the_rest():
    """The leave-group-out radii come from kept neighbours; here each is computed anew."""
    x = RNG(5).standard_normal((64, 3))
    groups = split_labels(len(x), 16)
    found = neighbours._radii_without(x, 3, groups)
    assert found[0] == pytest.approx(neighbours.radii(x, 3))
    for group in range(16):
        kept = groups != group
        assert found[1 + group, kept] == pytest.approx(neighbours.radii(x[kept], 3))
        assert (found[1 + group, ~kept] == -1).all()


def test_radii_are_right_where_a_group_is_a_cluster(monkeypatch):
    monkeypatch.setattr(neighbours, "_SPARE", 4)
    x = RNG(5).standard_normal((64, 3))
    groups = split_labels(len(x), 16)
    x[groups == 2] += 100  # their nearest neighbours are one another
    found = neighbours._radii_without(x, 3, groups)
    for group in range(16):
        kept = groups != group
        assert found[1 + group, kept] == pytest.approx(neighbours.radii(x[kept], 3))


def test_copies_of_the_reference_are_precise_and_cover():
    y = RNG(0).standard_normal((50, 3))
    assert score("precision", y, y).value == score("recall", y, y).value == score("coverage", y, y).value == 1


@pytest.mark.parametrize("name", ["precision", "recall"])
def test_agrees_with_torch_fidelity(name):
    import torch
    from torch_fidelity import metric_prc as fidelity

    x, y = 0.8 * RNG(0).standard_normal((200, 8)), RNG(1).standard_normal((150, 8))
    result = fidelity.prc_features_to_metric(torch.tensor(x), torch.tensor(y), prc_neighborhood=3, verbose=False)
    assert score(name, x, y).value == pytest.approx(result[name], abs=1e-6)


def test_bad_input_is_named():
    y = RNG(0).standard_normal((50, 3))
    with pytest.raises(UserError, match=r"metric 'recall@identity' needs at least 32 samples .* got 20"):
        score("recall", y[:20], y)
    with pytest.raises(UserError, match="'density@identity' needs more than 5 reference samples, got 5"):
        score("density", y, y[:5])
    with pytest.raises(EvalbenchError, match="has 2 dimensions, the samples have 3"):
        score("precision", y, y[:, :2])
