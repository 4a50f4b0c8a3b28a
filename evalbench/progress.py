"""The progress bar, with an ETA from forwards x measured cost."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class CostModel:
    """Seconds of a chunk as a * forwards + b * samples, fitted to the chunks that landed.

    With one kind of chunk only, all of the time is put on the forwards.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float]] = []

    def add(self, forwards: float, samples: float, seconds: float) -> None:
        """A chunk landed."""
        self._rows.append((forwards, samples, seconds))

    def seconds(self, forwards: float, samples: float) -> float | None:
        """Predicted worker-seconds; None before anything landed."""
        if not self._rows:
            return None
        a, b = self._fit()
        return a * forwards + b * samples

    def _fit(self) -> tuple[float, float]:
        total = [sum(column) for column in zip(*self._rows, strict=True)]
        ratios = {round(forwards / samples, 6) for forwards, samples, _ in self._rows}
        if len(ratios) < 2:
            return total[2] / total[0], 0.0
        import numpy as np
        from scipy.optimize import nnls

        table = np.asarray(self._rows)
        (a, b), _ = nnls(table[:, :2], table[:, 2])
        return float(a), float(b)


@dataclass
class Phase:
    """Work of one kind: what is left, how many workers share it, and what its pieces cost so far."""

    forwards: float
    samples: float
    workers: int
    total: float
    cost: CostModel

    def seconds_left(self, per_forward: float) -> float:
        """Wall seconds, by this phase's own pieces; before the first, by another phase's seconds per forward."""
        own = self.cost.seconds(self.forwards, self.samples)
        return (per_forward * self.forwards if own is None else own) / self.workers


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
        self._phases[phase] = Phase(forwards, samples, workers, forwards, CostModel())

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """A piece of a phase is done."""
        current = self._phases[phase]
        current.cost.add(forwards, samples, seconds)
        current.forwards = max(0.0, current.forwards - forwards)
        current.samples = max(0.0, current.samples - samples)
        self._refresh(phase)

    def note(self, line: str) -> None:
        """A line above the bar."""
        self._bar.console.print(line, markup=False)

    @property
    def eta(self) -> float | None:
        """Seconds left in all phases; None before the first piece."""
        known = [phase.cost.seconds(1.0, 0.0) for phase in self._phases.values()]
        per_forward = next((seconds for seconds in known if seconds is not None), None)
        if per_forward is None:
            return None
        return sum(phase.seconds_left(per_forward) for phase in self._phases.values())

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
