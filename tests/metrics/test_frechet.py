"""Frechet distance: closed forms, other implementations, the finite-sample law, calibrated errors, verdicts."""

from __future__ import annotations

import functools
import operator
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.metrics import frechet
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.metrics.unbiased import paired_difference
from evalbench.registry import build_metric
from evalbench.stats import standard_error, t_interval

RNG = np.random.default_rng


def isotropic(dims, mean=0.0, sd=1.0):
    return Gaussian(np.full(dims, mean), sd**2 * np.eye(dims))


def reference(dims):
    return {"mean": np.zeros(dims), "cov": np.eye(dims)}


def fd(features, parts, **options):
    metric = build_metric("fd@identity")
    return metric.compute(metric.update({"identity": features}), parts, **options)


def random_gaussian(seed, dims, rank):
    factor = RNG(seed).standard_normal((dims, rank))
    return Gaussian(RNG(seed + 1).standard_normal(dims), factor @ factor.T / rank)


# --- the distance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "shift", "a", "b", "expected"), [(256, 0.1, 2, 1, 258.56), (8, 0, 1, 1, 0), (3, 2, 0.5, 3, 30.75)]
)
def test_closed_form_of_isotropic_gaussians(dims, shift, a, b, expected):
    """|m1 - m2|^2 + d (a - b)^2."""
    assert frechet_distance(isotropic(dims, shift, a), isotropic(dims, 0, b)) == pytest.approx(expected, abs=1e-9)


def test_closed_form_of_commuting_covariances():
    a, b = RNG(0).uniform(0, 2, (2, 12))
    basis = np.linalg.qr(RNG(1).standard_normal((12, 12)))[0]
    gaussians = [Gaussian(np.zeros(12), basis @ np.diag(v**2) @ basis.T) for v in (a, b)]
    assert frechet_distance(*gaussians) == pytest.approx(np.sum((a - b) ** 2), abs=1e-10)


@pytest.mark.parametrize("rank", [3, 20, 64])
def test_zero_on_itself_symmetric_and_above_the_mean_difference(rank):
    a, b = random_gaussian(2, 64, rank), random_gaussian(5, 64, 64)
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-5)
    assert frechet_distance(a, b) >= np.sum((a.mean - b.mean) ** 2)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(32, 32), (32, 5), (5, 32), (5, 7)])
def test_agrees_with_the_matrix_square_root(rank_a, rank_b):
    """scipy's general square root, also where the covariances are rank-deficient."""
    from scipy.linalg import sqrtm

    a, b = random_gaussian(7, 32, rank_a), random_gaussian(9, 32, rank_b)
    jitter = 1e-14 * np.eye(32)  # sqrtm warns on an exactly singular matrix
    root = sqrtm((a.cov + jitter) @ (b.cov + jitter)).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * root)
    assert abs(frechet_distance(a, b) - expected) < 1e-5


