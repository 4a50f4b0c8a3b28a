"""Noise paths: inverses, derivatives, grids."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalbench.errors import UserError
from evalbench.paths import EDM, GRIDS, Flow, Masked, Path, VPDiscrete, VPLinear, grid, make_path, spaced

_TABLE = tuple(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
PATHS: list[Path] = [VPLinear(), EDM(), Flow(), VPDiscrete(alphas_cumprod=_TABLE), Masked()]
INSIDE = st.floats(0.0, 1.0)


def _time(path: Path, u: float) -> float:
    return path.t_end + u * (path.t_start - path.t_end)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@given(u=INSIDE)
def test_time_and_log_snr_are_inverse(path: Path, u: float) -> None:
    t = _time(path, u)
    assert path.t_of_lambda(path.lam(t)) == pytest.approx(t, rel=1e-9)
    assert path.t_of_rho(path.rho(t)) == pytest.approx(t, rel=1e-9)
    assert path.lam(t) == pytest.approx(np.log(path.alpha(t) / path.sigma(t)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@given(u=st.floats(0.01, 0.99))
def test_derivatives_are_the_slopes(path: Path, u: float) -> None:
    t = _time(path, u)
    if isinstance(path, VPDiscrete):
        t = (np.floor(t * 1000) + 0.5) / 1000  # a piecewise path has no slope at its nodes
    h = 1e-6 * t
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        assert slope(t) == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("path", PATHS[:1] + PATHS[3:4], ids=lambda p: type(p).__name__)
def test_variance_preserving_paths_keep_the_variance(path: Path) -> None:
    t = np.linspace(path.t_end, path.t_start, 50)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_time_zero_is_data() -> None:
    for path in PATHS:
        assert path.alpha(0.0) == 1.0
        assert path.sigma(0.0) == 0.0
        assert path.t_of_rho(0.0) == 0.0
        assert path.lam(0.0) == np.inf


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", GRIDS)
@given(n=st.integers(1, 40))
def test_grids_fall_from_start_to_end(path: Path, kind: str, n: int) -> None:
    times = grid(path, kind, n)
    assert len(times) == n + 1
    assert (times[0], times[-1]) == (path.t_start, path.t_end)
    assert all(b < a for a, b in pairwise(times))


def test_a_path_that_ends_at_zero_spends_its_last_step_there() -> None:
    path = VPLinear(final="zero")
    assert grid(path, "karras", 5)[-2:] == (path.t_end, 0.0)
    assert grid(path, "karras", 1) == (path.t_start, 0.0)


def test_karras_grid_is_equation_5() -> None:
    # Karras et al. 2022, eq. 5, with sigma_max 80, sigma_min 0.002, rho 7 and N = 18
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(spaced(EDM(), "karras", 80.0, 0.002, 17), expected, rtol=1e-12)


def test_logsnr_grid_is_uniform_in_lambda() -> None:
    lam = VPLinear().lam(np.asarray(grid(VPLinear(), "logsnr", 9)))
    np.testing.assert_allclose(np.diff(lam), np.diff(lam)[0], rtol=1e-9)


def test_bad_paths_and_grids_are_refused() -> None:
    with pytest.raises(UserError, match="unknown path 'edmm'; did you mean 'edm'"):
        make_path("edmm")
    with pytest.raises(UserError, match="unknown path option 't_ends'; did you mean 't_end'"):
        make_path("edm", t_ends=1.0)
    with pytest.raises(UserError, match="unknown grid 'karas'; did you mean 'karras'"):
        grid(EDM(), "karas", 3)
    with pytest.raises(UserError, match="needs 0 < t_end < t_start"):
        make_path("edm", t_end=90.0)
    with pytest.raises(UserError, match="t_start < 1"):
        make_path("flow", t_start=1.0)
    with pytest.raises(UserError, match="at least 1 step"):
        grid(EDM(), "time", 0)
