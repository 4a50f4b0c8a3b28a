"""Any `torch.nn.Module` as an extractor: `fd@module:NAME`, once `use_module` or `--module` has said what NAME is.

A module gets images (B, 3, H, W), grey ones with equal channels, and returns one row per image: a tensor (B, ...), or a
tuple, list or dict with exactly one. What torchmetrics takes as `feature` and torch-fidelity's feature extractors are
such modules. Resizing and normalisation are the module's own business; its class and state stand in its fingerprint.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalbench.errors import EvalbenchError, UserError, unknown
from evalbench.interfaces import ExtractorFamily, SampleBatch
from evalbench.metrics.extractors import BATCH, colour, images_of, in_batches
from evalbench.registry import load_plugin, read_plugin, register

if TYPE_CHECKING:
    import torch

INPUTS = ("uint8", "unit", "signed")  # 0 to 255 as torchmetrics hands them over; float32 in [0, 1]; in [-1, 1]


@dataclass(frozen=True)
class Given:
    """A module, what it takes, and what it is: class, digest of its state and, where it came from a file, of that."""

    module: Any
    inputs: str
    text: str


_given: dict[str, Given] = {}


def use_module(name: str, module: torch.nn.Module, inputs: str = "uint8", *, source: str = "") -> str:
    """Make a module known as `module:NAME` in this process, and return that name.

    Args:
        name: letters, digits, `_`, `-`, `.`. module: is put into eval mode and float32.
        inputs: one of `INPUTS`. source: text of the file it came from, for the fingerprint.

    Raises:
        UserError: it is no module, or the name or inputs are wrong.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UserError(f"module '{name}' is a {type(module).__name__}; give a torch.nn.Module")
    if inputs not in INPUTS:
        raise unknown("inputs of a module", inputs, INPUTS)
    if not name or set(name) & set(":@,/= "):
        raise UserError(f"module name '{name}' must be letters, digits, '_', '-' or '.'")
    module = module.float().eval()  # `in_batches` keeps gradients away
    text = f"{type(module).__qualname__} sha256:{_digest(module, source)}"
    _given[name] = Given(module, inputs, text)
    return f"module:{name}"


def _digest(module: torch.nn.Module, source: str) -> str:
    """SHA-256 of the source text and of names, types, shapes and bytes of the state."""
    digest = hashlib.sha256(source.encode())
    for name, array in sorted(module.state_dict().items()):
        array = array.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().numpy().tobytes())
    return digest.hexdigest()


def load_modules(words: Sequence[str]) -> None:
    """`--module NAME=FILE.py:OBJECT[:INPUTS]` or `NAME=FILE.pt[:INPUTS]`, each made known by `use_module`.

    OBJECT is a module, or a function without arguments that returns one; FILE.pt is TorchScript.

    Raises:
        UserError: the words cannot be read, or the file cannot be loaded.
    """
    for word in words:
        name, equals, target = word.partition("=")
        parts = target.split(":")
        if not equals or (parts[0].endswith(".py") and len(parts) < 2):
            raise UserError(f"--module '{word}': write NAME=FILE.py:OBJECT, or NAME=FILE.pt of TorchScript")
        inputs = parts.pop() if parts[-1] in INPUTS else INPUTS[0]
        if parts[0].endswith(".py") and len(parts) == 2:
            file, source = read_plugin(parts[0])
            use_module(name, _object(load_plugin(source, file), parts[1], parts[0]), inputs, source=source)
        elif len(parts) == 1 and not parts[0].endswith(".py"):
            use_module(name, _script(Path(parts[0])), inputs, source=_file_digest(Path(parts[0])))
        else:
            raise UserError(f"--module '{word}': inputs are one of {', '.join(INPUTS)}")


def _object(module: Any, name: str, file: str) -> Any:
    import torch

    if not hasattr(module, name):
        raise unknown("object", name, (key for key in vars(module) if not key.startswith("_")), where=file)
    found = getattr(module, name)
    if isinstance(found, torch.nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:  # whatever somebody's code raises
        raise UserError(f"{file}: {name}() raised {type(error).__name__}: {error}") from error


def _script(file: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and files of it are there all the same
            return torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{file}' is no TorchScript file: {reason}") from None


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@register("module:*")
class ModuleFeatures(ExtractorFamily):
    """Features of a torch.nn.Module that `--module` or `use_module` names, float32 (B, D)."""

    @classmethod
    def missing(cls) -> str:
        if cls.target in _given:
            return ""
        return f"features 'module:{cls.target or 'NAME'}': give --module {cls.target or 'NAME'}=FILE.py:OBJECT"

    @classmethod
    def fingerprint(cls) -> str:
        given = cls._module()
        return f"{cls.name}/{cls.version} {given.inputs}, {given.text} float32 batch {BATCH}"

    @classmethod
    def _module(cls) -> Given:
        if cls.target not in _given:
            raise UserError(cls.missing())
        return _given[cls.target]

    def __init__(self) -> None:
        self._found = self._module()

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = colour(images_of(batch, self.name))
        self._found.module.to(images.device)
        return in_batches(self._rows, images).float()

    def _rows(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        if self._found.inputs != "uint8":
            x = images.float() / 255 if self._found.inputs == "unit" else images / 127.5 - 1.0
        return _only(self._found.module(x), self.name, len(images))


def _only(output: Any, name: str, count: int) -> torch.Tensor:
    """The one tensor that a module returned, (B, D)."""
    import torch

    while isinstance(output, tuple | list | dict) and len(output) == 1:
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if not isinstance(output, torch.Tensor):
        many = f" of {len(output)}" if isinstance(output, tuple | list | dict) else ""
        raise EvalbenchError(f"features '{name}': the module returned a {type(output).__name__}{many}; return a tensor")
    if output.ndim < 1 or len(output) != count:
        raise EvalbenchError(f"features '{name}': {count} images gave a tensor {tuple(output.shape)}")
    return output.flatten(1) if output.ndim > 1 else output
