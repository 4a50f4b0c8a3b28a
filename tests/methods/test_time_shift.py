"""Time-Shift: both realisations against loops written by hand, on every path; what is left alone; where it helps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, exact
from hypothesis import given, settings
from hypothesis import strategies as st

from evalbench import registry
from evalbench.denoiser import Field, convert
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Solver
from evalbench.noise import NoiseSource
from evalbench.paths import Flow, Path, VPLinear, grid, make_path

MODULE = sys.modules[registry.get("method", "time-shift").__module__]
BATCH, DIM = 6, 24
VP = VPLinear()


def sampler(text: str) -> Solver:
    return registry.build_method(text).sampler


class Watched(Field):
    """A field that remembers the times it was asked at."""

    def __init__(self, inner: Field) -> None:
        super().__init__(inner.inner, inner.ledger)
        self.times: list[np.ndarray] = []

    def __call__(self, x, t, *args, **options):
        self.times.append(np.broadcast_to(np.asarray(t, dtype=np.float64), (len(x),)))
        return super().__call__(x, t, *args, **options)


def run(text: str, path: Path, nfe: int, rows: range | list[int] = range(BATCH), **options: object):
    """Samples, and the field they were made with."""
    field = Watched(exact(path, len(rows), nfe, dim=DIM, **options))
    noise = NoiseSource(4, rows, (DIM,), dtype=torch.float64)
    x = sampler(text).sample(field, noise.start() * float(path.sigma(path.t_start)), COND, nfe, noise)
    return x, field


def fitting_time(x: np.ndarray, centre: float, reach: float, above: float = 0.0, below: float = 1.0001) -> float:
    """The table time in units of the path that fits one state; `centre` itself if there is none."""
    v = np.var(x, ddof=1)
    candidates = [tau for tau in range(1, 1001) if abs(tau - round(1000 * centre)) <= reach]
    candidates = [tau for tau in candidates if above < tau / 1000 < below]
    if not candidates:
        return centre
    return min(candidates, key=lambda tau: (v - VP.sigma(tau / 1000) ** 2) ** 2) / 1000


def eps_of(x: torch.Tensor, t: list[float]) -> torch.Tensor:
    """Each row at its own time, one call per row."""
    return torch.cat([exact(VP, 1, dim=DIM)(x[i : i + 1], t[i], COND, "eps") for i in range(len(x))])


def start() -> torch.Tensor:
    return NoiseSource(4, range(BATCH), (DIM,), dtype=torch.float64).start() * float(VP.sigma(1.0))


# --- realisation 3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "t_c"), [(40, 300), (10, 0), (80, 600)])
def test_network_is_called_at_the_time_that_fits(w, t_c):
    x, shifted = start(), 0
    times = grid(VP, "time", 10)
    for i, (s, t) in enumerate(pairwise(times)):
        t_s = [s] * BATCH
        if i > 0 and 1000 * s > t_c:
            t_s = [fitting_time(row.numpy(), s, w) for row in x]
            shifted += sum(abs(u - s) > 1e-3 for u in t_s)
        eps = eps_of(x, t_s)
        x0 = (x - float(VP.sigma(s)) * eps) / float(VP.alpha(s))  # at the nominal time
        x = float(VP.alpha(t)) * x0 + float(VP.sigma(t)) * eps
    assert shifted > BATCH
    ours, field = run(f"ddim(grid=time)+time-shift(w={w},t_c={t_c})", VP, 10)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
    moved = np.array(field.times) - np.array(times[:-1])[:, None]
    assert (moved[0] == 0).all()
    assert np.abs(moved).max() <= (w + 0.5) / 1000 + 1e-12
    below = np.array(times[:-1]) <= t_c / 1000
    assert (moved[below] == 0).all()


@pytest.mark.parametrize("want", ["x0", "eps", "v", "velocity", "score"])
@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
def test_the_answer_is_eps_at_the_shifted_time_in_any_prediction(want, kind):
    path = make_path(kind)
    t = float(path.t_of_lambda(-1.0))
    x = 1.3 * float(np.hypot(path.alpha(t), path.sigma(t))) * start()
    wrapped = MODULE.AtShiftedTime(exact(path, BATCH, dim=DIM), MODULE.TimeShift(w=60))
    eps = wrapped(x, t, COND, "eps")
    assert not torch.allclose(eps, exact(path, BATCH, dim=DIM)(x, t, COND, "eps"))
    torch.testing.assert_close(wrapped(x, t, COND, want), convert(eps, x, path, t, "eps", want))
    per_row = wrapped(x, torch.full((BATCH,), t, dtype=torch.float64), COND, want)
    torch.testing.assert_close(per_row, wrapped(x, t, COND, want))
    with pytest.raises(Unsupported, match="one time per sample"):
        wrapped(x, torch.full((BATCH, DIM), t), COND, want)


# --- realisation 1 ---------------------------------------------------------------------------------------------------


def released(step: Callable[..., torch.Tensor], w: int, t_c: int, n: int) -> tuple[torch.Tensor, int]:
    """A loop whose target is the time that fits the state before the step; step(x, i, times, targets per row)."""
    x, shifted = start(), 0
    times = grid(VP, "time", n)
    for i in range(n):
        targets = [times[i + 1]] * BATCH
        if 0 < i < n - 1 and 1000 * times[i + 1] > t_c:
            targets = [fitting_time(row.numpy(), times[i + 1], w // 2, times[-1], times[i]) for row in x]
            shifted += sum(abs(u - times[i + 1]) > 1e-3 for u in targets)
        x = step(x, i, times, targets)
    return x, shifted


def rows_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(("w", "t_c"), [(40, 300), (5, 0), (161, 300)])
def test_target_of_the_transfer_is_the_time_that_fits(w, t_c):
    def step(x, i, times, targets):
        s = times[i]
        eps = eps_of(x, [s] * BATCH)
        x0 = (x - float(VP.sigma(s)) * eps) / float(VP.alpha(s))
        return rows_of([VP.alpha(u) for u in targets]) * x0 + rows_of([VP.sigma(u) for u in targets]) * eps

    expected, shifted = released(step, w, t_c, 10)
    assert shifted > BATCH
    ours, field = run(f"ddim(grid=time)+time-shift(realisation=1,w={w},t_c={t_c})", VP, 10)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(field.times, np.repeat(np.array(grid(VP, "time", 10)[:-1])[:, None], BATCH, 1))


def test_a_multistep_solver_keeps_its_order_and_history():
    """DPM-Solver++(2M) with lower order in the last step alone (Lu et al. 2022, algorithm 2)."""
    history: list[torch.Tensor] = []

    def step(x, i, times, targets):
        s = times[i]
        eps = eps_of(x, [s] * BATCH)
        history.append((x - float(VP.sigma(s)) * eps) / float(VP.alpha(s)))
        h = rows_of([VP.lam(u) for u in targets]) - float(VP.lam(s))
        d = history[-1]
        if 0 < i < 9:
            r = (float(VP.lam(s)) - float(VP.lam(times[i - 1]))) / h
            d = (1 + 1 / (2 * r)) * history[-1] - 1 / (2 * r) * history[-2]
        sigma, alpha = rows_of([VP.sigma(u) for u in targets]), rows_of([VP.alpha(u) for u in targets])
        return sigma / float(VP.sigma(s)) * x - alpha * torch.expm1(-h) * d

    expected, shifted = released(step, 40, 300, 10)
    assert shifted > BATCH
    ours, _ = run("dpm-solver++(grid=time)+time-shift(realisation=1)", VP, 10)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "method", ["heun", "unipc", "pndm", "dpm-solver", "diffusers:DDIMScheduler", "ddim+warm-start"]
)
def test_solvers_with_more_than_one_evaluation_per_step_are_refused(method):
    with pytest.raises(Unsupported, match=r"time-shift\(realisation=1\) needs .*realisation=3"):
        run(f"{method}+time-shift(realisation=1)", VP, 20)


@pytest.mark.parametrize(
    "method", ["ddim", "dpm-solver++(order=2)", "unipc(corrector=false)", "pndm(variant=s)", "deis"]
)
@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
def test_released_realisation_keeps_the_budget(method, kind):
    for nfe in (1, 2, 3, 10):
        x, field = run(f"{method}+time-shift(realisation=1,t_c=0)", make_path(kind), nfe)
        assert torch.isfinite(x).all()
        assert field.ledger.nfe.max() == nfe


@pytest.mark.parametrize("method", ["ddim(eta=1)", "dpm-solver++"])
def test_released_realisation_gives_the_same_bits_at_any_place(method):
    order = [3, 0, 5, 1, 4, 2]
    text = f"{method}+time-shift(realisation=1,w=80)"
    assert torch.equal(run(text, VP, 9)[0][order], run(text, VP, 9, order)[0])


def test_added_noise_is_scaled_for_the_target_and_drawn_for_the_step():
    """DDIM's eq. 12 and 16 with eta = 1 and the increment of the nominal step, so that steps stay independent."""
    noise = NoiseSource(4, range(BATCH), (DIM,), dtype=torch.float64)

    def step(x, i, times, targets):
        s, t = times[i], times[i + 1]
        eps = eps_of(x, [s] * BATCH)
        x0 = (x - float(VP.sigma(s)) * eps) / float(VP.alpha(s))
        alpha, sigma = rows_of([VP.alpha(u) for u in targets]), rows_of([VP.sigma(u) for u in targets])
        ratio = sigma**2 / float(VP.sigma(s)) ** 2 * (1 - (float(VP.alpha(s)) / alpha) ** 2)
        unit = noise.increment(VP.fraction(s), VP.fraction(t))
        return alpha * x0 + (sigma**2 - ratio).sqrt() * eps + ratio.sqrt() * unit

    expected, shifted = released(step, 80, 300, 10)
    assert shifted > BATCH
    ours, _ = run("ddim(eta=1,grid=time)+time-shift(realisation=1,w=80)", VP, 10)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "method", ["ddim(eta=1)", "dpm-solver++(order=3)", "deis(order=4)", "unipc(order=3,corrector=false)", "ipndm"]
)
def test_the_nominal_target_has_the_nominal_coefficients(method):
    """Of every step but the last, though what follows is another grid."""
    solver = registry.build_method(method).solver
    times = grid(VP, "logsnr", 7)
    nominal = MODULE._steps(solver.plan(VP, times), method)
    shifted = MODULE.ShiftedTargets(solver, MODULE.TimeShift(realisation=1))
    for i in range(6):
        update = shifted._update(VP, times, i, times[i + 1])
        for name in ("out", "states", "evals", "noise"):
            assert getattr(update, name) == getattr(nominal[i][-1], name)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("realisation", [1, 3])
