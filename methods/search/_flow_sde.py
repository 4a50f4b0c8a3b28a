"""The SDE that searches over a flow model walk on.

Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing (methods-b entry 41).

With velocity u = alpha' x0 + sigma' n and score s of a path, for any g(t) the process

    x_{t - dt} = x_t - f dt + g sqrt(dt) z,    f = u - g^2 / 2 s,    g = 3 t^2

has the path's marginals as dt -> 0. Time runs from 1 (noise) to 0 (data); g vanishes where the score grows.

A flow model gives the SDE of another path too ("interpolant conversion"). A state x_bar of that path at time s is the
state x_bar / c at the time t_s of equal noise level: rho(t_s) = rho_bar(s), c = sigma_bar(s) / sigma(t_s). The paper's
velocity there, u_bar = c' / c x_bar + c t_s' u(x_bar / c, t_s), is the one that belongs to the same x0-hat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from evalbench.engine import check_choice
from evalbench.errors import UserError
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Solver, Step, Time, Want
from evalbench.paths import GRIDS, Flow, Path, VPLinear, spaced
from evalbench.predictions import convert

if TYPE_CHECKING:
    from evalbench.noise import NoiseSource

Interpolant: TypeAlias = Literal["linear", "vp"]
INTERPOLANTS: dict[str, Callable[[], Path]] = {"linear": Flow, "vp": VPLinear}  # vp: beta 0.1 to 20, as in the paper


@dataclass(frozen=True)
class FlowSDE(Solver):
    """What the searches share: a reward of x0-hat, and the SDE that proposals are drawn from."""

    requires = frozenset({"reward"})

    reward: str = "target"
    steps: int = 10
    interpolant: Interpolant = "linear"
    g: float = 3.0
    grid: str = "exp"

    def __post_init__(self) -> None:
        check_choice(self.name, "interpolant", self.interpolant, tuple(INTERPOLANTS))
        if self.grid:
            check_choice(self.name, "grid", self.grid, ("exp", *GRIDS))
        if self.steps < 1:
            raise UserError(f"{self.name}: steps must be at least 1, got {self.steps}")
        if not 0.0 <= self.g < math.inf:
            raise UserError(f"{self.name}: g must be 0 or more, got {self.g}")

    def times(self, path: Path, suite_grid: str, n: int) -> tuple[float, ...]:
        """n + 1 falling times over the whole path."""
        kind = self.grid or suite_grid
        return exp_times(path, n) if kind == "exp" else spaced(path, kind, path.t_start, path.t_end, n)

    def transition(self, path: Path, at: Particle, s: float, t: float) -> tuple[torch.Tensor, float]:
        """Mean, (B, *S), and standard deviation of the proposals from a particle at s, for time t."""
        g = self.g * s**2
        alpha, sigma = float(path.alpha(s)), float(path.sigma(s))
        # f = alpha' x0 + k (x - alpha x0): u, and the score -(x - alpha x0) / sigma^2
        k = (float(path.d_sigma(s)) + 0.5 * g**2 / sigma) / sigma
        f = float(path.d_alpha(s)) * at.x0 + k * (at.x - alpha * at.x0)
        return at.x - (s - t) * f, g * math.sqrt(s - t)


class Particle(NamedTuple):
    """A state with its x0-hat, both (B, *S), and the reward of that, (B,)."""

    x: torch.Tensor
    x0: torch.Tensor
    reward: torch.Tensor


class Judge:
    """Evaluates states of some samples of a batch: one evaluation of the field and one call of the reward for each."""

    def __init__(self, denoiser: Denoiser, cond: Cond, reward: str) -> None:
        self.denoiser, self.cond, self.reward = denoiser, cond, reward

    def __call__(self, x: torch.Tensor, t: float, step: Step, rows: np.ndarray | None = None) -> Particle:
        """Args: x: (b, *S). rows: the samples that they are of, (b,); None for all."""
        cond = self.cond if rows is None else self.cond.rows(torch.from_numpy(rows).to(x.device))
        x0 = self.denoiser(x, t, cond, "x0", step=step, rows=rows)
        return Particle(x, x0, self.denoiser.reward(self.reward, x0, cond, rows=rows))


def exp_times(path: Path, n: int) -> tuple[float, ...]:
    """n + 1 times of the paper's grid t = sqrt(1 - (1 - v)^2), v uniform, between the ends of the path (t <= 1)."""
    first, last = (1.0 - math.sqrt(max(0.0, 1.0 - end**2)) for end in (path.t_start, path.t_end))
    times = np.sqrt(1.0 - (1.0 - np.linspace(first, last, n + 1)) ** 2)
    times[-1] = path.t_end
    times[0] = path.t_start  # after the last: of one time alone it is the start
    return tuple(float(t) for t in times)


class OnPath(DenoiserWrap):
    """The same model on another noise path, from the noise level of its own start to that of its own end."""

    def __init__(self, inner: Denoiser, path: Path) -> None:
        super().__init__(inner)
        own = inner.path
        start, end = (float(path.t_of_rho(own.rho(t))) for t in (own.t_start, own.t_end))
        self.path = path.between(min(start, path.t_start), end)

    def own_time(self, s: float) -> float:
        """The time of the model's path with the noise level of s."""
        own = self.inner.path
        return min(float(own.t_of_rho(self.path.rho(s))), own.t_start)

    def __call__(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        assert not isinstance(t, torch.Tensor), "the searches ask at one time for all rows"
        t_s = self.own_time(t)
        c = float(self.path.sigma(t) / self.inner.path.sigma(t_s))
        if step is not None:
            step = replace(step, t=self.own_time(step.t), t_next=self.own_time(step.t_next))
        x0 = self.inner(x / c, t_s, cond, "x0", step=step, rows=rows)
        return convert(x0, x, self.path, t, "x0", want)


def on_interpolant(denoiser: Denoiser, interpolant: Interpolant) -> Denoiser:
    """The model on the interpolant's path; itself where that is its own."""
    path = INTERPOLANTS[interpolant]()
    own = denoiser.path
    same = type(own) is type(path) and replace(path, t_start=own.t_start, t_end=own.t_end, final=own.final) == own
    return denoiser if same else OnPath(denoiser, path)


def moved(x_T: torch.Tensor, own: Path, path: Path) -> torch.Tensor:
    """A start of the model's path, as a start of another."""
    return x_T * float(path.sigma(path.t_start) / own.sigma(own.t_start))


def starts(x_T: torch.Tensor, denoiser: Denoiser, noise: NoiseSource, k: int) -> torch.Tensor:
    """The k-th start of the same samples, on the denoiser's path; 0 is x_T itself."""
    return noise.candidate(k).start() * float(denoiser.path.sigma(denoiser.path.t_start)) if k else x_T


def choose(which: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows of a where `which`, (B,), holds, else of b; both (B, ...)."""
    return torch.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def better(a: Particle, b: Particle) -> Particle:
    """Of two particles per sample the one of higher reward, b where they are equal."""
    which = a.reward > b.reward
    return Particle(*(choose(which, new, old) for new, old in zip(a, b, strict=True)))
