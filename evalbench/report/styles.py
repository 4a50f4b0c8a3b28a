"""How figures look and how wide they are: the report's style and the column widths of three conferences.

Colours are Okabe & Ito's, which colour-blind readers tell apart; markers and line styles repeat the distinction, so
that it survives a grey print.
"""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from evalbench.errors import unknown
from evalbench.report.frames import write_bytes, write_table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
GREY, DARK = "#6b6b6b", "#3a3a3a"  # of floors and fronts, of text that is no name
WIDTHS = ("column", "text")


@dataclass(frozen=True)
class Style:
    """Widths and type of a page.

    Attributes:
        column, text: width of a column and of the whole text, inches. source: where the widths stand.
        fonts: families, the first that has a glyph prints it. size, small: points of labels, and of ticks and notes.
        tallest: height of a panel at most, narrowest: width of one of several panels at least, inches.
        dpi: of the PNG.
    """

    name: str
    column: float
    text: float
    source: str
    fonts: tuple[str, ...] = ("STIXGeneral", "DejaVu Sans")  # the three conferences set Times, of which STIX is a kind
    size: float = 8.0
    small: float = 7.0
    tallest: float = 2.2
    narrowest: float = 1.75
    dpi: int = 300

    def inches(self, width: str) -> float:
        """`column` or `text` in inches.

        Raises:
            UserError: neither.
        """
        if width not in WIDTHS:
            raise unknown("width", width, WIDTHS)
        return self.column if width == "column" else self.text


REPORT = Style(
    "report",
    *(6.4, 10.0, "a window"),
    fonts=("DejaVu Sans",),
    size=9.0,
    small=7.5,
    tallest=3.9,
    narrowest=3.0,
    dpi=160,
)
PAPERS = {
    style.name: style
    for style in (
        Style("neurips", 5.5, 5.5, "NeurIPS formatting instructions: text 5.5 inches (33 picas) wide, one column"),
        Style("icml", 3.25, 6.75, "icml2025.sty: textwidth 6.75in, columnsep 0.25in"),
        Style("cvpr", 3.28125, 6.875, "cvpr.sty of the CVPR 2025 author kit: textwidth 6.875in, columnsep 0.3125in"),
    )
}


def paper(name: str) -> Style:
    """A conference's style.

    Raises:
        UserError: an unknown one.
    """
    if name not in PAPERS:
        raise unknown("style", name, PAPERS)
    return PAPERS[name]


def settings(style: Style) -> Any:
    """Matplotlib's settings of a style. Fonts are embedded as TrueType (Type 42), which conferences ask for."""
    scale = style.size / 9.0
    return {
        "font.family": list(style.fonts),
        "font.size": style.size,
        "axes.titlesize": style.size,
        "axes.labelsize": style.size,
        "xtick.labelsize": style.small,
        "ytick.labelsize": style.small,
        "legend.fontsize": style.size - 0.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.linewidth": 0.7 * scale,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6 * scale,
        "lines.linewidth": 1.6 * scale,
        "lines.markersize": 5.0 * scale,
        "hatch.linewidth": 0.6,
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.hashsalt": "evalbench",
    }


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the method at this place of the sorted names."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def ink(index: int) -> str:
    """The colour of a method, dark enough for its name to be read on white."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(COLOURS[index % len(COLOURS)]))
    return to_hex(colorsys.hls_to_rgb(hue, min(light, 0.32), saturation))


def folded_name(name: str, width: int) -> str:
    """A method's name in lines of at most `width` characters, broken after `+`, `,` and `(` where it can be."""
    lines = [""]
    for part in re.findall(r"[^+,(]*[+,(]*", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def width_of(line: str, style: Style) -> float:
    """Width of a line of labels, inches."""
    return _width(line, style.fonts, style.size) if line.strip() else 0.0


@lru_cache(maxsize=4096)
def _width(line: str, fonts: tuple[str, ...], size: float) -> float:
    path = TextPath((0, 0), line, prop=FontProperties(family=list(fonts), size=size))
    return float(path.vertices[:, 0].max()) / 72  # control points too: a hair more, and much cheaper


def wrapped(text: str, inches: float, style: Style) -> str:
    """Text in lines of at most this width, broken at spaces; a unit that does not fit gets a line of its own."""
    lines: list[str] = []
    for line in text.split("\n"):
        parts = re.split(r" (?=\[)", line) if width_of(line, style) > inches else [line]
        for part in parts:
            lines.append("")
            for word in part.split(" "):
                longer = f"{lines[-1]} {word}".strip()
                if lines[-1] and width_of(longer, style) > inches:
                    lines.append(word)
                else:
                    lines[-1] = longer
    return "\n".join(lines)


@dataclass(frozen=True)
class Drawn:
    """A figure on disk.

    Attributes:
        name: stem of the files. png, pdf, csv: the files. alt: what a reader who cannot see it is told.
        caption: what stands below it. wide: whether it has several panels.
    """

    name: str
    png: Path
    pdf: Path
    csv: Path
    alt: str
    caption: str
    wide: bool


@dataclass(frozen=True)
class Sheet:
    """A figure before it is drawn: how to draw it, the table behind it, and its words (see `Drawn`)."""

    draw: Callable[[Style, float], Figure]
    table: pd.DataFrame
    caption: str
    alt: str
    wide: bool = False


def save(sheet: Sheet, name: str, folder: Path, style: Style, inches: float) -> Drawn:
    """Write a figure as PNG, PDF and the CSV behind it, of equal records in equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(settings(style)):
        figure = sheet.draw(style, inches)
        png = write_bytes(folder / f"{name}.png", figure_bytes(figure, "png", style.dpi))
        pdf = write_bytes(folder / f"{name}.pdf", figure_bytes(figure, "pdf", style.dpi))
    table = write_table(sheet.table, folder / f"{name}.csv")
    return Drawn(name, png, pdf, table, sheet.alt, sheet.caption, sheet.wide)


def figure_bytes(figure: Figure, kind: str, dpi: int) -> bytes:
    """The file without dates and versions, so that equal figures are equal bytes."""
    metadata = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata[kind])
    return stream.getvalue()