@pytest.mark.parametrize("method", ["ddim", "dpm-solver++", "ddim(eta=1)", "deis"])
def test_above_the_cut_off_of_all_times_it_is_the_solver_itself(method, realisation):
    plain, _ = run(method, VP, 8)
    shifted, _ = run(f"{method}+time-shift(realisation={realisation},t_c=1000)", VP, 8)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-10)
    moved, _ = run(f"{method}+time-shift(realisation={realisation},t_c=100)", VP, 8)
    assert not torch.allclose(moved, plain, atol=1e-4)


@pytest.mark.parametrize("realisation", [1, 3])
@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_the_same_noise_levels_give_the_same_samples_on_every_path(kind, realisation):
    """DDIM does not see the scale of a path, nor does the shift: x / alpha is the same from VP, EDM and flow."""
    text = f"ddim(grid=logsnr)+time-shift(realisation={realisation})"
    whole = make_path(kind) if kind == "edm" else Flow(t_start=0.9999)
    other = whole.between(float(whole.t_of_lambda(VP.lam(1.0))), float(whole.t_of_lambda(VP.lam(1e-3))))
    on_vp, _ = run(text, VP, 10)
    on_other, _ = run(text, other, 10)
    plain, _ = run("ddim(grid=logsnr)", VP, 10)
    assert not torch.allclose(on_vp, plain, atol=1e-3)
    scale = float(other.alpha(other.t_end) / VP.alpha(1e-3))
    torch.testing.assert_close(on_other, scale * on_vp, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["ddim", "dpm-solver++(order=2)", "unipc", "heun", "diffusers:DDIMScheduler"])
