"""Golden seeds, "Good Seed Makes a Good Crop: Discovering Secret Seeds in Text-to-Image Diffusion Models"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evalbench.engine import check_choice
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Modifier, Preparation, Solver
from evalbench.noise import NoiseSource
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

_LOOKED_AT = 1000  # samples whose labels are looked at
_SOURCE = "Good Seed Makes a Good Crop; methods-a entry 28"
CLAIM = Claim(
    text="Batches of the 5 % of seeds that are best on half of the labels have a lower Frechet distance (size ours).",
    suite="gmm-smooth",
    arm="ddim+golden-seed(seeds=40,keep=2,block=512)",
    baseline="ddim",
    nfe=10,
    metric="fd@identity",
    direction="lower",
    effect=0.1,
    level="E",
    author="catalogue",
    transfer="none",
    source=f"{_SOURCE}: top 5 % of seeds chosen on half of the prompts against random ones",
    samples=1024,
    prepare_seeds=(0, 1, 2),
    witness="tests/methods/test_golden_seed.py",
)


@register("golden-seed")
@dataclass(frozen=True)
class GoldenSeed(Modifier):
    """Golden seeds: samples start from the noise of seeds that did best on a part of the conditions.

    In the paper a seed is one x_T (and the noise of every step), used for many prompts, and has an FID over them.
    Three labels are no such set, so here a seed is what `torch.manual_seed` fixes for a batch: x_T and step noise of
    a block of `block` samples, shared by all conditions. `prepare` samples each block with the chain's solver under
    two halves of the conditions, A and B, at the budget of the cell it is prepared for; a seed's score on a half is
    the Frechet distance of its block to clean data of the same labels. The `keep` best on A are the pool. Its facts
    hold the paper's test: Spearman's rank correlation of the scores on A and B with a 95 % interval (Fisher's z,
    seeds drawn independently), and the mean score on B of the pool and of all seeds.

    * `halves="conditions"`: halves of the labels, the same noise, as in the paper.
    * `halves="noise"`: halves of the block under all labels. The halves share no random number, so the correlation is
      zero for any model, and a pool says nothing about other noise: the null of the test.

    Sample i starts from sample i mod (keep * block) of the pool, the first seed's block first, and keeps its own
    label. A deterministic solver would repeat itself where a start comes again under the same label, so samples
    beyond keep * block are refused; choose keep * block >= N, rounded up to whole batches. Run seeds change nothing
    then, only `seed` does, and starts are not paired with other methods'. Choosing among blocks also lowers a distance
    that other noise of the same seed would not have: this is choosing starts, and says nothing about seeds of networks
    that were trained.
    The preference score and the farthest-point selection of the paper are not here.

    Attributes:
        seeds: candidates, at least 4. keep: size of the pool, below seeds. block: samples of a seed, at least 4.
        halves: `conditions` or `noise`.
        seed: draws the candidates' noise and the data that they are scored against.
    """

    prepares = "per-nfe"

    seeds: int = 8
    keep: int = 2
    block: int = 32
    halves: Literal["conditions", "noise"] = "conditions"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("golden-seed", "halves", self.halves, ("conditions", "noise"))
        if not (self.seeds >= 4 and 1 <= self.keep < self.seeds and self.block >= 4 and self.seed >= 0):
            raise UserError(
                "golden-seed: needs seeds >= 4, 1 <= keep < seeds, block >= 4 and seed >= 0, got "
                f"seeds={self.seeds}, keep={self.keep}, block={self.block}, seed={self.seed}"
            )

    def prepare(self, context: Preparation) -> Artifact:
        halves = self._halves(context)
        distances = [context.distance_to(data_of(context, labels, self.seed)) for _, labels in halves]
        scores = np.zeros((2, self.seeds))
        source = context.noise(range(1), self.seed)
        for k in range(self.seeds):
            for half, (slots, labels) in enumerate(halves):
                noise = context.noise([k * self.block + j for j in slots], self.seed)
                scores[half, k] = distances[half](_generate(context, noise, labels))
        pool = np.argsort(scores[0], kind="stable")[: self.keep]
        rho, low, high = spearman(scores[0], scores[1])
        facts = {
            "noise_seed": source.seed,
            "nfe": context.nfe,
            "spearman": rho,
            "spearman_low": low,
            "spearman_high": high,
            "pool_on_b": float(scores[1, pool].mean()),
            "all_on_b": float(scores[1].mean()),
        }
        return Artifact({"pool": pool, "on_a": scores[0], "on_b": scores[1]}, facts)

    def modify(self, solver: Solver) -> Solver:
        return FromPool(solver, self)

    def _halves(self, context: Preparation) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Slots of a block and the labels that they are sampled under, of A and B.

        Raises:
            Unsupported: halves of the conditions, where there are not two of them.
        """
        found = context.cond(range(_LOOKED_AT)).labels
        labels = [] if found is None else sorted(set(found.tolist()))
        slots = range(self.block)
        if self.halves == "noise":
            middle = self.block // 2
            return [(slots[:middle], labels), (slots[middle:], labels)]
        if len(labels) < 2:
            raise Unsupported("golden-seed: halves=conditions needs two labels or more; use halves=noise")
        middle = (len(labels) + 1) // 2
        return [(slots, labels[:middle]), (slots, labels[middle:])]


