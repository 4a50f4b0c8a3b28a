"""Two run folders -> verdicts; `evalbench compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalbench.compare.fast import fast_compare
from evalbench.compare.latency import latency_verdicts
from evalbench.compare.pairs import Pair
from evalbench.compare.runs import NotComparable, Run, title_of
from evalbench.compare.tolerances import check_tolerances, parse_tolerances
from evalbench.compare.words import CONTROLS, Comparison, Control, Verdict, decide
from evalbench.errors import UserError, unknown
from evalbench.spec import Record
from evalbench.store import Store

FORMATS = ("console", "md", "json")


def compare_runs(
    base: Path | str,
    new: Path | str,
    tolerances: Mapping[str, float] | None = None,
    *,
    base_method: str | None = None,
    new_method: str | None = None,
    control: Control = "holm",
) -> Comparison:
    """Compare two runs cell by cell.

    Args:
        base, new: run folders; they may be one folder when two methods are named.
        tolerances: by metric id, in the metric's unit; the others have the defaults of docs/compare.md.
        base_method, new_method: compare these two methods, by canonical text, instead of every method with itself.
        control: of errors over all cells: `holm` for a gate, `bh` for a report.

    Raises:
        UserError: not a run folder, an unknown metric or method, one method without the other.
        EvalbenchError: a record, manifest or chunk cannot be read, or a newer evalbench wrote it.
    """
    if (base_method is None) != (new_method is None):
        raise UserError("name both methods to compare, of BASE and of NEW, or neither")
    runs = Run(Store(base)), Run(Store(new))
    check_tolerances(tolerances or {}, [run.suite for run in runs])
    olds, news = runs[0].cells(base_method), runs[1].cells(new_method)
    timed = latency_verdicts(runs, (base_method, new_method), tolerances or {})
    joined = [_compare(runs, olds[key], news.get(key), tolerances or {}) for key in sorted(olds)]
    only_new = tuple(title_of(news[key].cell) for key in sorted(news.keys() - olds.keys()))
    if not olds.keys() & news.keys():
        joined = []
    return Comparison(str(base), str(new), tuple(decide([*joined, *timed], control)), only_new, control)


def _compare(runs: tuple[Run, Run], old: Record, new: Record | None, tolerances: Mapping[str, float]) -> Verdict:
    """The effect on a cell, its word still open; or why there is none."""
    cell, suite = old.cell, runs[0].suite
    facts: dict[str, Any] = {
        "suite": cell.suite,
        "suite_version": cell.suite_version,
        "base_method": cell.method,
        "method": new.cell.method if new else cell.method,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "metric": suite.metrics.primary,
    }
    try:
        if new is None:
            raise NotComparable("missing in NEW")
        pair = Pair(runs, old, new, tolerances)
        pair.check()
        effect, notes = pair.effect(suite.metrics.primary)
        others = [name for name in suite.metrics.names if name != suite.metrics.primary]
        return Verdict(
            **facts, word="undecided", effect=effect, notes=notes, descriptive=tuple(pair.effects_of(others))
        )
    except NotComparable as error:
        return Verdict(**facts, word="not comparable", reason=str(error), gates=old.status == "ok")


def compare_command(
    base: Path,
    new: Path,
    tolerance_text: str | None = None,
    *,
    junit: Path | None = None,
    json_path: Path | None = None,
    fmt: str = "console",
    strict: bool = False,
    fast: bool = False,
    base_method: str | None = None,
    new_method: str | None = None,
    control: str = "holm",
) -> int:
    """`evalbench compare`: print verdicts, write the files asked for, return the exit code.

    Args:
        base, new: run folders. tolerance_text: see `parse_tolerances`. junit, json_path: files to write.
        fmt: what is printed: `console`, `md` or `json`. strict: undecided cells fail too. fast: `fast_compare`.
        base_method, new_method, control: see `compare_runs`.

    Raises:
        UserError, EvalbenchError: as `compare_runs`; the caller turns them into 2 and 4.
    """
    from evalbench.report import verdicts as text

    if fmt not in FORMATS:
        raise unknown("format", fmt, FORMATS)
    tolerances = parse_tolerances(tolerance_text)
    if fast:
        if tolerances or base_method or new_method or junit:
            raise UserError("--fast compares bits: it takes no tolerance, no methods and no --junit")
        gate = fast_compare(base, new)
        print(text.fast_text(gate, fmt), end="")
        _write(json_path, text.fast_json(gate))
        return gate.exit_code()
    found = compare_runs(
        base, new, tolerances, base_method=base_method, new_method=new_method, control=_control(control)
    )
    _write(junit, text.to_junit(found, strict=strict))
    _write(json_path, text.to_json(found, strict=strict))
    if fmt == "console":
        text.print_verdicts(found)
    else:
        print(text.to_json(found, strict=strict) if fmt == "json" else text.to_markdown(found), end="")
    return found.exit_code(strict=strict)


def _control(name: str) -> Control:
    """A control by name.

    Raises:
        UserError: nobody has that name.
    """
    for known in CONTROLS:
        if known == name:
            return known
    raise unknown("control", name, CONTROLS)


def _write(file: Path | None, content: str) -> None:
    if file is None:
        return
    try:
        file.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror}; choose another place") from None