def test_network_realisation_takes_any_solver_at_its_own_cost(method):
    plain, without = run(method, VP, 10)
    shifted, field = run(f"{method}+time-shift", VP, 10)
    np.testing.assert_array_equal(without.ledger.nfe, field.ledger.nfe)
    assert not torch.allclose(plain, shifted, atol=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    v=st.floats(0.0, 1.5),
    t=st.floats(0.002, 1.0),
    reach=st.integers(0, 200),
    low=st.floats(0.0, 0.5),
    width=st.floats(0.0, 0.6),
)
def test_nearest_is_the_argmin(v, t, reach, low, width):
    high = low + width
    found = float(MODULE.Table(VP).nearest(np.array([v]), np.array([t]), reach, low, high)[0])
    inside = [k for k in range(1, 1001) if abs(k - round(1000 * t)) <= reach and low < k / 1000 < high]
    if not inside:
        assert found == t
        return
    best = min((v - float(VP.sigma(k / 1000)) ** 2) ** 2 for k in inside)
    assert (v - float(VP.sigma(found)) ** 2) ** 2 == pytest.approx(best, abs=1e-15)
    assert round(1000 * found) in inside


@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
def test_times_and_table_times_are_inverse(kind):
    path = make_path(kind)
    table = MODULE.Table(path)
    times = np.array(grid(path, "logsnr", 20))
    np.testing.assert_allclose(table.time(table.tau(times)), times, rtol=1e-8)


