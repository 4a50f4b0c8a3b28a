"""The sample grid of a paper: a row per method, the same samples of the same seed at every budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evalbench.report.grids import Images, pictures
from evalbench.report.styles import DARK, Sheet, Style, folded_name
from evalbench.report.view import Block

_NAME, _BUDGETS, _ROWS = 0.09, 0.07, 0.03  # inches between name and samples, budgets, rows
_LEAST, _MOST = 0.26, 8  # inches of a sample at least, samples of a budget at most
_LETTERS = 16  # per line of a method's name


class Strip(NamedTuple):
    """Samples of a cell from number 0 on, (n, H, W, 1 or 3) uint8, or the word that stands in their place."""

    method: str
    nfe: int
    cell: str
    samples: np.ndarray | None
    word: str


def strips(images: Images, block: Block, budgets: Sequence[int]) -> Sheet | None:
    """The first samples of the block's first seed; None when no row has images.

    Args:
        images: uint8 images of a cell by its id, (n, C, H, W), or None. budgets: the columns.
    """
    found = [_strip(images, block, method, nfe) for method in block.methods for nfe in budgets]
    held = [strip.samples for strip in found if strip.samples is not None]
    if not held:
        return None
    caption = (
        f"Samples 0, 1, 2, ... of seed {block.seeds[0]}: the same noise and conditions in every row and at every "
        f"budget; {block.suite} v{block.version}, {block.title}."
    )
    shown = min(_MOST, *(len(samples) for samples in held)) if len(held) > 1 else min(_MOST, len(held[0]))
    return Sheet(partial(_draw, found, len(budgets), shown), _table(found, block, shown), caption, caption, wide=True)


def _strip(images: Images, block: Block, method: str, nfe: int) -> Strip:
    row = block.row(method, nfe)
    if row is None:
        return Strip(method, nfe, "", None, "not run")
    cell = row.records[0].cell.id
    if row.status != "ok":
        return Strip(method, nfe, cell, None, "not supported" if row.status == "unsupported" else "error")
    pixels = pictures(images, cell)
    if pixels is None:
        return Strip(method, nfe, cell, None, "no images")
    return Strip(method, nfe, cell, pixels.transpose(0, 2, 3, 1), "")


def _table(found: Sequence[Strip], block: Block, shown: int) -> pd.DataFrame:
    """Which sample is where; pixels by their SHA-256, since a CSV is no place for them."""
    return pd.DataFrame(
        [
            {
                "suite": block.suite,
                "guidance": block.guidance,
                "seed": block.seeds[0],
                "protocol": block.protocol,
                "method": strip.method,
                "nfe": strip.nfe,
                "sample": i,
                "sha256": hashlib.sha256(np.ascontiguousarray(strip.samples[i]).tobytes()).hexdigest(),
                "cell": strip.cell,
            }
            for strip in found
            if strip.samples is not None
            for i in range(shown)
        ]
    )


def _draw(found: Sequence[Strip], budgets: int, shown: int, style: Style, inches: float) -> Figure:
    names = [folded_name(strip.method, _LETTERS) for strip in found[::budgets]]
    left = _NAME + 0.56 * style.size / 72 * max(len(line) for name in names for line in name.split("\n"))
    room = (inches - left - (budgets - 1) * _BUDGETS) / budgets
    samples = max(1, min(shown, int(room / _LEAST)))
    height, width = next(strip.samples.shape[1:3] for strip in found if strip.samples is not None)
    size = room / samples * height / width
    row = max(size, max(name.count("\n") + 1 for name in names) * 1.2 * style.size / 72) + _ROWS
    head = 1.7 * style.size / 72
    tall = head + row * len(names)
    figure = Figure(figsize=(inches, tall))
    FigureCanvasAgg(figure)
    for j, strip in enumerate(found[:budgets]):
        x = left + j * (room + _BUDGETS)
        figure.text((x + room / 2) / inches, 1 - head / 2 / tall, f"NFE {strip.nfe}", ha="center", va="center")
    for i, name in enumerate(names):
        y = head + i * row
        figure.text((left - _NAME) / inches, 1 - (y + size / 2) / tall, name, ha="right", va="center", linespacing=1.0)
        for j, strip in enumerate(found[i * budgets : (i + 1) * budgets]):
            x = left + j * (room + _BUDGETS)
            if strip.samples is None:
                place = ((x + room / 2) / inches, 1 - (y + size / 2) / tall)
                figure.text(*place, strip.word, ha="center", va="center", color=DARK, fontsize=style.small)
                continue
            axes = figure.add_axes((x / inches, 1 - (y + size) / tall, room / inches, size / tall))
            axes.imshow(_beside(strip.samples[:samples]), interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    return figure


def _beside(samples: np.ndarray) -> np.ndarray:
    """Samples (n, H, W, C) as one picture (H, n W, 3) with a white line between them."""
    grey = np.broadcast_to(samples, (*samples.shape[:3], 3)) if samples.shape[3] == 1 else samples
    big = grey.repeat(4, axis=1).repeat(4, axis=2)
    padded = np.pad(big, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-2]
