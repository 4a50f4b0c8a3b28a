"""RADD: one sample with or without the cache, the formula of its evaluations, exact distributions."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, DenoiserWrap
from evalbench.models.tokens import MarkovTokens
from evalbench.noise import NoiseSource
from evalbench.paths import Masked, Path
from evalbench.spec import load_suite

PATH = Masked()
SUITE = MarkovTokens(**load_suite("tokens-markov").model.options)
PAIR = MarkovTokens(length=2, vocabulary=3, contrast=1.5, seed=1)
FORMULA = {16: 15.743, 64: 40.641, 256: 56.725, 1024: 62.070}  # T (1 - (1 - 1/T)^64)

UPDATES = ("tweedie", "euler")


def radd() -> ModuleType:
    """The module of the method, for its formulas."""
    return sys.modules[type(registry.build_method("radd").solver).__module__]


def run(
    method: str, nfe: int, n: int, model: MarkovTokens = SUITE, path: Path = PATH, seed: int = 0, budget: bool = True
) -> tuple[torch.Tensor, np.ndarray]:
    """Samples (n, L) and what each of them spent."""
    x, ledger = run_with(lambda field: field, method, nfe, n, model, path, seed, budget)
    return x, ledger.nfe


def run_with(wrap, method, nfe, n, model=SUITE, path=PATH, seed=0, budget=True):  # type: ignore[no-untyped-def]
    ledger = Ledger(n, nfe if budget else None)
    door = NetworkDoor(model, path, "time")
    door.ledger = ledger
    noise = NoiseSource(seed, range(n), model.shape, dtype=torch.float64)
    solver = registry.build_method(method).solver
    return solver.sample(wrap(Field(door, ledger)), model.start(noise, path), Cond(), nfe, noise), ledger


def excess(x: torch.Tensor, model: MarkovTokens) -> tuple[float, float]:
    """Mean of -log P(x) / L above the entropy, nats per token, and its standard error."""
    nll = -model.log_likelihood(x) / x.shape[1]
    return float(nll.mean()) - model.entropy, float(nll.std()) / len(x) ** 0.5


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the chi-square statistic is within 4 of its standard deviations."""
    degrees = counts.size - 1
    return bool(((counts - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees))


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [16, 64, 256])
@pytest.mark.parametrize("update", UPDATES)
def test_cached_and_uncached_samples_are_one(T: int, update: str) -> None:
    cached, spent = run(f"radd(steps={T},update={update})", min(T, 64), 32)
    uncached, all_steps = run(f"radd(steps={T},update={update},cache=false)", T, 32)
    assert torch.equal(cached, uncached)
    assert (all_steps == T).all()
    assert spent.max() <= min(T, 64)
    assert len(np.unique(spent)) > 1  # per sample


@pytest.mark.parametrize(("T", "formula"), FORMULA.items())
def test_evaluations_follow_the_formula(T: int, formula: float) -> None:
    assert radd().expected_nfe(PATH, T, 64) == pytest.approx(formula, abs=1e-3)
    _, spent = run(f"radd(steps={T})", 64, 512)
    assert spent.mean() == pytest.approx(formula, rel=0.02)
    se = spent.std(ddof=1) / np.sqrt(len(spent))
    assert abs(spent.mean() - formula) < 4 * se + 1e-3


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_the_expectation_holds_on_other_schedules(update: str, exponent: float) -> None:
    path = Masked(exponent=exponent)
    _, spent = run(f"radd(steps=64,update={update})", 64, 512, path=path)
    se = spent.std(ddof=1) / np.sqrt(len(spent))
    assert abs(spent.mean() - radd().expected_nfe(path, 64, 64, update)) < 4 * se


def test_only_states_that_change_are_evaluated_each_at_its_own_time() -> None:
    calls: list[tuple[torch.Tensor, torch.Tensor, np.ndarray]] = []

    class Spy(DenoiserWrap):
        def __call__(self, x, t, cond, want="x0", *, step=None, rows=None):  # type: ignore[no-untyped-def]
            calls.append((x, t, rows))
            return self.inner(x, t, cond, want, step=step, rows=rows)

    run_with(Spy, "radd(steps=256)", 64, 8)
    for sample in range(8):
        seen = [(x[rows == sample], float(t[rows == sample])) for x, t, rows in calls if sample in rows]
        masked = [int((x == SUITE.mask).sum()) for x, _ in seen]
        times = [t for _, t in seen]
        assert masked[0] == 64
        assert all(a > b for a, b in pairwise(masked))  # no state twice
        assert all(a > b for a, b in pairwise(times))
        # the share of masks is that of the time, within the spread of 64 tokens
        assert max(abs(m / 64 - float(PATH.sigma(t))) for m, t in zip(masked, times, strict=True)) < 0.25


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 7, 20, 45, 63])
def test_steps_are_the_most_whose_expectation_fits_and_every_sample_keeps_the_budget(nfe: int) -> None:
    solver = registry.build_method("radd").solver
    T = solver.steps_for(PATH, 64, nfe)  # type: ignore[attr-defined]

    def expected(steps: int) -> float:
        return steps * (1 - (1 - 1 / steps) ** 64)

    assert expected(T) <= nfe
    assert expected(T + 1) > nfe or T == 16 * 64
    x, spent = run("radd", nfe, 128)
    assert spent.max() <= nfe
    assert spent.mean() > 0.93 * expected(T)
    assert int(x.max()) < SUITE.mask


