"""Who watches a run: a progress bar, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """Told what happens.

    Work comes in phases (`quality`, `latency`) and is counted in forwards: evaluations of the field over all samples.
    """

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """Work of a phase, announced before anything runs."""

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """A piece of it is done, after `seconds` on its worker."""

    def cells(self, done: int, total: int, errors: int) -> None:
        """Cells with a record so far, of all; of them error rows."""

    def workers(self, states: Mapping[str, str]) -> None:
        """What each worker does, by its name."""

    def note(self, line: str) -> None:
        """Something worth a line."""


class Silent:
    """An observer that says nothing."""

    def planned(self, phase: str, forwards: float, samples: int, workers: int) -> None:
        """Nothing."""

    def landed(self, phase: str, forwards: float, samples: int, seconds: float) -> None:
        """Nothing."""

    def cells(self, done: int, total: int, errors: int) -> None:
        """Nothing."""

    def workers(self, states: Mapping[str, str]) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""
