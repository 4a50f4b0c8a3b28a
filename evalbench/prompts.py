"""Public prompt sets, read from the user's data folder: `prompts` in EVALBENCH_CACHE, checked by SHA-256."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evalbench.errors import UserError
from evalbench.spec import Prompts
from evalbench.weights import cache, sha256


@dataclass(frozen=True)
class Prompt:
    """One prompt. `facts` is the JSON line of a set whose evaluator wants it back (GenEval)."""

    id: str
    text: str
    category: str = ""
    facts: str = ""


def prompts_file(prompts: Prompts) -> Path:
    """Where a set belongs."""
    return cache() / "prompts" / prompts.file


def missing(prompts: Prompts) -> str:
    """What to put where, when a set is absent; empty when it is there."""
    path = prompts_file(prompts)
    if path.is_file():
        return ""
    return f"put {prompts.file} ({prompts.source}; SHA-256 {prompts.sha256}) into {path.parent}"


def read_prompts(prompts: Prompts) -> tuple[Prompt, ...]:
    """The prompts of a set, in the order of the file.

    Raises:
        UserError: the file is absent, another file, or holds another number of prompts.
    """
    if why := missing(prompts):
        raise UserError(f"prompts not found; {why}")
    path = prompts_file(prompts)
    digest = sha256(path)
    if digest != prompts.sha256:
        raise UserError(
            f"{path} has SHA-256 {digest}, the suite says {prompts.sha256}; get the file of {prompts.source}"
        )
    return _read(path, prompts)


@lru_cache(maxsize=4)
def _read(path: Path, prompts: Prompts) -> tuple[Prompt, ...]:
    try:
        found = tuple(_READERS[prompts.format](path.read_text("utf-8"), prompts))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no {prompts.format} file with the columns of the suite: {error}") from None
    if len(found) != prompts.rows:
        raise UserError(f"{path} holds {len(found)} prompts, the suite says {prompts.rows}")
    return found


def _table(delimiter: str) -> Callable[[str, Prompts], Iterable[Prompt]]:
    def read(text: str, prompts: Prompts) -> Iterable[Prompt]:
        lines = io.StringIO(text, newline="")
        # tab-separated files quote nothing: a quotation mark is part of a prompt
        if delimiter == "\t":
            rows = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(lines, delimiter=delimiter)
        return [_prompt(number, row, prompts) for number, row in enumerate(rows)]

    return read


def _prompt(number: int, row: dict[str, Any], prompts: Prompts, facts: str = "") -> Prompt:
    category = str(row[prompts.category]) if prompts.category else ""
    return Prompt(str(row[prompts.id]) if prompts.id else str(number), str(row[prompts.text]), category, facts)


def _pairs(text: str, prompts: Prompts) -> Iterable[Prompt]:
    pairs = [line.split("\t", 1) for line in text.splitlines() if line]
    return [Prompt(name, words) for name, words in pairs]


def _jsonl(text: str, prompts: Prompts) -> Iterable[Prompt]:
    lines = [line for line in text.splitlines() if line.strip()]
    return [_prompt(number, json.loads(line), prompts, line) for number, line in enumerate(lines)]


def _lines(text: str, prompts: Prompts) -> Iterable[Prompt]:
    return [Prompt(str(number), line) for number, line in enumerate(text.splitlines())]


def _coco(text: str, prompts: Prompts) -> Iterable[Prompt]:
    """The first caption of each image (that of least annotation id), by image id."""
    first: dict[int, tuple[int, str]] = {}
    for note in json.loads(text)["annotations"]:
        image, entry = int(note["image_id"]), (int(note["id"]), str(note["caption"]))
        first[image] = min(first.get(image, entry), entry)
    return [Prompt(str(image), first[image][1].strip()) for image in sorted(first)]


_READERS: dict[str, Callable[[str, Prompts], Iterable[Prompt]]] = {
    "tsv": _table("\t"),
    "csv": _table(","),
    "pairs": _pairs,
    "jsonl": _jsonl,
    "lines": _lines,
    "coco": _coco,
}
