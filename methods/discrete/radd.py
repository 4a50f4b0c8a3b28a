"""RADD, Ou et al., Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data.

State: tokens, [MASK] until they are revealed. In the step t -> s every masked token is revealed with the probability

    tweedie  rho = (alpha(s) - alpha(t)) / sigma(t)     (exact for this schedule)
    euler    rho = -alpha'(t) (t - s) / sigma(t), at most 1

(alpha: probability of being clean at t, sigma = 1 - alpha; the last step reveals all), and its value is drawn from
what the network gives for it, each token by itself. Whether a token is revealed does not depend on the network, and
the network does not depend on time, so a state has to be evaluated only in a step that reveals something: that is the
paper's cache. A token's step is uniform for `tweedie` on the log-linear schedule, so a sample of L tokens in T steps
costs T (1 - (1 - 1/T)^L) evaluations on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Solver
from evalbench.paths import Path
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_SOURCE = "Ou et al., RADD; methods-a entry 16"
_WITNESS = "tests/methods/test_radd.py"
CLAIM = (
    Claim(
        text="Cached and uncached samples of 256 steps are the same samples, at a quarter of the evaluations.",
        suite="tokens-markov",
        arm="radd(steps=256)",
        baseline="radd(steps=256,cache=false)",
        nfe=64,
        baseline_nfe=256,
        metric="pair-tv@tokens",
        direction="equal",
        effect=1e-9,
        level="M",
        author="catalogue",
        transfer="fair",
        source=_SOURCE,
        witness=_WITNESS,
    ),
    Claim(
        text="On the log-linear schedule the Euler update is the Tweedie update.",
        suite="tokens-markov",
        arm="radd(update=euler)",
        baseline="radd",
        nfe=10,
        metric="pair-tv@tokens",
        direction="equal",
        effect=1e-9,
        level="M",
        author="catalogue",
        transfer="fair",
        source=_SOURCE,
        witness=_WITNESS,
    ),
    Claim(
        text="At 48 evaluations the cache, which affords more steps, brings samples nearer to the data.",
        suite="tokens-markov",
        arm="radd",
        baseline="radd(cache=false)",
        nfe=48,
        metric="pair-tv@tokens",
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=f"{_SOURCE}: fewer evaluations at similar quality",
        witness=_WITNESS,
    ),
)

Update: TypeAlias = Literal["tweedie", "euler"]
_STEPS_PER_TOKEN = 16  # at most; then fewer than 1 token in 32 shares its step with an earlier one


@register("radd")
@dataclass(frozen=True)
class RADD(Solver):
    """RADD: absorbing discrete diffusion that evaluates a time-free network only where a token changes.

    T steps uniform in t from t_start to 0. Stochastic; two uniform numbers per token in all (when it is revealed, and
    as what), so samples are paired across budgets, updates and the cache. Evaluations are per sample: T without the
    cache; with it one for each step that reveals a token, on average sum_i 1 - (1 - p_i)^L for p_i the probability
    that a token is revealed in step i.

    The budget holds for every sample: with the cache T is the largest number of steps, at most 16 L, whose expected
    evaluations do not exceed it, and a sample that is at its last evaluation reveals all that is left. (The paper has
    no such end. It never comes where the budget is min(T, L) or more, such as `steps=256` at NFE >= L.)

    `any-order` reveals a fixed number of tokens per evaluation instead. The network's time is not used; where it has
    one, `t` is the time of the step.

    Attributes:
        update: reveal probability, `tweedie` or `euler`; the same on the log-linear schedule.
        cache: False evaluates every sample in every step, as a network with time would.
        steps: T; 0 finds it from the budget.
    """

    requires = frozenset({"tokens"})

    update: Update = "tweedie"
    cache: bool = True
    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"radd: steps must be 0 (from the budget) or more, got {self.steps}")

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        import torch

        T = self.steps_for(denoiser.path, x_T.shape[1], nfe)
        times = np.linspace(denoiser.path.t_start, 0.0, T + 1)
        by_then = torch.from_numpy(revealed_by(denoiser.path, times, self.update)).to(x_T.device)
        step = torch.searchsorted(by_then, noise.uniform("reveal").double(), right=True).clamp_(max=T - 1)  # (B, L)
        at = torch.from_numpy(times[:-1]).to(x_T.device).expand(len(x_T), -1)  # (B, T)
        if not self.cache:
            return reveal(denoiser, x_T, cond, step, at, noise, every_sample=True)
        # call c of a sample is its c-th step in which something happens; the last one the budget allows takes the rest
        ordered, places = step.sort(1)
        count = (ordered.diff(dim=1, prepend=ordered[:, :1]) > 0).cumsum(1)
        call = torch.zeros_like(step).scatter_(1, places, count).clamp_(max=nfe - 1)
        first = at.new_zeros(len(x_T), int(call.max()) + 1).scatter_reduce_(1, call, at.gather(1, step), "amax")
        return reveal(denoiser, x_T, cond, call, first, noise)

    def steps_for(self, path: Path, length: int, nfe: int) -> int:
        """T for a budget.

        Raises:
            Unsupported: `steps` without the cache exceed the budget.
        """
        if self.steps > nfe and not self.cache:
            raise Unsupported(f"radd(steps={self.steps},cache=false) spends {self.steps} evaluations, not {nfe}")
        if self.steps or not self.cache:
            return self.steps or nfe
        most = _STEPS_PER_TOKEN * length
        fits = (T - 1 for T in range(nfe + 1, most + 1) if expected_nfe(path, T, length, self.update) > nfe)
        return next(fits, max(nfe, most))


def revealed_by(path: Path, times: Sequence[float] | np.ndarray, update: Update = "tweedie") -> np.ndarray:
    """Probability that a token is clean after each step over falling `times`, (T,); the last is 1."""
    t, s = np.asarray(times[:-1]), np.asarray(times[1:])
    if update == "tweedie":
        rho = (path.alpha(s) - path.alpha(t)) / path.sigma(t)
    else:
        rho = np.minimum(1.0, -path.d_alpha(t) * (t - s) / path.sigma(t))
    rho[-1] = 1.0
    by_then: np.ndarray = 1.0 - np.cumprod(1.0 - rho)
    return by_then


def expected_nfe(path: Path, T: int, length: int, update: Update = "tweedie") -> float:
    """Mean evaluations of a sample of `length` tokens in T steps with the cache.

    Tweedie on the log-linear schedule: T (1 - (1 - 1/T)^length).
    """
    p = np.diff(revealed_by(path, np.linspace(path.t_start, 0.0, T + 1), update), prepend=0.0)
    return float(np.sum(1.0 - (1.0 - p) ** length))


def reveal(
    denoiser: Denoiser,
    x_T: torch.Tensor,
    cond: Cond,
    call: torch.Tensor,
    at: torch.Tensor,
    noise: NoiseSource,
    *,
    every_sample: bool = False,
) -> torch.Tensor:
    """Reveal every token in its call, from what the network says of the sample's state before that call.

    Args:
        x_T: the masked states, int64 (B, L).
        call: the call of each token, int64 (B, L), below n. at: the time of each call of a sample, (B, n).
        every_sample: evaluate also the samples of which a call reveals nothing.
    """
    import torch

    x, u = x_T, noise.uniform("token")
    for i in range(at.shape[1]):
        now = call == i
        rows = (now.any(1) | every_sample).nonzero().flatten()
        probs = denoiser(x[rows], at[rows, i], cond.rows(rows), "probs", rows=rows.cpu().numpy())
        x = x.index_copy(0, rows, torch.where(now[rows], draw(probs, u[rows]), x[rows]))
    return x


def draw(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One value per token by the inverse of its distribution: probs (B, L, V), uniform u (B, L) to int64 (B, L)."""
    below = probs.cumsum(-1)[..., :-1]
    return (u.unsqueeze(-1) >= below).sum(-1)
