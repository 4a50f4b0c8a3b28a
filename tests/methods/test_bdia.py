"""BDIA: the paper's update written out, its inverse, and what the catalogue measured on mixtures."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench.errors import Unsupported, UserError
from evalbench.noise import NoiseSource
from evalbench.paths import grid, make_path

KINDS = ("vp-linear", "edm", "flow")
BATCH = 64
SMOOTH = {"std": 0.5, "seed": 1}


def start(kind: str, n: int, dtype: torch.dtype = torch.float64, batch: int = 8, final: str = "t_end"):
    """(field, noise, x_T, times) on the log-SNR grid."""
    path = make_path(kind, final=final)
    field = exact(path, batch, None, "logsnr", **SMOOTH)
    field.inner.model.to(dtype, torch.device("cpu"))
    noise = NoiseSource(0, range(batch), field.shape, dtype=dtype)
    return field, noise, noise.start() * float(path.sigma(path.t_start)), grid(path, "logsnr", n)


def data(field, batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Exact draws of the mixture."""
    return torch.as_tensor(field.inner.model.draws(batch, seed=5), dtype=dtype)


def rms(x: torch.Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


# --- the paper's update, with moves written in other words ----------------------------------------------------------


def ddim_to(path, z, eps, a, b):
    """DDIM as published: predicted x0 and predicted noise, put together at the other time."""
    x0 = (z - path.sigma(a) * eps) / path.alpha(a)
    return path.alpha(b) * x0 + path.sigma(b) * eps


def naive_ddim(field, z, times, gamma):
    path, z_before = field.path, None
    for i, (s, t) in enumerate(pairwise(times)):
        eps = field(z, s, COND, "eps")
        delta = ddim_to(path, z, eps, s, t) - z
        if z_before is None:
            z_before, z = z, z + delta
        else:
            delta_back = ddim_to(path, z, eps, s, times[i - 1]) - z
            z_before, z = z, z_before - (1 - gamma) * (z_before - z) - gamma * delta_back + delta
    return z


def naive_2m(field, z, times, gamma):
    """2M as published, sigma_t / sigma_s z - alpha_t (e^-h - 1) D, forward and backward."""
    path, z_before, x0_before = field.path, None, None

    def to(x0, s, last, t):
        if t == 0.0:
            return x0
        h = path.lam(t) - path.lam(s)
        D = x0
        if x0_before is not None:
            r = (path.lam(s) - path.lam(last)) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        return path.sigma(t) / path.sigma(s) * z - path.alpha(t) * math.expm1(-h) * D

    for i, (s, t) in enumerate(pairwise(times)):
        x0, last = field(z, s, COND, "x0"), times[i - 1]
        forward = to(x0, s, last, t)
        new = forward if z_before is None else forward + gamma * (z_before - to(x0, s, last, last))
        z_before, z, x0_before = z, new, x0
    return z


def naive_edm(field, z, times, gamma):
    """Heun on y = x / alpha against rho = sigma / alpha, the last interval refined with the newest evaluation."""
    path, y_before, d_before = field.path, None, None
    y = z / path.alpha(times[0])
    for i, (s, t) in enumerate(pairwise(times)):
        d = field(y * path.alpha(s), s, COND, "eps")
        h = float(path.rho(t) - path.rho(s))
        delta = h * d
        if t > 0:
            delta = 0.5 * h * (d + field((y + delta) * path.alpha(t), t, COND, "eps"))
        if y_before is None:
            y_before, y, d_before = y, y + delta, d
        else:
            back = 0.5 * float(path.rho(times[i - 1]) - path.rho(s)) * (d + d_before)
            # gamma weighs states of x, so the difference of the old interval is in units of x
            scale = float(path.alpha(times[i - 1]) / path.alpha(t))
            y_before, y, d_before = y, y + delta + gamma * scale * (y_before - y - back), d
    return y * path.alpha(times[-1])


@pytest.mark.parametrize("final", ["t_end", "zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize(
    ("base", "naive", "steps"), [("ddim", naive_ddim, 7), ("dpm-solver++", naive_2m, 7), ("edm", naive_edm, 7)]
)
def test_it_is_the_published_update(base, naive, steps, gamma, kind, final):
    field, noise, x_T, times = start(kind, steps, final=final)
    nfe = 2 * steps if base == "edm" else steps
    x = solver(f"bdia(base={base},gamma={gamma})").sample(field, x_T, COND, nfe, noise)
    np.testing.assert_allclose(x, naive(field, x_T, times, gamma), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("base", "text"), [("ddim", "ddim"), ("dpm-solver++", "dpm-solver++(lower_order_final=false)"), ("edm", "heun")]
)
@pytest.mark.parametrize("nfe", [1, 6, 7])
def test_without_gamma_it_is_the_base_solver(base, text, nfe):
    path = make_path("vp-linear")
    x, spent = draw(f"bdia(base={base},gamma=1e-14)", path, nfe)
    expected, spent_there = draw(text, path, nfe)
    assert spent == spent_there == nfe
    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9)


# --- inversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 50, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_inversion_is_exact_up_to_rounding(n, kind):
    """Catalogue: 3e-16 in float64; 5e-16 (10 steps) to 1.2e-15 (200) here on VP."""
    field, noise, x_T, _ = start(kind, n)
    bdia = solver("bdia")
    pair = bdia.sample_pair(field, x_T, COND, n, noise)
    assert float(field.ledger.nfe.mean()) == n
    assert torch.equal(pair.cleaner, bdia.sample(field, x_T, COND, n, noise))
    before = float(field.ledger.nfe.mean())
    inverted = bdia.invert(field, pair, COND, n, noise)
    assert float(field.ledger.nfe.mean()) - before == n - 1
    assert rms(inverted.noisier - x_T) < 1e-14 * rms(x_T)


def test_inversion_divides_by_gamma():
    field, noise, x_T, _ = start("vp-linear", 10)
    bdia = solver("bdia(gamma=0.9)")
    inverted = bdia.invert(field, bdia.sample_pair(field, x_T, COND, 10, noise), COND, 10, noise)
    assert rms(inverted.noisier - x_T) < 1e-13


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 3e-15), (torch.float32, 1.3e-6)])
def test_data_come_back_from_their_inversion(n, dtype, bound):
    """Data -> pair -> noise -> data. float32 throughout: 2e-7 (10 steps) to 6e-7 (200)."""
    field, noise, _, _ = start("vp-linear", n, dtype, BATCH)
    bdia, x_0 = solver("bdia"), data(field, BATCH, dtype)
    z = bdia.invert(field, bdia.first_pair(field, x_0, COND, n), COND, n, noise)
    back = bdia.sample_pair(field, z, COND, n, noise)
    assert z.noisier.dtype == dtype
    assert 0.9 < rms(z.noisier) < 1.1
    assert rms(back.cleaner - x_0) < bound
    assert float(field.ledger.nfe.mean()) == 1 + 2 * (n - 1)


