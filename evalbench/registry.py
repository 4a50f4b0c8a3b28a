"""The one registry: methods, metrics, extractors and models by name, and the one parser of method chains.

Built-in parts are found by importing every module below `evalbench.methods`, `evalbench.metrics` and
`evalbench.models`, third-party parts through the entry point group `evalbench.plugins` and `--plugin FILE.py`.
Nobody imports a method by name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from evalbench.errors import UserError, unknown
from evalbench.interfaces import (
    Artifact,
    Extractor,
    ExtractorFamily,
    Method,
    Metric,
    Model,
    Modifier,
    Outside,
    Registered,
    Solver,
    Wrap,
)

KINDS = ("method", "metric", "extractor", "model")
_PACKAGES = {
    "method": ("evalbench.methods",),
    "metric": ("evalbench.metrics",),
    "extractor": ("evalbench.metrics",),
    "model": ("evalbench.models",),
}
_parts: dict[str, dict[str, type[Registered]]] = {kind: {} for kind in KINDS}
_origins: dict[tuple[str, str], str] = {}
_loaded: set[str] = set()
_TEXT = ConfigDict(coerce_numbers_to_str=True)  # blocks=3 is a text that reads as a number
R = TypeVar("R", bound=type[Registered])


def register(name: str) -> Callable[[R], R]:
    """Class decorator: enter a method, metric, extractor or model under `name`.

    A name ending in `:*` registers a family, such as `diffusers:*`; the class then gets the rest of the name as the
    setting `target`.

    Raises:
        UserError: the name is taken or malformed.
    """

    def enter(cls: R) -> R:
        kind = cls.kind
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(\+\+)?(:\*)?", name):
            raise UserError(f"{kind} name '{name}' must be letters, digits, '.', '_', '-' and may end in '++' or ':*'")
        origin = f"{cls.__module__}.{cls.__qualname__}"
        if name in _parts[kind] and _origins[kind, name] != origin:
            raise UserError(f"{kind} '{name}' is registered twice: {_origins[kind, name]} and {origin}; rename one")
        _parts[kind][name] = cls
        _origins[kind, name] = origin
        cls.name = name
        return cls

    return enter


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted; families as `prefix:*`."""
    _load(kind)
    return sorted(_parts[kind])


def get(kind: str, name: str) -> type[Registered]:
    """The class registered under a name, or for `prefix:rest` the family class (of extractors: the member).

    Raises:
        UserError: nobody registered it; names the nearest.
    """
    _load(kind)
    parts = _parts[kind]
    if name in parts:
        return parts[name]
    prefix, colon, target = name.partition(":")
    if colon and f"{prefix}:*" in parts:
        family = parts[f"{prefix}:*"]
        return _member(family, target) if issubclass(family, ExtractorFamily) else family
    raise unknown(kind, name, parts)


@cache
def _member(family: type[ExtractorFamily], target: str) -> type[Registered]:
    return family.member(target)


def _load(kind: str) -> None:
    for package in _PACKAGES[kind]:
        if package in _loaded:
            continue
        _loaded.add(package)
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not _is_script(module.name):
                importlib.import_module(module.name)
    if "entry points" not in _loaded:
        _loaded.add("entry points")
        for entry in entry_points(group="evalbench.plugins"):
            entry.load()


def _is_script(module: str) -> bool:
    """Training and reference scripts lie beside their weights and register nothing."""
    return ".zoo." in module or ".references." in module


# --- plug-ins -------------------------------------------------------------------------------------------------------


class _TextLoader(importlib.abc.SourceLoader):
    """Imports a module from source text, so that a plug-in travels to workers that do not have its file."""

    def __init__(self, source: str, filename: str) -> None:
        self._source, self._filename = source, filename

    def get_data(self, path: Any) -> bytes:
        return self._source.encode()

    def get_filename(self, fullname: str) -> str:
        return self._filename

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError("source text has no file times")


