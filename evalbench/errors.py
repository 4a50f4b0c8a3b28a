"""Errors that users meet: one line that says what, where, and what to type next.

Each class carries the exit code of design table "Exit codes": 2 what the user gave is wrong, 4 the tool failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class EvalbenchError(Exception):
    """The tool failed, or a stored record cannot be read. Exit code 4."""

    exit_code = 4


class UserError(EvalbenchError):
    """What the user typed or gave is wrong. Exit code 2. The message is one line and names the remedy."""

    exit_code = 2


class Unsupported(EvalbenchError):
    """A (method, model) pair lacks a capability. Becomes a visible row `not supported: needs ...`, not a crash."""


class BudgetExceeded(EvalbenchError):
    """A method asked for more evaluations than its budget. Becomes an error row."""


class DamagedFile(EvalbenchError):
    """A stored file is missing or is not what was written. A chunk is then computed again."""


class BadSamples(EvalbenchError):
    """A method returned NaN, a wrong shape or constant images. Becomes an error row."""


def line(error: Exception) -> str:
    """A library's complaint in one line: its type, and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def some(ids: Sequence[object], most: int = 8) -> str:
    """The first of many ids for a message: `3, 17, 21`, or `0, 1, 2, ... (9 more)`."""
    shown = ", ".join(str(each) for each in ids[:most])
    return shown if len(ids) <= most else f"{shown}, ... ({len(ids) - most} more)"


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UserError:
    """The error for a name nobody registered: what was asked, the nearest name, and all names.

    Args:
        kind: noun for the thing, such as `method`.
        name: what the user wrote.
        known: the valid names.
        where: the place, such as `suite file x.toml`; empty when the command line is meant.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean '{close[0]}'?" if close else ""
    place = f" in {where}" if where else ""
    return UserError(f"unknown {kind} '{name}'{place};{hint} known: {', '.join(names) or 'none'}")
