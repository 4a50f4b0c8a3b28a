"""Words that this tool does not use of a result (design, section 12): nobody here ran a paper's own setting."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = re.compile(r"\b(?:reproduce[d]|contradicte[d])\b", re.IGNORECASE)
# They look for the words themselves.
SEARCHERS = {"tests/test_words.py", "tests/report/test_report.py"}


def tracked() -> list[str]:
    """Files of the checkout that are tracked, or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("needs git to know which files are tracked")
    if done.returncode:
        pytest.skip("not a git checkout: cannot tell which files are tracked")
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def hits(name: str, content: bytes) -> list[str]:
    """Where a file says such a word; binary files say none."""
    if b"\0" in content:
        return []
    lines = content.decode("utf-8", errors="replace").splitlines()
    return [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if FORBIDDEN.search(line)]


@pytest.mark.parametrize("word", ["reproduce", "contradicte"])
def test_such_a_word_is_noticed(word: str) -> None:
    assert hits("x.md", f"fine\nThe claim was {word.upper()}D here.\n".encode()) == [
        f"x.md:2: The claim was {word.upper()}D here."
    ]
    assert hits("x.md", f"**{word}d**".encode())
    assert hits("x.bin", f"\0{word}d".encode()) == []
    assert hits("x.md", b"to reproduce a run; reproducible; it contradicts itself; unreproduced") == []


def test_nobody_says_them() -> None:
    names = tracked()
    assert {"README.md", "evalbench/claims.py"} <= set(names)
    found = [hit for name in names if name not in SEARCHERS for hit in hits(name, (ROOT / name).read_bytes())]
    assert not found, "\n".join(["say observed, holds, replicated, repeated or measured again instead:", *found])
