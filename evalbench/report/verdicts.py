"""Verdicts as Markdown, JSON, JUnit XML and a terminal's table: the same bytes from the same records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from evalbench.report.text import md, md_name, md_table, number, plus_minus, significant

if TYPE_CHECKING:
    from rich.table import Table

    from evalbench.compare import Comparison, Effect, FastComparison, Sameness, Verdict

_NOTHING = "No cell in common: nothing was compared."
_CONTROLS = {"holm": "Holm", "bh": "Benjamini-Hochberg"}
_STYLES = {"worse": "bold red", "better": "green", "undecided": "yellow", "not comparable": "magenta"}
_HEADER = ("cell", "metric", "verdict", "remarks", "base", "new", "difference", "tolerance", "80 % power at")


# --- words ----------------------------------------------------------------------------------------------------------


def summary(found: Comparison) -> str:
    """How many cells have which word, in one line."""
    if not found.verdicts:
        return _NOTHING
    return ", ".join(f"{count} {word}" for word, count in found.counts.items() if count)


def remarks(v: Verdict) -> str:
    """Why, at which N it would be decided, and what must be known beside it."""
    parts = [v.reason] if v.reason else []
    if v.word == "undecided":
        parts.append(_what_decides(v))
    return _printable("; ".join([*parts, *v.notes]))


def _what_decides(v: Verdict) -> str:
    if not v.samples_to_decide:
        return "at the tolerance: no N decides"
    if v.effect and v.effect.relative:
        return f"{v.samples_to_decide:,} processes would decide"
    return f"N = {v.samples_to_decide:,} would decide"


def _printable(text: str) -> str:
    """Without control characters, which XML cannot hold and terminals obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _difference(effect: Effect) -> str:
    if effect.relative:
        value, low, high = (math.exp(x) for x in (effect.difference, effect.low, effect.high))
        return f"× {significant(value)} ({significant(low)} to {significant(high)})"
    return plus_minus(effect.difference, effect.half)


def _size(effect: Effect, size: float | None) -> str:
    """A tolerance or a smallest effect as it stands beside the difference."""
    if effect.relative and size is not None:
        return f"× {significant(math.exp(size))}"
    return number(size)


def _row(v: Verdict) -> list[str]:
    words = [_printable(v.title), v.metric, v.word, remarks(v)]
    if v.effect is None:
        return [*words, "", "", "", "", ""]
    e = v.effect
    return [*words, number(e.base), number(e.new), _difference(e), _size(e, e.tolerance), _size(e, v.detectable)]


# --- Markdown -------------------------------------------------------------------------------------------------------


def to_markdown(found: Comparison) -> str:
    """GitHub-flavoured Markdown: one table of verdicts, one of the other metrics."""
    parts = [f"### evalbench: {md(summary(found))}\n", f"{md_name(found.base)} (base) and {md_name(found.new)} (new)\n"]
    if found.verdicts:
        rows = ([md(text) for text in _row(v)] for v in found.verdicts)
        parts += [md_table(_HEADER, rows, left=4), _legend(found)]
    described = [(v, effect) for v in found.verdicts for effect in v.descriptive]
    if described:
        rows = (
            [md(_printable(v.title)), md(e.metric), number(e.base), number(e.new), md(_difference(e))]
            for v, e in described
        )
        table = md_table(("cell", "metric", "base", "new", "difference"), rows, left=2)
        parts.append(f"<details><summary>Other metrics: descriptive, no verdict</summary>\n\n{table}\n</details>\n")
    if found.only_new:
        parts.append("Only in new: " + "; ".join(md(_printable(title)) for title in found.only_new) + "\n")
    return "\n".join(parts)


def _legend(found: Comparison) -> str:
    statistics = sorted({f"{v.metric}: {v.effect.statistic}" for v in found.verdicts if v.effect})
    timed = []
    if any(v.effect and v.effect.relative for v in found.verdicts):
        timed = ["Of timings it is the ratio new / base with its interval; base and new are ms per call."]
    lines = [
        "base and new are table values; the difference is new - base ± half of its 95 % interval.",
        *timed,
        f"Error control over the cells: {_CONTROLS[found.control]}.",
        *statistics,
    ]
    return "".join(f"- {md(line)}\n" for line in lines)


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(found: Comparison, *, strict: bool = False) -> str:
    """Everything, keys sorted."""
    content = {
        "schema": 1,
        "base": found.base,
        "new": found.new,
        "control": found.control,
        "counts": found.counts,
        "exit_code": found.exit_code(strict=strict),
        "cells": [_verdict(v) for v in found.verdicts],
        "only_new": list(found.only_new),
    }
    return _dump(content)


