"""What the methods of a run prepared: kept in the run folder by preparation key, handed to the jobs that need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evalbench import registry
from evalbench.interfaces import Artifact
from evalbench.preparation import preparation_key
from evalbench.spec import Cell, Suite
from evalbench.store import Store
from evalbench.worker import PreparedResult, PrepareJob


class Artifacts:
    """The preparations of one run folder.

    Args:
        store: the run folder. suite: as overridden. plugins: file name -> source.
    """

    def __init__(self, store: Store, suite: Suite, plugins: Mapping[str, str]) -> None:
        self.store, self.suite, self.plugins = store, suite, plugins
        self._known: dict[str, tuple[tuple[Artifact | None, ...], dict[str, Any]]] = {}
        self._keys: dict[Cell, str] = {}  # asked for once per chunk, and dear: the method is built for it

    def key(self, cell: Cell) -> str:
        """The preparation of a cell; empty when its method prepares nothing."""
        if cell not in self._keys:
            self._keys[cell] = preparation_key(self.suite, registry.build_method(cell.method), cell)
        return self._keys[cell]

    def missing(self, cells: Iterable[Cell]) -> list[PrepareJob]:
        """Preparations that these cells need and the folder lacks, each once."""
        first = {key: cell for cell in reversed(list(cells)) if (key := self.key(cell))}
        lacking = {key: cell for key, cell in first.items() if self._read(key) is None}
        return [PrepareJob(self.suite, cell, key, self.plugins) for key, cell in reversed(lacking.items())]

    def land(self, result: PreparedResult) -> None:
        """Keep what a job made."""
        made = result.prepared
        arrays = {
            f"{i}.{name}": values
            for i, a in enumerate(made.artifacts)
            if a is not None
            for name, values in a.arrays.items()
        }
        facts = {
            "parts": [None if artifact is None else dict(artifact.facts) for artifact in made.artifacts],
            "bill": made.bill,
            "method": result.job.cell.method,
            "environment": result.environment,
        }
        self.store.write_artifacts(result.job.key, arrays, facts)

    def of(self, cell: Cell) -> tuple[Artifact | None, ...]:
        """Artefacts of a cell's parts; empty when its method prepares nothing."""
        found = self._read(self.key(cell))
        return found[0] if found else ()

    def bill(self, cell: Cell) -> dict[str, float]:
        """What the preparation of a cell spent; empty when there was none."""
        found = self._read(self.key(cell))
        return {name: float(value) for name, value in found[1]["bill"].items()} if found else {}

    def footprint(self, cell: Cell) -> dict[str, float]:
        """Bits, bytes and bit operations of a cell's quantised network, as its method says them in an artefact's facts.

        Empty where nothing is quantised, and where two parts quantise: neither saw what the other left.
        """
        said = [part.facts["footprint"] for part in self.of(cell) if part is not None and "footprint" in part.facts]
        return {name: float(value) for name, value in said[0].items()} if len(said) == 1 else {}

    def _read(self, key: str) -> tuple[tuple[Artifact | None, ...], dict[str, Any]] | None:
        if key and key not in self._known:
            content = self.store.read_artifacts(key)
            if content is None:
                return None
            arrays, facts = content
            parts = tuple(
                None if part is None else Artifact(_of_part(arrays, i), part) for i, part in enumerate(facts["parts"])
            )
            self._known[key] = (parts, facts)
        return self._known.get(key)


def _of_part(arrays: Mapping[str, Any], i: int) -> dict[str, Any]:
    prefix = f"{i}."
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
