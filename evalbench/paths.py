"""Noise paths x_t = alpha(t) x_0 + sigma(t) n, n ~ N(0, I), and the time grids that solvers walk.

All functions take floats or float64 arrays and return float64. Time runs from `t_start` (noise) down to `t_end`
(data); t = 0 is exact data (sigma = 0, lambda = +inf) on every path. lambda = log(alpha / sigma) is half the log-SNR
(Lu et al. 2022, DPM-Solver, section 2), rho = sigma / alpha the noise level in EDM's coordinates x / alpha
(Karras et al. 2022, table 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from evalbench.errors import UserError, unknown

Times: TypeAlias = Any  # float or float64 array; the functions below are ufuncs of it
FinalStep: TypeAlias = Literal["t_end", "zero"]


@dataclass(frozen=True)
class Path(ABC):
    """A Gaussian noise path with its start and end.

    Attributes:
        t_start: time of the noisiest state, where sampling begins.
        t_end: smallest time a network is evaluated at, > 0.
        final: `t_end` stops the last step at t_end; `zero` adds a last step from t_end to t = 0 (first order,
            it returns x0), as EDM and diffusers' `final_sigmas_type="zero"` do.
    """

    t_start: float
    t_end: float
    final: FinalStep = "t_end"

    def __post_init__(self) -> None:
        if not 0 < self.t_end < self.t_start:
            raise UserError(f"path needs 0 < t_end < t_start, got t_end={self.t_end}, t_start={self.t_start}")

    @abstractmethod
    def log_alpha(self, t: Times) -> Any:
        """log alpha(t)."""

    @abstractmethod
    def sigma(self, t: Times) -> Any:
        """sigma(t), in the units of x."""

    @abstractmethod
    def t_of_lambda(self, lam: Times) -> Any:
        """The inverse of `lam`: time at half log-SNR lambda."""

    @abstractmethod
    def d_alpha(self, t: Times) -> Any:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Times) -> Any:
        """d sigma / dt."""

    def alpha(self, t: Times) -> Any:
        """alpha(t)."""
        return np.exp(self.log_alpha(t))

    def lam(self, t: Times) -> Any:
        """lambda(t) = log(alpha / sigma), +inf at t = 0."""
        with np.errstate(divide="ignore"):
            return self.log_alpha(t) - np.log(self.sigma(t))

    def rho(self, t: Times) -> Any:
        """rho(t) = sigma / alpha, EDM's noise level of x / alpha."""
        return self.sigma(t) * np.exp(-self.log_alpha(t))

    def t_of_rho(self, rho: Times) -> Any:
        """The inverse of `rho`; rho = 0 gives t = 0."""
        rho = np.asarray(rho, dtype=np.float64)
        with np.errstate(divide="ignore"):
            t = self.t_of_lambda(-np.log(rho))
        return np.where(rho == 0.0, 0.0, t)[()]

    def fraction(self, t: Times) -> float:
        """Where t lies in log-SNR between t_start (0) and t_end (1); the clock of the Brownian noise."""
        lo, hi = self.lam(self.t_start), self.lam(self.t_end)
        return float(np.clip((self.lam(t) - lo) / (hi - lo), 0.0, 1.0))

    def between(self, t_start: float | None = None, t_end: float | None = None) -> Path:
        """The same path with another start or end."""
        return replace(self, t_start=t_start or self.t_start, t_end=t_end or self.t_end)


@dataclass(frozen=True)
class VPLinear(Path):
    """Variance preserving with beta(t) linear from beta_min to beta_max on [0, 1] (Song et al. 2021, eq. 33)."""

    t_start: float = 1.0
    t_end: float = 1e-3
    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Times) -> Any:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def sigma(self, t: Times) -> Any:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def t_of_lambda(self, lam: Times) -> Any:
        # log alpha = -log(1 + e^{-2 lambda}) / 2, then the root of a quadratic in its stable form
        minus_log_alpha = 0.5 * np.logaddexp(0.0, -2.0 * lam)
        half = 0.5 * self.beta_min
        root = np.sqrt(half**2 + (self.beta_max - self.beta_min) * minus_log_alpha)
        return 2.0 * minus_log_alpha / (half + root)

    def d_alpha(self, t: Times) -> Any:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min)) * self.alpha(t)

    def d_sigma(self, t: Times) -> Any:
        # alpha^2 + sigma^2 = 1
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


