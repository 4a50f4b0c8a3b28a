"""Samples inside report.html: strips of the same seeds for a slider over NFE, and where a method differs the most."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from evalbench.report.grids import Images, pictures
from evalbench.report.leaderboard import middle
from evalbench.report.view import Block, Row
from evalbench.spec import Record

Solution = Callable[[Record], str | None]  # cell id of the fine solution of a record
_SHOWN = 8  # samples of a strip
_SIDE = 64  # pixels of a sample at most
_GAP = 2
_MOST_BYTES = 3_000_000  # of all strips of a page


@dataclass(frozen=True)
class Strip:
    """Samples side by side: PNG bytes with its size in pixels, and what it shows."""

    png: bytes
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Slide:
    """A method's strips by NFE budget."""

    method: str
    strips: tuple[tuple[int, Strip], ...]


@dataclass(frozen=True)
class Slides:
    """The strips of a block. left_out: methods that have samples but no room on the page."""

    title: str
    budgets: tuple[int, ...]
    slides: tuple[Slide, ...]
    left_out: int


@dataclass(frozen=True)
class Apart:
    """The samples of a method that are farthest from its baseline's: method above, baseline below."""

    method: str
    baseline: str
    nfe: int
    strip: Strip
    words: str


class Page:
    """What a page has room for, over all of its blocks."""

    def __init__(self, most: int = _MOST_BYTES) -> None:
        self.left = most

    def take(self, png: bytes) -> bool:
        """Whether there is room, which is then taken."""
        self.left -= len(png)
        return self.left >= 0


def slides(images: Images, block: Block, page: Page) -> Slides | None:
    """Strips of every method of a block that has images, first seed; None without images."""
    found: list[Slide] = []
    left_out = 0
    for method in block.methods:
        if page.left <= 0:
            left_out += 1
            continue
        strips = tuple((row.nfe, strip) for row in block.of(method) if (strip := _first(images, row)) is not None)
        if strips and page.take(b"".join(strip.png for _, strip in strips)):
            found.append(Slide(method, strips))
        elif strips:
            left_out += 1
    if not found:
        return None
    budgets = tuple(sorted({nfe for slide in found for nfe, _ in slide.strips}))
    title = f"Samples 0 to {_SHOWN - 1} of seed {block.seeds[0]}, the same noise in every row; {block.title}"
    return Slides(title, budgets, tuple(found), left_out)


def _first(images: Images, row: Row) -> Strip | None:
    pixels = pictures(images, row.records[0].cell.id) if row.status == "ok" else None
    if pixels is None:
        return None
    return strip([pixels[:_SHOWN]], f"Samples of {row.method} at NFE {row.nfe}")


def strip(rows: Sequence[np.ndarray], alt: str) -> Strip:
    """Rows of uint8 samples, each (n, C, H, W), below each other as one PNG; large samples are made smaller."""
    lines = [_line(row) for row in rows]
    canvas = np.concatenate([np.pad(line, ((0, _GAP), (0, 0), (0, 0)), constant_values=255) for line in lines])
    picture = canvas[: len(canvas) - _GAP]
    stream = io.BytesIO()
    flat = picture[:, :, 0] if picture.shape[2] == 1 else picture
    Image.fromarray(flat).save(stream, format="PNG", optimize=True)
    return Strip(stream.getvalue(), picture.shape[1], picture.shape[0], alt)


def _line(samples: np.ndarray) -> np.ndarray:
    small = [_smaller(sample.transpose(1, 2, 0)) for sample in samples]
    padded = [np.pad(x, ((0, 0), (0, _GAP), (0, 0)), constant_values=255) for x in small]
    line: np.ndarray = np.concatenate(padded, axis=1)
    return line[:, : line.shape[1] - _GAP]


def _smaller(sample: np.ndarray) -> np.ndarray:
    height, width, channels = sample.shape
    if max(height, width) <= _SIDE:
        return sample
    scale = _SIDE / max(height, width)
    flat = sample[:, :, 0] if channels == 1 else sample
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(flat).resize(size, Image.Resampling.BOX))
    return small.reshape(size[1], size[0], channels)


# --- where a method differs the most --------------------------------------------------------------------------------


def farthest(images: Images, block: Block, page: Page, solution: Solution | None) -> list[Apart]:
    """For every method at the middle budget, the stored samples that differ most from its baseline's, by RMS.

    The baseline of a chain is what it wraps, at the same budget (`ddim` of `ddim+cache`); of a plain solver the fine
    solution from the same noise. Methods whose baseline has no images are left out.
    """
    if not block.budgets:
        return []
    nfe = middle(block.budgets)
    return [found for row in block.rows if row.nfe == nfe for found in _apart(images, block, row, page, solution)]


def _apart(images: Images, block: Block, row: Row, page: Page, solution: Solution | None) -> Iterator[Apart]:
    if row.status != "ok" or page.left <= 0:
        return
    name, cell = _baseline(block, row, solution)
    mine, other = pictures(images, row.records[0].cell.id), pictures(images, cell) if cell else None
    if mine is None or other is None or mine.shape[1:] != other.shape[1:]:
        return
    n = min(len(mine), len(other))
    gaps = np.sqrt(np.mean((mine[:n].astype(float) - other[:n].astype(float)) ** 2, axis=(1, 2, 3))) / 255
    worst = np.argsort(-gaps, kind="stable")[:_SHOWN]
    title = f"{row.method} above, {name} below, at NFE {row.nfe}"
    shown = strip([mine[worst], other[worst]], f"{title}: samples {', '.join(map(str, worst))}")
    words = ", ".join(f"{i} ({gaps[i]:.3f})" for i in worst)
    if page.take(shown.png):
        yield Apart(row.method, name, row.nfe, shown, f"{title}; sample (RMS of pixels, of 1): {words}; of {n} stored.")


def _baseline(block: Block, row: Row, solution: Solution | None) -> tuple[str, str | None]:
    wrapped = [m for m in block.methods if wraps(row.method, m)]
    inner = block.row(max(wrapped, key=len), row.nfe) if wrapped else None
    if inner is not None and inner.status == "ok":
        return inner.method, inner.records[0].cell.id
    return "the fine solution", solution(row.records[0]) if solution else None


def wraps(chain: str, method: str) -> bool:
    """Whether a chain is that method with more around it: `ddim+cfg` is, `dpm-solver++` is no `dpm-solver`."""
    rest = chain.removeprefix(method)
    return rest != chain and len(rest) > 1 and rest[0] == "+" and rest[1] not in "+("
