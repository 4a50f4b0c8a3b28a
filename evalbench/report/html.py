"""report.html: one file that works from disk, offline, on a phone, in print; every text from outside is escaped.

Readable without scripts: `report.js` sorts, filters and draws charts on top of tables and pictures that stand in the
file. The charts are drawn by uPlot (MIT, Leon Sorokin), which is inside the file with its licence.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evalbench.report import published
from evalbench.report.content import Content
from evalbench.report.leaderboard import Board
from evalbench.report.samples import Apart, Slides
from evalbench.report.tables import Shown

_LEADING = re.compile(r"-?\d+(\.\d+)?($| ±|–\d|[†‡§¶#])")  # report.js has the same


@dataclass(frozen=True)
class Pictures:
    """Samples of a report: strips of each block, and where methods differ the most."""

    slides: Sequence[Slides] = ()
    apart: Sequence[Apart] = ()


def render(content: Content, board: Board, pictures: Pictures) -> str:
    """The report as one HTML file, pictures inside."""
    loader = PackageLoader("evalbench.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_uri": data_uri, "png_uri": png_uri, "sort_key": sort_key}
    references = [
        (key, ref.sha256 or ("exact moments of the model" if ref.model else "no hash"))
        for key, ref in content.suite.references.items()
    ]
    figures = {figure.name: figure for figure in content.figures}
    template = environment.get_template("report.html.j2")
    return template.render(
        c=content,
        board=board,
        pictures=pictures,
        figures=figures,
        references=references,
        published_heading=published.HEADING,
        published_notes=published.NOTES,
        asset=_asset,
    )


def data_uri(png: Path) -> str:
    """A picture file as text."""
    return png_uri(png.read_bytes())


def png_uri(png: bytes) -> str:
    """A picture as text."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def sort_key(cell: Shown) -> Markup:
    """The number that a cell sorts by as an attribute, unless its text begins with it."""
    if cell.key is None or _LEADING.match(cell.text):
        return Markup("")
    return Markup(f' data-v="{cell.key:.6g}"')


def _asset(name: str) -> Markup:
    """A file of the package as it is: ours and uPlot's, never a record's."""
    return Markup(files("evalbench.report").joinpath("templates", name).read_text(encoding="utf-8"))