@dataclass(frozen=True)
class VPDiscrete(Path):
    """Variance preserving path of a discrete model: log alpha piecewise linear through its table.

    Entry i of `alphas_cumprod` (alpha^2 of training step i) sits at t = (i + 1) / N, alpha(0) = 1
    (Lu et al. 2022, DPM-Solver, appendix on discrete-time models).
    """

    t_start: float = 1.0
    t_end: float = 1e-3
    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        table = np.asarray(self.alphas_cumprod)
        if len(table) < 2 or np.any(np.diff(table) >= 0) or table[0] >= 1 or table[-1] <= 0:
            raise UserError("path 'vp-discrete' needs alphas_cumprod falling strictly inside (0, 1)")

    @cached_property
    def _nodes(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.alphas_cumprod)
        log_alpha = 0.5 * np.log(np.asarray(self.alphas_cumprod, dtype=np.float64))
        return np.arange(n + 1) / n, np.concatenate([[0.0], log_alpha])

    def log_alpha(self, t: Times) -> Any:
        return np.interp(t, *self._nodes)

    def sigma(self, t: Times) -> Any:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def t_of_lambda(self, lam: Times) -> Any:
        times, log_alpha = self._nodes
        return np.interp(-0.5 * np.logaddexp(0.0, -2.0 * lam), log_alpha[::-1], times[::-1])

    def _slope(self, t: Times) -> Any:
        times, log_alpha = self._nodes
        i = np.clip(np.searchsorted(times, t, side="left") - 1, 0, len(times) - 2)
        return (log_alpha[i + 1] - log_alpha[i]) / (times[i + 1] - times[i])

    def d_alpha(self, t: Times) -> Any:
        return self._slope(t) * self.alpha(t)

    def d_sigma(self, t: Times) -> Any:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


@dataclass(frozen=True)
class EDM(Path):
    """Variance exploding with sigma(t) = t, alpha = 1 (Karras et al. 2022, table 1)."""

    t_start: float = 80.0
    t_end: float = 0.002

    def log_alpha(self, t: Times) -> Any:
        return np.zeros_like(t, dtype=np.float64)[()]

    def sigma(self, t: Times) -> Any:
        return np.asarray(t, dtype=np.float64)[()]

    def t_of_lambda(self, lam: Times) -> Any:
        return np.exp(-np.asarray(lam, dtype=np.float64))[()]

    def d_alpha(self, t: Times) -> Any:
        return np.zeros_like(t, dtype=np.float64)[()]

    def d_sigma(self, t: Times) -> Any:
        return np.ones_like(t, dtype=np.float64)[()]


@dataclass(frozen=True)
class Flow(Path):
    """Straight flow path alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023).

    t_start stays below 1 because lambda(1) = -inf; the state drawn there is sigma(t_start) n.
    """

    t_start: float = 0.999
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_start >= 1:
            raise UserError(f"path 'flow' needs t_start < 1, got {self.t_start}")

    def log_alpha(self, t: Times) -> Any:
        return np.log1p(-np.asarray(t, dtype=np.float64))[()]

    def sigma(self, t: Times) -> Any:
        return np.asarray(t, dtype=np.float64)[()]

    def t_of_lambda(self, lam: Times) -> Any:
        return np.exp(-np.logaddexp(0.0, lam))

    def d_alpha(self, t: Times) -> Any:
        return -np.ones_like(t, dtype=np.float64)[()]

    def d_sigma(self, t: Times) -> Any:
        return np.ones_like(t, dtype=np.float64)[()]


