"""`--model`: a model of the user's in place of the suite's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from evalbench.errors import UserError
from evalbench.registry import parse_arguments, read_plugin
from evalbench.spec import ModelSpec, Suite
from evalbench.weights import sha256

_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)(?:\((?P<arguments>.*)\))?", re.DOTALL)


def with_model(suite: Suite, text: str, *, trust_remote_code: bool = False) -> tuple[Suite, dict[str, str]]:
    """The suite with another model, and the source files that every worker needs.

    Args:
        text: `FILE.py:FUNCTION(argument=value)`, whose function returns an `Adapter`; else a folder or an id of
            diffusers. The model brings its own path and scale of time; the suite's further roles are dropped.

    Raises:
        UserError: no such file, or an argument that cannot be read.
    """
    match = _FILE.fullmatch(text)
    if match is None:
        if text.endswith(".py"):
            raise UserError(f"--model '{text}' names no function; write --model {text}:load")
        options: dict[str, Any] = {"folder": text}
        return _replaced(suite, ModelSpec(loader="diffusers", options=options)), {}
    name, source = read_plugin(match["file"])
    arguments = parse_arguments(match["arguments"] or "", where=f"--model {match['file']}:{match['function']}")
    for key, value in arguments.items():
        if isinstance(value, str) and Path(value).exists():
            arguments[key] = str(Path(value).resolve())  # workers have another working folder
    files = {key: sha256(Path(value)) for key, value in arguments.items() if _is_file(value)}
    options = {
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "function": match["function"],
        "arguments": arguments,
        "files": files,
        "trust_remote_code": trust_remote_code,
    }
    return _replaced(suite, ModelSpec(loader="module", options=options)), {name: source}


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _replaced(suite: Suite, model: ModelSpec) -> Suite:
    return suite.model_copy(update={"model": model, "roles": {}, "path": None})
