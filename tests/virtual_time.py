"""A clock that knows the truth: time passes only where a test says so, and reading it takes none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evalbench.cost.clock import Clock

MS = 1_000_000  # nanoseconds
UNIT = 1_953_125  # nanoseconds: 1/512 s, which floats hold exactly


class VirtualClock(Clock):
    """Virtual nanoseconds. Work may be queued, as on a GPU: it takes its time when the device is waited for."""

    name = "virtual"

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []
        self.queued: list[tuple[int, Callable[[], None]]] = []

    def __call__(self) -> int:
        """Nanoseconds, as the host's clock gives them."""
        return self.now

    def wait(self) -> None:
        while self.queued:
            nanoseconds, done = self.queued.pop(0)
            self.now += nanoseconds
            done()

    def mark(self) -> int:
        return self.now

    def seconds(self, start: int, stop: int) -> float:
        return (stop - start) / 1e9

    def queue(self, nanoseconds: int, done: Callable[[], None] = lambda: None) -> None:
        """Launch work on the device."""
        self.queued.append((nanoseconds, done))

    def call(self, name: str, durations: Iterable[int]) -> Callable[[], None]:
        """A competitor whose calls take the given nanoseconds, one after the other."""
        source = iter(durations)

        def run() -> None:
            self.log.append(name)
            self.now += next(source)

        return run
