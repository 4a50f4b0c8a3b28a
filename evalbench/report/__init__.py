"""Records -> Markdown, HTML, CSV, figures, and the table of a terminal. Nothing heavy is imported before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from evalbench.errors import unknown
from evalbench.spec import Record, Suite, parse_suite
from evalbench.store import Store

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from evalbench.report.ranking import Difference

FORMATS = ("md", "html", "csv", "latex")
TABLES = ("cells", "timings", "samples")


class Pairs(Protocol):
    """What two records have in common sample by sample; `compare.Pairs` is one."""

    def difference(self, first: Record, second: Record, metric: str, /) -> Difference | None:
        """first - second of a metric by a paired test; None where there is none."""

    def solution(self, record: Record, /) -> str | None:
        """The cell id of the fine solution from the same noise; None where there is none."""


def build_report(
    store: Store, out_dir: Path, formats: Sequence[str] = FORMATS, pairs: Pairs | None = None
) -> dict[str, Path]:
    """Write the report of a run.

    Args:
        store: the run. out_dir: for report.md, report.html, figures and sample grids; usually RUN/report.
        formats: which of `md`, `html`, `latex` (report.tex), `csv`; `csv` writes table.csv and timings.csv into the run
            folder itself.
        pairs: paired tests for the ranks of report.html and the underlining of report.tex; without them both use the
            intervals of the values.

    Returns:
        The files: `table`, `timings`, `md`, `html`, `latex`, and `figure:NAME`, `grid:NAME` for the pictures.

    Raises:
        UserError: an unknown format.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    from evalbench.report import build

    return build.build(store, suite_of(store), Path(out_dir), formats, pairs)


def load(run: Path | str, table: str = "cells") -> pd.DataFrame:
    """A run as a tidy DataFrame, see docs/pandas.md.

    Args:
        run: the run folder.
        table: `cells`, one row per cell, the content of table.csv; `timings`, one row per cell, variant and batch
            size, the content of timings.csv; `samples`, one row per sample with its scores and counts.

    Raises:
        UserError: not a run folder, or an unknown table.
    """
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    from evalbench.report import frames

    store = Store(run)
    records = store.shown_records()
    if table == "cells":
        return frames.cells_frame(records, suite_of(store))
    if table == "timings":
        return frames.timings_frame(records)
    return frames.samples_frame(records, store.per_sample)


def print_table(records: Sequence[Record], suite: Suite, console: Console) -> None:
    """Print methods x NFE for the primary metric, the other metrics and counts, and what failed and why."""
    from evalbench.report import console as terminal

    terminal.print_table(records, suite, console)


def suite_of(store: Store) -> Suite:
    """The suite of a run, from its manifest."""
    return parse_suite(store.manifest()["suite"], "", where=f"manifest of {store.folder}")
