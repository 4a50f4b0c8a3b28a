"""The ledger of claims as Markdown, JSON and a terminal's table: the same bytes from the same rows.

A row is what `claims.Judgement.row` gives and `results/claims.json` holds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from evalbench.errors import EvalbenchError
from evalbench.report.text import MISSING, md, md_name, md_table, number, plus_minus

Row: TypeAlias = Mapping[str, Any]

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
HEADER = (
    *("claim", "arms", "suite", "level", "author", "transfer", "verdict"),
    *("effect", "claimed", "power", "model", "date"),
)
SHORT = ("claim", "suite", "level, author, transfer", "verdict", "effect", "claimed", "power")
_STYLES = {
    "holds": "green",
    "observed here": "green",
    "fails": "red",
    "not observed here": "red",
    "undecided here": "yellow",
    "error": "bold red",
}
LEGEND = (
    "Effect: mean of (arm - baseline) / baseline over run seeds, from the same noise, +- half of its 95 % interval. A "
    "metric enters without its estimated finite-sample bias. No interval is widened for the number of claims.",
    "Observed: the interval lies on the claimed side of 0 (equal: inside the claimed size). Not observed: it "
    "excludes the claimed size, a true claim would have been observed with 80 % power, and the implementation has a "
    "second witness.",
    "Level M (a mechanism) holds or fails; level E is a direction on an embedded suite and says nothing of a paper's "
    "own setting. Transfer: what it says about large models.",
    "Power: probability of 'observed' if the claim were true at the claimed size, from the measured spread.",
)
_METHOD = (
    "A claim is a constant in its method's file, committed before the run that judges it; `evalbench claims --run` "
    "runs both arms and `evalbench claims RUN` says what a run holds of it. A changed claim loses its verdict until it "
    "is run again.",
    "Intervals are Student's t over run seeds. The bias that is taken off is the metric's own estimate: for a Frechet "
    "distance this makes the difference the half-split extrapolation; for `sw` the "
    "jackknife. Metrics without a bias (paired errors, accuracy) enter as they are. A baseline at the floor has no "
    "value above 0 without its bias: then nothing is said, and a paired error decides better.",
    "Random prepares and searches run with three seeds of their own, crossed with the run seeds: se^2 = var(means by "
    "prepare seed) / 3 + var(means by run seed) / n, Satterthwaite's degrees of freedom. What both do together counts "
    "twice, so the interval is wide rather than narrow.",
    "A mechanism (level M) has no third word: where the interval holds both outcomes, nothing is said.",
)


def read_ledger(file: Path) -> list[dict[str, Any]]:
    """The rows of a ledger.

    Raises:
        EvalbenchError: not a ledger.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [dict(row) for row in rows if row["id"] and row["claim"]["text"] and row["word"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EvalbenchError(f"{file} is not a ledger of claims ({error}); restore it or delete it") from None


def to_json(rows: Sequence[Row]) -> str:
    """Everything, keys sorted."""
    return json.dumps(list(rows), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def table(rows: Sequence[Row]) -> str:
    """The Markdown table 'What we observed on embedded models', with its legend."""
    if not rows:
        return "No method states a claim yet.\n"
    lines = [[md_name(row["id"]) + " " + md(row["claim"]["text"]), *map(md, _cells(row))] for row in rows]
    return md_table(HEADER, lines, left=7) + "\n" + "".join(f"- {md(line)}\n" for line in LEGEND)


def short_table(rows: Sequence[Row]) -> str:
    """The same for a first page: without arms, remarks and dates."""
    if not rows:
        return "No method states a claim yet.\n"
    lines = [[md_name(row["id"]) + " " + md(row["claim"]["text"]), *map(md, _short_cells(row))] for row in rows]
    return md_table(SHORT, lines, left=4) + "\n" + "".join(f"- {md(line)}\n" for line in LEGEND)


def page(rows: Sequence[Row]) -> str:
    """docs/claims.md: the table, and each claim with its source, seeds and values."""
    head = "<!-- made by `python docs/make.py claims` from results/claims.json; edit the claims instead -->\n"
    method = "".join(f"- {line}\n" for line in _METHOD)
    parts = [
        head,
        "# Claims: what we observed on embedded models\n",
        table(rows),
        f"## How they are judged\n\n{method}",
    ]
    for row in rows:
        claim = row["claim"]
        facts = {
            "verdict": _verdict(row),
            "metric": f"{claim['metric']}, N = {row['samples']}, claimed {_claimed(claim)}",
            "source": f"{claim['source']} (author: {claim['author']})",
            "second witness": claim["witness"] or "none named",
            "measured NFE": " and ".join(f"{n:g}" for n in row["spent"]) if row["spent"] else MISSING,
            "by seed": ", ".join(f"{number(100 * value)} %" for _, _, value in row["values"]) or MISSING,
        }
        lines = "".join(f"- {key}: {md(value)}\n" for key, value in facts.items())
        parts.append(f"## {md_name(row['id'])}\n\n{md(claim['text'])}\n\n{lines}")
    return "\n".join(parts)


def insert(text: str, rows: Sequence[Row]) -> str:
    """A page with the short table between its markers.

    Raises:
        EvalbenchError: it has no markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise EvalbenchError(f"the page has no lines '{BEGIN}' and '{END}'; add them where the table goes")
    return f"{head}{BEGIN}\n{short_table(rows)}{END}{tail}"


def print_rows(rows: Sequence[Row]) -> None:
    """Print one row per claim, what is claimed and the remarks below, and the count of words last."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("claim", overflow="fold")
    found.add_column("verdict", no_wrap=True)
    for name in ("effect", "claimed"):
        found.add_column(name, justify="right", overflow="fold")
    found.add_column("power", justify="right", no_wrap=True)
    for row in rows:
        word = Text(row["word"], style=_STYLES.get(row["word"], "dim"))
        found.add_row(Text(row["id"]), word, _effect(row), _claimed(row["claim"]), _power(row))
    if rows:
        console.print(found)
    for row in rows:
        claim, note = row["claim"], f": {row['note']}" if row["note"] else ""
        where = f"{_arms(claim)}, {claim['metric']} on {claim['suite']}, level {claim['level']}"
        console.print(Text(_plain(f"{row['id']}: {claim['text']} {where}{note}"), style="dim"))
    counts = Counter(row["word"] for row in rows)
    console.print(", ".join(f"{n} {word}" for word, n in sorted(counts.items())) or "No method states a claim yet.")


# --- words ----------------------------------------------------------------------------------------------------------


def _cells(row: Row) -> list[str]:
    claim = row["claim"]
    return [
        _arms(claim),
        claim["suite"],
        claim["level"],
        claim["author"],
        claim["transfer"],
        _verdict(row),
        _effect(row),
        _claimed(claim),
        _power(row),
        row["model"],
        row["date"],
    ]


def _short_cells(row: Row) -> list[str]:
    claim = row["claim"]
    kind = f"{claim['level']}, {claim['author']}, {claim['transfer']}"
    return [claim["suite"], kind, row["word"], _effect(row), _claimed(claim), _power(row)]


def _verdict(row: Row) -> str:
    return _plain(f"{row['word']}: {row['note']}" if row["note"] else row["word"])


def _arms(claim: Mapping[str, Any]) -> str:
    other = f" at NFE {claim['baseline_nfe']}" if claim["baseline_nfe"] else ""
    return f"{claim['arm']} at NFE {claim['nfe']} against {claim['baseline']}{other}"


def _effect(row: Row) -> str:
    if row["effect"] is None:
        return MISSING
    sign = "+" if row["effect"] > 0 else ""
    return f"{sign}{plus_minus(100 * row['effect'], 50 * (row['high'] - row['low']))} %"


def _claimed(claim: Mapping[str, Any]) -> str:
    size = f"{number(100 * claim['effect'])} %"
    return f"{claim['direction']} within {size}" if claim["direction"] == "equal" else f"{claim['direction']} by {size}"


def _power(row: Row) -> str:
    if row["power"] is None:
        return MISSING
    return "> 99 %" if row["power"] > 0.99 else f"{math.floor(100 * row['power'])} %"


def _plain(text: str) -> str:
    """Without control characters, which terminals obey."""
    return "".join(character if character.isprintable() else " " for character in text)
