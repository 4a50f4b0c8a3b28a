"""AutoDiffusion: DDIM on a respaced chain, the operators of its evolution, and what a preparation costs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_suite

from evalbench import preparation, registry, sampling
from evalbench.engine import execute
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact
from evalbench.noise import NoiseSource
from evalbench.paths import Path, VPDiscrete, make_path
from evalbench.runner import make_cell

autodiffusion = sys.modules[registry.get("method", "autodiffusion").__module__]  # nobody imports a method by its name
KINDS = ("vp-linear", "edm", "flow")


def walk(path: Path, steps: list[int], batch: int = 8) -> torch.Tensor:
    field = exact(path, batch)
    noise = NoiseSource(0, range(batch), field.shape, dtype=torch.float64)
    x_T = noise.start() * float(path.sigma(path.t_start))
    return execute(autodiffusion.ddim_plan(path, steps), field, x_T, COND, noise)


# --- the sampler ----------------------------------------------------------------------------------------------------


def test_the_walk_is_ddim_on_the_respaced_chain_of_the_table():
    """beta_i = 1 - abar_i / abar_{i-1} over the chosen steps, in the terms of Song et al. 2021 on integers."""
    steps = [834, 94, 574, 217, 944, 354]  # in no order
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    path = VPDiscrete(alphas_cumprod=tuple(abar))
    field = exact(path, 8)
    noise = NoiseSource(0, range(8), field.shape, dtype=torch.float64)
    x_T = noise.start() * float(path.sigma(path.t_start))
    ours = execute(autodiffusion.ddim_plan(path, steps), field, x_T, COND, noise)

    chosen = np.sort(steps)
    beta = 1 - abar[chosen] / np.append(1.0, abar[chosen][:-1])
    respaced = np.append(1.0, np.cumprod(1 - beta))
    x = x_T  # the release starts from the noise itself, wherever the chain begins
    for i in range(len(chosen), 0, -1):
        eps = field(x, (chosen[i - 1] + 1) / 1000, COND, "eps")
        x0 = (x - np.sqrt(1 - respaced[i]) * eps) / np.sqrt(respaced[i])
        x = np.sqrt(respaced[i - 1]) * x0 + np.sqrt(1 - respaced[i - 1]) * eps
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_uniform_steps_are_the_time_grid_and_a_last_step_to_zero():
    """999, 749, ... are the times at which `ddim(grid=time)` asks the network; there the last step ends at t_end."""
    path = make_path("vp-linear")
    for n in (1, 2, 4, 5, 10):
        plan = autodiffusion.ddim_plan(path, autodiffusion.uniform_steps(n))
        asked = [op.t for op in plan.ops if hasattr(op, "want")]
        np.testing.assert_allclose(asked, np.linspace(1.0, 0.0, n + 1)[:-1], atol=6e-4)  # steps are whole numbers
    close = draw("ddim(grid=time)", make_path("vp-linear", t_end=1e-5), 4, 8)[0]
    torch.testing.assert_close(walk(path, autodiffusion.uniform_steps(4)), close, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_below_the_first_step_is_scaled_to_its_level(kind):
    """Unit-variance data in, the same out: the walk of N(0, 1) data ends with unit variance wherever it starts."""
    path = make_path(kind)
    field = exact(path, 4000, components=1, spread=0.0, std=1.0)
    noise = NoiseSource(0, range(4000), field.shape, dtype=torch.float64)
    x_T = noise.start() * float(path.sigma(path.t_start))
    steps = list(range(9, 700, 10))
    x = execute(autodiffusion.ddim_plan(path, steps), field, x_T, COND, noise)
    assert float(x.std()) == pytest.approx(1.0, abs=0.05)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_repeated_step_is_walked_once(steps):
    for kind in KINDS:
        plan = autodiffusion.ddim_plan(make_path(kind), steps)
        assert plan.nfe == len(set(steps))
        assert plan.ops == autodiffusion.ddim_plan(make_path(kind), sorted(set(steps))).ops


# --- the evolution --------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_operators_keep_sets_of_training_steps(seed, n):
    rng = np.random.default_rng(seed)
    a, b = autodiffusion.random_steps(rng, n), autodiffusion.uniform_steps(n)
    mutated = autodiffusion.mutated(rng, a, 0.25)
    crossed = autodiffusion.crossed(rng, a, b)
    whole = autodiffusion.repaired(rng, crossed, n)
    for steps in (a, b, mutated, whole):
        assert len(set(steps)) == n
        assert set(steps) <= set(range(1000))
    assert all(step in (a[i], b[i]) for i, step in enumerate(crossed))
    assert len(crossed) == n
    kept = [step for i, step in enumerate(crossed) if step not in crossed[:i]]
    assert [step for step in whole if step in crossed] == kept  # the repair touches repetitions only


def test_a_mutation_replaces_a_quarter():
    rng = np.random.default_rng(0)
    steps = autodiffusion.random_steps(rng, 100)
    moved = [np.mean(np.array(autodiffusion.mutated(rng, steps, 0.25)) != steps) for _ in range(200)]
    assert np.mean(moved) == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 20_000))


def evolved(seed, n, population, epochs, *, repair):
    """Scored sets, the score being the distance to a known one."""
    target = np.sort(np.random.default_rng(seed + 1000).choice(1000, n, replace=False))

    def score(steps):
        return float(np.abs(np.resize(np.sort(steps), n) - target).sum())

    return autodiffusion.evolve(score, np.random.default_rng(seed), n, population, epochs, repair=repair), score


@given(SEEDS, st.integers(1, 10), st.integers(4, 30), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_evolution_scores_population_times_epochs_sets_and_none_twice(seed, n, population, epochs, repair):
    scored, score = evolved(seed, n, population, epochs, repair=repair)
    assert len(scored) == population * epochs
    assert autodiffusion.distinct(autodiffusion.uniform_steps(n)) in scored
    assert all(value == score(steps) for steps, value in scored.items())
    assert all(tuple(sorted(set(steps))) == steps for steps in scored)
    if repair:
        assert {len(steps) for steps in scored} == {n}


def test_an_evolution_ends_when_every_set_was_tried():
    assert len(evolved(0, 1, 400, 3, repair=True)[0]) == 1000


def test_the_released_crossing_spends_fewer_evaluations_and_the_repaired_does_not():
    sizes = {repair: set() for repair in (True, False)}
    for repair, found in sizes.items():
        for seed in range(3):
            found |= {len(steps) for steps in evolved(seed, 10, 50, 8, repair=repair)[0]}
    assert sizes[True] == {10}
    assert min(sizes[False]) < 10


def test_the_evolution_beats_random_sets():
    found, blind = [], []
    for seed in range(5):
        scored, score = evolved(seed, 6, 50, 10, repair=True)
        rng = np.random.default_rng(seed)
        found.append(min(scored.values()))
        blind.append(min(score(autodiffusion.random_steps(rng, 6)) for _ in range(500)))
    assert np.mean(found) < 0.7 * np.mean(blind)


# --- the method -----------------------------------------------------------------------------------------------------


def prepared(text: str, nfe: int = 4, suite_name: str = "gmm-smooth"):
    suite = small_suite(suite_name)
    chain, cell = registry.build_method(text), make_cell(suite, text, nfe, 1.0, 0)
    return preparation.prepare(sampling.build(suite), chain, cell)


def test_a_search_is_billed_repeats_and_depends_on_its_seed():
    text = "autodiffusion(population=8,epochs=2,samples=80)"
    found = prepared(text)
    facts = found.artifacts[0].facts
    assert found.bill["nfe"] == 16 * 80 * 4
    assert facts["evaluations"] == 16
    assert len(facts["steps"]) == 4
    assert facts["score"] <= facts["uniform_score"]
    assert prepared(text).artifacts[0].facts == facts
    assert prepared("autodiffusion(population=8,epochs=2,samples=80,seed=1)").artifacts[0].facts != facts


def test_the_score_is_the_distance_of_the_search_samples():
    found = prepared("autodiffusion(population=4,epochs=1,samples=300)")  # in two batches
    suite = small_suite("gmm-smooth")
    chain = registry.build_method("autodiffusion")
    context = preparation.Context(sampling.build(suite), chain, make_cell(suite, "autodiffusion", 4, 1.0, 0), 0, [])
    noise = context.noise(range(300))
    with torch.no_grad():
        plan = autodiffusion.ddim_plan(context.path, found.artifacts[0].facts["steps"])
        x = execute(plan, context.denoiser(300), context.x_T(noise), context.cond(range(300)), noise)
    assert context.distance(x) == pytest.approx(found.artifacts[0].facts["score"], rel=1e-9)


def test_the_released_variant_may_leave_budget_unspent():
    steps = Artifact(facts={"steps": [100, 500, 900]})
    path = make_path("vp-linear")
    field = exact(path, 2, 5)
    noise = NoiseSource(0, range(2), field.shape, dtype=torch.float64)
    for nfe in (3, 5):
        solver("autodiffusion(variant=released)").equipped(steps).sample(field, noise.start(), COND, nfe, noise)
        assert field.ledger.nfe.max() == 3
        field = exact(path, 2, 5)
    with pytest.raises(Unsupported, match="3 steps were searched, the budget is 2"):
        solver("autodiffusion").equipped(steps).sample(field, noise.start(), COND, 2, noise)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("autodiffusion(population=3)", "population must be at least 4"),
        ("autodiffusion(epochs=0)", "epochs must be at least 1"),
        ("autodiffusion(variant=official)", "Input should be 'paper' or 'released'"),
    ],
)
def test_wrong_settings_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        registry.build_method(text)


def test_a_budget_beyond_half_the_table_is_refused():
    with pytest.raises(Unsupported, match="at most 500 of 1000 steps"):
        prepared("autodiffusion", nfe=501)
