"""What holds for every metric: states are frozen, merging is associative, shards and their order do not matter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalbench.registry import build_metric, names

N, D = 60, 3


def _parts():
    rng = np.random.default_rng(0)
    x = 5 + rng.standard_normal((N, D))
    return {
        "identity": x,
        "paired:identity": x + 0.1 * rng.standard_normal((N, D)),
        "gmm-mode": rng.integers(0, 4, N).astype(float),
        "fashion-classifier": rng.integers(0, 2, N).astype(float),
        "tokens": rng.integers(0, 3, (N, 5)),
        "gmm-mode-distance": 1.0 + 0.1 * rng.standard_normal(N),
        "token-nll": rng.normal(1.0, 0.2, N),
        "tiny-fashion": rng.normal(0.3, 0.1, N).astype(np.float32),
        # 12 measurements; error, risk, signal (the same for all), consistency, distance; then the whitened sample
        "posterior": np.column_stack(
            [np.arange(N) % 12, rng.random((N, 2)), np.ones(N), rng.random((N, 2)), rng.standard_normal((N, D))]
        ),
        "reward-target": -rng.random(N),
        "labels": rng.integers(0, 4, N),
        "images": (images := rng.integers(0, 256, (N, 1, 12, 13), dtype=np.uint8)),
        "paired:images": images // 2,
        "clip-cosine:ViT-B-32:openai": np.column_stack([rng.normal(0.3, 0.1, N), rng.integers(0, 2, N)]),
        "inception:tf1": x,
        "inception:adm:spatial": x + 1,
        "inception:tf1:logits": rng.standard_normal((N, 5)),
    }


PARTS = _parts()
REFERENCE = {
    "mean": np.full(D, 5.0),
    "cov": np.eye(D),
    "draws": 5 + np.random.default_rng(1).standard_normal((80, D)),
    "weights": np.full(4, 0.25),
    "pairs": np.full((3, 3), 1 / 9),
    "entropy": np.array([1.1]),
    "labels": np.arange(80) % 4,
}
ELSEWHERE = {"lpips"}  # held to it with a network, tests/metrics/test_more_metrics.py
IDS = (
    "accuracy@fashion-classifier",
    "align@tiny-fashion",
    "clip-x100@ViT-B-32:openai",
    "clip@ViT-B-32:openai",
    "clipscore@ViT-B-32:openai",
    "cmmd@identity",
    "consistency@posterior",
    "coverage@identity",
    "density@identity",
    "fd-infinity@identity",
    "fd@identity",
    "fd_to_converged@identity",
    "fid@tf1",
    "is@tf1",
    "kid-per-class@identity",
    "kid@identity",
    "memorised@identity",
    "mode-coverage@gmm-mode",
    "mode-distance@gmm-mode-distance",
    "nll-gap@token-nll",
    "pair-tv@tokens",
    "paired-median@identity",
    "paired-p90@identity",
    "paired-rms@identity",
    "posterior-energy@posterior",
    "posterior-rmse@posterior",
    "posterior-spread@posterior",
    "precision@identity",
    "psnr",
    "recall@identity",
    "recovery-snr@posterior",
    "reward@reward-target",
    "sfid@adm",
    "shortfall@reward-target",
    "ssim",
    "sw@identity",
    "vendi@identity",
)


def chunk(indices):
    return {name: values[indices] for name, values in PARTS.items()}


def value_of(metric, chunks):
    state = metric.update(chunk(chunks[0]))
    for indices in chunks[1:]:
        state = metric.merge(state, metric.update(chunk(indices)))
    return metric.compute(state, REFERENCE)


def numbers(value, *fields):
    return [getattr(value, field) for field in fields if getattr(value, field) is not None]


def arrays(state):
    """Every number of a state, nested records and tuples included."""
    if dataclasses.is_dataclass(state):
        return [a for field in dataclasses.fields(state) for a in arrays(getattr(state, field.name))]
    if isinstance(state, tuple):
        return [np.concatenate(state)] if state else []
    assert isinstance(state, np.ndarray | int | float), f"{type(state)} in a state"
    return [np.asarray(state)]


def test_every_metric_is_held_to_this_contract():
    assert {metric_id.partition("@")[0] for metric_id in IDS} == set(names("metric")) - ELSEWHERE


@pytest.mark.parametrize("metric_id", IDS)
def test_facts(metric_id):
    metric = build_metric(metric_id)
    assert metric.id == metric_id
    assert metric.unit
    assert metric.summary()
    assert metric.paired == metric_id.startswith(("paired-", "psnr", "ssim"))
    higher = ("accuracy", "align", "coverage", "density", "mode-coverage", "precision", "recall")
    higher += ("clip", "is@", "psnr", "ssim", "vendi", "posterior-spread", "recovery-snr", "reward")
    assert metric.higher_is_better == metric_id.startswith(higher)


@pytest.mark.parametrize("metric_id", IDS)
def test_states_are_frozen_and_hold_numbers_only(metric_id):
    state = build_metric(metric_id).update(chunk(np.arange(N)))
    assert arrays(state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(state, dataclasses.fields(state)[0].name, None)


@pytest.mark.parametrize("metric_id", IDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.tuples(st.integers(1, N - 2), st.integers(1, N - 2)).filter(lambda c: c[0] < c[1]))
def test_merging_is_associative_and_changes_no_operand(metric_id, cuts):
    metric = build_metric(metric_id)
    a, b, c = (metric.update(chunk(i)) for i in np.split(np.arange(N), cuts))
    before = [array.copy() for array in arrays(a) + arrays(b) + arrays(c)]
    left, right = metric.merge(metric.merge(a, b), c), metric.merge(a, metric.merge(b, c))
    for x, y in zip(arrays(left), arrays(right), strict=True):
        assert x == pytest.approx(y, rel=1e-13)
    for x, y in zip(before, arrays(a) + arrays(b) + arrays(c), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("metric_id", IDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, N - 1), unique=True, max_size=6))
def test_shards_do_not_matter(metric_id, cuts):
    """One chunk or k: every number of the value, the interval and the bias."""
    metric = build_metric(metric_id)
    whole = value_of(metric, [np.arange(N)])
    shards = value_of(metric, np.split(np.arange(N), sorted(cuts)))
    fields = ("value", "n", "se", "low", "high", "bias")
    assert numbers(shards, *fields) == pytest.approx(numbers(whole, *fields), rel=1e-9, abs=1e-10)
    assert shards.note == whole.note


@pytest.mark.parametrize("metric_id", IDS)
def test_the_order_of_samples_does_not_matter(metric_id):
    """The value and the influence errors; bias, jackknife groups and subsets follow the sample index on purpose."""
    if metric_id.startswith(("fd-infinity", "is@")):
        pytest.skip("its subsets are drawn by sample index")
    metric = build_metric(metric_id)
    order = np.random.default_rng(2).permutation(N)
    whole, mixed = value_of(metric, [np.arange(N)]), value_of(metric, [order[:13], order[13:]])
    split = metric_id.startswith(
        ("sw", "recall", "coverage", "fd", "fid", "kid", "sfid", "vendi")
    )  # their errors need groups or halves
    fields = ("value", "n") if split else ("value", "n", "se", "low", "high")
    assert numbers(mixed, *fields) == pytest.approx(numbers(whole, *fields), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("metric_id", IDS)
def test_two_computations_agree_to_the_last_bit(metric_id):
    values = [value_of(build_metric(metric_id), [np.arange(20), np.arange(20, N)]) for _ in range(2)]
    assert values[0] == values[1]