@dataclass(frozen=True)
class Masked(Path):
    """Absorbing process of tokens: alpha(t) the probability that a token is clean at t, sigma(t) that it is [MASK].

    sigma(t) = (1 - eps) t^exponent. exponent = 1 is the log-linear schedule, whose total noise is
    -log(1 - (1 - eps) t) (Ou et al., RADD). Here alpha + sigma = 1 and nothing is Gaussian.

    Attributes:
        eps: probability that a token is still clean at t = 1. exponent: power of t.
    """

    t_start: float = 1.0
    t_end: float = 1e-3
    eps: float = 1e-3
    exponent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.eps < 1 and self.exponent > 0 and self.t_start <= 1):
            raise UserError(
                f"path 'masked' needs 0 < eps < 1, exponent > 0 and t_start <= 1, got eps={self.eps}, "
                f"exponent={self.exponent}, t_start={self.t_start}"
            )

    def log_alpha(self, t: Times) -> Any:
        return np.log1p(-self.sigma(t))

    def sigma(self, t: Times) -> Any:
        return (1.0 - self.eps) * np.asarray(t, dtype=np.float64)[()] ** self.exponent

    def t_of_lambda(self, lam: Times) -> Any:
        # sigma = 1 / (1 + e^lambda)
        return (np.exp(-np.logaddexp(0.0, lam)) / (1.0 - self.eps)) ** (1.0 / self.exponent)

    def d_alpha(self, t: Times) -> Any:
        return -self.d_sigma(t)

    def d_sigma(self, t: Times) -> Any:
        return (1.0 - self.eps) * self.exponent * np.asarray(t, dtype=np.float64)[()] ** (self.exponent - 1.0)


PATHS: dict[str, type[Path]] = {
    "vp-linear": VPLinear,
    "vp-discrete": VPDiscrete,
    "edm": EDM,
    "flow": Flow,
    "masked": Masked,
}


def make_path(kind: str, **options: Any) -> Path:
    """Build a path by its name in suite files: vp-linear, vp-discrete, edm, flow, masked.

    Raises:
        UserError: unknown kind or option.
    """
    if kind not in PATHS:
        raise unknown("path", kind, PATHS)
    allowed = set(PATHS[kind].__dataclass_fields__)
    for key in options:
        if key not in allowed:
            raise unknown("path option", key, allowed)
    return PATHS[kind](**options)


GRIDS = ("time", "quadratic", "logsnr", "karras")


def grid(path: Path, kind: str, n: int, *, rho: float = 7.0) -> tuple[float, ...]:
    """n steps from t_start to the end of the path: n + 1 falling times.

    Args:
        path: gives t_start, t_end and whether a last step to t = 0 is added (`path.final`).
        kind: `time` uniform in t; `quadratic` uniform in sqrt(t) (Song et al. 2021, DDIM, appendix D.2);
            `logsnr` uniform in lambda (Lu et al. 2022); `karras` uniform in (sigma/alpha)^(1/rho)
            (Karras et al. 2022, eq. 5).
        n: number of steps, at least 1.
        rho: exponent of `karras`.

    Raises:
        UserError: unknown kind, or n < 1.
    """
    if n < 1:
        raise UserError(f"a grid needs at least 1 step, got {n}")
    inner = spaced(path, kind, path.t_start, path.t_end, n - 1 if path.final == "zero" else n, rho=rho)
    return (*inner, 0.0) if path.final == "zero" else inner


def spaced(path: Path, kind: str, t_from: float, t_to: float, n: int, *, rho: float = 7.0) -> tuple[float, ...]:
    """n + 1 times from t_from to t_to, both included exactly; n = 0 gives (t_from,)."""
    if n == 0:
        return (float(t_from),)
    u = np.linspace(0.0, 1.0, n + 1)

    def mix(a: float, b: float) -> np.ndarray:
        return (1.0 - u) * a + u * b

    if kind == "time":
        times = mix(t_from, t_to)
    elif kind == "quadratic":
        times = mix(t_from**0.5, t_to**0.5) ** 2
    elif kind == "logsnr":
        times = path.t_of_lambda(mix(path.lam(t_from), path.lam(t_to)))
    elif kind == "karras":
        times = path.t_of_rho(mix(path.rho(t_from) ** (1 / rho), path.rho(t_to) ** (1 / rho)) ** rho)
    else:
        raise unknown("grid", kind, GRIDS)
    times[0], times[-1] = t_from, t_to
    return tuple(float(t) for t in times)


def check_falling(times: Sequence[float]) -> None:
    """Raise UserError unless times fall strictly."""
    if any(b >= a for a, b in pairwise(times)):
        raise UserError(f"times must fall strictly, got {list(times)[:6]}...")
