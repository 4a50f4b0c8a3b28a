"""Sample grids: the same samples of the same seed, one row per method and budget, so that like meets like."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evalbench.report.frames import write_bytes
from evalbench.report.view import Block

Images = Callable[[str], np.ndarray | None]
_DPI = 100
_CELL = 64  # least pixels of a sample's longer side
_GAP = 4
_GROUP_GAP = 12
_NAME = 28  # characters per line of a method's name


def sample_grid(images: Images, block: Block, path: Path, columns: int = 10) -> Path | None:
    """Draw the first samples of every row of a block that has images.

    Args:
        images: uint8 images of a cell by its id, (n, C, H, W), or None.
        block: whose rows; of several seeds the first is shown.
        path: the PNG to write. columns: samples per row.

    Returns:
        The file; None when no row has images.
    """
    found = [(row.method, row.nfe, pictures(images, row.records[0].cell.id)) for row in block.rows]
    rows = [(method, nfe, x) for method, nfe, x in found if x is not None]
    if not rows:
        return None
    shown = min(columns, *(len(x) for _, _, x in rows))
    strips = [_strip(x[:shown]) for _, _, x in rows]
    canvas, tops = _stack(strips, [method for method, _, _ in rows])
    return write_bytes(path, _draw(canvas, tops, [(m, n) for m, n, _ in rows], strips[0].shape, shown))


def pictures(images: Images, cell: str) -> np.ndarray | None:
    """The images of a cell that can be shown, (n, 1 or 3, H, W) uint8; None when there are none."""
    x = images(cell)
    return x if x is not None and x.ndim == 4 and x.shape[1] in (1, 3) and len(x) else None


def _strip(x: np.ndarray) -> np.ndarray:
    """Samples (n, C, H, W) side by side, enlarged by a whole number: (h, w, 3)."""
    scale = max(1, -(-_CELL // max(x.shape[2:])))
    big = x.repeat(scale, axis=2).repeat(scale, axis=3)
    rgb = np.broadcast_to(big, (len(big), 3, *big.shape[2:])) if big.shape[1] == 1 else big
    padded = np.pad(rgb, ((0, 0), (0, 0), (0, 0), (0, _GAP)), constant_values=255)
    return np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1)


def _stack(strips: Sequence[np.ndarray], methods: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Strips below each other with a wider gap between methods, and where each starts."""
    parts, tops, y = [], [], 0
    for i, strip in enumerate(strips):
        gap = 0 if i == 0 else _GAP if methods[i] == methods[i - 1] else _GROUP_GAP
        parts += [np.full((gap, strip.shape[1], 3), 255, np.uint8), strip]
        tops.append(y + gap)
        y += gap + len(strip)
    return np.concatenate(parts), tops


def _draw(
    canvas: np.ndarray, tops: Sequence[int], labels: Sequence[tuple[str, int]], strip: tuple[int, ...], shown: int
) -> bytes:
    names = [textwrap.fill(method, _NAME, break_on_hyphens=False) for method, _ in labels]
    left = 8 + round(7.4 * max(len(line) for name in names for line in name.split("\n"))) + 62
    top, right, bottom = 26, 8, 8
    height, width = canvas.shape[0] + top + bottom, canvas.shape[1] + left + right
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8.0}):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        figure.figimage(canvas, xo=left, yo=bottom, origin="upper")
        for j in range(shown):
            x = left + (j + 0.5) * strip[1] / shown - _GAP / 2
            figure.text(x / width, 1 - top / 2 / height, str(j), ha="center", va="center", color="#4a4a4a")
        for i, ((_, nfe), start) in enumerate(zip(labels, tops, strict=True)):
            y = 1 - (top + start + strip[0] / 2) / height
            figure.text((left - 8) / width, y, f"NFE {nfe}", ha="right", va="center", color="#4a4a4a")
            if i == 0 or names[i - 1] != names[i]:
                figure.text(8 / width, y, names[i], ha="left", va="center", weight="bold")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