@pytest.fixture(scope="module")
def two_sets():
    mixing = RNG(11).standard_normal((24, 24))
    return RNG(12).standard_normal((600, 24)) @ mixing, RNG(13).standard_normal((500, 24)) @ mixing * 1.2 + 0.3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_clean_fid_on_the_same_features(two_sets):
    from cleanfid.fid import frechet_distance as theirs

    x, y = two_sets
    expected = theirs(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert fd(x, frechet.pack_statistics(y)).value == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics_on_the_same_features(two_sets):
    import torch
    from torchmetrics.image.fid import _compute_fid

    x, y = two_sets
    statistics = [torch.from_numpy(s) for f in (x, y) for s in (f.mean(0), np.cov(f, rowvar=False))]
    assert fd(x, frechet.pack_statistics(y)).value == pytest.approx(_compute_fid(*statistics).item(), rel=1e-9)


def test_every_sample_twice_changes_only_the_divisor(two_sets):
    x, y = two_sets
    target = frechet.unpack_statistics(frechet.pack_statistics(y))
    twice = moments(np.concatenate([x, x]))
    once = moments(x).gaussian()
    rescaled = Gaussian(once.mean, once.cov * (len(x) - 1) / len(x) * 2 * len(x) / (2 * len(x) - 1))
    assert frechet_distance(twice.gaussian(), target) == pytest.approx(frechet_distance(rescaled, target), rel=1e-10)


# --- moments --------------------------------------------------------------------------------------------------------


def float32_moments(features):
    """The bug of torcheval #192: sums kept in float32."""
    x = features.astype(np.float32)
    n = np.float32(len(x))
    total, outer = np.zeros(x.shape[1], np.float32), np.zeros((x.shape[1], x.shape[1]), np.float32)
    for block in np.split(x, 20):
        total, outer = total + block.sum(0), outer + block.T @ block
    mean = total / n
    return (outer - n * np.outer(mean, mean)) / (n - 1)


def test_moments_are_summed_in_float64():
    x = (1 + 0.1 * RNG(3).standard_normal((20_000, 4))).astype(np.float32)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    assert np.abs(moments(x).gaussian().cov - expected).max() < 1e-12
    assert np.abs(float32_moments(x) - expected).max() > 1e-7


@pytest.fixture(scope="module")
def samples():
    """600 float32 features of full rank, and the same with 5 of 12 directions dead."""
    full = (RNG(4).standard_normal((600, 12)) @ RNG(5).standard_normal((12, 12)) + 3).astype(np.float32)
    basis = np.linalg.qr(RNG(6).standard_normal((12, 12)))[0]
    flat = (RNG(7).standard_normal((600, 7)) @ basis[:7] + 1).astype(np.float32).astype(np.float64)
    return {"full": full, "deficient": flat}


@given(st.lists(st.integers(1, 599), max_size=12, unique=True), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_into_shards_in_any_order_says_the_same(samples, cuts, random):
    """1e-12 on the sums, 1e-10 on the distance of full rank, 1e-7 where it is rank-deficient."""
    for kind, tolerance in (("full", 1e-10), ("deficient", 1e-7)):
        x = samples[kind]
        shards = [moments(shard) for shard in np.split(x, sorted(cuts))]
        random.shuffle(shards)
        merged, whole = functools.reduce(operator.add, shards), moments(x)
        assert merged.n == whole.n
        assert np.abs(merged.sum - whole.sum).max() <= 1e-12 * np.abs(whole.sum).max()
        assert np.abs(merged.outer - whole.outer).max() <= 1e-12 * np.abs(whole.outer).max()
        target = random_gaussian(8, 12, 12 if kind == "full" else 9)
        distances = [frechet_distance(m.gaussian(), target) for m in (merged, whole)]
        assert distances[0] == pytest.approx(distances[1], rel=tolerance)


def test_statistics_survive_packing_also_in_float32():
    x = RNG(5).standard_normal((300, 6)) @ RNG(6).standard_normal((6, 6))
    packed = frechet.pack_statistics(x)
    assert packed["cov_triu"].shape == (21,)
    assert packed["n"] == 300
    gaussian, plain = frechet.unpack_statistics(packed), moments(x).gaussian()
    assert np.array_equal(gaussian.cov, plain.cov)
    assert np.array_equal(gaussian.mean, plain.mean)
    full = frechet.unpack_statistics({"mean": plain.mean.astype(np.float32), "cov": plain.cov.astype(np.float32)})
    assert full.cov == pytest.approx(plain.cov, rel=1e-5, abs=1e-5)


# --- finite samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [640, 2048, 8192])
def test_finite_sample_law_within_three_percent(n):
    """d = 64, N >= 10 d, mean of 50 draws."""
    dims = 64
    rng, target = RNG(22), isotropic(dims)
    values = [frechet_distance(moments(rng.standard_normal((n, dims))).gaussian(), target) for _ in range(50)]
    assert np.mean(values) == pytest.approx(dims / n + dims * (dims + 1) / (4 * n), rel=0.03)


@pytest.mark.slow
def test_finite_sample_law_in_2048_dimensions_within_eight_percent():
    """One draw, N = 10 d."""
    dims, n, blocks = 2048, 20_480, 10
    rng = RNG(23)
    summed = functools.reduce(
        operator.add, (moments(rng.standard_normal((n // blocks, dims), dtype=np.float32)) for _ in range(blocks))
    )
    law = dims / n + dims * (dims + 1) / (4 * n)
    assert frechet_distance(summed.gaussian(), isotropic(dims)) == pytest.approx(law, rel=0.08)


def repeated(dims, n, times, *, shift=0.0, sd=1.0, seed=20):
    rng = RNG(seed)
    return [fd(shift + sd * rng.standard_normal((n, dims)), reference(dims)) for _ in range(times)]


@pytest.mark.parametrize(("dims", "n"), [(64, 1000), (64, 5000), (8, 400)])
def test_finite_sample_law(dims, n):
    """E[FD] of N exact samples is d/N + d(d+1)/(4N), and the half-split estimate of the bias finds it."""
    law = dims / n + dims * (dims + 1) / (4 * n)
    values = repeated(dims, n, 40)
    assert np.mean([v.value for v in values]) == pytest.approx(law, rel=0.08)
    assert np.mean([v.bias for v in values]) == pytest.approx(law, rel=0.12)


def test_bias_estimate_halves_when_the_sample_doubles():
    """Where the distance is far from zero too."""
    small, large = (repeated(16, n, 150, shift=0.2, sd=1.3) for n in (400, 800))
    truth = 16 * (0.2**2 + 0.3**2)
    for values in (small, large):
        bias = np.mean([v.value for v in values]) - truth
        assert np.mean([v.bias for v in values]) == pytest.approx(bias, abs=0.03)
    ratio = np.mean([v.bias for v in small]) / np.mean([v.bias for v in large])
    assert ratio == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("dims", "n", "shift", "sd"), [(8, 400, 0.3, 1.2), (16, 400, 0.1, 0.8), (4, 200, 1, 1)])
def test_interval_covers_the_expected_plug_in_value(dims, n, shift, sd):
    values = repeated(dims, n, 500, shift=shift, sd=sd)
    expected = np.mean([v.value for v in values])
    assert 0.92 <= np.mean([v.low <= expected <= v.high for v in values]) <= 0.975
    spread = np.std([v.value for v in values], ddof=1)
    assert np.mean([v.se for v in values]) == pytest.approx(spread, rel=0.1)


def test_interval_covers_at_distance_zero_where_the_plain_influence_is_too_wide():
    """There the first-order effect vanishes and the error is of second order."""
    rng, target = RNG(21), isotropic(16)
    fits = [frechet.Fit((x,), target, moments(x)) for x in rng.standard_normal((300, 200, 16))]
    values = [f.whole.distance for f in fits]
    expected, spread = np.mean(values), np.std(values, ddof=1)
    covers = [t_interval(v, f.error.se, f.error.df) for v, f in zip(values, fits, strict=True)]
    assert 0.92 <= np.mean([i.low <= expected <= i.high for i in covers]) <= 0.98
    assert np.mean([f.error.se for f in fits]) == pytest.approx(spread, rel=0.12)
    plain = np.mean([standard_error(f.influence).se for f in fits])
    assert plain == pytest.approx(np.sqrt(2) * spread, rel=0.12)


def test_influence_is_the_derivative_of_the_distance():
    """Against weighting one sample a little more."""
    x, target = RNG(31).standard_normal((50, 5)), random_gaussian(32, 5, 5)

    def weighted(weights):
        mean = weights @ x / weights.sum()
        return Gaussian(mean, (x - mean).T @ ((x - mean) * weights[:, None]) / weights.sum())

    psi = frechet.Influence(weighted(np.ones(50)), target)(x)
    step = 1e-5
    for i in (0, 17, 49):
        direction = np.eye(50)[i] * 50 - 1  # towards all weight on sample i
        up, down = (frechet_distance(weighted(np.ones(50) + s * direction), target) for s in (step, -step))
        assert psi[i] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)
    assert abs(psi.mean()) < 1e-12


def test_error_stays_finite_where_the_covariance_is_singular():
    x = np.concatenate([RNG(33).standard_normal((200, 4)), np.zeros((200, 3))], axis=1)
    value, plain = fd(x, reference(7)), fd(x[:, :4], reference(4))
    assert value.value == pytest.approx(plain.value + 3, rel=1e-9)
    assert value.se == pytest.approx(plain.se, rel=1e-6)


# --- paired -------------------------------------------------------------------------------------------------------


def test_paired_difference_of_a_set_with_itself_is_exactly_zero():
    x = RNG(41).standard_normal((100, 5))
    found = paired_difference(x, x, random_gaussian(42, 5, 5))
    assert (found.value, found.error.se) == (0, 0)


def test_paired_sets_must_match():
    with pytest.raises(EvalbenchError, match=r"paired features differ in shape: \(9, 2\) and \(8, 2\)"):
        paired_difference(np.zeros((9, 2)), np.zeros((8, 2)), isotropic(2))


# --- refusals and notes ---------------------------------------------------------------------------------------------


def test_too_small_n_is_refused():
    message = (
        "metric 'fd@identity' needs at least 16 samples (2 x 8 dimensions), got 15; "
        "raise --samples or pass --allow-small-n"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        fd(RNG(50).standard_normal((15, 8)), reference(8))


@pytest.mark.parametrize(
    ("n", "note"), [(15, "small N; bias-dominated"), (16, "bias-dominated"), (79, "bias-dominated"), (80, "")]
)
def test_notes(n, note):
    value = fd(RNG(51).standard_normal((n, 8)), reference(8), allow_small_n=True)
    assert value.note == note
    assert np.isfinite([value.se, value.bias]).all()


def test_three_samples_are_refused_always():
    with pytest.raises(UserError, match=r"needs at least 4 samples \(two halves with a covariance\), got 3"):
        fd(RNG(52).standard_normal((3, 1)), reference(1), allow_small_n=True)


def test_nan_is_an_error():
    x = RNG(53).standard_normal((20, 2))
    x[3, 1], x[7, 0] = np.nan, np.inf
    with pytest.raises(BadSamples, match=r"^fd@identity: 'identity' is NaN or infinite for 2 of 20 samples$"):
        fd(x, reference(2))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mean": np.zeros(3), "cov": np.eye(3)}, "reference 'identity' has 3 dimensions, the samples have 2"),
        ({"mean": np.zeros(2), "cov": np.full((2, 2), np.nan)}, "reference 'identity' holds NaN"),
        ({"mean": np.zeros(2), "cov": -10 * np.eye(2)}, "reference 'identity' is not a covariance"),
        (None, "metric 'fd@identity' needs the reference 'identity'"),
        ({"features": np.zeros((5, 2))}, r"this one holds \['features'\]; make it with"),
    ],
)
def test_bad_references_are_errors(parts, message):
    with pytest.raises(EvalbenchError, match=message):
        fd(RNG(54).standard_normal((20, 2)), parts)


def test_distance_to_converged_samples_has_its_own_reference():
    metric = build_metric("fd_to_converged@identity")
    assert (metric.id, metric.reference_key) == ("fd_to_converged@identity", "converged/identity")
    x = RNG(55).standard_normal((60, 3))
    assert metric.compute(metric.update({"identity": x}), reference(3)) == fd(x, reference(3))
