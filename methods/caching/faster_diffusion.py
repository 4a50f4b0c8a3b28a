"""Faster Diffusion: "Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference"."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from evalbench.engine import PlannedSolver, check_choice, execute, nudged
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import (
    Claim,
    Cond,
    Denoiser,
    Edit,
    Features,
    Modifier,
    Share,
    Solver,
    Split,
    Step,
    Time,
    Want,
    both,
)
from evalbench.predictions import convert
from evalbench.registry import register

from ._kept import Keeping, branch, check_keys, key_steps

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_SOURCE = "Faster Diffusion; methods-b entry 3"


def _claim(text: str, baseline: str, effect: float, *, baseline_nfe: int = 0, author: Any = "catalogue") -> Claim:
    return Claim(
        text=text,
        suite="fashion-sd",
        arm="ddim+faster-diffusion",
        baseline=baseline,
        nfe=50,
        baseline_nfe=baseline_nfe,
        metric="paired-median@pixels",
        samples=128,
        direction="lower",
        effect=effect,
        level="E",
        author=author,
        transfer="weak",
        source=_SOURCE,
        witness="tests/methods/test_inside.py",
    )


# sizes are ours: the catalogue gives an order only
CLAIM = (
    _claim(
        "Nine early-dense keys of 50 stay nearer to the fine solution than nine late-dense keys.",
        "ddim+faster-diffusion(keys=50ls-late)",
        0.1,
    ),
    _claim(
        "Propagating the encoder stays nearer to the fine solution than propagating the decoder at the same keys.",
        "ddim+faster-diffusion(propagate=decoder)",
        0.3,
        author="paper",
    ),
    _claim(
        "Nine keys of 50 stay nearer to the fine solution than 32 plain steps; what both cost stands in the table.",
        "ddim",
        0.05,
        baseline_nfe=32,
    ),
)


@register("faster-diffusion")
@dataclass(frozen=True)
class FasterDiffusion(Modifier):
    """Encoder propagation: at key steps the whole network, between them its decoder alone on the last key's features.

    At a non-key step the network's own prediction does not depend on the state, but on its time and conditions; only
    the solver's update sees x. A solver that evaluates more than once in a step does so in full at a key step. A
    UNet's encoder is all up to its middle; of a transformer it is the first 18 of 28 blocks (`at` counts them).

    * `parallel`: the decoder runs of the steps up to the next key are one batch, right after the key: the same
      predictions to rounding. The times are found by a dry run of the solver that evaluates nothing, so they may not
      depend on its states. Rows and FLOPs are what they were.
    * `inject`: once the first evaluation of a step is made, x moves by inject x_T in the second half of the path
      (0.003 in the paper). Needs a solver that is a plan.
    * `propagate="decoder"` is the paper's negative control, in our reading: the encoder runs at every step, the
      decoder's features are the last key's, and its head makes the prediction of them.

    Its keys were chosen for 50 steps, and the paper says that it is weak at few; scaling them to n is ours.

    Attributes:
        keys: `50ls`, `50ls-late`, `uniform:K`, or steps such as `0/1/4`. propagate: `encoder` or `decoder`.
        parallel, inject: see above. at: blocks of a transformer's encoder; 0 is 18 of 28, and what a UNet needs.
    """

    requires = frozenset({"split"})

    keys: str = "50ls"
    propagate: Literal["encoder", "decoder"] = "encoder"
    parallel: bool = False
    inject: float = 0.0
    at: int = 0

    def __post_init__(self) -> None:
        check_choice(self.name, "propagate", self.propagate, ("encoder", "decoder"))
        check_keys(self.name, self.keys)
        if self.parallel and self.propagate == "decoder":
            raise UserError("faster-diffusion: parallel=true needs propagate=encoder; the encoder reads the state")
        if self.at < 0:
            raise UserError(f"faster-diffusion: at must be at least 1, or 0 for 18 of 28 blocks, got {self.at}")

    def check(self, nfe: int, blocks: int) -> None:
        key_steps(self.name, self.keys, nfe)
        if blocks and self.at >= blocks:
            raise UserError(
                f"faster-diffusion: at={self.at}, but the network has {blocks} blocks; give at most {blocks - 1}"
            )

    def modify(self, solver: Solver) -> Solver:
        return _Faster(solver, self)


class _Faster(Solver):
    """A solver on a network whose encoder is propagated."""

    def __init__(self, solver: Solver, settings: FasterDiffusion) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        recorder = _Recorder(denoiser)
        if self.settings.parallel:
            self.solver.sample(recorder, x_T, cond, nfe, noise)
        calls = tuple(recorder.calls) if self.settings.parallel else None
        faster = denoiser.within(lambda inner: _Propagated(inner, self.settings, calls))
        if not self.settings.inject:
            return self.solver.sample(faster, x_T, cond, nfe, noise)
        if not isinstance(self.solver, PlannedSolver):
            raise Unsupported("faster-diffusion(inject) needs a solver that is a plan, such as ddim or dpm-solver++")
        half = 0.5 * denoiser.path.t_start
        plan = self.solver.plan_for(denoiser.path, denoiser.grid, nfe)
        plan = nudged(plan, lambda t: self.settings.inject if t < half else 0.0)
        return execute(plan, faster, x_T, cond, noise)


class _Recorder(Denoiser):
    """Remembers which times a solver asks for; answers with zeros and evaluates nothing."""

    def __init__(self, like: Denoiser) -> None:
        self.path, self.grid, self.shape, self.provides = like.path, like.grid, like.shape, like.provides
        self.calls: list[tuple[int, Time]] = []

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
        if step is None:
            raise Unsupported("not supported: faster-diffusion needs a solver that says its steps")
        self.calls.append((step.i, t))
        return x * 0.0


class _Propagated(Keeping):
    """A network whose decoder runs on old features.

    Args:
        calls: the steps and times that the solver will ask for, in order, where decoders run in one batch; else None.
    """

    def __init__(
        self, inner: Denoiser, settings: FasterDiffusion, calls: Sequence[tuple[int, Time]] | None = None
    ) -> None:
        super().__init__(inner, settings.name)
        self.settings, self.calls = settings, calls
        self.ahead: dict[Hashable, list[torch.Tensor]] = {}  # native predictions for the next calls
        self.asked: dict[Hashable, int] = {}

    def _around(self, inner: Denoiser) -> Self:
        clone = super()._around(inner)
        clone.ahead, clone.asked = {}, {}
        return clone

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable]:
        which, split = branch(cond, rows), self.split(self.settings.at or None)
        decoder = self.settings.propagate == "decoder"
        if self._is_key(self.known(step)) or which not in self.kept:
            features: Features = {}
            self.kept[which] = features
            return (split.keep_decoder if decoder else split.keep)(features), (self.settings, "keep")
        return (split.reuse_decoder if decoder else split.resume)(self.kept[which]), (self.settings, "reuse")

    def _is_key(self, step: Step) -> bool:
        return step.i in key_steps(self.method, self.settings.keys, step.n)

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
        if self.calls is None:
            return super().__call__(x, t, cond, want, step=step, rows=rows)
        return self._parallel(both(), "", x, t, cond, want, step, rows)

    def edited(
        self,
        edit: Edit,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable,
        fraction: Share | None = None,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        if self.calls is None:
            return super().edited(edit, x, t, cond, want, key=key, fraction=fraction, step=step, rows=rows)
        if fraction is not None:
            raise Unsupported("faster-diffusion(parallel=true) cannot stand inside a wrap that computes rows in part")
        return self._parallel(edit, key, x, t, cond, want, step, rows)

    def _parallel(
        self,
        edit: Edit,
        key: Hashable,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want,
        step: Step | None,
        rows: np.ndarray | None,
    ) -> torch.Tensor:
        """A key step and the decoders of all that follow, or what one of these has found."""
        assert self.calls is not None
        which, now = branch(cond, rows), self.known(step)
        place = self.asked.get(which, 0) % len(self.calls)  # a second trajectory starts again
        self.asked[which] = place + 1
        if self.calls[place][0] != now.i:
            raise Unsupported("faster-diffusion(parallel=true) needs a solver whose times do not depend on its states")
        if not self._is_key(now):
            return convert(self.ahead[which].pop(0), x, self.path, t, self.native, want)
        features: Features = {}
        split = self.split(self.settings.at or None)
        keep = both(split.keep(features), edit)
        out = self.inner.edited(keep, x, t, cond, want, key=(self.settings, "keep", key), step=step, rows=rows)
        self.ahead[which] = self._decoders(split, features, edit, key, place, x, cond, now, rows)
        return out

    def _decoders(
        self,
        split: Split,
        features: Features,
        edit: Edit,
        key: Hashable,
        place: int,
        x: torch.Tensor,
        cond: Cond,
        step: Step,
        rows: np.ndarray | None,
    ) -> list[torch.Tensor]:
        """Native predictions of the calls between this one and the next key step."""
        import torch

        assert self.calls is not None
        keys = key_steps(self.method, self.settings.keys, step.n)
        times: list[torch.Tensor] = []
        for i, t in self.calls[place + 1 :]:
            if i in keys:
                break
            times.append(torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x)))
        if not times:
            return []
        n, size = len(times), len(x)
        resume = both(split.resume({name: _repeated(value, n) for name, value in features.items()}), edit)
        repeated = cond.rows(torch.arange(size, device=x.device).repeat(n))
        every = np.tile(np.arange(size) if rows is None else rows, n)
        state, t = x.repeat(n, *(1,) * (x.ndim - 1)), torch.cat(times)
        found = self.inner.edited(
            resume, state, t, repeated, self.native, key=(self.settings, "reuse", key), step=step, rows=every
        )
        return [found[i * size : (i + 1) * size] for i in range(n)]


def _repeated(value: Any, n: int) -> Any:
    """Features of a batch, n times after each other."""
    if isinstance(value, tuple):
        return tuple(_repeated(each, n) for each in value)
    return None if value is None else value.repeat(n, *(1,) * (value.ndim - 1))
