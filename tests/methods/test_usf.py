"""USF's engine against a second formulation and the solvers it contains; S3's operators and what it finds."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_suite

from evalbench import preparation, registry, sampling
from evalbench.engine import Plan, execute, exponential_weights, phi
from evalbench.errors import Unsupported, UserError
from evalbench.noise import NoiseSource
from evalbench.paths import VPDiscrete, grid, make_path
from evalbench.runner import make_cell

KINDS = ("vp-linear", "edm", "flow")


# nobody imports a method by its name
usf, s3 = (sys.modules[registry.get("method", name).__module__] for name in ("usf", "s3"))
NODES, WEIGHTS = np.polynomial.legendre.leggauss(30)


# --- against a second formulation -----------------------------------------------------------------------------------


def phi_by_quadrature(i: int, z: float) -> float:
    """The catalogue's phi_i, phi_0 = (e^z - 1) / z and phi_i = (phi_{i-1} - 1 / i!) / z, as the integral it is."""
    u = (NODES + 1) / 2
    return float(WEIGHTS @ (np.exp((1 - u) * z) * u**i)) / 2 / math.factorial(i)


def by_hand(field, path, times, decisions, x, afs):
    """The walk as the catalogue writes it, on arrays of eps, x0 and lambda."""
    seen = []  # (lambda, eps, x0), newest first
    base, last = x, None

    def taylor(start, s, t, d, order, nodes, factor):
        a_s, s_s, a_t, s_t = (float(f(u)) for u in (s, t) for f in (path.alpha, path.sigma))
        lam_s, h = float(path.lam(s)), float(path.lam(t) - path.lam(s))
        which, z = (1, h) if d.prediction == "noise" else (2, -h)
        here, *others = nodes
        f = here[which]
        terms = phi_by_quadrature(0, z) * h * f
        if order > 1:
            m = len(others)
            matrix = np.array([[(o[0] - lam_s) ** j / math.factorial(j) for j in range(1, m + 1)] for o in others])
            differences = torch.stack([o[which] - f for o in others])
            derivatives = torch.from_numpy(np.linalg.solve(matrix, differences.reshape(m, -1).numpy()))
            for i in range(1, order):
                scale = factor(h, z) if i == 1 else 1.0
                terms = terms + phi_by_quadrature(i, z) * h ** (i + 1) * scale * derivatives[i - 1].reshape(f.shape)
        return a_t / a_s * start - s_t * terms if which == 1 else s_t / s_s * start + a_t * terms

    def factor_of(name, c):
        def factor(h, z):
            e = math.exp(z)
            return {
                "none": 1.0,
                "linear": 1 + c * h,
                "bh1": 0.5 * z * z / (e - 1 - z),
                "bh2": 0.5 * z * (e - 1) / (e - 1 - z),
                "plus": 1 + (e - 1) / 2,
                "minus": 1 - (e - 1) / 2,
            }[name]

        return factor

    predicted = x
    for i, ((s, t), d) in enumerate(zip(pairwise(times), decisions, strict=True)):
        alpha, sigma = float(path.alpha(s)), float(path.sigma(s))
        eps = predicted / sigma if afs and i == 0 else field(predicted, s, COND, "eps")
        point = (float(path.lam(s)), eps, (predicted - sigma * eps) / alpha)
        base = predicted
        if last is not None and last[0].corrector != "off":
            d_0, start, s_0, order_0, nodes_0 = last
            factor = factor_of(d_0.corrector, d_0.c)
            base = taylor(start, s_0, s, d_0, order_0 + 1, [*nodes_0, point], factor)
        seen.insert(0, point)
        if t == 0.0:
            return seen[0][2] if d.prediction == "data" else (base - sigma * eps) / alpha
        order = min(d.order, len(seen))
        nodes = seen[: 1 + max(order - 1, min(d.points, len(seen) - 1))]
        predicted = taylor(base, s, t, d, order, nodes, factor_of(d.relaxation, d.c))
        last = (d, base, s, order, nodes)
    return predicted


