"""AutoDiffusion: "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures"."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np

from evalbench.engine import Plan, check_choice, execute, linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Edit, NetworkWrap, Preparation, Solver, Step
from evalbench.paths import Path
from evalbench.registry import register

from .clock import table
from .oracle import Oracle

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

Steps: TypeAlias = tuple[int, ...]  # training steps in the order the search holds them, which is not sorted
Layers: TypeAlias = tuple[frozenset[int], ...]  # blocks that each step leaves out, in the same order; () for none
Candidate: TypeAlias = tuple[Steps, Layers]
T = TypeVar("T")

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


_SEARCH = "population=10,epochs=3,samples=256"


def _layers_claim(text: str, baseline: str, *, baseline_nfe: int = 0) -> Claim:
    # one block of six is left out on average: 10 steps cost 8.34
    return Claim(
        text=text,
        suite="fashion-dit",
        arm=f"autodiffusion({_SEARCH},layers=0.834)",
        baseline=baseline,
        nfe=10,
        baseline_nfe=baseline_nfe,
        metric="fd@fashion64",
        samples=512,
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source="AutoDiffusion; methods-a entry 40 (c); sizes are ours",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_autodiffusion.py",
    )


# 0.563 against 1.324 and 1.846 in the catalogue's check
CLAIM = (
    _claim("uniform", 0.57),
    _claim("quadratic", 0.69),
    _layers_claim(
        "Ten searched steps without a sixth of the blocks are nearer to the data than nine full searched steps.",
        f"autodiffusion({_SEARCH})",
        baseline_nfe=9,
    ),
    _layers_claim(
        "Left-out blocks searched for each of ten steps are nearer to the data than the middle one left out in all.",
        f"autodiffusion({_SEARCH})+layer-skip",
    ),
    _layers_claim(
        "Ten searched steps without a sixth of the blocks are nearer to the data than two cached every other step.",
        f"autodiffusion({_SEARCH})+interval-cache(every=2,blocks=2-3)",
    ),
)


@register("autodiffusion")
@dataclass(frozen=True)
class AutoDiffusion(Solver):
    """AutoDiffusion: an evolution over sets of S training steps for DDIM, and the blocks each leaves out.

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
    one (`variant="paper"`). It is not `ddim` on a named grid (`grid=quadratic` has most of the gain at 10 steps), nor
    `s3`, which searches the solver too.

    With `layers` below 1 every step carries the blocks that it leaves out (of a UNet a resnet is its shortcut and an
    attention body nothing; of a transformer whole blocks). All candidates leave out the same number in all, so that
    blocks and not costs are searched; the paper's limit is a bound, and it opens over the epochs. Crossing takes a step
    with its blocks, after which blocks at random are put back or left out until the number is right. A mutation
    replaces each left-out block with the same probability by one that runs; in the release that has no effect, so
    there crossing alone moves blocks.

    On VP paths training step i is t = (i + 1) / 1000. On others the steps are 1000 times evenly spaced on the clock of
    `usf`, and the start is scaled to the level of the largest step, for data of unit variance.

    Attributes:
        population: candidates of an epoch; the paper's is 50. epochs: the paper's is 10. The defaults are a smoke test.
        samples: samples a candidate is scored with, 1000..5000 in the paper. Well above the number of features, or
            their covariance decides nothing.
        variant: `paper` or `released`, see above.
        layers: share of the blocks of all steps that run, in (0, 1]; 1 searches the time steps alone.
        seed: of the search.
    """

    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "per-nfe"

    population: int = 10
    epochs: int = 2
    samples: int = 64
    variant: Literal["paper", "released"] = "paper"
    layers: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("autodiffusion", "variant", self.variant, ("paper", "released"))
        for name, least in (("population", 4), ("epochs", 1), ("samples", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"autodiffusion: {name} must be at least {least}, got {getattr(self, name)}")

        if not 0.0 < self.layers <= 1.0:
            raise UserError(f"autodiffusion: layers must be in (0, 1], got {self.layers}")
        if self.layers < 1.0:
            object.__setattr__(self, "requires", frozenset({"blocks"}))

    def check(self, nfe: int, blocks: int) -> None:
        if blocks and int(self.layers * nfe * blocks) < 1:
            raise UserError(
                f"autodiffusion: layers={self.layers} leaves none of the {blocks} blocks in {nfe} steps; "
                f"give at least {math.ceil(1000 / (nfe * blocks)) / 1000}"
            )

    def prepare(self, context: Preparation) -> Artifact:
        if context.nfe > TABLE // 2:
            raise Unsupported(f"autodiffusion: at most {TABLE // 2} of {TABLE} steps, the budget is {context.nfe}")
        oracle = Oracle(context, self.samples, self.seed)
        skips = self._skips(context) if self.layers < 1.0 else None
        scored = evolve(
            lambda candidate: oracle(ddim_plan(context.path, candidate[0]), thinned(self.name, candidate)),
            context.rng(self.seed),
            context.nfe,
            self.population,
            self.epochs,
            repair=self.variant == "paper",
            skips=skips,
        )
        best = min(scored, key=lambda candidate: scored[candidate])
        if not math.isfinite(scored[best]):
            raise Unsupported(f"autodiffusion: none of {len(scored)} candidates has a finite distance; raise samples=")
        facts: dict[str, Any] = {"steps": list(best[0])}
        if skips:
            facts["skipped"] = [sorted(blocks) for blocks in best[1]]
        uniform = next(iter(scored.values()))  # the first candidate
        return Artifact(facts=facts | {"score": scored[best], "uniform_score": uniform, "evaluations": len(scored)})

    def _skips(self, context: Preparation) -> Skips:
        blocks = len(context.denoiser(1).blocks.names)
        every = context.nfe * blocks
        return Skips(blocks, every - max(int(self.layers * every), 1), mutates=self.variant == "paper")

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        facts = self.prepared().facts
        steps = facts["steps"]
        if len(steps) > nfe:
            raise Unsupported(f"autodiffusion: {len(steps)} steps were searched, the budget is {nfe}")
        candidate = (tuple(steps), tuple(frozenset(blocks) for blocks in facts.get("skipped", ())))
        plan = ddim_plan(denoiser.path, steps)
        return execute(plan, thinned(self.name, candidate)(denoiser), x_T, cond, noise)


def thinned(method: str, candidate: Candidate) -> Callable[[Denoiser], Denoiser]:
    """The field on a network that leaves a candidate's blocks out, as `ddim_plan` walks its steps."""
    steps, layers = candidate
    if not any(layers):
        return lambda denoiser: denoiser
    of_step = dict(zip(steps, layers, strict=True))
    walk = [sorted(of_step[step]) for step in sorted(of_step, reverse=True)]
    return lambda denoiser: denoiser.within(lambda inner: _Thinned(inner, method, walk))