@pytest.mark.parametrize("n", [10, 50, 200])
def test_states_kept_in_float32_come_back_to_4e_8(n):
    """The catalogue's figure: states rounded to float32, everything between them float64.

    Both directions are written out with DDIM's formula.
    """
    field, _, _, times = start("vp-linear", n, batch=BATCH)
    bdia = solver("bdia")
    x_0 = data(field, BATCH).float().double()
    cleaner = x_0
    z = bdia.first_pair(field, x_0, COND, n).noisier.float().double()

    def two_step(z, i):
        eps = field(z, times[i], COND, "eps")
        return ddim_to(field.path, z, eps, times[i], times[i + 1]) - ddim_to(field.path, z, eps, times[i], times[i - 1])

    for i in range(n - 1, 0, -1):
        z, cleaner = (cleaner - two_step(z, i)).float().double(), z
    noisier, z = z, cleaner
    for i in range(1, n):
        noisier, z = z, (noisier + two_step(z, i)).float().double()
    assert 1e-8 < rms(z - x_0) < 8e-8


@pytest.mark.parametrize(("n", "catalogue"), [(10, 0.44), (200, 0.03)])
def test_naive_ddim_inversion_is_far_from_exact(n, catalogue):
    """Data -> noise by DDIM steps upwards -> data by DDIM; RMS per coordinate."""
    field, _, _, times = start("vp-linear", n, batch=BATCH)
    x_0 = x = data(field, BATCH)
    for s, t in [*pairwise(times[::-1]), *pairwise(times)]:
        x = ddim_to(field.path, x, field(x, s, COND, "eps"), s, t)
    assert catalogue / 2 < rms(x - x_0) < catalogue * 2


