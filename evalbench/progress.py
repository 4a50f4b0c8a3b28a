"""The progress bar, with an ETA from forwards x measured cost."""

from __future__ import annotations

import time
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


class ProgressBar:
    """An observer of `runner.run` that draws one bar on a console. Phases (quality, latency) add to its total."""

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
        self._cost = CostModel()
        self._left: tuple[float, float] = (0.0, 0.0)
        self._planned: tuple[float, float] = (0.0, 0.0)
        self._workers = 1
        self.started = time.perf_counter()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, forwards: float, samples: int, workers: int) -> None:
        """A phase begins with this much work."""
        self._left = (self._left[0] + forwards, self._left[1] + samples)
        self._planned = (self._planned[0] + forwards, self._planned[1] + samples)
        self._workers = workers
        self._refresh()

    def landed(self, forwards: float, samples: int, seconds: float) -> None:
        """A chunk landed."""
        self._cost.add(forwards, samples, seconds)
        self._left = (self._left[0] - forwards, self._left[1] - samples)
        self._refresh()

    def note(self, line: str) -> None:
        """A line above the bar."""
        self._bar.console.print(line, markup=False)

    @property
    def eta(self) -> float | None:
        """Seconds left; None before the first chunk."""
        seconds = self._cost.seconds(*self._left)
        return None if seconds is None else seconds / self._workers

    def _refresh(self) -> None:
        done = self._planned[0] - self._left[0]
        eta = self.eta
        text = "" if eta is None else f"about {_human(eta)} left"
        self._bar.update(self._task, description="sampling", completed=done, total=self._planned[0], eta=text)


def _human(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