def load_plugin(source: str, filename: str) -> ModuleType:
    """Import a plug-in from its text; its `@register` lines take effect. Loading the same text twice does nothing."""
    module_name = _plugin_name(hashlib.sha256(source.encode()).hexdigest())
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_loader(module_name, _TextLoader(source, filename))
    if spec is None or spec.loader is None:
        raise UserError(f"cannot import plug-in {filename}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while the class body runs
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[module_name]
        raise
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(f"plug-in {filename} does not import: {type(error).__name__}: {error}") from error
    return module


def load_plugins(sources: Mapping[str, str]) -> None:
    """Import plug-ins from their texts, by file name; see `load_plugin`."""
    for filename, source in sources.items():
        load_plugin(source, filename)


def plugin_module(digest: str) -> ModuleType:
    """A plug-in that was loaded, by the SHA-256 of its text.

    Raises:
        UserError: it was not loaded in this process.
    """
    name = _plugin_name(digest)
    if name not in sys.modules:
        raise UserError("the file of --model is not loaded; give --model FILE.py:FUNCTION again")
    return sys.modules[name]


def _plugin_name(digest: str) -> str:
    return f"evalbench_plugin_{digest[:16]}"


def read_plugin(path: str) -> tuple[str, str]:
    """(file name, source text) of `--plugin FILE.py`."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"plug-in file '{path}' not found; give the path of a .py file")
    return file.name, file.read_text()


# --- method chains --------------------------------------------------------------------------------------------------

# `name`, or `prefix:rest`; a rest that holds anything but letters, digits and `. _ - /` stands in double quotes
_PLAIN = r"[\w./-]+"
_NAME = re.compile(rf'[A-Za-z0-9][\w.-]*(?::(?:{_PLAIN}|"[^"]*"))?(?:\+\+)?')


@dataclass(frozen=True)
class Chain:
    """A method as users write it: one solver, wraps around the network, modifiers of the solver; settings resolved.

    Attributes:
        solver: the one solver. others: wraps and modifiers in the order written; the first wrap is innermost, next to
            the network, and the first modifier next to the solver.
    """

    solver: Solver
    others: tuple[Wrap | Modifier, ...] = ()

    @property
    def parts(self) -> tuple[Method, ...]:
        """Solver first, then the others."""
        return (self.solver, *self.others)

    @property
    def wraps(self) -> tuple[Wrap, ...]:
        """What stands around the network, the innermost first."""
        return tuple(part for part in self.others if isinstance(part, Wrap))

    @property
    def modifiers(self) -> tuple[Modifier, ...]:
        """What stands around the solver, the innermost first."""
        return tuple(part for part in self.others if isinstance(part, Modifier))

    @cached_property
    def sampler(self) -> Solver:
        """The solver inside its modifiers: what samples."""
        solver = self.solver
        for modifier in self.modifiers:
            solver = modifier.modify(solver)
        return solver

    @cached_property
    def text(self) -> str:
        """Canonical text: solver first, then the others, settings that differ from their defaults."""
        return "+".join(_part_text(part) for part in self.parts)

    @property
    def guidance(self) -> str:
        """Text of the wraps that guide, such as `cfg(scale=2.0)`; empty when the suite's guidance applies."""
        return "+".join(_part_text(wrap) for wrap in self.wraps if wrap.guides)

    def settings(self) -> list[dict[str, Any]]:
        """Every part with its version and all settings, defaults included: what a cell's id hashes."""
        return [
            {"name": part_name(part), "version": part.version, **_settings(part), **part.identity()}
            for part in self.parts
        ]

    @property
    def requires(self) -> frozenset[str]:
        """Capabilities the denoiser must provide."""
        return frozenset().union(*(part.requires for part in self.parts))

    @property
    def prepares(self) -> str:
        """When something is prepared before sampling: `per-nfe` if any part says so, `once`, or empty for never."""
        wanted = {part.prepares for part in self.parts}
        return next((when for when in ("per-nfe", "once") if when in wanted), "")

    def equipped(self, artifacts: Sequence[Artifact | None]) -> Chain:
        """The chain with the artefacts of its parts, one for each of `parts`; those after the last have none."""
        given = (*artifacts, *(None,) * (len(self.parts) - len(artifacts)))
        solver, *others = (part.equipped(found) for part, found in zip(self.parts, given, strict=True))
        return Chain(solver, tuple(others))  # type: ignore[arg-type]


def part_name(part: Method) -> str:
    """The name a part was asked for: `ddim`, or `diffusers:DDIMScheduler` for a member of a family."""
    if part.name.endswith(":*"):
        target = getattr(part, "target", "")
        return part.name[:-1] + (target if re.fullmatch(_PLAIN, target) else f'"{target}"')
    return part.name


def parse_methods(text: str) -> list[str]:
    """Split `a(x=1,y=2),b` at the commas outside parentheses and double quotes.

    Raises:
        UserError: unbalanced parentheses or quotes, or an empty entry.
    """
    entries = [entry.strip() for entry in _split(text, ",")]
    if any(not entry for entry in entries):
        raise UserError(f"empty method name in '{text}'; write --methods 'a(x=1),b'")
    return entries


def build_method(text: str) -> Chain:
    """Parse `solver(x=1)+wrap(y=2)` and build its parts with typed settings.

    Where a part is a file, `lora:loras/style.safetensors`, a path with spaces, commas, parentheses or `+` in it stands
    in double quotes: `lora:"my loras/style (1).safetensors"(scale=0.5)`.

    Raises:
        UserError: unbalanced parentheses or quotes, unknown name or setting, wrong type, no solver or two of them.
    """
    parts = [_build_part("method", name, args) for name, args in _tokens(text)]
    solvers = [part for part in parts if isinstance(part, Solver)]
    others = tuple(part for part in parts if isinstance(part, Wrap | Modifier))
    if len(solvers) != 1:
        found = ", ".join(part.name for part in solvers) or "none"
        raise UserError(f"method '{text}' needs exactly one solver, found {found}; write solver(...)+wrap(...)")
    _check_company(text, solvers[0], others)
    return Chain(solvers[0], others)


def _check_company(text: str, solver: Solver, others: Sequence[Method]) -> None:
    """Refuse parts that would quietly undo each other."""
    if isinstance(solver, Outside) and others:
        raise UserError(
            f"method '{text}': {part_name(solver)} is a program of its own, nothing stands around it; leave out "
            f"{', '.join(part_name(part) for part in others)}"
        )
    replacing = [part_name(part) for part in (solver, *others) if part.replaces_layers]
    if len(replacing) > 1:
        raise UserError(f"method '{text}': {' and '.join(replacing)} replace layers of one network; leave one out")


def build_guidance(scale: float) -> Wrap:
    """The wrap behind a suite's `guidance`: classifier-free guidance, registered as `cfg`."""
    return _construct(get("method", "cfg"), "cfg", {"scale": scale})  # type: ignore[no-any-return]


def build_metric(metric_id: str) -> Metric[Any]:
    """A metric from its id `name@arg`.

    Raises:
        UserError: unknown metric, or an extractor it needs is unknown.
    """
    name, _, arg = metric_id.partition("@")
    cls = get("metric", name)
    assert issubclass(cls, Metric)
    metric = cls(arg)
    for part in metric.needs:
        try:
            get("extractor", part)
        except UserError as error:
            raise UserError(f"metric '{metric_id}': {error}") from None
    return metric


def extractor_fingerprint(name: str) -> str:
    """Weights digest and recipe of an extractor, without loading its network."""
    cls = get("extractor", name)
    assert issubclass(cls, Extractor)
    return cls.fingerprint()


def extractor_caveat(name: str) -> str:
    """What must stand beside every number made of an extractor's features; empty when nothing must."""
    cls = get("extractor", name)
    assert issubclass(cls, Extractor)
    return cls.caveat()


def build_extractor(name: str) -> Extractor:
    """The extractor of a name, with its weights loaded."""
    cls = get("extractor", name)
    assert issubclass(cls, Extractor)
    return cls()


def build_model(name: str, options: Mapping[str, Any]) -> Model:
    """The model of a loader name with typed options.

    Raises:
        UserError: unknown loader or option, or wrong type.
    """
    cls = get("model", name)
    assert issubclass(cls, Model)
    return _construct(cls, name, options)  # type: ignore[no-any-return]


def _split(text: str, separator: str) -> list[str]:
    depth, entries, current, quoted = 0, [], "", False
    for character in text:
        quoted ^= character == '"'
        if not quoted:
            depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        if character == separator and depth == 0 and not quoted:
            entries.append(current)
            current = ""
        else:
            current += character
    if quoted:
        raise UserError(f"unbalanced quotes in '{text}'; every '\"' needs its '\"'")
    if depth != 0:
        raise UserError(f"unbalanced parentheses in '{text}'; every '(' needs its ')'")
    return [*entries, current]


def _tokens(text: str) -> list[tuple[str, str | None]]:
    """`a(x=1)+b` into [(a, "x=1"), (b, None)]; names may end in `++`."""
    _split(text, "+")  # reports unbalanced parentheses first
    rest, tokens = text.strip(), []
    while True:
        match = _NAME.match(rest)
        if not match:
            raise UserError(f"cannot read method '{text}' at '{rest}'; write solver(x=1)+wrap(y=2)")
        name, rest = match.group(), rest[match.end() :]
        args = None
        if rest.startswith("("):
            args = _argument_text(rest)
            rest = rest[len(args) + 2 :]
        tokens.append((name, args))
        if not rest:
            return tokens
        if not rest.startswith("+"):
            raise UserError(f"cannot read method '{text}' at '{rest}'; parts are joined by '+'")
        rest = rest[1:]


def _argument_text(rest: str) -> str:
    """What stands between the first parenthesis of `rest` and its partner."""
    depth, quoted = 0, False
    for i, character in enumerate(rest):
        quoted ^= character == '"'
        if not quoted:
            depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[1:i]
    raise UserError(f"unbalanced parentheses in '{rest}'")


def _build_part(kind: str, name: str, args: str | None) -> Method:
    cls = get(kind, name)
    settings: dict[str, Any] = {}
    if cls.name.endswith(":*"):
        settings["target"] = name.partition(":")[2].strip('"')
    for key, value in parse_arguments(args or "", where=name).items():
        settings[key] = value
    return _construct(cls, name, settings)  # type: ignore[no-any-return]


def parse_arguments(text: str, *, where: str) -> dict[str, Any]:
    """What stands between the parentheses of `name(x=1,y=abc)`, by key.

    Raises:
        UserError: an entry without a value, or a key given twice.
    """
    found: dict[str, Any] = {}
    for entry in _split(text, ",") if text.strip() else []:
        key, equals, value = (piece.strip() for piece in entry.partition("="))
        if not equals:
            raise UserError(f"setting '{entry}' of '{where}' needs a value: write {where}({entry}=...)")
        if key in found:
            raise UserError(f"setting '{key}' of '{where}' is given twice")
        found[key] = _literal(value)
    return found


def _literal(value: str) -> Any:
    """A Python literal, true/false/none, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it may raise
        return value


def _construct(cls: type[Registered], name: str, settings: Mapping[str, Any]) -> Any:
    """Build a dataclass from settings, each checked against its field's type."""
    known: set[str] = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set()
    hints = get_type_hints(cls)
    checked = {}
    for key, value in settings.items():
        if key not in known:
            raise unknown("setting", key, known, where=f"{cls.kind} '{name}'")
        try:
            checked[key] = TypeAdapter(hints[key], config=_TEXT).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"setting '{key}={value}' of {cls.kind} '{name}': {reason}") from None
    try:
        return cls(**checked)
    except TypeError as error:
        raise UserError(f"{cls.kind} '{name}': {error}") from error


def _settings(part: Method) -> dict[str, Any]:
    if not is_dataclass(part):
        return {}
    return {f.name: getattr(part, f.name) for f in fields(part) if f.init}


def _part_text(part: Method) -> str:
    if not is_dataclass(part):
        return part_name(part)
    given = [
        f"{f.name}={_value_text(getattr(part, f.name))}"
        for f in fields(part)
        if f.init and f.name != "target" and getattr(part, f.name) != f.default
    ]
    return f"{part_name(part)}({','.join(given)})" if given else part_name(part)


def _value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(_value_text(v) for v in value)}]"
    if isinstance(value, str) and _literal(value) != value:  # a text that would be read as a number
        return f'"{value}"'
    return str(value)
