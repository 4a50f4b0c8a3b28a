"""A table of a report, independent of its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Shown(NamedTuple):
    """A table cell: its text, what to sort by, and how it stands out.

    Attributes:
        text: as read. key: number to sort by; None sorts by the text.
        kind: `best`, `same` (as the best, as far as tests can tell), `floor`, `error`, `words`, a shade of a heat map
            (`heat h0` to `heat h9`), or empty.
        small: what stands below in small type where the format can, such as ranks.
    """

    text: str
    key: float | None = None
    kind: str = ""
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first `left` columns are names, the rest numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]
    left: int = 1
