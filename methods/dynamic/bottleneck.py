"""Bottleneck Sampling: "Training-free Diffusion Acceleration with Bottleneck Sampling"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evalbench.engine import PlannedSolver, execute
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, Modifier, Solver
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_SOURCE = "Bottleneck Sampling; methods-a entry 18 (its constants are not public; stages and noise levels are ours)"
CLAIM = (
    Claim(
        text="Twenty steps, the middle half at half the resolution, are nearer to the data than 13 full steps.",
        suite="fashion-dit",
        arm="ddim+bottleneck",
        baseline="ddim",
        nfe=20,
        baseline_nfe=13,
        metric="fd@fashion64",
        samples=512,
        direction="lower",
        effect=0.1,
        level="E",
        author="catalogue",
        transfer="weak",
        source=_SOURCE,
        witness="tests/methods/test_bottleneck.py",
    ),
    Claim(
        text="Without noise put back at the changes of resolution, samples are further from the data.",
        suite="fashion-dit",
        arm="ddim+bottleneck(renoise=1.0)",
        baseline="ddim+bottleneck",
        nfe=20,
        metric="fd@fashion64",
        samples=512,
        direction="higher",
        effect=0.1,
        level="E",
        author="paper",
        transfer="weak",
        source=_SOURCE,
        witness="tests/methods/test_bottleneck.py",
    ),
)


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Modifier):
    """High, low and high resolution along one trajectory; noise is put back at each change.

    The steps are split by shares among three stages. A stage ends with its last x0, which is resized (area down,
    bicubic up); the next stage starts from alpha x0 + sigma n, n fresh, at `renoise` times the time where the stage
    before stood, so a little noisier. Its times are evenly spaced in u, mapped by t = t_0 s u / (1 + (s - 1) u)
    with the shift s, which puts more steps at high noise. A stage too short for a step is left out, the last never is.

    The paper's code is not public: this is the form that a follow-up describes, with stages of our own. Needs a model
    that is good at both resolutions (`fashion-dit` was trained on both), and a solver that is a plan.

    Attributes:
        first, low: share of the steps of the first stage, and of the one at half the resolution; the rest comes last.
        renoise: time that a stage starts from, over the time that the stage before stopped at, at least 1.
        shift: s above, at least 1; of the stages after the first.
    """

    requires = frozenset({"network"})

    first: float = 0.2
    low: float = 0.5
    renoise: float = 1.2
    shift: float = 1.5

    def __post_init__(self) -> None:
        if not (self.first >= 0.0 and self.low >= 0.0 and self.first + self.low < 1.0):
            raise UserError(f"bottleneck: first + low must be below 1, got {self.first} + {self.low}")
        if self.renoise < 1.0 or self.shift < 1.0:
            raise UserError(f"bottleneck: renoise and shift must be at least 1, got {self.renoise}, {self.shift}")

    def modify(self, solver: Solver) -> Solver:
        return _Stages(solver, self)

    def stages(self, n: int) -> list[tuple[int, bool]]:
        """Steps of each stage of n, and whether it is at the low resolution."""
        first, low = round(self.first * n), round(self.low * n)
        last = max(n - first - low, 1)
        low = min(low, n - first - last)
        return [(steps, at_low) for steps, at_low in ((first, False), (low, True), (last, False)) if steps > 0]

    def times(self, t_start: float, n: int) -> list[tuple[float, ...]]:
        """The falling times at which each stage evaluates."""
        found: list[tuple[float, ...]] = []
        t, done = t_start, 0
        for steps, _ in self.stages(n):
            # where the stage would stand after its steps on an even grid
            done += steps
            end = t_start * (1.0 - done / n)
            s = self.shift if found else 1.0
            u = [1.0 - j * (1.0 - end / t) / steps for j in range(steps + 1)]
            mapped = [t * s * v / (1.0 + (s - 1.0) * v) for v in u]
            found.append(tuple(mapped[:-1]))
            t = min(t_start, self.renoise * mapped[-1])
        return found


class _Stages(Solver):
    """A planned solver that changes the resolution on its way."""

    def __init__(self, solver: Solver, settings: Bottleneck) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        if not isinstance(self.solver, PlannedSolver):
            raise Unsupported("bottleneck needs a solver that is a plan, such as ddim, heun or dpm-solver++")
        path, settings = denoiser.path, self.settings
        n = self.solver.steps_for(path, nfe)
        x, x0 = x_T, None
        stages = zip(settings.stages(n), settings.times(path.t_start, n), strict=True)
        for k, ((_, low), times) in enumerate(stages):
            n_k = noise.normal("bottleneck", k)
            if x0 is not None:
                x0 = _resized(x0, x_T.shape[-2:], low=low)
                x = float(path.alpha(times[0])) * x0 + float(path.sigma(times[0])) * (_pooled(n_k) if low else n_k)
            elif low:
                x = _pooled(x_T)
            # a last step to t = 0 returns x0
            x0 = execute(self.solver.plan(path, _ending(times)), denoiser, x, cond, noise)
        assert x0 is not None
        return x0


def _ending(times: Sequence[float]) -> tuple[float, ...]:
    return (*times, 0.0)


def _pooled(noise: torch.Tensor) -> torch.Tensor:
    """Normals of the same size at half the resolution: half the sum of four is one again, independent of the others."""
    import torch

    return 2.0 * torch.nn.functional.avg_pool2d(noise, 2)


def _resized(x0: torch.Tensor, size: Sequence[int], *, low: bool) -> torch.Tensor:
    """x0 at full resolution `size`, or at half of it."""
    import torch

    wanted = [side // 2 if low else side for side in size]
    if list(x0.shape[-2:]) == wanted:
        return x0
    if low:
        return torch.nn.functional.avg_pool2d(x0, 2)
    return torch.nn.functional.interpolate(x0, wanted, mode="bicubic", align_corners=False)