class _Thinned(NetworkWrap):
    """A network that leaves out blocks of its own at each step."""

    def __init__(self, inner: Denoiser, method: str, walk: Sequence[Sequence[int]]) -> None:
        super().__init__(inner)
        self.method, self.walk = method, walk

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable] | None:
        assert step is not None  # a plan says its steps
        skipped = self.walk[step.i]
        if not skipped:
            return None
        names = self.blocks.names
        return self.blocks.bypass([names[k] for k in skipped]), (self.method, tuple(skipped))


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
    score: Callable[[Candidate], float],
    rng: np.random.Generator,
    n: int,
    population: int,
    epochs: int,
    *,
    repair: bool,
    skips: Skips | None = None,
) -> dict[Candidate, float]:
    """Score of every candidate that was tried, by its rising steps with what they leave out; the first is uniform."""
    scored: dict[Candidate, float] = {}
    best: list[Candidate] = []  # as the search holds them
    possible = math.comb(TABLE, n) * (skips.possible(n) if skips else 1)

    def tried(candidate: Candidate) -> bool:
        """Whether a candidate was new, and is scored now."""
        key = rising(candidate)
        if key in scored:
            return False
        scored[key] = score(key)
        best.append(candidate)
        return True

    for epoch in range(epochs):
        if epoch == 0:
            made = _first(rng, n, population, skips)
        else:
            made = _next(rng, n, population, list(best), repair=repair, skips=skips)
        added = sum(tried(candidate) for candidate in made)
        while added < population and len(scored) < possible:
            added += tried(_random(rng, n, skips))
        best.sort(key=lambda candidate: scored[rising(candidate)])
        del best[max(2, population // 5) :]
    return scored


def rising(candidate: Candidate) -> Candidate:
    """The candidate with its steps in order, each once, with what the first of equal ones leaves out."""
    steps, layers = candidate
    if not layers:
        return distinct(steps), ()
    of_step: dict[int, frozenset[int]] = {}
    for step, blocks in zip(steps, layers, strict=True):
        of_step.setdefault(step, blocks)
    order = sorted(of_step)
    return tuple(order), tuple(of_step[step] for step in order)


def _first(rng: np.random.Generator, n: int, population: int, skips: Skips | None) -> Iterator[Candidate]:
    uniform = uniform_steps(n)
    yield uniform, skips.random(rng, n) if skips else ()
    for _ in range(population // 2):
        yield _random(rng, n, skips)
    for _ in range(population - population // 2 - 1):
        steps = mutated(rng, uniform, NEAR_UNIFORM)
        yield steps, skips.random(rng, n) if skips else ()


def _next(
    rng: np.random.Generator, n: int, population: int, best: Sequence[Candidate], *, repair: bool, skips: Skips | None
) -> Iterator[Candidate]:
    for _ in range(population // 2):
        steps, layers = best[int(rng.integers(len(best)))]
        steps = mutated(rng, steps, MUTATED)
        yield steps, skips.mutated(rng, layers, MUTATED) if skips else ()
    for _ in range(population // 4):
        (a, a_layers), (b, b_layers) = (best[int(rng.integers(len(best)))] for _ in range(2))
        if not skips:
            child = crossed(rng, a, b)
            yield repaired(rng, child, n) if repair else child, ()
            continue
        genes = crossed(rng, tuple(zip(a, a_layers, strict=True)), tuple(zip(b, b_layers, strict=True)))
        child = tuple(step for step, _ in genes)
        layers = skips.balanced(rng, tuple(blocks for _, blocks in genes))
        yield repaired(rng, child, n) if repair else child, layers


def _random(rng: np.random.Generator, n: int, skips: Skips | None) -> Candidate:
    steps = random_steps(rng, n)
    return steps, skips.random(rng, n) if skips else ()


@dataclass(frozen=True)
class Skips:
    """How blocks are left out: `total` of them over all steps of a candidate, of a network of `blocks`."""

    blocks: int
    total: int
    mutates: bool = True

    def possible(self, n: int) -> int:
        """Number of ways over n steps."""
        return math.comb(n * self.blocks, self.total)

    def random(self, rng: np.random.Generator, n: int) -> Layers:
        """Any of them."""
        return self._layers(rng.choice(n * self.blocks, self.total, replace=False), n)

    def mutated(self, rng: np.random.Generator, layers: Layers, probability: float) -> Layers:
        """Each left-out block replaced with a probability by one that runs."""
        if not self.mutates:
            return layers
        kept = [k for k in self._places(layers) if rng.random() >= probability]
        out = set(self._places(layers))
        running = [k for k in range(len(layers) * self.blocks) if k not in out]
        moved = min(self.total - len(kept), len(running))
        new = rng.choice(running, moved, replace=False).tolist() if moved else []
        return self.balanced(rng, self._layers([*kept, *new], len(layers)))

    def balanced(self, rng: np.random.Generator, layers: Layers) -> Layers:
        """`total` left out: blocks at random are put back, or left out as well."""
        out = self._places(layers)
        if len(out) >= self.total:
            return self._layers(rng.choice(out, self.total, replace=False) if self.total else [], len(layers))
        known = set(out)
        running = [k for k in range(len(layers) * self.blocks) if k not in known]
        return self._layers([*out, *rng.choice(running, self.total - len(out), replace=False)], len(layers))

    def _places(self, layers: Layers) -> list[int]:
        """Left-out blocks counted through all steps."""
        return [i * self.blocks + block for i, blocks in enumerate(layers) for block in sorted(blocks)]

    def _layers(self, places: Sequence[int] | np.ndarray, n: int) -> Layers:
        by_step: Mapping[int, set[int]] = {i: set() for i in range(n)}
        for place in places:
            by_step[int(place) // self.blocks].add(int(place) % self.blocks)
        return tuple(frozenset(by_step[i]) for i in range(n))


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


def crossed(rng: np.random.Generator, a: Sequence[T], b: Sequence[T]) -> tuple[T, ...]:
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