@pytest.mark.parametrize("text", ["w=0", "t_c=1001", "t_c=-1", "realisation=2"])
def test_bad_settings_are_refused(text):
    with pytest.raises(UserError):
        registry.build_method(f"ddim+time-shift({text})")


# --- direction -------------------------------------------------------------------------------------------------------


def distances(text: str, seeds: int, **options: object) -> np.ndarray:
    """Frechet distance to the exact moments in 48 random directions of 768 dimensions, 300 samples, by seed."""
    from evalbench.metrics.frechet import Gaussian, frechet_distance, moments

    q = np.linalg.qr(np.random.Generator(np.random.Philox(key=3)).standard_normal((768, 48)))[0]
    found = []
    for seed in range(seeds):
        field = exact(VP, 300, 10, "time", dim=768, components=8, seed=7, **options)
        noise = NoiseSource(seed, range(300), (768,), dtype=torch.float64)
        x = sampler(text).sample(field, noise.start() * float(VP.sigma(1.0)), COND, 10, noise)
        means = field.inner.model.means.numpy() @ q
        centred = means - means.mean(0)
        cov = centred.T @ centred / 8 + field.inner.model.std**2 * np.eye(48)
        found.append(frechet_distance(moments(x.numpy() @ q).gaussian(), Gaussian(means.mean(0), cov)))
    return np.array(found)


@pytest.mark.slow
def test_the_sign_on_an_exact_score_depends_on_the_variance_of_the_data():
    """The table has 1 - alpha-bar for Var(x) = 1 - alpha-bar + alpha-bar Var(x0).

    DDIM with 10 steps, four seeds, relative paired differences with their sd.
    """
    small, large = {"std": 0.2, "spread": 0.5}, {"std": 1.0, "spread": 1.0}  # Var(x0) = 0.29 and 2
    effects = {}
    for name, options in (("small", small), ("large", large)):
        base = distances("ddim", 4, **options)
        for realisation in (1, 3):
            effect = distances(f"ddim+time-shift(realisation={realisation})", 4, **options) / base - 1
            print(f"Var(x0) {name}, realisation {realisation}: {effect.mean():+.3f} sd {effect.std(ddof=1):.3f}")
            effects[name, realisation] = effect
    assert (effects["small", 3] < 0).all()
    assert (effects["large", 3] > 0).all()
    assert (effects["large", 1] > 0).all()
    assert (effects["large", 3] > effects["large", 1]).all()
