"""AutoDiffusion: "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures", the time steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np

from evalbench.engine import Plan, check_choice, execute, linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Preparation, Solver
from evalbench.paths import Path
from evalbench.registry import register

from .clock import table
from .oracle import Oracle

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

Steps: TypeAlias = tuple[int, ...]  # training steps in the order the search holds them, which is not sorted

TABLE = 1000  # training steps
MUTATED = 0.25  # probability that a mutation replaces a step
NEAR_UNIFORM = 0.1  # the same for the mutations of uniform steps in the first population


def _claim(baseline: str, effect: float) -> Claim:
    return Claim(
        text=f"Four searched time steps make samples nearer to the data than {baseline} steps, with DDIM.",
        suite="gmm-64",
        arm="autodiffusion(population=50,epochs=10,samples=1000)",
        baseline=f"ddim(grid={'time' if baseline == 'uniform' else baseline})",
        nfe=4,
        metric="fd@identity",
        direction="lower",
        effect=effect,
        level="E",
        author="catalogue",
        transfer="fair",
        source="AutoDiffusion; methods-a entry 40",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_autodiffusion.py",
    )


# 0.563 against 1.324 and 1.846 in the catalogue's check
CLAIM = (_claim("uniform", 0.57), _claim("quadratic", 0.69))


@register("autodiffusion")
@dataclass(frozen=True)
class AutoDiffusion(Solver):
    """AutoDiffusion's time steps: an evolution over sets of S training steps for DDIM, before sampling.

    A candidate is S = NFE distinct steps of 0..999. DDIM (eta = 0) walks the respaced chain from the largest to the
    smallest and then to x0; the noise of the start is taken as the state at the largest, as in the release. Its score
    is the Frechet distance of `samples` search samples to the search split of the data. The first population is the
    uniform steps, random ones (half of it) and mutations of the uniform ones (each step replaced with probability
    0.1). An epoch keeps the best fifth, mutates them (half of the population, each step replaced with probability 0.25
    by an unused one), crosses them (a quarter, element by element in the order the lists are held) and fills up at
    random; no set of steps is scored twice. So population x epochs candidates are scored, and
    population x epochs x samples x S evaluations are on the preparation's bill. "Training-free" it is; it needs data.

    Crossing two lists can repeat a step. In the release the chain takes the set and silently spends fewer evaluations
    (`variant="released"`); in the paper a candidate has S distinct steps, so a repeated one is replaced by an unused
    one (`variant="paper"`). The paper's search over network layers is not here. It is not `ddim` on a named grid
    (`grid=quadratic` has most of the gain at 10 steps), nor `s3`, which searches the solver too.

    On VP paths training step i is t = (i + 1) / 1000. On others the steps are 1000 times evenly spaced on the clock of
    `usf`, and the start is scaled to the level of the largest step, for data of unit variance.

    Attributes:
        population: candidates of an epoch; the paper's is 50. epochs: the paper's is 10. The defaults are a smoke test.
        samples: samples a candidate is scored with, 1000..5000 in the paper. Well above the number of features, or
            their covariance decides nothing.
        variant: `paper` or `released`, what a repeated step becomes.
        seed: of the search.
    """

    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "per-nfe"

    population: int = 10
    epochs: int = 2
    samples: int = 64
    variant: Literal["paper", "released"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("autodiffusion", "variant", self.variant, ("paper", "released"))
        for name, least in (("population", 4), ("epochs", 1), ("samples", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"autodiffusion: {name} must be at least {least}, got {getattr(self, name)}")

    def prepare(self, context: Preparation) -> Artifact:
        if context.nfe > TABLE // 2:
            raise Unsupported(f"autodiffusion: at most {TABLE // 2} of {TABLE} steps, the budget is {context.nfe}")
        oracle = Oracle(context, self.samples, self.seed)
        scored = evolve(
            lambda steps: oracle(ddim_plan(context.path, steps)),
            context.rng(self.seed),
            context.nfe,
            self.population,
            self.epochs,
            repair=self.variant == "paper",
        )
        best = min(scored, key=lambda steps: scored[steps])
        if not math.isfinite(scored[best]):
            raise Unsupported(f"autodiffusion: none of {len(scored)} candidates has a finite distance; raise samples=")
        uniform = scored[distinct(uniform_steps(context.nfe))]
        facts = {"steps": list(best), "score": scored[best], "uniform_score": uniform, "evaluations": len(scored)}
        return Artifact(facts=facts)

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        steps = self.prepared().facts["steps"]
        if len(steps) > nfe:
            raise Unsupported(f"autodiffusion: {len(steps)} steps were searched, the budget is {nfe}")
        return execute(ddim_plan(denoiser.path, steps), denoiser, x_T, cond, noise)


def ddim_plan(path: Path, steps: Sequence[int]) -> Plan:
    """DDIM over training steps, from the largest down and then to x0; repeated steps count once."""
    times = table(path, TABLE)
    walk = [float(times[i]) for i in sorted(set(steps), reverse=True)]
    plan = Plan("eps")
    # the level of a state of unit-variance data, which is 1 on a VP path
    level, start = (math.hypot(path.alpha(t), path.sigma(t)) for t in (walk[0], path.t_start))
    x = plan.update({plan.x_T: level / start}, {})
    for s, t in pairwise((*walk, 0.0)):
        a, b = linear_step(path, s, t, "eps")
        x = plan.update({x: a}, {plan.evaluate(x, s, t): b})
    return plan.finish(x)


# --- evolution ------------------------------------------------------------------------------------------------------


def uniform_steps(n: int) -> Steps:
    """n evenly spaced steps, the last of them 999: the grid `time` of a path that starts there."""
    return tuple(round((i + 1) * TABLE / n) - 1 for i in range(n))


def distinct(steps: Steps) -> Steps:
    """What the chain walks: the set, rising."""
    return tuple(sorted(set(steps)))


def evolve(
    score: Callable[[Steps], float], rng: np.random.Generator, n: int, population: int, epochs: int, *, repair: bool
) -> dict[Steps, float]:
    """Score of every set of steps that was tried, by the set."""
    scored: dict[Steps, float] = {}
    best: list[Steps] = []  # as the search holds them

    def tried(candidate: Steps) -> bool:
        """Whether a candidate was new, and is scored now."""
        key = distinct(candidate)
        if key in scored:
            return False
        scored[key] = score(key)
        best.append(candidate)
        return True

    for epoch in range(epochs):
        made = _first(rng, n, population) if epoch == 0 else _next(rng, n, population, list(best), repair=repair)
        added = sum(tried(candidate) for candidate in made)
        while added < population and len(scored) < math.comb(TABLE, n):
            added += tried(random_steps(rng, n))
        best.sort(key=lambda candidate: scored[distinct(candidate)])
        del best[max(2, population // 5) :]
    return scored


def _first(rng: np.random.Generator, n: int, population: int) -> Iterator[Steps]:
    uniform = uniform_steps(n)
    yield uniform
    for _ in range(population // 2):
        yield random_steps(rng, n)
    for _ in range(population - population // 2 - 1):
        yield mutated(rng, uniform, NEAR_UNIFORM)


def _next(rng: np.random.Generator, n: int, population: int, best: Sequence[Steps], *, repair: bool) -> Iterator[Steps]:
    for _ in range(population // 2):
        yield mutated(rng, best[int(rng.integers(len(best)))], MUTATED)
    for _ in range(population // 4):
        a, b = (best[int(rng.integers(len(best)))] for _ in range(2))
        child = crossed(rng, a, b)
        yield repaired(rng, child, n) if repair else child


def random_steps(rng: np.random.Generator, n: int) -> Steps:
    """n distinct steps."""
    return tuple(int(i) for i in rng.choice(TABLE, n, replace=False))


def mutated(rng: np.random.Generator, steps: Steps, probability: float) -> Steps:
    """Each step replaced with a probability by an unused one."""
    new = list(steps)
    for i in range(len(new)):
        if rng.random() < probability:
            new[i] = _unused(rng, new)
    return tuple(new)


def crossed(rng: np.random.Generator, a: Steps, b: Steps) -> Steps:
    """Element by element from either; a step may come twice."""
    return tuple(a[i] if rng.random() < 0.5 else b[i] for i in range(min(len(a), len(b))))


def repaired(rng: np.random.Generator, steps: Steps, n: int) -> Steps:
    """n distinct steps: a repeated one is replaced by an unused one."""
    new: list[int] = []
    for step in steps:
        new.append(_unused(rng, [*steps, *new]) if step in new else step)
    while len(new) < n:
        new.append(_unused(rng, new))
    return tuple(new)


def _unused(rng: np.random.Generator, used: Sequence[int]) -> int:
    while (step := int(rng.integers(TABLE))) in used:
        pass
    return step
