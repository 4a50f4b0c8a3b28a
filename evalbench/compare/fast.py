"""The fast gate: are the first samples of every cell what they were?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from evalbench.compare.pairs import Pair
from evalbench.compare.runs import NotComparable, Run, chunk_size, title_of
from evalbench.compare.words import FINE, NOT_COMPARABLE
from evalbench.spec import GRID_SAMPLES, Record, chunks_of
from evalbench.store import Store

SameWord: TypeAlias = Literal["bit-identical", "same to rounding", "changed", "not comparable"]

# What may differ by rounding alone: (largest, mean) difference over the largest absolute value. Coarse storage hides
# small changes from its largest difference but not from its mean: rounding flips few entries, a change moves most.
_ROUNDING: Mapping[str, tuple[float, float]] = {
    "float64": (1e-5, 1e-5),
    "float32": (1e-5, 1e-5),
    "float16": (2.0**-10, 2.0**-10 / 20),
    "uint8": (1 / 255, 1 / 255 / 20),
}


@dataclass(frozen=True)
class Sameness:
    """Whether a cell's first samples are what they were.

    Attributes:
        difference: the largest over arrays, relative to the largest absolute value; None when not comparable.
    """

    cell: str
    word: SameWord
    difference: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class FastComparison:
    """The fast gate: the first samples of every cell of BASE."""

    base: str
    new: str
    cells: tuple[Sameness, ...]

    def exit_code(self) -> int:
        """0 all the same; 3 something changed or is missing: only the full comparison can tell."""
        same = bool(self.cells) and all(c.word in ("bit-identical", "same to rounding") for c in self.cells)
        return FINE if same else NOT_COMPARABLE


def fast_compare(base: Path | str, new: Path | str) -> FastComparison:
    """Compare the first 64 stored samples (`images`, `identity`, `pixels`) of the cells that BASE has values for.

    Raises:
        UserError, EvalbenchError: as `compare_runs`.
    """
    runs = Run(Store(base)), Run(Store(new))
    for run in runs:
        _ = run.suite
    olds, news = runs[0].cells(None), runs[1].cells(None)
    if not olds.keys() & news.keys():
        return FastComparison(str(base), str(new), ())
    cells = [sameness(runs, olds[key], news.get(key)) for key in sorted(olds) if olds[key].status == "ok"]
    return FastComparison(str(base), str(new), tuple(cells))


def sameness(runs: tuple[Run, Run], old: Record, new: Record | None) -> Sameness:
    """Whether the first samples of two records are the same; `old` and `new` may be of two methods."""
    title = title_of(old.cell)
    try:
        if new is None:
            raise NotComparable("missing in NEW")
        Pair(runs, old, new, {}).check()
        a, b = (_first_samples(run, record) for run, record in zip(runs, (old, new), strict=True))
        shared = sorted(a.keys() & b.keys())
        if not shared:
            raise NotComparable("no samples of both are stored")
    except NotComparable as error:
        return Sameness(title, "not comparable", reason=str(error))
    same_class = old.environment.get("class") == new.environment.get("class")
    if same_class and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in shared):
        return Sameness(title, "bit-identical", 0.0)
    gaps = [_gap(a[name], b[name]) for name in shared]
    word: SameWord = "same to rounding" if all(small for _, small in gaps) else "changed"
    return Sameness(title, word, max(gap for gap, _ in gaps))


def _first_samples(run: Run, record: Record) -> dict[str, np.ndarray]:
    """Stored samples of the first images of a cell, by array."""
    found: dict[str, list[np.ndarray]] = {}
    for chunk in chunks_of(record.cell.id, record.samples, chunk_size(record)):
        if chunk.start >= GRID_SAMPLES:
            break
        arrays = run.chunk(chunk)
        for name in arrays.keys() & {"images", "identity", "pixels"}:
            found.setdefault(name, []).append(arrays[name][: GRID_SAMPLES - chunk.start])
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _gap(a: np.ndarray, b: np.ndarray) -> tuple[float, bool]:
    """Largest relative difference of two arrays, and whether it is rounding."""
    if a.shape != b.shape or a.dtype != b.dtype or a.dtype.name not in _ROUNDING:
        return math.inf, False
    largest, mean = _ROUNDING[a.dtype.name]
    x, y = a.astype(np.float64), b.astype(np.float64)
    scale = float(np.abs(x).max(initial=0.0)) if a.dtype.name != "uint8" else 255.0
    gaps = np.abs(x - y) / (scale or 1.0)
    return float(gaps.max(initial=0.0)), bool(gaps.max(initial=0.0) <= largest and gaps.mean() <= mean)
