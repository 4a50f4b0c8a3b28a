"""A run folder -> the files of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evalbench.report import html, markdown
from evalbench.report.bars import draw_breakdown
from evalbench.report.content import gather
from evalbench.report.figures import draw_all
from evalbench.report.frames import (
    cells_frame,
    latency_fits,
    timings_frame,
    write_bytes,
    write_table,
)
from evalbench.report.grids import sample_grid
from evalbench.report.styles import Drawn
from evalbench.report.view import Block, blocks
from evalbench.spec import Suite
from evalbench.store import Store


def build(store: Store, suite: Suite, out_dir: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Write what `build_report` promises."""
    records = store.records()
    timings = timings_frame(records)
    paths: dict[str, Path] = {}
    if "csv" in formats:
        paths["table"] = write_table(cells_frame(records, suite), store.folder / "table.csv")
        paths["timings"] = write_table(timings, store.folder / "timings.csv")
    if not {"md", "html"} & set(formats):
        return paths
    out_dir.mkdir(parents=True, exist_ok=True)
    fits = latency_fits(timings)
    paths["latency fits"] = write_table(fits, out_dir / "latency-fits.csv")
    found = blocks(records, suite)
    figures = draw_all(found, timings, suite.metrics.primary, out_dir / "figures")
    split = draw_breakdown(timings, out_dir / "figures")
    figures += [split] if split else []
    grids = _grids(store, found, out_dir)
    content = gather(records, suite, store.manifest(), timings, fits, figures, grids)
    if "md" in formats:
        paths["md"] = write_bytes(out_dir / "report.md", markdown.render(content, out_dir).encode())
    if "html" in formats:
        paths["html"] = write_bytes(out_dir / "report.html", html.render(content).encode())
    return paths | _pictures(figures, grids)


def _grids(store: Store, found: Sequence[Block], out_dir: Path) -> list[tuple[str, Path]]:
    grids = []
    (out_dir / "figures").mkdir(exist_ok=True)
    for i, block in enumerate(found):
        path = out_dir / "figures" / ("samples.png" if i == 0 else f"samples-{i + 1}.png")
        if sample_grid(store.images, block, path):
            seed = block.seeds[0]
            grids.append((f"The first samples of seed {seed}, the same noise in every row; {block.title}.", path))
    return grids


def _pictures(figures: Sequence[Drawn], grids: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    return {f"figure:{f.name}": f.png for f in figures} | {f"grid:{path.stem}": path for _, path in grids}
