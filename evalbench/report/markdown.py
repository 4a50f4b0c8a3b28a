"""report.md: what the HTML says, as plain text that a pull request can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from evalbench.report import published
from evalbench.report.content import Content
from evalbench.report.tables import Shown, Table
from evalbench.report.text import md, md_name, md_table
from evalbench.report.view import Trouble


def render(content: Content, folder: Path) -> str:
    """The report as Markdown; pictures are linked relative to `folder`."""
    suite = content.suite
    parts = [
        f"# {md(suite.name)} (version {suite.version})\n",
        f"{md(suite.summary)}\n",
        "".join(f"- **{md(key)}**: {md(value)}\n" for key, value in content.headline),
        *_results(content),
        *_published(content),
        *_pictures(content, folder),
        *_latency(content),
        *_troubles(content.troubles),
        *_protocol(content),
    ]
    return "\n".join(parts)


def table(found: Table) -> str:
    """A table with its caption above; the best of a column bold, floors in italics."""
    rows = ([_cell(cell, name=j < found.left) for j, cell in enumerate(row)] for row in found.rows)
    return f"**{md(found.caption)}**\n\n" + md_table([md(name) for name in found.header], rows, left=found.left)


def _cell(cell: Shown, *, name: bool) -> str:
    if not cell.text:
        return ""
    if cell.kind == "best":
        return f"**{md(cell.text)}**"
    if cell.kind == "floor":
        return f"*{md(cell.text)}*"
    return md_name(cell.text) if name else md(cell.text)


def _results(content: Content) -> list[str]:
    parts = [f"## {md(content.suite.metrics.primary)}\n"]
    for block, primary, full, notes in zip(content.blocks, content.primary, content.full, content.notes, strict=True):
        if len(content.blocks) > 1:
            parts.append(f"### {md(block.title)}\n")
        footnotes = "".join(f"- {md(note)}\n" for note in notes)
        parts += [table(primary), footnotes, table(full)]
    if not content.blocks:
        return [*parts, "No cell has a record yet.\n"]
    return [*parts, "".join(f"- {md(note)}\n" for note in content.general_notes)]


def _published(content: Content) -> list[str]:
    if not content.published:
        return []
    return [f"## {md(published.HEADING)}\n", _notes(published.NOTES), *map(table, content.published)]


def _pictures(content: Content, folder: Path) -> list[str]:
    found = [f"![{md(f.alt)}]({_link(f.png, folder)})\n\n{md(f.caption)}\n" for f in content.figures]
    grids = [f"![{md(heading)}]({_link(png, folder)})\n\n{md(heading)}\n" for heading, png in content.grids]
    parts = ["## Figures\n", *found] if found else []
    return [*parts, "## Samples\n", *grids] if grids else parts


def _link(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _latency(content: Content) -> list[str]:
    found = content.latency
    if found is None:
        return []
    parts = [f"## {md(found.heading)}\n", _notes(found.notes)]
    return [*parts, *(part for one in found.tables for part in (table(one.table), _notes(one.notes)))]


def _notes(notes: Iterable[str]) -> str:
    return "".join(f"- {md(note)}\n" for note in notes)


def _troubles(found: Iterable[Trouble]) -> list[str]:
    rows = [tuple(map(md, t)) for t in found]
    return ["## Without a value\n", md_table(Trouble._fields, rows, left=4)] if rows else []


def _protocol(content: Content) -> list[str]:
    parts = ["## Protocol and environment\n"]
    references = {
        f"reference {key}": reference.sha256 or ("exact moments of the model" if reference.model else "no hash")
        for key, reference in content.suite.references.items()
    }
    parts += [_facts("Suite", {"hash": content.suite.id, **references})]
    parts += [_facts(f"Protocol, {title}", facts) for title, facts in content.protocols]
    parts += [_facts(f"Environment of {title}", facts) for title, facts in content.environments]
    return parts


def _facts(title: str, facts: Mapping[str, str]) -> str:
    return f"**{md(title)}**\n\n" + "".join(f"- {md(key)}: {md(value)}\n" for key, value in facts.items())