def test_an_end_that_the_budget_forces_takes_all_that_is_left() -> None:
    """L = 2 in one evaluation: two independent tokens, whatever the number of steps."""
    n = 9000
    x, spent = run("radd(steps=50)", 1, n, PAIR)
    assert (spent == 1).all()
    counts = np.bincount((x[:, 0] * 3 + x[:, 1]).numpy(), minlength=9)
    assert fits(counts, n * np.outer(PAIR.stationary, PAIR.stationary).ravel())


def test_a_budget_of_one_per_token_forces_nothing() -> None:
    a, _ = run("radd(steps=256)", 64, 16)
    b, _ = run("radd(steps=256)", 1000, 16)
    assert torch.equal(a, b)


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("cache", ["true", "false"])
def test_two_tokens_in_T_steps_have_a_closed_form(T: int, cache: str) -> None:
    """Both fall into one step with probability 1/T, and are independent then; else they are exact."""
    n = 9000
    x, _ = run(f"radd(steps={T},cache={cache})", max(T, 2), n, PAIR)
    exact, apart = PAIR.reference("tokens")["pairs"], np.outer(PAIR.stationary, PAIR.stationary)
    counts = np.bincount((x[:, 0] * 3 + x[:, 1]).numpy(), minlength=9)
    assert fits(counts, n * (apart / T + exact * (1 - 1 / T)).ravel())
    assert not fits(counts, n * exact.ravel())  # the statistic sees the difference


@pytest.mark.parametrize("method", ["radd(steps=4096)", "any-order", "any-order(order=left-to-right)"])
def test_one_token_at_a_time_is_exact(method: str) -> None:
    """All sequences of a chain of 4, 81 of them."""
    model, n = MarkovTokens(length=4, vocabulary=3, contrast=1.5, seed=2), 10_000
    x, _ = run(method, 4, n, model)
    counts = np.bincount(x.numpy() @ 3 ** np.arange(4), minlength=81)
    every = np.array(np.unravel_index(np.arange(81), (3, 3, 3, 3)))[::-1].T.copy()
    assert fits(counts, n * np.exp(model.log_likelihood(torch.from_numpy(every)).numpy()))


def test_more_steps_are_nearer_to_exact_samples() -> None:
    """Tokens revealed together are drawn as if they were independent: the less so, the more steps."""
    errors = [excess(run(f"radd(steps={T})", 64, 512)[0], SUITE) for T in (4, 16, 64, 1024)]
    assert all(a[0] > 2 * b[0] for a, b in pairwise(errors))
    assert abs(errors[-1][0]) < 4 * errors[-1][1]
    exact = excess(SUITE.data(range(512), None, 1), SUITE)
    assert abs(exact[0]) < 4 * exact[1]


def test_at_one_budget_the_cache_is_nearer() -> None:
    cached, uncached = (excess(run(m, 48, 1024)[0], SUITE) for m in ("radd", "radd(cache=false)"))
    assert cached[0] + 3 * np.hypot(cached[1], uncached[1]) < uncached[0]


# --- the updates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3, 64])
def test_on_the_log_linear_schedule_both_updates_are_one(T: int) -> None:
    a, b = (run(f"radd(steps={T},update={update})", 64, 64)[0] for update in UPDATES)
    assert torch.equal(a, b)


def test_only_tweedie_has_the_marginals_of_another_schedule() -> None:
    """Masks left after half of the steps: sigma(1/2) = 1/4 for t^2; Euler's product is (1 - 2/T)(1 - 2/(T - 1))..."""
    path, T = Masked(exponent=2.0), 8
    times = np.linspace(1, 0, T + 1)
    assert 1 - radd().revealed_by(path, times)[3] == pytest.approx(0.25)
    assert 1 - radd().revealed_by(path, times, "euler")[3] == pytest.approx(np.prod(1 - 2 / np.arange(8, 4, -1)))


def test_euler_is_worse_in_four_steps_of_another_schedule() -> None:
    path = Masked(exponent=2.0)
    exact, euler = (excess(run(f"radd(steps=4,update={u})", 64, 1024, path=path)[0], SUITE) for u in UPDATES)
    assert exact[0] + 3 * np.hypot(exact[1], euler[1]) < euler[0]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("radd(update=tau)", "'update=tau' of method 'radd'"),
        ("radd(steps=-1)", "steps must be 0 .* or more, got -1"),
        ("any-order(order=best)", "'order=best' of method 'any-order'"),
    ],
)
def test_wrong_settings(method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build_method(method)


def test_steps_beyond_the_budget_need_the_cache() -> None:
    with pytest.raises(Unsupported, match="spends 30 evaluations, not 20"):
        run("radd(steps=30,cache=false)", 20, 2)


def test_a_model_of_tokens_predicts_nothing_else() -> None:
    with pytest.raises(Unsupported, match="needs eps, the model predicts probs"):
        run_with(lambda field: field, "ddim", 4, 2)


@pytest.mark.parametrize("order", ["random", "left-to-right"])
def test_any_order_spends_its_budget_evenly(order: str) -> None:
    x, spent = run(f"any-order(order={order})", 10, 6)
    assert (spent == 10).all()
    assert int(x.max()) < SUITE.mask


def test_the_suite_runs_both() -> None:
    setup = sampling.build(load_suite("tokens-markov"))
    assert setup.path == PATH
    assert setup.model.native == "probs"
