"""KID: a naive double loop, other implementations, unbiasedness, calibrated errors."""

from __future__ import annotations

import numpy as np
import pytest

from evalbench.errors import BadSamples, UserError
from evalbench.metrics import kernel
from evalbench.metrics.kernel import mmd2
from evalbench.registry import build_metric
from evalbench.stats import u_statistic_error

RNG = np.random.default_rng


def naive_mmd2(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    own = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    theirs = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + theirs - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def kid(x, y, **options):
    metric = build_metric("kid@identity")
    return metric.compute(metric.update({"identity": x}), {"features": y}, **options)


@pytest.mark.parametrize("block", [1024, 7])
def test_agrees_with_the_double_loop(monkeypatch, block):
    """Also when the samples do not fill whole blocks."""
    monkeypatch.setattr(kernel, "_BLOCK", block)
    x, y = RNG(0).standard_normal((23, 5)), 0.3 + RNG(1).standard_normal((17, 5))
    assert mmd2(x, y).value == pytest.approx(naive_mmd2(x, y), rel=1e-12)


@pytest.mark.parametrize("rows", [43, 700])
def test_sums_by_moments_are_those_of_the_kernel(rows):
    """More reference rows than D (D + 1): the sums come from three moments and agree to rounding."""
    x, y = 3 * RNG(0).standard_normal((600, 6)) + 1, 2 * RNG(1).standard_normal((rows, 6)) - 0.5
    assert rows > 6 * 7
    direct = kernel.cubic_kernel(x, y)
    np.testing.assert_allclose(kernel._row_sums(x, y, kernel.cubic_kernel), direct.sum(axis=1), rtol=1e-11, atol=1e-9)
    few = y[:42]
    assert (kernel._row_sums(x, few, kernel.cubic_kernel) == kernel.cubic_kernel(x, few).sum(axis=1))[:512].all()


@pytest.mark.parametrize("stripe", [32, 7])
def test_stripes_change_no_bit(monkeypatch, stripe):
    """What stays in a core's cache is a matter of speed alone."""
    x, y, base = RNG(0).standard_normal((150, 6)), RNG(1).standard_normal((70, 6)), RNG(2).standard_normal((150, 6))
    plans = [{}, {"base": base}, {"clusters": np.arange(150) // 4}, {"strata": np.arange(150) % 3}]

    def found():
        return kernel.cubic_kernel(x, y), [mmd2(x, y, **plan) for plan in plans]

    whole = (x / 6) @ y.T + 1.0
    monkeypatch.setattr(kernel, "_STRIPE", 1 << 20)
    unstriped = found()
    np.testing.assert_array_equal(unstriped[0], whole * whole * whole)
    monkeypatch.setattr(kernel, "_STRIPE", stripe)
    np.testing.assert_array_equal(found()[0], unstriped[0])
    assert found()[1] == unstriped[1]


@pytest.fixture(scope="module")
def two_sets():
    return RNG(2).standard_normal((300, 16)), 0.4 + RNG(3).standard_normal((300, 16))


def test_agrees_with_torchmetrics_on_the_same_features(two_sets):
    import torch
    from torchmetrics.image.kid import poly_mmd

    x, y = two_sets
    expected = poly_mmd(torch.from_numpy(y), torch.from_numpy(x)).item()
    assert kid(x, y).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_clean_fid_where_its_subset_is_everything(two_sets):
    from cleanfid.fid import kernel_distance

    x, y = two_sets
    assert kid(x, y).value == pytest.approx(kernel_distance(x, y, num_subsets=1), rel=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_is_the_expectation_of_clean_fids_random_subsets(two_sets):
    from cleanfid.fid import kernel_distance

    x, y = two_sets
    state = np.random.get_state()
    try:
        np.random.seed(4)  # clean-fid draws from the global generator
        draws = [kernel_distance(x, y, num_subsets=1, max_subset_size=60) for _ in range(1500)]
    finally:
        np.random.set_state(state)
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    full = kid(x, y).value
    assert abs(np.mean(draws) - full) < 3 * error
    assert error < 0.02 * full


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_torch_fidelity_on_the_same_subsets(two_sets):
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = two_sets
    options = {"kid_subsets": 20, "kid_subset_size": 60, "rng_seed": 2020, "verbose": False}
    theirs = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    state, ours = np.random.RandomState(2020), []
    for _ in range(20):
        a, b = (rows[state.choice(len(rows), 60, replace=False)] for rows in (x, y))
        ours.append(mmd2(a, b).value)
    assert np.mean(ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert np.std(ours) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_is_unbiased_at_zero():
    """Unlike the estimate that keeps the diagonal."""
    rng = RNG(5)
    values = [mmd2(rng.standard_normal((20, 4)), rng.standard_normal((25, 4))).value for _ in range(2000)]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert np.min(values) < 0


@pytest.mark.parametrize(("shift", "most"), [(0.3, 0.98), (0.0, 1.0)])
def test_interval_covers_the_expected_value(shift, most):
    """With the reference given; at zero, where the first-order effect vanishes, in nearly all."""
    rng = RNG(6)
    y = rng.standard_normal((400, 8))
    values = [kid(shift + rng.standard_normal((200, 8)), y) for _ in range(300)]
    expected = np.mean([v.value for v in values])
    assert 0.91 <= np.mean([v.low <= expected <= v.high for v in values]) <= most
    assert np.mean([v.se for v in values]) == pytest.approx(np.std([v.value for v in values]), rel=0.2)


def test_pairs_of_one_cluster_are_left_out():
    """By a double loop; every sample twice says the same as once."""
    x, y, names = (
        RNG(60).standard_normal((9, 3)),
        RNG(61).standard_normal((7, 3)),
        np.array([0, 1, 1, 2, 2, 2, 3, 4, 4]),
    )

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    apart = [k(x[i], x[j]) for i in range(9) for j in range(9) if names[i] != names[j]]
    cross = [k(a, b) for a in x for b in y]
    theirs = [k(y[i], y[j]) for i in range(7) for j in range(7) if i != j]
    expected = np.mean(apart) + np.mean(theirs) - 2 * np.mean(cross)
    assert mmd2(x, y, names).value == pytest.approx(expected, rel=1e-12)
    many = RNG(62).standard_normal((80, 3))
    once, twice = mmd2(many, y), mmd2(np.repeat(many, 2, 0), y, np.repeat(np.arange(80), 2))
    assert twice.value == pytest.approx(once.value, rel=1e-10)
    assert twice.error.se == pytest.approx(once.error.se, rel=0.05)


def test_paired_influences_remove_shared_noise():
    rng = RNG(7)
    y, differences, errors = rng.standard_normal((300, 4)), [], []
    for _ in range(200):
        x = rng.standard_normal((150, 4))
        found, alone = mmd2(1.2 * x, y, base=1.25 * x), mmd2(1.2 * x, y)
        assert found.value == pytest.approx(alone.value - mmd2(1.25 * x, y).value, rel=1e-9)
        differences.append(found.value)
        errors.append(found.error.se)
        assert errors[-1] < alone.error.se / 2
    assert np.mean(errors) == pytest.approx(np.std(differences, ddof=1), rel=0.15)


def naive_parts(x, base, y):
    """g, mean psi^2 and mean g psi g of the difference, by the whole matrix."""
    n = len(x)
    k = kernel.cubic_kernel(x, x) - kernel.cubic_kernel(base, base)
    c = kernel.cubic_kernel(x, y).mean(1) - kernel.cubic_kernel(base, y).mean(1)
    off = ~np.eye(n, dtype=bool)
    h = np.where(off, k - c[:, None] - c, 0.0)
    theta = h[off].mean()
    g = h.sum(1) / (n - 1) - theta
    psi = np.where(off, h - theta - g[:, None] - g, 0.0)
    return g, (psi**2)[off].mean(), (g[:, None] * psi * g)[off].mean()


@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize("clusters", [None, np.random.default_rng(0).permutation(40)])
def test_error_is_made_of_the_parts_of_the_whole_matrix(monkeypatch, block, clusters):
    """Clusters of one too, whatever their names."""
    monkeypatch.setattr(kernel, "_BLOCK", block)
    x, y = RNG(70).standard_normal((40, 3)), RNG(71).standard_normal((25, 3))
    base = 0.5 * x + RNG(72).standard_normal((40, 3))
    g, squares, along = naive_parts(x, base, y)
    found, expected = mmd2(x, y, clusters, base).error, u_statistic_error(g, squares, along)
    assert (found.se, found.df, found.slope) == pytest.approx((expected.se, expected.df, expected.slope), rel=1e-9)


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_error_and_slope_are_those_of_repetitions(scale):
    """Same noise, scales (1 - scale) x and (1 + scale) x, near the least distance and farther off."""
    rng, found = RNG(73), []
    y = rng.standard_normal((500, 16))
    for _ in range(400):
        x = rng.standard_normal((120, 16))
        found.append(mmd2((1 + scale) * x, y, base=(1 - scale) * x))
    values, squares = np.array([f.value for f in found]), np.array([f.error.se**2 for f in found])
    assert np.sqrt(squares.mean()) == pytest.approx(values.std(), rel=0.15)
    slope = np.cov(values, squares)[0, 1] / values.var()
    assert np.mean([f.error.slope for f in found]) == pytest.approx(slope, rel=0.4)


def test_exact_models_offer_draws():
    metric, x, y = build_metric("kid@identity"), RNG(8).standard_normal((30, 3)), RNG(9).standard_normal((40, 3))
    state = metric.update({"identity": x})
    assert metric.compute(state, {"draws": y, "mean": np.zeros(3)}) == metric.compute(state, {"features": y})


def test_refusals():
    x = RNG(10).standard_normal((30, 3))
    with pytest.raises(UserError, match=r"^metric 'kid@identity' needs at least 4 samples"):
        kid(x[:3], x, allow_small_n=True)
    metric = build_metric("kid@identity")
    with pytest.raises(UserError, match=r"needs single samples, but reference 'identity' has only \['mean'\]"):
        metric.compute(metric.update({"identity": x}), {"mean": np.zeros(3)})
    x[0, 0] = np.nan
    with pytest.raises(BadSamples, match="'identity' is NaN or infinite for 1 of 30 samples"):
        kid(x, x)
