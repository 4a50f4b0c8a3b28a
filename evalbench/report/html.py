"""report.html: one file that works from disk, offline, on a phone, in print; every text from outside is escaped."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from evalbench.report.content import Content


def render(content: Content) -> str:
    """The report as one HTML file, pictures inside."""
    loader = PackageLoader("evalbench.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = data_uri
    references = [
        (key, ref.sha256 or ("exact moments of the model" if ref.model else "no hash"))
        for key, ref in content.suite.references.items()
    ]
    figures = {figure.name: figure for figure in content.figures}
    return environment.get_template("report.html.j2").render(c=content, figures=figures, references=references)


def data_uri(png: Path) -> str:
    """A picture as text."""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
