"""Numbers and names as text: the rounding that all reports share, and what Markdown needs escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

_PLAIN = re.compile(r"[A-Za-z0-9_.+()=:,@ /-]+")
MISSING = "–"


def number(value: float | None) -> str:
    """A value without an interval: four significant digits, no exponent between 0.001 and 10 million."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 1e4 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.4g}"


def significant(value: float | None) -> str:
    """A measurement with three significant digits, zeros at the end kept, so that a column lines up."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def plus_minus(value: float, half: float | None) -> str:
    """`value ± half`, both with two significant digits of the half interval."""
    if half is None or not math.isfinite(half) or half <= 0:
        return number(value)
    exponent = math.floor(math.log10(max(abs(value), half)))
    if -4 < exponent < 7:
        return _aligned(value, half)
    return f"({_aligned(value / 10.0**exponent, half / 10.0**exponent)})e{exponent}"


def _aligned(value: float, half: float) -> str:
    digits = min(max(0, 1 - math.floor(math.log10(half))), 6)
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def count(value: float | None) -> str:
    """A count such as FLOPs with an SI prefix: `1.23 G`."""
    if value is None or not math.isfinite(value):
        return MISSING
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.4g}"


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def md(text: object) -> str:
    """Text as it reads, in a Markdown cell or paragraph: no markup, no HTML, no new column, no new line."""
    flat = " ".join(str(text).split())
    escaped = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


def md_name(text: str) -> str:
    """A name as a code span when it is plain, else escaped."""
    return f"`{text}`" if _PLAIN.fullmatch(text) else md(text)


def md_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table of escaped cells; columns after the first `left` are aligned right."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    lines = [header, align, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
