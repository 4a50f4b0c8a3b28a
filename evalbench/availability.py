"""Which members of a family of methods run here, such as the schedulers and caches of diffusers: tried once, then kept.

Trying means importing the library and running small networks under every cache and guider, which takes many seconds.
What was found is a function of the library's, torch's and evalbench's code, so it is kept in `availability.json` in
`EVALBENCH_CACHE` beside a key of their versions; another key, or a file that cannot be read, has all tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import platform
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path

from evalbench import weights
from evalbench.durable import write_atomic
from evalbench.errors import EvalbenchError
from evalbench.interfaces import Registered

Members = list[tuple[str, str]]  # name, and the reason it cannot be used here, empty when it can


def members_of(cls: type[Registered]) -> Members:
    """The members of a family with the reason each cannot be used here, empty when it can; tried or remembered.

    A family of a plug-in is tried every time: the key does not know its code.
    """
    if not cls.__module__.startswith("evalbench."):
        return _tried(cls)
    kept = _read()
    if cls.name not in kept:
        kept[cls.name] = _tried(cls)
        _write(kept)
    return kept[cls.name]


def _tried(cls: type[Registered]) -> Members:
    return [(name, reason) for name, reason in cls.members()]  # type: ignore[attr-defined]


def file() -> Path:
    """Where it is kept."""
    return weights.cache() / "availability.json"


def _read() -> dict[str, Members]:
    """What is kept under today's key; empty where nothing is, or nothing that can be read."""
    try:
        content = json.loads(file().read_text("utf-8"))
        if content["key"] != key():
            return {}
        return {family: [(str(name), str(why)) for name, why in found] for family, found in content["members"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write(members: dict[str, Members]) -> None:
    text = json.dumps({"key": key(), "members": members}, indent=1)
    with contextlib.suppress(OSError, EvalbenchError):  # a folder that nobody may write to: tried again next time
        file().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file(), text)


@lru_cache(maxsize=1)
def key() -> str:
    """Hash of what availability depends on: Python, every installed package's version, and evalbench's own sources.

    Every package, not diffusers and torch alone: a class that lacks a library runs once that is installed.
    """
    facts = [platform.python_version(), *sorted({f"{d.metadata['Name']} {d.version}" for d in distributions()})]
    digest = hashlib.sha256("\n".join(facts).encode())
    for package in ("evalbench", "evalbench.methods"):
        for folder in importlib.import_module(package).__path__:
            for source in sorted(Path(folder).rglob("*.py")):
                digest.update(b"\n" + source.relative_to(folder).as_posix().encode() + b"\n" + source.read_bytes())
    return digest.hexdigest()
