"""AutoDiffusion: DDIM on a respaced chain, the operators of its evolution, and what a preparation costs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import twins
from exact_model import COND, draw, exact, solver
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_inside import B, draw_with
from methods_inside import prepared as inside_prepared
from support import request, small_suite

from evalbench import preparation, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.engine import execute
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact
from evalbench.noise import NoiseSource
from evalbench.paths import Path, VPDiscrete, make_path
from evalbench.plan import make_plan
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

    found = autodiffusion.evolve(
        lambda candidate: score(candidate[0]), np.random.default_rng(seed), n, population, epochs, repair=repair
    )
    assert not any(layers for _, layers in found)
    return {steps: value for (steps, _), value in found.items()}, score


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


# --- layers ---------------------------------------------------------------------------------------------------------

INSIDE = ("dit", "sd", "sd3")


def thinned(steps, skipped, kind="dit", guidance=1.0):
    artifact = Artifact(facts={"steps": steps, "skipped": skipped})
    return draw_with([artifact], "autodiffusion(layers=0.5)", len(steps), kind, guidance)


@given(SEEDS, st.integers(1, 8), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_operators_leave_out_as_many_blocks_as_before(seed, n, blocks, data):
    rng = np.random.default_rng(seed)
    total = data.draw(st.integers(0, n * blocks - 1))
    skips = autodiffusion.Skips(blocks, total)
    a, b = skips.random(rng, n), skips.random(rng, n)
    crossed = autodiffusion.crossed(rng, a, b)
    few, many = (tuple(frozenset(range(k)) for _ in range(n)) for k in (0, blocks))
    balanced = [skips.balanced(rng, layers) for layers in (crossed, few, many)]
    for layers in (a, skips.mutated(rng, a, 0.25), *balanced):
        assert len(layers) == n
        assert sum(len(each) for each in layers) == total
        assert all(each <= set(range(blocks)) for each in layers)
    assert skips.mutated(rng, a, 0.0) == a
    assert autodiffusion.Skips(blocks, total, mutates=False).mutated(rng, a, 1.0) == a


def test_a_mutation_of_layers_replaces_a_quarter():
    rng, skips = np.random.default_rng(0), autodiffusion.Skips(50, 100)
    layers = skips.random(rng, 10)
    stayed = []
    for _ in range(200):
        new = skips.mutated(rng, layers, 0.25)
        stayed.append(sum(len(a & b) for a, b in zip(layers, new, strict=True)) / 100)
    assert 1 - np.mean(stayed) == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 20_000))


@pytest.mark.parametrize("repair", [True, False])
def test_an_evolution_finds_steps_and_layers_together(repair):
    n, skips = 4, autodiffusion.Skips(6, 5)
    rng = np.random.default_rng(7)
    target = autodiffusion.rising((autodiffusion.random_steps(rng, n), skips.random(rng, n)))

    def score(candidate):
        steps, layers = candidate
        far = np.abs(np.resize(steps, n) - np.array(target[0])).sum() / 1000
        return float(far + sum(len(a ^ b) for a, b in zip(layers, target[1], strict=False)))

    scored = autodiffusion.evolve(score, np.random.default_rng(0), n, 40, 8, repair=repair, skips=skips)
    assert len(scored) == 320
    assert all(value == score(candidate) for candidate, value in scored.items())
    for steps, layers in scored:
        assert len(steps) == len(layers) == len(set(steps))
        assert list(steps) == sorted(steps)
        assert sum(map(len, layers)) == 5 or (not repair and len(steps) < n)
    blind = min(score((autodiffusion.random_steps(rng, n), skips.random(rng, n))) for _ in range(320))
    assert min(scored.values()) < blind
    assert next(iter(scored))[0] == autodiffusion.uniform_steps(n)


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_step_leaves_out_its_own_blocks_and_does_not_pay_for_them(kind, guidance):
    steps, skipped = [120, 430, 800], [[0, 2], [], [1]]
    x, ledger = thinned(steps, skipped, kind, guidance)
    made = twins.setup(kind)
    names, x_0 = made.door.blocks.names, torch.zeros(B, *made.model.shape, dtype=made.dtype)
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    left = [[names[k] for k in blocks] for blocks in skipped]
    shares = [made.door.share(made.door.blocks.bypass(each), x_0, 0.5, cond, key=object()) for each in left]
    calls = 1 if guidance == 1.0 else 2
    assert ledger.nfe.tolist() == [3.0] * B
    assert ledger.evals["base"].tolist() == [3.0 * calls] * B
    np.testing.assert_allclose(ledger.cost, calls * sum(shares))
    assert max(shares) == pytest.approx(1.0)
    whole = thinned(steps, [[], [], []], kind, guidance)
    np.testing.assert_allclose(whole[1].cost, calls * 3.0)
    assert not torch.equal(whole[0], x)
    alone, _ = draw_with([Artifact(facts={"steps": steps})], "autodiffusion", 3, kind, guidance)
    assert torch.equal(alone, whole[0]), "a network that leaves out nothing is the network itself"


def test_the_walk_leaves_out_the_blocks_of_the_step_it_is_at():
    """By hand: DDIM from the largest step down, each prediction from the network with its own blocks bypassed."""
    made, steps, skipped = twins.setup("dit"), [120, 430, 800], [[0, 2], [], [1]]
    x, _ = thinned(steps, skipped)
    cond = sampling.conditions(made.suite, made.model, range(B), made.device)
    made.door.ledger = Ledger(B)
    names = made.door.blocks.names
    state = made.model.start(NoiseSource(0, range(B), made.model.shape, made.dtype), made.path)
    state = state / float(np.hypot(made.path.alpha(made.path.t_start), made.path.sigma(made.path.t_start)))
    times = [(step + 1) / 1000 for step in steps]
    state = state * float(np.hypot(made.path.alpha(times[-1]), made.path.sigma(times[-1])))
    with torch.no_grad():
        for i in (2, 1, 0):
            alpha, sigma = float(made.path.alpha(times[i])), float(made.path.sigma(times[i]))
            with made.door.blocks.bypass([names[k] for k in skipped[i]])():
                eps = made.door(state, times[i], cond, "eps")
            x0 = (state - sigma * eps) / alpha
            t = times[i - 1] if i else None
            state = x0 if t is None else float(made.path.alpha(t)) * x0 + float(made.path.sigma(t)) * eps
    torch.testing.assert_close(x, state, rtol=1e-8, atol=1e-8)


def test_a_search_over_layers_leaves_out_the_share_that_it_was_told_and_is_billed():
    text = "autodiffusion(population=4,epochs=2,samples=8,layers=0.8)"
    found = inside_prepared(text, 5)
    facts = found.artifacts[0].facts
    assert sum(map(len, facts["skipped"])) == 4  # of 5 steps with 4 blocks
    assert len(facts["skipped"]) == len(facts["steps"]) == 5
    assert found.bill["nfe"] == 4 * 2 * 8 * 5
    assert 0.75 < found.bill["cost"] / found.bill["nfe"] < 0.85
    assert inside_prepared.__wrapped__(text, 5).artifacts[0].facts == facts
    network = twins.setup("dit").door.network
    assert not any("forward" in vars(module) for module in network.modules())


def test_layers_of_a_model_without_blocks_are_not_supported():
    with pytest.raises(Unsupported, match=r"^not supported: needs blocks$"):
        prepared("autodiffusion(layers=0.9)")
    assert not registry.build_method("autodiffusion").requires


@pytest.mark.parametrize(("layers", "reason"), [("0", r"layers must be in \(0, 1\], got 0"), ("1.2", r"got 1.2")])
def test_shares_of_layers_that_mean_nothing_are_refused(layers, reason):
    with pytest.raises(UserError, match=reason) as error:
        registry.build_method(f"autodiffusion(layers={layers})")
    assert "\n" not in str(error.value)


def test_a_share_that_leaves_no_block_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"layers=0.01 leaves none of the 4 blocks in 5 steps"):
        make_plan(request(twins.suite("dit"), ["autodiffusion(layers=0.01)"], metrics=(), nfe=(5,)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "last"), [("sd-1.5", 37), ("dit-xl", 27)])
def test_layers_of_large_networks_are_left_out(kind, last):
    x, ledger = thinned([100, 500, 900], [[0, last], [last // 2], []], kind)
    assert torch.isfinite(x).all()
    assert 0 < ledger.cost[0] < 3
