"""What a run shows while it runs: cells, speed, workers, and the time left from forwards x measured cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

MOST_DRAG = 1.3
_RECENT = 50  # pieces whose speed is shown
_SILENCE = 30.0  # seconds between plain lines
_WORKERS_SHOWN = 8


class CostModel:
    """Seconds of a piece as a * forwards + b * samples, a and b at least 0, fitted to the pieces that landed.

    Only sums over pieces are kept: a run has millions of them.
    """

    def __init__(self) -> None:
        self._kinds: set[float] = set()
        self._forwards = self._seconds = 0.0
        self._ff = self._fs = self._ss = self._fy = self._sy = 0.0  # f: forwards, s: samples, y: seconds

    def add(self, forwards: float, samples: float, seconds: float) -> None:
        """A piece landed."""
        self._kinds.add(_kind(forwards, samples))
        self._forwards += forwards
        self._seconds += seconds
        self._ff += forwards * forwards
        self._fs += forwards * samples
        self._ss += samples * samples
        self._fy += forwards * seconds
        self._sy += samples * seconds

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
        return self._seconds / self._forwards if self._forwards else 0.0

    def _fit(self) -> tuple[float, float]:
        """Least squares by the normal equations; where one of the two would be negative, the other has all."""
        determinant = self._ff * self._ss - self._fs**2
        a = (self._ss * self._fy - self._fs * self._sy) / determinant
        b = (self._ff * self._sy - self._fs * self._fy) / determinant
        if b < 0:
            return self._fy / self._ff, 0.0
        return (a, b) if a >= 0 else (0.0, self._sy / self._ss)


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


class Tracker:
    """An observer of `runner.run` that adds up what it is told; what shows it overrides `changed` and `note`."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.phase = "starting"
        self.done, self.cells_planned, self.errors = 0, 0, 0
        self.states: dict[str, str] = {}
        self._landings: deque[float] = deque(maxlen=_RECENT)  # when the last pieces landed

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """A phase with this much work is to come."""
        self.phases[phase] = Phase(forwards, samples, workers)
        self.changed()

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """A piece of a phase is done."""
        self.phase = phase
        self._landings.append(time.perf_counter())
        # a chunk that was found damaged is computed without having been announced
        self.phases.setdefault(phase, Phase(forwards, samples, 1)).landed(
            forwards, samples, seconds, self._landings[-1]
        )
        self.changed()

    def cells(self, done: int, total: int, errors: int) -> None:
        """Cells with a record."""
        self.done, self.cells_planned, self.errors = done, total, errors
        self.changed()

    def workers(self, states: Mapping[str, str]) -> None:
        """What each worker does; shown with the next piece."""
        self.states = dict(states)

    def note(self, line: str) -> None:
        """Something worth a line."""

    def changed(self) -> None:
        """There is something new to show."""

    @property
    def eta(self) -> float | None:
        """Seconds left in all phases; None until the pieces that landed can tell."""
        known = [phase.cost.per_forward * phase.drag for phase in self.phases.values()]
        per_forward = next((seconds for seconds in known if seconds), None)
        left = [phase.seconds_left(per_forward) for phase in self.phases.values()]
        return None if any(seconds is None for seconds in left) else sum(filter(None, left))

    @property
    def total(self) -> float:
        """Forwards of all phases."""
        return sum(phase.total for phase in self.phases.values())

    @property
    def fraction(self) -> float:
        """Share of the forwards that is done, 0 to 1; 1 when there are none."""
        return 1.0 - sum(phase.forwards for phase in self.phases.values()) / self.total if self.total else 1.0

    @property
    def rate(self) -> float | None:
        """Pieces per second, of the last that landed; None before the second."""
        took = self._landings[-1] - self._landings[0] if len(self._landings) > 1 else 0.0
        return (len(self._landings) - 1) / took if took > 0.0 else None

    @property
    def facts(self) -> str:
        """Cells, errors, speed and time left, in words."""
        eta, rate = self.eta, self.rate
        parts = [
            f"{self.done} of {self.cells_planned} cells" if self.cells_planned else "",
            f"{self.errors} {'error' if self.errors == 1 else 'errors'}" if self.errors else "",
            "" if rate is None else f"{rate:.3g} chunks/s",
            "" if eta is None else f"about {human(eta)} left",
        ]
        return ", ".join(filter(None, parts))


class ProgressBar(Tracker):
    """One bar over all phases with a line per worker; on what is no terminal, a plain line now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self._spoke, self._told = time.perf_counter(), -1

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def changed(self) -> None:
        if self._live:
            self._live.update(self._picture(), refresh=True)
        elif self._is_time():
            self.note(f"{self.phase}: {self.fraction:.0%}, {self.facts}")

    def _is_time(self) -> bool:
        """For a plain line: a cell is done, or a while went by."""
        now = time.perf_counter()
        if not self.cells_planned or (self.done == self._told and now - self._spoke < _SILENCE):
            return False
        self._spoke, self._told = now, self.done
        return True

    def _picture(self) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        bar = Bar(total=1.0, completed=self.fraction, width=32)
        line.add_row(self.phase, bar, f"{self.fraction:.0%}", self.facts)
        rows = [
            Text(f"  {name}: {state}", style="dim", overflow="ellipsis", no_wrap=True) for name, state in self._shown()
        ]
        return Group(line, *rows)

    def _shown(self) -> list[tuple[str, str]]:
        """The first workers; of many, how many more."""
        rows = list(self.states.items())
        more = len(rows) - _WORKERS_SHOWN
        return rows if more <= 0 else [*rows[:_WORKERS_SHOWN], (f"and {more} more", "see `evalbench status RUN`")]


def human(seconds: float) -> str:
    """A duration in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