def _verdict(v: Verdict) -> dict[str, Any]:
    plain = {key: value for key, value in vars(v).items() if key not in ("effect", "descriptive")}
    return plain | {
        "notes": list(v.notes),
        "effect": _effect(v.effect) if v.effect else None,
        "descriptive": [_effect(effect) for effect in v.descriptive],
    }


def _effect(effect: Effect) -> dict[str, Any]:
    df = effect.df if math.isfinite(effect.df) else None  # JSON has no infinity
    return vars(effect) | {"df": df, "low": effect.low, "high": effect.high, "p": effect.p}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


# --- JUnit ----------------------------------------------------------------------------------------------------------


def to_junit(found: Comparison, *, strict: bool = False) -> str:
    """JUnit XML: `worse` is a failure (undecided too when strict), a cell that BASE has and NEW lacks an error."""
    cases = [_case(v, strict=strict) for v in found.verdicts] or [_nothing()]
    suite = ElementTree.Element("testsuite", name="evalbench compare", tests=str(len(cases)))
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.find(kind) is not None for case in cases)))
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _nothing() -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="evalbench", name="cells in common")
    ElementTree.SubElement(case, "error", message=_NOTHING)
    return case


def _case(v: Verdict, *, strict: bool) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=f"{v.suite}.{v.metric}", name=_printable(v.title))
    message = ": ".join(part for part in (v.word, _sentence(v), remarks(v)) if part)
    failing = ("worse", "undecided") if strict else ("worse",)
    if v.word in failing:
        ElementTree.SubElement(case, "failure", message=message)
    elif v.word == "not comparable" and v.gates:
        ElementTree.SubElement(case, "error", message=message)
    elif v.word in ("not comparable", "undecided"):
        ElementTree.SubElement(case, "skipped", message=message)
    else:
        ElementTree.SubElement(case, "system-out").text = message
    return case


def _sentence(v: Verdict) -> str:
    return f"difference {_difference(v.effect)}, tolerance {_size(v.effect, v.effect.tolerance)}" if v.effect else ""


# --- the fast gate --------------------------------------------------------------------------------------------------


def fast_text(gate: FastComparison, fmt: str) -> str:
    """The fast gate's outcome as `console` (plain lines), `md` or `json`."""
    if fmt == "json":
        return fast_json(gate)
    if not gate.cells:
        return f"{_NOTHING}\n"
    if fmt == "md":
        return md_table(("cell", "first samples"), ([md(_printable(c.cell)), md(_same(c))] for c in gate.cells), left=2)
    return "".join(f"{_printable(c.cell)}: {_same(c)}\n" for c in gate.cells)


def _same(cell: Sameness) -> str:
    if cell.word == "not comparable":
        return f"not comparable: {_printable(cell.reason)}"
    if cell.word == "changed":
        return f"changed (largest relative difference {number(cell.difference)}): run the full comparison"
    return cell.word


def fast_json(gate: FastComparison) -> str:
    """Everything, keys sorted; an infinite difference (other shape or type) is null."""
    cells = [
        vars(c) | {"difference": None if c.difference is None or c.difference == float("inf") else c.difference}
        for c in gate.cells
    ]
    return _dump({"schema": 1, "base": gate.base, "new": gate.new, "exit_code": gate.exit_code(), "cells": cells})


# --- terminal -------------------------------------------------------------------------------------------------------


def print_verdicts(found: Comparison) -> None:
    """Print one row per cell, its remarks below the table, and the count of words last."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for metric in sorted({v.metric for v in found.verdicts}):
        console.print(_table(metric, [v for v in found.verdicts if v.metric == metric]))
    for v in found.verdicts:
        if remarks(v):
            console.print(Text(f"{_printable(v.title)}: {remarks(v)}", style=_STYLES.get(v.word, "dim")))
    for title in found.only_new:
        console.print(Text(f"only in new: {_printable(title)}", style="dim"))
    console.print(Text(summary(found)))


def _table(metric: str, verdicts: Sequence[Verdict]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    common = {_settings(v) for v in verdicts}
    where = next(iter(common)) if len(common) == 1 else ""
    title = Text(f"{metric}  {verdicts[0].suite} v{verdicts[0].suite_version}{where}")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("cell", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for name in _HEADER[6:]:
        table.add_column(name, justify="right", no_wrap=True)
    for v in verdicts:
        cell, _, word, _, _, _, *numbers = _row(v)
        styled = Text(word, style=_STYLES.get(word, ""))
        table.add_row(Text(cell.removesuffix(where) if where else cell), styled, *map(Text, numbers))
    return table


def _settings(v: Verdict) -> str:
    return f", guidance {v.guidance:g}, seed {v.seed}"
