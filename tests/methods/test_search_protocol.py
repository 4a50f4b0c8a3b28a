"""What searches find on `gmm-64`, judged on noise they never saw, and what they seem to find when that rule is broken.

The figures are those of methods-a, section 7: another mixture (only D = 64 is stated), so directions are asserted and
ratios within a factor of 2. Distances enter without their finite-sample bias.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from evalbench import preparation, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.metrics.frechet import Fit, Gaussian, frechet_distance, moments, unpack_statistics
from evalbench.metrics.unbiased import paired_difference
from evalbench.preparation import SEARCH
from evalbench.registry import Chain
from evalbench.runner import make_cell
from evalbench.spec import load_suite
from evalbench.stats import t_interval

HELD_OUT = 4096  # 64 samples per dimension, of run seed 0
SEARCHED_STEPS = "autodiffusion(population=30,epochs=8,samples=1000)"
SEARCHED_SOLVER = "s3(evaluations=330,samples=1000)"
FIXED = [
    f"{solver},grid={grid})"
    for grid in ("time", "logsnr")
    for solver in (
        "ddim(eta=0.0",
        "dpm-solver++(order=2",
        "dpm-solver++(order=3",
        "dpm-solver++(order=3,d2=taylor",
        "dpm-solver(order=2,algorithm=multistep",
        "unipc(order=2",
        "unipc(order=3",
    )
]


@lru_cache
def setup() -> sampling.Setup:
    return sampling.build(load_suite("gmm-64"))


@lru_cache
def reference() -> Gaussian:
    return unpack_statistics(setup().model.reference("identity"))


def prepared(text: str, nfe: int) -> Chain:
    chain = registry.build_method(text)
    if not chain.prepares:
        return chain
    return chain.equipped(preparation.prepare(setup(), chain, make_cell(setup().suite, text, nfe, 1.0, 0)).artifacts)


def samples(chain: Chain, nfe: int, n: int, seed: int) -> np.ndarray:
    """(n, D) of a run seed."""
    cell, batches = make_cell(setup().suite, chain.text, nfe, 1.0, seed), []
    for start in range(0, n, 512):
        rows = range(start, min(start + 512, n))
        cond = sampling.conditions(setup().suite, setup().model, rows, setup().device)
        batches.append(sampling.sample(setup(), chain, cell, rows, cond, Ledger(len(rows), nfe)))
    return torch.cat(batches).numpy()


searched = lru_cache(prepared)


@lru_cache(maxsize=64)
def held_out(text: str, nfe: int, n: int) -> np.ndarray:
    return samples(searched(text, nfe), nfe, n, seed=0)


def distance(text: str, nfe: int, n: int = HELD_OUT) -> float:
    x = held_out(text, nfe, n)
    fit = Fit((x,), reference(), moments(x))
    return fit.whole.distance - fit.bias


def assert_better(text: str, baseline: str, nfe: int, *, known: float | None, n: int = HELD_OUT) -> None:
    """The verdict's interval is below zero, and the ratio is within a factor of 2 of the catalogue's."""
    ratio = distance(text, nfe, n) / distance(baseline, nfe, n)
    difference = paired_difference(held_out(text, nfe, n), held_out(baseline, nfe, n), reference())
    found = t_interval(difference.value, difference.error.se, difference.error.df)
    print(f"{text} {nfe}: {ratio:.3f} of {baseline}, catalogue {known}, {found.low:.4f}..{found.high:.4f}")
    assert found.high < 0
    if known is not None:
        assert known / 2 < ratio < known * 2


# --- facts of the catalogue -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("nfe", "known", "n"), [(5, 0.059 / 0.335, HELD_OUT), (8, 0.0355 / 0.0459, 8 * HELD_OUT)])
def test_a_searched_solver_beats_the_best_fixed_one(nfe, known, n):
    """At 8 evaluations the difference is a tenth of that at 5 and takes more samples to be decided."""
    best = min(FIXED, key=lambda text: distance(text, nfe))
    assert best == "dpm-solver(order=2,algorithm=multistep,grid=logsnr)"  # at 5 the catalogue's best too
    assert_better(SEARCHED_SOLVER, best, nfe, known=known, n=n)


@pytest.mark.slow
@pytest.mark.parametrize(("nfe", "uniform", "quadratic"), [(4, 0.563 / 1.324, None), (6, 0.352 / 0.770, 0.352 / 0.533)])
def test_searched_steps_beat_uniform_and_quadratic_ones(nfe, uniform, quadratic):
    """At 4 steps the size against quadratic is not the catalogue's (0.63 against 0.30): there quadratic steps are worse
    than uniform ones, here better. Which they are depends on the mixture: with std 0.2 and spread 1.5 it is as there.
    """
    assert_better(SEARCHED_STEPS, "ddim(grid=time)", nfe, known=uniform)
    assert_better(SEARCHED_STEPS, "ddim(grid=quadratic)", nfe, known=quadratic)


@pytest.mark.slow
def test_at_ten_steps_a_quadratic_grid_has_most_of_the_gain():
    """The rest is within the spread of prepare seeds: 0.92, 1.05 and 0.89 of it for 0, 1, 2 (with the paper's 50
    candidates in 10 epochs 0.90, 0.88 and 0.93).
    """
    assert_better(SEARCHED_STEPS, "ddim(grid=time)", 10, known=0.168 / 0.447)
    uniform, quadratic, evolved = (
        distance(text, 10) for text in ("ddim(grid=time)", "ddim(grid=quadratic)", SEARCHED_STEPS)
    )
    assert evolved < quadratic
    assert (uniform - quadratic) / (uniform - evolved) > 0.8  # 0.95 in the catalogue


# --- why the search has seeds and a reference split of its own ------------------------------------------------------

FEW = 256
REPORTED_REFERENCE = 77  # seed of the sample that the reported score refers to


@pytest.mark.slow
def test_searching_on_the_reported_noise_and_reference_gains_there_and_nowhere_else(monkeypatch):
    text, nfe = f"s3(evaluations=120,samples={FEW})", 5
    on_reported, elsewhere = [], []
    for seed in range(5):
        split = moments(setup().model.data(range(FEW), None, REPORTED_REFERENCE + seed).numpy()).gaussian()
        honest = prepared(text, nfe)
        with monkeypatch.context() as swapped:
            swapped.setattr(preparation, "SEARCH", seed)  # the reported noise
            swapped.setattr(preparation, "_REFERENCE_SEED", REPORTED_REFERENCE + seed)
            swapped.setattr(preparation, "_REFERENCE_SAMPLES", FEW)
            circular = prepared(text, nfe)
        reported = [score(chain, nfe, FEW, seed, split) for chain in (honest, circular)]
        held = [score(chain, nfe, HELD_OUT, 1000 + seed, reference()) for chain in (honest, circular)]
        assert circular.solver.prepared().facts["score"] == pytest.approx(reported[1], rel=1e-6)
        on_reported.append(reported[0] - reported[1])
        elsewhere.append(held[0] - held[1])
    print(on_reported, elsewhere)
    gain, error = np.mean(on_reported), np.std(on_reported, ddof=1) / np.sqrt(len(on_reported))
    assert gain > 2 * error
    assert np.mean(elsewhere) < 0


def score(chain: Chain, nfe: int, n: int, seed: int, target: Gaussian) -> float:
    return frechet_distance(moments(samples(chain, nfe, n, seed)).gaussian(), target)


@pytest.mark.parametrize("text", ["s3(evaluations=12,samples=128)", "autodiffusion(population=6,samples=128)"])
def test_what_is_found_does_not_depend_on_the_run_seed(text):
    chain, suite = registry.build_method(text), setup().suite
    found = [preparation.prepare(setup(), chain, make_cell(suite, text, 5, 1.0, seed)).artifacts for seed in (0, 9)]
    assert found[0][0].facts == found[1][0].facts


def test_search_noise_is_no_reported_noise():
    suite = setup().suite
    context = preparation.Context(setup(), registry.build_method("s3"), make_cell(suite, "s3", 5, 1.0, 0), 0, [])
    assert all(context.noise([0], seed).seed >= SEARCH > max(suite.sampling.seeds) for seed in (0, 1, 5))
