"""Diversity distillation: "Distilling Diversity and Control in Diffusion Models" (Gandikota & Bau 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from evalbench.errors import UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Preparation, Solver
from evalbench.paths import grid
from evalbench.registry import register

from ._student import Tuned, ddim, train, tuned_weights
from .mmd_ddm import check_training

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource


@register("diversity-distill")
@dataclass(frozen=True)
class DiversityDistill(Solver):
    """Diversity distillation: the base model walks the student's first interval, the few-step student the rest.

    The student has a grid of `steps` times; the base model, on a grid as many times finer as the budget pays for, goes
    from noise to the student's second time, hands its state over unchanged, and the student makes the other
    `steps - 1` steps: NFE of the base, plus steps - 1. Both by DDIM, both under the suite's guidance. Where the paper
    has a published student (Turbo, LCM, DMD2; without guidance), this one is tuned here as in `mmd-ddm`, before
    sampling and billed. A budget of at most `steps` is the student alone.

    Attributes:
        steps: of the student. iterations, batch, rate, features, seed: of its training, as in `mmd-ddm`.
        hybrid: false for the student alone at every budget, which is what is compared with.
    """

    requires = frozenset({"network", "gradient"})
    replaces_layers = True
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "once"

    steps: int = 4
    iterations: int = 100
    batch: int = 64
    rate: float = 5e-6
    features: Literal["fashion-classifier", "fashion64", "identity"] = "fashion-classifier"
    hybrid: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_training("diversity-distill", self.iterations, self.batch, self.rate, self.seed)
        if self.steps < 2:
            raise UserError(f"diversity-distill: steps must be at least 2, got {self.steps}")

    def prepare(self, context: Preparation) -> Artifact:
        return train(context, self.steps, self.iterations, self.batch, self.rate, 0.5, self.features, self.seed)

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        weights = tuned_weights(self.prepared(), denoiser.network)
        student = denoiser.within(lambda inner: Tuned(inner, weights))
        own = grid(denoiser.path, "time", min(self.steps, nfe))
        if not self.hybrid or nfe < self.steps:
            return ddim(student, x_T, cond, own, 0, len(own) - 1)
        first = nfe - (self.steps - 1)
        fine = grid(denoiser.path, "time", first * self.steps)[: first + 1]
        x = ddim(denoiser, x_T, cond, (*fine[:-1], own[1]), 0, nfe)
        return ddim(student, x, cond, own[1:], first, nfe)


CLAIM = Claim(
    text="With the base model on the first interval the samples are nearer to the data than the student's alone",
    suite="fashion-dit",
    arm="diversity-distill(steps=4,iterations=200,batch=64,rate=0.00005)",
    baseline="diversity-distill(steps=4,iterations=200,batch=64,rate=0.00005,hybrid=false)",
    nfe=7,
    baseline_nfe=4,
    metric="fd@fashion64",
    samples=512,
    direction="lower",
    effect=0.1,
    level="E",
    author="paper",
    transfer="weak",
    source="Distilling Diversity and Control; catalogue A 3",
    prepare_seeds=(0, 1, 2),
    witness="tests/methods/test_fewstep.py",
)
