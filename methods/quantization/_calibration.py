"""States to calibrate with: where the full-precision sampler passes, and what people take instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evalbench.errors import UserError
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Preparation, Step, Time, Want
from evalbench.paths import Path

BATCH = 32  # rows of a calibration call


@dataclass(frozen=True)
class States:
    """Inputs of the field: x (N, *S), t (N,) and their conditions."""

    x: torch.Tensor
    t: torch.Tensor
    cond: Cond

    def batches(self) -> Iterator[States]:
        """In blocks of `BATCH`, in order."""
        for rows in torch.split(torch.arange(len(self.x), device=self.x.device), BATCH):
            yield States(self.x[rows], self.t[rows], self.cond.rows(rows))

    def chosen(self, rows: torch.Tensor) -> States:
        """Some rows."""
        return States(self.x[rows], self.t[rows], self.cond.rows(rows))


class _Recorder(DenoiserWrap):
    """Notes where the solver asks."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []

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
        if len(x) == len(cond_rows(cond, x)) and rows is None:  # calls for some of the rows only are not states of all
            self.states.append((x.detach().clone(), times(t, x)))
        return self.inner(x, t, cond, want, step=step, rows=rows)


def cond_rows(cond: Cond, x: torch.Tensor) -> range:
    """One index per row of the conditions."""
    return range(len(x) if cond.labels is None else len(cond.labels))


def times(t: Time, x: torch.Tensor) -> torch.Tensor:
    """A time per row, (B,) on x's device."""
    if isinstance(t, torch.Tensor):
        return t.detach().to(x.dtype).reshape(len(x), -1)[:, 0]
    return x.new_full((len(x),), float(t))


def check_samples(method: str, samples: int) -> None:
    """Raises UserError where a calibration set would be empty."""
    if samples < 1:
        raise UserError(f"{method}: samples must be at least 1, got {samples}: calibration needs images to see")


def share(path: Path, t: torch.Tensor | float) -> Any:
    """t as a share of the path's start, in 0..1."""
    return t / path.t_start


def trajectories(context: Preparation, samples: int, steps: int, seed: int) -> Iterator[list[States]]:
    """The states at which the chain's solver asks the full-precision field, by block of samples.

    Args:
        samples: how many; each costs `steps` evaluations on the preparation's bill. steps: the solver's budget.
    """
    for start in range(0, samples, BATCH):
        indices = range(start, min(start + BATCH, samples))
        noise, cond = context.noise(indices, seed), context.cond(indices)
        recorder = _Recorder(context.denoiser(len(indices)))
        context.solver.sample(recorder, context.x_T(noise), cond, steps, noise)
        yield [States(x, t, cond) for x, t in recorder.states]


def evenly(context: Preparation, samples: int, steps: int, every: int, seed: int) -> States:
    """All states of every `every`-th call of each sample's trajectory, in order of blocks, then calls."""
    return joined([state for block in trajectories(context, samples, steps, seed) for state in block[::every]])


def nearest(context: Preparation, targets: np.ndarray, steps: int, seed: int) -> States:
    """For each sample, the state of its trajectory whose time is nearest to its target.

    Args:
        targets: wanted times as shares of the path's start, (N,).
    """
    found: list[States] = []
    done = 0
    for block in trajectories(context, len(targets), steps, seed):
        size = len(block[0].x)
        wanted = torch.as_tensor(targets[done : done + size], device=block[0].x.device)
        known = torch.stack([share(context.path, state.t) for state in block])  # (calls, rows)
        calls = (known - wanted).abs().argmin(0)
        x = torch.stack([block[int(call)].x[i] for i, call in enumerate(calls)])
        t = torch.stack([block[int(call)].t[i] for i, call in enumerate(calls)])
        found.append(States(x, t, block[0].cond))
        done += size
    return joined(found)


def joined(blocks: list[States]) -> States:
    """States one after another."""
    conds = [block.cond for block in blocks]
    labels = None if conds[0].labels is None else torch.cat([c.labels for c in conds if c.labels is not None])
    captions = None if conds[0].captions is None else sum((c.captions or () for c in conds), ())
    return States(torch.cat([b.x for b in blocks]), torch.cat([b.t for b in blocks]), Cond(labels, captions))


def evaluate(context: Preparation, states: States, wrap: Callable[[Denoiser], Denoiser] | None = None) -> torch.Tensor:
    """The field at states, (N, *S) as x0, on the bill: in full precision, or with a wrap at its network."""
    found = []
    for part in states.batches():
        field = context.denoiser(len(part.x))
        found.append((field if wrap is None else field.within(wrap))(part.x, part.t, part.cond))
    return torch.cat(found)
