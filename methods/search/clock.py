"""The clock of searched schedules: path times as times of a VP path.

Both searches were released for networks trained on a VP table of 1000 steps, and their numbers (integers 0..999,
perturbations of 0.03, ends of 1e-4..1e-3) are its times. Here the time of the clock is t itself on VP paths; on others
it is the time of equal log-SNR on `vp-linear`, whose perturbations have the same effect on the noise level.
"""

from __future__ import annotations

import numpy as np

from evalbench.paths import Path, Times, VPDiscrete, VPLinear

_CLOCK = VPLinear()


def clock(path: Path, t: float) -> float:
    """Time of the clock at path time t > 0."""
    return t if isinstance(path, VPLinear | VPDiscrete) else float(_CLOCK.t_of_lambda(path.lam(t)))


def path_time(path: Path, u: float) -> float:
    """Path time at clock time u > 0."""
    return float(_path_times(path, u))


def table(path: Path, n: int) -> np.ndarray:
    """n rising path times from t_end to t_start, evenly spaced on the clock; (i + 1) / n on a VP path from 1 / n."""
    times = np.array(_path_times(path, np.linspace(clock(path, path.t_end), clock(path, path.t_start), n)))
    times[0], times[-1] = path.t_end, path.t_start
    return times


def _path_times(path: Path, u: Times) -> Times:
    return u if isinstance(path, VPLinear | VPDiscrete) else path.t_of_lambda(_CLOCK.lam(u))