def _generate(context: Preparation, noise: NoiseSource, labels: Sequence[int]) -> torch.Tensor:
    """Samples of the chain's solver from a noise source, under `labels` in turn."""
    cond = context.cond(range(_LOOKED_AT))
    if labels:
        assert cond.labels is not None
        first = {label: i for i, label in reversed(list(enumerate(cond.labels.tolist())))}
        cond = context.cond([first[labels[j % len(labels)]] for j in range(len(noise.samples))])
    else:
        cond = context.cond(range(len(noise.samples)))
    denoiser = context.denoiser(len(noise.samples))
    return context.solver.sample(denoiser, context.x_T(noise), cond, context.nfe, noise)


class FromPool(Solver):
    """A solver that starts from the pool's noise."""

    def __init__(self, solver: Solver, settings: GoldenSeed) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        artifact, block = self.settings.prepared(), self.settings.block
        pool = artifact.arrays["pool"]
        room = len(pool) * block
        if max(noise.samples) >= room:
            raise Unsupported(
                f"golden-seed: {len(pool)} seeds of {block} samples hold {room} starts, sample {max(noise.samples)} "
                "would repeat one; raise keep or block"
            )
        starts = [int(pool[i // block]) * block + i % block for i in noise.samples]
        chosen = NoiseSource(int(artifact.facts["noise_seed"]), starts, noise.shape, noise.dtype, noise.device)
        start = chosen.start() * float(denoiser.path.sigma(denoiser.path.t_start))
        return self.solver.sample(denoiser, start, cond, nfe, chosen)


# --- scores ----------------------------------------------------------------------------------------------------------


def data_of(context: Preparation, labels: Sequence[int], seed: int) -> torch.Tensor:
    """Clean samples of these labels; of all labels where there are none."""
    x, cond = context.data(_REFERENCE, seed)
    if labels and cond.labels is not None:
        wanted = cond.labels.new_tensor(list(labels))
        x = x[(cond.labels[:, None] == wanted).any(1)]
    return x


_REFERENCE = 4096  # clean samples of all labels


def spearman(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation of distinct values with its 95 % interval; n >= 4.

    Fisher's z with the variance 1.06 / (n - 3); the tests simulate its coverage.
    """
    ranks: list[Any] = [np.argsort(np.argsort(values)) for values in (a, b)]
    rho = float(np.corrcoef(*ranks)[0, 1])
    z = math.atanh(max(min(rho, 1.0 - 1e-12), -1.0 + 1e-12))
    half = 1.959964 * math.sqrt(1.06 / (len(a) - 3))
    return rho, math.tanh(z - half), math.tanh(z + half)
