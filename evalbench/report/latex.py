"""report.tex: the leaderboard as LaTeX tables for a paper, in plain ASCII; needs the package booktabs and nothing else.

Bold is the best value of a column; underlined is what the tests of `ranking` cannot tell from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evalbench.report.content import footnotes, primary_table
from evalbench.report.protocol import protocol_words
from evalbench.report.ranking import Ranker, Ranking
from evalbench.report.tables import Shown
from evalbench.report.view import Block

_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\ttfamily\char34}",
    "`": r"\`{}",
    "-": "-{}",  # two of them would become a dash
    "±": r"$\pm$",
    "×": r"$\times$",
    "²": r"\textsuperscript{2}",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
    "†": r"\textsuperscript{\dag}",
    "‡": r"\textsuperscript{\ddag}",
    "§": r"\textsuperscript{\S}",
    "¶": r"\textsuperscript{\P}",
}
_WORDS = {"paired": "paired tests of all pairs", "intervals": "tests of all pairs from the intervals"}


def tex(text: object) -> str:
    """Text as it reads, in a cell or a caption: no command, no new line, and ASCII; what has no name is [U+1234]."""
    return "".join(_character(c) for c in " ".join(str(text).split()) if c.isprintable())


def _character(c: str) -> str:
    return _SPECIAL.get(c, c) if c in _SPECIAL or c.isascii() else f"[U+{ord(c):04X}]"


def render(blocks: Sequence[Block], metric: str, ranker: Ranker | None = None) -> str:
    """One table per block of comparable rows.

    Args:
        metric: whose values the tables hold. ranker: for the tests against the best; without one they use the
            intervals of the values.
    """
    found = ranker or Ranker(metric)
    head = "% made by evalbench report; needs \\usepackage{booktabs}\n"
    return head + "".join(f"\n{_table(block, metric, found)}" for block in blocks)


def _table(block: Block, metric: str, ranker: Ranker) -> str:
    rankings = {nfe: ranker.ranking(block, nfe) for nfe in block.budgets}
    table = primary_table(block, metric)
    methods, floors = table.rows[: len(block.methods)], table.rows[len(block.methods) :]
    ties = [[_ties(rankings[nfe], method) for nfe in block.budgets] for method in block.methods]
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        rf"  \caption{{{_caption(block, metric, list(rankings.values()))}}}",
        rf"  \label{{tab:{_label(block)}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(block.budgets)}}}",
        r"    \toprule",
        _row([tex(name) for name in table.header]),
        r"    \midrule",
        *(_row([_name(row[0]), *map(_cell, row[1:], tied)]) for row, tied in zip(methods, ties, strict=True)),
        *([r"    \midrule"] if floors else []),
        *(_row([tex(cell.text) for cell in row]) for row in floors),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"    {' & '.join(cells)} \\\\"


def _name(cell: Shown) -> str:
    return rf"\texttt{{{tex(cell.text)}}}"


def _cell(cell: Shown, tied: bool) -> str:
    if cell.kind == "best":
        return rf"\textbf{{{tex(cell.text)}}}"
    return rf"\underline{{{tex(cell.text)}}}" if tied else tex(cell.text)


def _ties(ranking: Ranking | None, method: str) -> bool:
    """Whether the tests cannot tell a method from the best of its column."""
    return ranking is not None and ranking.like_best(method)


def _caption(block: Block, metric: str, rankings: Sequence[Ranking | None]) -> str:
    held = [ranking for ranking in rankings if ranking is not None]
    tests = " and ".join(sorted({_WORDS[ranking.basis] for ranking in held}))
    sentences = [
        f"{block.heading(metric)}; {protocol_words([block], [metric])}.",
        "± is half of the 95 % interval.",
        *(
            [f"Bold: best of its column; underlined: not distinguishable from it ({tests}, 5 % after Holm)."]
            * bool(held)
        ),
        *(["Floor: what a perfect sampler scores at the same N."] if metric in block.floors else []),
        *(f"{note}." for note in footnotes(block)[: len(block.marks)]),
    ]
    return " ".join(tex(sentence) for sentence in sentences)


def _label(block: Block) -> str:
    """Letters, digits and hyphens, which no package redefines."""
    parts = (block.suite, f"guidance {block.guidance:g}", f"n {block.samples}", block.tag)
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(part for part in parts if part)).strip("-").lower()
