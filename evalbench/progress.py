"""The progress bar, with an ETA from forwards x measured cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

MOST_DRAG = 1.3


class CostModel:
    """Seconds of a piece as a * forwards + b * samples, fitted to the pieces that landed."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float]] = []

    def add(self, forwards: float, samples: float, seconds: float) -> None:
        """A piece landed."""
        self._rows.append((forwards, samples, seconds))

    def seconds(self, forwards: float, samples: float) -> float | None:
        """Predicted worker-seconds; None while the pieces seen cannot tell.

        Pieces of one kind (forwards per sample) say nothing about another: a and b need two kinds.
        """
        if not samples:
            return 0.0
        if len(self._kinds) > 1:
            a, b = self._fit()
            return a * forwards + b * samples
        same = self._kinds == {_kind(forwards, samples)}
        return self.per_forward * forwards if same else None

    @property
    def per_forward(self) -> float:
        """Seconds per forward; with one kind of piece seen, its whole time is put on them. 0 before the first."""
        if len(self._kinds) > 1:
            return self._fit()[0]
        forwards = sum(row[0] for row in self._rows)
        return sum(row[2] for row in self._rows) / forwards if forwards else 0.0

    @property
    def _kinds(self) -> set[float]:
        return {_kind(forwards, samples) for forwards, samples, _ in self._rows}

    def _fit(self) -> tuple[float, float]:
        import numpy as np
        from scipy.optimize import nnls

        table = np.asarray(self._rows)
        (a, b), _ = nnls(table[:, :2], table[:, 2])
        return float(a), float(b)


def _kind(forwards: float, samples: float) -> float:
    return round(forwards / samples, 6)


class Phase:
    """Work of one kind: what is left, how many workers share it, and what its pieces cost so far.

    Args:
        forwards, samples: the whole work. workers: how many share it.
    """

    def __init__(self, forwards: float, samples: float, workers: int) -> None:
        self.total = self.forwards = forwards
        self.samples, self.workers = samples, workers
        self.cost = CostModel()
        self._pieces = 0
        self._first, self._last = 0.0, 0.0  # clock from which and to which drag is measured
        self._paid = 0.0  # worker-seconds of the pieces that landed in between

    def landed(self, forwards: float, samples: float, seconds: float, clock: float) -> None:
        """A piece is done at `clock`, after `seconds` on its worker."""
        self.cost.add(forwards, samples, seconds)
        self.forwards = max(0.0, self.forwards - forwards)
        self.samples = max(0.0, self.samples - samples)
        self._pieces += 1
        if self._pieces <= 2 * self.workers:  # workers that still load say nothing about the rest
            self._first = clock
        else:
            self._paid += seconds
        self._last = clock

    @property
    def drag(self) -> float:
        """Wall time over the pieces' own time: what writing, reducing and waiting add. 1 until that is known."""
        if self._paid <= 0.0:
            return 1.0
        # more than the bound is not drag: it is a worker that has not begun yet
        return min(MOST_DRAG, max(1.0, (self._last - self._first) * self.workers / self._paid))

    def seconds_left(self, per_forward: float | None) -> float | None:
        """Wall seconds, by this phase's own pieces; before the first, by another phase's seconds per forward."""
        if 0 < self._pieces < 2 * self.workers and self.forwards:
            return None  # the first piece of each worker pays for warming up
        own = self.cost.seconds(self.forwards, self.samples)
        if own is None and self._pieces == 0 and per_forward is not None:
            own = per_forward * self.forwards
        return None if own is None else self.drag * own / self.workers


class ProgressBar:
    """An observer of `runner.run` that draws one bar on a console, over all phases announced."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            transient=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, eta="")
        self._phases: dict[str, Phase] = {}

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """A phase with this much work is to come."""
        self._phases[phase] = Phase(forwards, samples, workers)

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """A piece of a phase is done."""
        self._phases[phase].landed(forwards, samples, seconds, time.perf_counter())
        self._refresh(phase)

    def cells(self, done: int, total: int, errors: int) -> None:
        """Cells with a record."""

    def workers(self, states: Mapping[str, str]) -> None:
        """What each worker does."""

    def note(self, line: str) -> None:
        """A line above the bar."""
        self._bar.console.print(line, markup=False)

    @property
    def eta(self) -> float | None:
        """Seconds left in all phases; None until the pieces that landed can tell."""
        known = [phase.cost.per_forward * phase.drag for phase in self._phases.values()]
        per_forward = next((seconds for seconds in known if seconds), None)
        left = [phase.seconds_left(per_forward) for phase in self._phases.values()]
        return None if any(seconds is None for seconds in left) else sum(filter(None, left))

    def _refresh(self, phase: str) -> None:
        eta = self.eta
        total = sum(p.total for p in self._phases.values())
        done = total - sum(p.forwards for p in self._phases.values())
        text = "" if eta is None else f"about {_human(eta)} left"
        self._bar.update(self._task, description=phase, completed=done, total=total, eta=text)


def _human(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
