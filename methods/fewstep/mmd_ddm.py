"""MMD-DDM: "Fast Inference in Denoising Diffusion Models via MMD Finetuning" (Aiello et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from evalbench.engine import check_least
from evalbench.errors import UserError
from evalbench.interfaces import Artifact, Claim, Denoiser, Preparation, Wrap
from evalbench.registry import register

from ._student import Tuned, train, tuned_weights


@register("mmd-ddm")
@dataclass(frozen=True)
class MMDDDM(Wrap):
    """MMD-DDM: the network is fine-tuned for the budget's few DDIM steps, the gradient going through all of them.

    The loss is the unbiased squared MMD with the kernel (<a, b> / D + 1)^3 between features of generated and of real
    images; Adam with clipped gradients, from the network's own weights, under the suite's guidance. The features are of
    a network other than the one that the suite ranks by, or the result would be circular: `features=fashion-classifier`
    (its 96 last hidden units) where the suite has fd@fashion64. One set of weights per budget: at other budgets the
    tuned network is worse. Samples are then drawn by the chain's solver, `ddim` in the paper. Training data is the
    search split. Needs the network and its gradients; forwards and backward passes are on the preparation's bill.

    Attributes:
        iterations: the paper's 10^2..10^3. batch: of a step, the paper's 64.
        rate: Adam's, the paper's 5e-6 from a large network. clip: largest norm of a gradient, 0.5.
        features: `fashion-classifier`, `fashion64` or `identity` (the samples themselves). seed: of noise and data.
    """

    requires = frozenset({"network", "gradient"})
    replaces_layers = True
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = "per-nfe"

    iterations: int = 100
    batch: int = 64
    rate: float = 5e-6
    clip: float = 0.5
    features: Literal["fashion-classifier", "fashion64", "identity"] = "fashion-classifier"
    seed: int = 0

    def __post_init__(self) -> None:
        check_training("mmd-ddm", self.iterations, self.batch, self.rate, self.seed)

    def prepare(self, context: Preparation) -> Artifact:
        rest = (self.iterations, self.batch, self.rate, self.clip, self.features, self.seed)
        return train(context, context.nfe, *rest)

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        weights = tuned_weights(self.prepared(), denoiser.network)
        return denoiser.within(lambda inner: Tuned(inner, weights))


def check_training(method: str, iterations: int, batch: int, rate: float, seed: int) -> None:
    """Raises UserError for a training that is none."""
    check_least(method, 1, iterations=iterations)
    check_least(method, 2, batch=batch)
    check_least(method, 0, seed=seed)
    if not rate > 0.0:
        raise UserError(f"{method}: rate must be above 0, got {rate}")


def _claim(text: str, arm_nfe: int, direction: Literal["lower", "higher"], effect: float) -> Claim:
    return Claim(
        text=text,
        suite="fashion-dit",
        arm="ddim+mmd-ddm(iterations=200,batch=64,rate=0.00005)",
        baseline="ddim",
        nfe=arm_nfe,
        metric="fd@fashion64",
        samples=512,
        direction=direction,
        effect=effect,
        level="E",
        author="catalogue",
        transfer="weak",
        source="MMD-DDM; catalogue A 21. Other features are optimised than the ones that judge",
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_fewstep.py",
    )


CLAIM = (
    _claim("Five DDIM steps tuned by MMD on other features are nearer to the data than five untuned", 5, "lower", 0.2),
)
