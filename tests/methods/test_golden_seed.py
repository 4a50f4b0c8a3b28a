"""Golden seeds: scores, pool and correlation against independent computations, and the null of the paper's test."""

from __future__ import annotations

import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact
from evalbench.metrics.frechet import frechet_distance, moments
from evalbench.noise import NoiseSource
from evalbench.preparation import SEARCH, Prepared, prepare
from evalbench.runner import make_cell
from evalbench.spec import Suite, load_suite

MODULE = sys.modules[registry.get("method", "golden-seed").__module__]


@lru_cache
def setup_of(labels: str = "cyclic") -> sampling.Setup:
    suite: Suite = load_suite("gmm-smooth")
    if labels == "none":
        conditions = suite.conditions.model_copy(update={"labels": "none", "classes": 0})
        suite = suite.model_copy(update={"conditions": conditions})
    return sampling.build(suite)


@lru_cache
def prepared(text: str, labels: str = "cyclic", nfe: int = 10) -> Prepared:
    setup, chain = setup_of(labels), registry.build_method(text)
    return prepare(setup, chain, make_cell(setup.suite, text, nfe, 1.0, 0))


def golden(text: str, labels: str = "cyclic", nfe: int = 10) -> Artifact:
    artifact = prepared(text, labels, nfe).artifacts[-1]
    assert artifact is not None
    return artifact


def sampled(text: str, rows: list[int], nfe: int = 10, seed: int = 0) -> torch.Tensor:
    setup = setup_of()
    chain = registry.build_method(text).equipped(prepared(text, "cyclic", nfe).artifacts)
    cond = sampling.conditions(setup.suite, setup.model, rows, setup.device)
    return sampling.sample(
        setup, chain, make_cell(setup.suite, text, nfe, 1.0, seed), rows, cond, Ledger(len(rows), nfe)
    )


def by_hand(text: str, noise: NoiseSource, labels: list[int], nfe: int = 10) -> torch.Tensor:
    """Samples of a solver from given noise under given labels; labels of the suite are index mod 3."""
    setup = setup_of()
    cell = make_cell(setup.suite, text, nfe, 1.0, noise.seed)
    cond = sampling.conditions(setup.suite, setup.model, labels, setup.device)
    ledger = Ledger(len(labels), nfe)
    return sampling.sample(setup, registry.build_method(text), cell, noise.samples, cond, ledger)


TEXT = "ddim(eta=0.5)+golden-seed(seeds=6,keep=2,block=20,seed=7)"


def test_scores_are_frechet_distances_of_blocks_under_two_halves_of_the_labels():
    artifact = golden(TEXT)
    setup = setup_of()
    clean = setup.model.data(range(4096), torch.arange(4096) % 3, SEARCH + 7).numpy()
    for half, labels in (("on_a", [0, 1]), ("on_b", [2])):
        reference = moments(clean[np.isin(np.arange(4096) % 3, labels)]).gaussian()
        for k in range(6):
            noise = NoiseSource(SEARCH + 7, range(20 * k, 20 * k + 20), (8,))
            x = by_hand("ddim(eta=0.5)", noise, [labels[j % len(labels)] for j in range(20)])
            expected = frechet_distance(moments(x.numpy()).gaussian(), reference)
            assert artifact.arrays[half][k] == pytest.approx(expected, rel=1e-6)
    best = np.argsort(artifact.arrays["on_a"])[:2]
    np.testing.assert_array_equal(artifact.arrays["pool"], best)
    assert artifact.facts["pool_on_b"] == pytest.approx(artifact.arrays["on_b"][best].mean())
    assert artifact.facts["all_on_b"] == pytest.approx(artifact.arrays["on_b"].mean())
    rho = scipy_stats.spearmanr(artifact.arrays["on_a"], artifact.arrays["on_b"]).statistic
    assert artifact.facts["spearman"] == pytest.approx(rho)
    assert prepared(TEXT).bill["nfe"] == 6 * 2 * 20 * 10  # every seed under both halves


