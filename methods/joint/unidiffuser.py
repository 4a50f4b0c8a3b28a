"""UniDiffuser, Bao et al. 2023, One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale.

One network over (image, text), each at a time of its own, gives every distribution of the two:

    joint             both at t
    image             text at t_start, Gaussian noise
    image-given-text  text at 0, the given one; guided for free: out + scale (out - out with the text at t_start)

and the same with image and text exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.predictions import convert, like_rows
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

_SOURCE = "Bao et al., UniDiffuser; methods-a entry 11"
_WITNESS = "tests/methods/test_unidiffuser.py"
CLAIM = (
    Claim(
        text="The unconditional branch of image-given-text, scale -1, is the marginal of the images.",
        suite="gmm-joint",
        arm="unipc+unidiffuser(scale=-1)",
        baseline="unipc+unidiffuser(task=image)",
        nfe=5,
        metric="fd@image-part",
        direction="equal",
        effect=1e-6,
        level="M",
        author="catalogue",
        transfer="fair",
        source=_SOURCE,
        witness=_WITNESS,
    ),
    Claim(
        text="Guidance by the text at t_start makes images agree with their texts more often.",
        suite="gmm-joint",
        arm="unipc+unidiffuser(scale=2)",
        baseline="unipc+unidiffuser",
        nfe=20,
        metric="accuracy@gmm-agreement",
        direction="higher",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        witness=_WITNESS,
    ),
)

Task: TypeAlias = Literal["joint", "image", "text", "image-given-text", "text-given-image"]


@register("unidiffuser")
@dataclass(frozen=True)
class UniDiffuser(Wrap):
    """UniDiffuser's tasks of a joint model by the other modality's time, with guidance for free, under any solver.

    One evaluation per call of the solver; two network rows where `scale` is not 0. What is given is read from the
    suite's measured sample (`cond.measured`) and returned with the sample, where the path ends. A modality that is not
    asked for is held at t_start, at the solver's own start, and goes to 0 in the sample. It is no `cfg`: the
    unconditional branch is the joint network with noise for a condition, and scale 0 is the conditional model.

    Attributes:
        task: what is made, of the modalities `image` and `text`.
        scale: s of out + s (out - unconditional); needs a task with a condition.
    """

    requires = frozenset({"modalities"})

    task: Task = "image-given-text"
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.scale and "-given-" not in self.task:
            raise UserError(f"unidiffuser: scale needs a task with a condition, not '{self.task}'; leave it out")

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        if self.task == "joint":
            return denoiser
        wanted, given, _ = self.task.partition("-given-")
        return _OneModality(denoiser, wanted, conditional=bool(given), scale=self.scale)


class _OneModality(DenoiserWrap):
    """The field in which one modality moves.

    Args:
        wanted: that modality. conditional: the other one is given; else it is noise. scale: of the guidance.
    """

    def __init__(self, inner: Denoiser, wanted: str, *, conditional: bool, scale: float) -> None:
        super().__init__(inner)
        if wanted not in inner.modalities:
            raise Unsupported(f"not supported: the model's modalities are {', '.join(inner.modalities)}, not {wanted}")
        self._where, self._conditional, self._scale = inner.modalities[wanted], conditional, scale

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
        def beside(other: torch.Tensor, t_other: float) -> torch.Tensor:
            """E[x0] with the other modality at `other`, at its own time."""
            clock = x.double()
            times = self._joined(clock.new_full(x.shape, t_other), clock.new_zeros(x.shape) + like_rows(t, clock))
            return self.inner(self._joined(other, x), times, cond, "x0", step=step, rows=rows)

        def alone() -> torch.Tensor:
            return beside(_noise(step, len(x), rows), self.path.t_start)

        if not self._conditional:
            x0, other = alone(), x.new_zeros(x.shape)
        elif cond.measured is None:
            raise Unsupported("not supported: unidiffuser needs a sample to be given, and the suite measures none")
        else:
            x0, other = beside(cond.measured, 0.0), cond.measured
            if self._scale:
                x0 = x0 + self._scale * (x0 - alone())
        return convert(self._joined(other, x0), x, self.path, t, "x0", want)

    def _joined(self, other: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The wanted modality's elements of one, the rest of the other, (B, *S)."""
        both = other.clone()
        both[:, self._where] = wanted[:, self._where]
        return both


def _noise(step: Step | None, n: int, rows: np.ndarray | None) -> torch.Tensor:
    """The state at t_start that sampling began from, for n rows."""
    if step is None or step.x_T is None:
        raise Unsupported("not supported: unidiffuser needs a solver that says which noise it started from")
    return step.x_T if len(step.x_T) == n or rows is None else step.x_T[rows]