DECISIONS = st.builds(
    usf.Decision,
    prediction=st.sampled_from(usf.PREDICTIONS),
    order=st.integers(1, 4),
    points=st.integers(0, 4),
    relaxation=st.sampled_from(usf.RELAXATIONS),
    corrector=st.sampled_from(usf.CORRECTORS),
    c=st.floats(-0.2, 0.2),
)


@given(decisions=st.lists(DECISIONS, min_size=1, max_size=7), afs=st.booleans(), kind=st.sampled_from(KINDS))
@settings(max_examples=50, deadline=None)
def test_any_decision_list_is_the_walk_written_by_hand(decisions, afs, kind):
    path = make_path(kind, t_start={"edm": 20.0}.get(kind, 0.95), t_end={"edm": 0.05}.get(kind, 0.02))
    n = len(decisions)
    times = tuple(path.t_start * (path.t_end / path.t_start) ** (i / n) for i in range(n + 1))
    field = exact(path, 3)
    x = NoiseSource(0, range(3), field.shape, dtype=torch.float64).start() * float(path.sigma(path.t_start))
    plan = usf.decided_plan(path, times, decisions, afs=afs)
    ours = execute(plan, field, x, COND, NoiseSource(0, range(3), field.shape))
    assert plan.nfe == n - afs
    by = by_hand(field, path, times, decisions, x, afs)
    # the hand's Taylor system is solved on differences of eps = (x - alpha x0) / sigma: digits go where sigma is small
    torch.testing.assert_close(ours, by, rtol=1e-7, atol=1e-7 * float(by.abs().max() + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_a_plain_step_integrates_the_polynomial_through_its_points(kind, prediction):
    path, want = make_path(kind), {"noise": "eps", "data": "x0"}[prediction]
    times = solver("ddim").times(path, "logsnr", 4)
    plan = usf.decided_plan(path, times, [usf.Decision(prediction, 4)] * 4)
    last = plan.ops[-1]
    nodes = times[3::-1]
    expected = exponential_weights(path, times[3], times[4], nodes, want)
    np.testing.assert_allclose([c for _, c in last.evals], expected, rtol=1e-9)


# --- the solvers it contains ----------------------------------------------------------------------------------------

SAME = [
    ("usf", "dpm-solver++"),
    ("usf(grid=karras,lower_order_final=false)", "dpm-solver++(grid=karras,lower_order_final=false)"),
    ("usf(steps=data:1)", "ddim"),
    ("usf(steps=noise:1)", "ddim"),
    ("usf(steps=noise:2:0:bh2)", "dpm-solver(order=2,algorithm=multistep)"),
    ("usf(steps=data:2)", "dpm-solver++(solver_type=heun)"),
    ("usf(steps=data:3,lower_order_final=false)", "dpm-solver++(order=3,d2=taylor,solver_type=heun,FULL)"),
    ("usf(steps=data:1:0:none:bh2/data:2:0:bh2:none)", "unipc"),
    ("usf(steps=data:1:0:none:bh1/data:2:0:bh1:none)", "unipc(variant=bh1)"),
    ("usf(steps=noise:1:0:none:bh2/noise:2:0:bh2:none)", "unipc(prediction=eps)"),
    ("usf(steps=data:2:0:bh2)", "unipc(corrector=false)"),
    (
        "usf(steps=data:1:0:none:bh1/data:2:0:bh1:none/data:3:0:none:none,lower_order_final=false)",
        "unipc(order=3,variant=bh1,lower_order_final=false)",
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME)
def test_a_decision_list_is_the_named_solver(ours, theirs):
    theirs = theirs.replace("FULL", "lower_order_final=false")
    for kind in KINDS:
        for final in ("t_end", "zero"):
            path = make_path(kind, final=final)
            for nfe in (1, 2, 7):
                (x, spent), (y, _) = draw(ours, path, nfe, 8), draw(theirs, path, nfe, 8)
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * max(1.0, float(y.abs().max())))
                assert spent == nfe


@pytest.mark.parametrize(
    ("steps", "low", "high"),
    [
        ("data:2", 1.8, 2.2),
        ("data:3", 2.8, 3.6),
        ("noise:4", 3.4, 4.5),
        ("data:1:0:none:none", 1.8, 2.2),  # the corrector raises the order by one
        ("data:2:0:none:none", 2.7, 3.3),
        ("data:2:3", 1.8, 2.3),  # more points make the derivative better, not the order
    ],
)
def test_order_of_convergence(steps, low, high):
    path, budgets = make_path("vp-linear"), (40, 80, 160)
    fine = draw("dpm-solver++(order=3,algorithm=singlestep,solver_type=heun,lower_order_final=false)", path, 900, 16)[0]
    text = f"usf(steps={steps},lower_order_final=false)"
    errors = [float((draw(text, path, n, 16)[0] - fine).norm(dim=1).median()) for n in budgets]
    assert low < -np.polyfit(np.log(budgets), np.log(errors), 1)[0] < high


# --- single decisions -----------------------------------------------------------------------------------------------


def test_relaxations_put_their_fixed_forms_in_the_place_of_phi_2():
    h = 0.7
    for z in (h, -h):
        assert usf.relaxed("none", 0.3, h, z) == 1.0
        assert usf.relaxed("linear", 0.3, h, z) == pytest.approx(1.21)
        assert phi(2, z) * usf.relaxed("bh2", 0.0, h, z) == pytest.approx(phi(1, z) / 2)
        assert phi(2, z) * usf.relaxed("bh1", 0.0, h, z) == pytest.approx(0.5)
        assert usf.relaxed("plus", 0.0, h, z) == pytest.approx(1 + (math.exp(z) - 1) / 2)
        assert usf.relaxed("minus", 0.0, h, z) + usf.relaxed("plus", 0.0, h, z) == pytest.approx(2.0)


def test_the_analytical_first_step_saves_an_evaluation_and_takes_x_T_for_noise():
    path = make_path("vp-linear")
    planned = solver("usf(afs=true,steps=noise:1)")
    plan = planned.plan_for(path, "logsnr", 5)
    times = planned.times(path, "logsnr", 5)
    assert (plan.nfe, len(times)) == (5, 7)
    first = plan.ops[0]
    # with eps = x_T / sigma the x0 estimate is 0: x_t = sigma_t / sigma_s x_T
    assert first.evals == ()
    np.testing.assert_allclose(dict(first.states)[plan.x_T], path.sigma(times[1]) / path.sigma(times[0]), rtol=1e-12)
    data = solver("usf(afs=true,steps=data:1)").plan_for(path, "logsnr", 5)
    np.testing.assert_allclose(first.states[0][1], data.ops[0].states[0][1], rtol=1e-12)
    assert draw("usf(afs=true)", path, 5, 4)[1] == 5


@given(decisions=st.lists(DECISIONS, min_size=2, max_size=9))
@settings(max_examples=40, deadline=None)
def test_a_step_reads_no_more_history_than_it_has_and_asked_for(decisions):
    decisions = [usf.replace(decision, corrector="off", prediction="data") for decision in decisions]
    path = make_path("vp-linear")
    times = solver("ddim").times(path, "logsnr", len(decisions))
    updates = [op for op in usf.decided_plan(path, times, decisions).ops if not hasattr(op, "want")]
    for i, (op, decision) in enumerate(zip(updates, decisions, strict=True)):
        most = max(decision.points, decision.order - 1) + 1
        assert len(op.evals) == (min(i + 1, most) if min(decision.order, i + 1) > 1 else 1)


def test_given_times_are_walked_and_spend_their_own_budget():
    text = "usf(timesteps=[0.7,0.3,0.1],t_end=0.0005)"
    for kind in ("vp-linear", "edm"):
        path = make_path(kind)
        times = solver(text).times(path, "logsnr", 10)
        same_noise = [make_path("vp-linear").lam(u) for u in (0.7, 0.3, 0.1, 0.0005)]
        np.testing.assert_allclose([path.lam(t) for t in times[1:]], same_noise, rtol=1e-9)
    assert solver(text).plan_for(path, "logsnr", 10).nfe == 4
    with pytest.raises(Unsupported, match="3 timesteps spend 4 evaluations"):
        solver(text).plan_for(path, "logsnr", 3)
    assert registry.build_method(registry.build_method(text).text) == registry.build_method(text)


def test_the_clock_is_t_on_vp_paths():
    betas = np.linspace(1e-4, 0.02, 1000)
    discrete = VPDiscrete(alphas_cumprod=tuple(np.cumprod(1 - betas)))
    for path in (make_path("vp-linear"), discrete):
        assert solver("usf(timesteps=[0.3])").times(path, "time", 5) == (1.0, 0.3, 1e-3)
        assert solver("usf").times(path, "logsnr", 5) == grid(path, "logsnr", 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("usf(steps=datum:2)", "step 'datum:2:0:none:off' is none of noise"),
        ("usf(steps=data:5)", "is none of noise"),
        ("usf(steps=data:2:0:bh3)", "is none of noise"),
        ("usf(steps=data:two)", "cannot read step 'data:two'"),
        ("usf(steps=data:2:0:none:off:on)", "cannot read step"),
        ("usf(steps=data:2:0:linear@0.1:linear@0.2)", "cannot read step"),
        ("usf(timesteps=[0.1,0.3])", "timesteps must fall"),
        ("usf(t_end=-1)", "t_end must be at least 0"),
        ("usf(grid=tim)", "unknown grid"),
        ("s3(evaluations=0)", "evaluations must be at least 1"),
        ("s3(classes=0)", "classes must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        registry.build_method(text)


@given(decision=DECISIONS)
def test_a_decision_is_read_back_from_its_text(decision):
    back = usf.Decision.parse(decision.text)
    assert usf.replace(back, c=decision.c) == decision
    if "linear" in (decision.relaxation, decision.corrector):
        assert back == decision


# --- the search's operators -----------------------------------------------------------------------------------------

SPACES = st.builds(
    lambda kind, final, most, classes: s3.Space(make_path(kind, final=final), max(1, most - classes), most),
    st.sampled_from(KINDS),
    st.sampled_from(("t_end", "zero")),
    st.integers(1, 8),
    st.integers(0, 2),
)


def check_candidate(schedule, space) -> None:
    times = schedule.times(space.path)
    assert all(b < a for a, b in pairwise(times))
    assert min(t for t in times[:-1]) >= space.path.t_end * (1 - 1e-9)
    assert space.least <= schedule.nfe <= space.most
    plan = schedule.plan(space.path)  # finite coefficients
    assert plan.nfe == schedule.nfe
    again = usf.Schedule.from_facts(json.loads(json.dumps(schedule.facts())))
    assert again.plan(space.path).ops == plan.ops


@given(space=SPACES, seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_every_candidate_is_a_solver_within_its_budget(space, seed):
    rng = np.random.default_rng(seed)
    pool = [*space.known(), space.random(rng), space.random(rng)]
    for schedule in pool:
        if schedule.nfe >= space.least:
            check_candidate(schedule, space)
    a, b = pool[int(rng.integers(len(pool)))], pool[-1]
    for _ in range(4):
        a = space.mutate(space.cross(a, b, rng), rng)
        check_candidate(a, space)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_crossing_takes_everything_from_its_parents(seed):
    rng = np.random.default_rng(seed)
    space = s3.Space(make_path("vp-linear"), 6, 6)
    a, b = (usf.replace(space.random(rng), t_end=t) for t in (2e-4, 5e-4))
    child = space.cross(a, b, rng)
    assert (child.afs, len(child.decisions)) == (a.afs, len(a.decisions))
    assert all(d in (a.decisions[i], *b.decisions[i : i + 1]) for i, d in enumerate(child.decisions))
    assert child.t_end in (a.t_end, b.t_end)


def test_the_evolution_scores_what_it_may_and_beats_random_search():
    path = make_path("vp-linear")
    space = s3.Space(path, 6, 6)
    target = np.array([0.8, 0.5, 0.3, 0.15, 0.05])

    def score(schedule):
        inner = np.array(schedule.inner[:5])
        off = float(np.abs(np.resize(inner, 5) - target).sum())
        return off + sum(0.1 for d in schedule.decisions if (d.order, d.prediction) != (3, "noise")) + schedule.afs

    found, blind = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scored = s3.evolve(score, space, rng, 200, 15)
        assert len(scored) == 200
        assert [item.schedule for item in scored[:10]] == space.known()
        found.append(min(item.score for item in scored))
        blind.append(min(score(space.random(rng)) for _ in range(200)))
    assert np.mean(found) < 0.75 * np.mean(blind)


def test_parents_are_the_best_of_one_class():
    space = s3.Space(make_path("vp-linear"), 1, 5)
    rng = np.random.default_rng(0)
    good = s3.Schedule((usf.Decision("noise", 3),) * 5, (0.8, 0.6, 0.4, 0.2))
    bad = s3.Schedule((usf.Decision("data", 1),) * 5, (0.9, 0.89, 0.88, 0.87))
    scored = [s3.Scored(bad, 2.0), s3.Scored(good, 1.0), s3.Scored(bad, 3.0)]
    children = [s3.breed(scored, space, rng, 1) for _ in range(100)]
    last = [child.inner[-1] for child in children if len(child.inner) == 4]
    assert np.median(last) == 0.2  # each time stays with probability 0.7


def test_a_search_is_billed_repeats_and_depends_on_its_seed():
    suite = small_suite("gmm-smooth")
    setup = sampling.build(suite)

    def prepared(text):
        found = preparation.prepare(setup, registry.build_method(text), make_cell(suite, text, 4, 1.0, 0))
        return found.artifacts[0].facts, found.bill

    facts, bill = prepared("s3(evaluations=16,samples=80)")
    assert bill["nfe"] == 16 * 80 * 4
    assert facts["evaluations"] == 16
    assert facts["score"] <= facts["best_known_score"]
    assert prepared("s3(evaluations=16,samples=80)")[0] == facts
    assert prepared("s3(evaluations=16,samples=80,seed=1)")[0] != facts
    # with a class more, solvers of fewer evaluations are tried too
    assert prepared("s3(evaluations=40,samples=80,classes=2)")[1]["nfe"] < 40 * 80 * 4


def test_an_unprepared_search_and_a_smaller_budget_are_refused():
    path = make_path("vp-linear")
    with pytest.raises(Unsupported, match="nothing prepared"):
        draw("s3", path, 5, 2)
    schedule = s3.Space(path, 5, 5).known()[0]
    equipped = solver("s3").equipped(s3.Artifact(facts={"schedule": schedule.facts()}))
    field = exact(path, 2)
    noise = NoiseSource(0, range(2), field.shape, dtype=torch.float64)
    with pytest.raises(Unsupported, match="searched for 5 evaluations, the budget is 4"):
        equipped.sample(field, noise.start(), COND, 4, noise)


def test_a_candidate_that_leaves_the_numbers_is_the_worst():
    suite = small_suite("gmm-smooth")
    chain, cell = registry.build_method("s3"), make_cell(suite, "s3", 2, 1.0, 0)
    context = preparation.Context(sampling.build(suite), chain, cell, 0, [])
    with torch.no_grad():
        oracle = s3.Oracle(context, 64, 0)
        assert math.isfinite(oracle(usf.Schedule((usf.Decision("data", 1),), ()).plan(context.path)))
        plan = Plan("x0")
        assert oracle(plan.finish(plan.update({plan.x_T: 1.7e308}, {}))) == math.inf