def test_noise_halves_share_no_noise_and_all_labels():
    text = "ddim+golden-seed(seeds=4,block=24,halves=noise)"
    artifact = golden(text)
    reference = moments(setup_of().model.data(range(4096), torch.arange(4096) % 3, SEARCH).numpy()).gaussian()
    for half, first in (("on_a", 0), ("on_b", 12)):
        noise = NoiseSource(SEARCH, range(24 + first, 36 + first), (8,))
        x = by_hand("ddim", noise, [j % 3 for j in range(12)])
        expected = frechet_distance(moments(x.numpy()).gaussian(), reference)
        assert artifact.arrays[half][1] == pytest.approx(expected, rel=1e-6)
    assert prepared(text).bill["nfe"] == 4 * 24 * 10


def test_samples_start_from_the_pool_and_keep_their_labels():
    pool = golden(TEXT).arrays["pool"]
    rows = [0, 5, 19, 20, 33]
    starts = [20 * pool[0] + j for j in (0, 5, 19)] + [20 * pool[1] + j for j in (0, 13)]
    x = sampled(TEXT, rows)
    expected = by_hand("ddim(eta=0.5)", NoiseSource(SEARCH + 7, starts, (8,)), [i % 3 for i in rows])
    assert torch.equal(x, expected)  # x_T and the noise of the steps
    assert torch.equal(x, sampled(TEXT, rows, seed=1))  # the pool's noise is all there is
    assert not torch.equal(x, by_hand("ddim(eta=0.5)", NoiseSource(0, rows, (8,)), [i % 3 for i in rows]))


def test_no_start_is_used_twice():
    x = sampled(TEXT, list(range(40)))
    assert len(torch.unique(x, dim=0)) == 40
    with pytest.raises(Unsupported, match="hold 40 starts, sample 40 would repeat one; raise keep or block"):
        sampled(TEXT, [3, 40])


def test_the_budget_of_samples_is_the_solvers_own():
    for solver in ("ddim", "dpm-solver++(order=2)", "unipc", "heun", "ddim+time-shift", "ddim+warm-start", "pndm"):
        for nfe in (1, 10):
            setup, text = setup_of(), f"{solver}+golden-seed(seeds=4,block=8)"
            chain = registry.build_method(text).equipped(prepared(text).artifacts)
            cond = sampling.conditions(setup.suite, setup.model, range(4), setup.device)
            ledger = Ledger(4, nfe)
            cell = make_cell(setup.suite, text, nfe, 1.0, 0)
            assert torch.isfinite(sampling.sample(setup, chain, cell, range(4), cond, ledger)).all()
            assert ledger.nfe.max() == nfe


def test_without_labels_only_halves_of_the_noise_are_possible():
    with pytest.raises(Unsupported, match="use halves=noise"):
        golden("ddim+golden-seed", "none")
    assert np.isfinite(golden("ddim+golden-seed(halves=noise)", "none").facts["spearman"])


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_the_interval_of_the_correlation_covers(n, strength):
    """Normal pairs: the rank correlation's own value is 6 / pi asin(r / 2); 1000 draws, se of the coverage 0.007."""
    rng = np.random.Generator(np.random.Philox(key=2))
    truth, hits = 6 / np.pi * np.arcsin(strength / 2), 0
    for _ in range(1000):
        a = rng.standard_normal(n)
        b = strength * a + np.sqrt(1 - strength**2) * rng.standard_normal(n)
        rho, low, high = MODULE.spearman(a, b)
        assert rho == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
        hits += low <= truth <= high
    print(f"n {n}, r {strength}: {hits / 1000:.3f}")
    assert 0.91 < hits / 1000 < 0.985


@pytest.mark.slow
def test_the_null_of_the_papers_test():
    """Exact score, 400 seeds: no correlation between halves that share no noise, some between halves that do."""
    facts = {
        halves: golden(f"ddim+golden-seed(seeds=400,keep=20,block=64,halves={halves})").facts
        for halves in ("noise", "conditions")
    }
    for halves, found in facts.items():
        print(halves, {key: round(value, 3) for key, value in found.items() if key != "noise_seed"})
    assert facts["noise"]["spearman_low"] < 0 < facts["noise"]["spearman_high"]
    assert facts["noise"]["spearman_high"] - facts["noise"]["spearman_low"] < 0.22  # it could have been seen
    assert facts["conditions"]["spearman_low"] > 0


@pytest.mark.parametrize("text", ["seeds=3", "keep=8", "keep=0", "block=3", "seed=-1", "halves=prompts"])
def test_bad_settings_are_refused(text):
    with pytest.raises(UserError):
        registry.build_method(f"ddim+golden-seed({text})")