def test_inversion_with_a_small_gamma_explodes():
    """Errors grow like gamma^-N: catalogue 1.6e9 for gamma = 0.5 at 50 steps, fine for 0.92 up to 50, 29 at 200."""
    sizes = {}
    for gamma, n in ((0.5, 50), (0.92, 50), (0.92, 200)):
        field, noise, _, _ = start("vp-linear", n, batch=BATCH)
        bdia = solver(f"bdia(gamma={gamma})")
        pair = bdia.first_pair(field, data(field, BATCH), COND, n)
        sizes[gamma, n] = rms(bdia.invert(field, pair, COND, n, noise).noisier)
    assert 1e8 < sizes[0.5, 50] < 1e10
    assert 0.9 < sizes[0.92, 50] < 1.2
    assert 5 < sizes[0.92, 200] < 60


def test_only_the_ddim_base_can_be_inverted():
    field, noise, x_T, _ = start("vp-linear", 4)
    pair = solver("bdia").sample_pair(field, x_T, COND, 4, noise)
    for base in ("edm", "dpm-solver++"):
        for call in ("sample_pair", "invert"):
            with pytest.raises(Unsupported, match="type base=ddim"):
                getattr(solver(f"bdia(base={base})"), call)(field, pair, COND, 4, noise)


def test_samples_at_zero_are_not_inverted_but_pairs_are():
    field, noise, x_T, _ = start("vp-linear", 5, final="zero")
    bdia = solver("bdia")
    pair = bdia.sample_pair(field, x_T, COND, 5, noise)
    assert rms(bdia.invert(field, pair, COND, 5, noise).noisier - x_T) < 1e-13
    with pytest.raises(Unsupported, match="final='t_end'"):
        bdia.first_pair(field, pair.cleaner, COND, 5)


# --- accuracy -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def fine(std: float) -> torch.Tensor:
    """End of the flow, by a third-order singlestep solver."""
    text = "dpm-solver++(order=3,algorithm=singlestep,solver_type=heun,lower_order_final=false)"
    return draw(text, make_path("vp-linear"), 900, BATCH, std=std, seed=1)[0]


def error(text: str, nfe: int, std: float = 0.5) -> float:
    """Median over samples of the RMS error of a sample's coordinates, as in the catalogue."""
    x, _ = draw(text, make_path("vp-linear"), nfe, BATCH, std=std, seed=1)
    return float((x - fine(std)).pow(2).mean(1).sqrt().median())


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("bdia", 1.8, 2.2),
        ("bdia(gamma=0.5)", 0.9, 1.15),
        ("bdia(base=edm)", 1.8, 2.3),
        ("bdia(base=dpm-solver++)", 1.8, 2.8),
    ],
)
def test_order(text, low, high):
    errors = [error(text, nfe) for nfe in (40, 80, 160)]
    assert low < -float(np.polyfit(np.log((40, 80, 160)), np.log(errors), 1)[0]) < high


def test_at_10_steps_it_gains_on_smooth_and_loses_on_sharp_mixtures():
    """Catalogue medians: smooth 0.048 against DDIM's 0.20, sharp 0.21 against 0.069."""
    smooth, smooth_ddim = error("bdia", 10), error("ddim", 10)
    sharp, sharp_ddim = error("bdia", 10, 0.15), error("ddim", 10, 0.15)
    print(f"smooth {smooth:.3f} ddim {smooth_ddim:.3f}, sharp {sharp:.3f} ddim {sharp_ddim:.3f}")
    assert smooth < smooth_ddim
    assert sharp > sharp_ddim
    for measured, catalogue in ((smooth, 0.048), (smooth_ddim, 0.20), (sharp, 0.21), (sharp_ddim, 0.069)):
        assert catalogue / 2 < measured < catalogue * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bdia(gamma=0)", "0 is the base solver itself"),
        ("bdia(gamma=1.5)", "at most 1"),
        ("bdia(base=plms)", "base"),
        ("bdia(grid=linear)", "unknown grid"),
    ],
)
def test_bad_settings_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        solver(text)
