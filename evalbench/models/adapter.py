"""Any `torch.nn.Module` as a model: what its author says of it in about ten lines, `--model my_model.py:load`.

The file's source travels to every worker, and its digest is part of every cell's id, as are the digests of the files
that the arguments of `load` name.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Model, Time, Want
from evalbench.paths import Path as NoisePath
from evalbench.paths import make_path
from evalbench.registry import plugin_module, register
from evalbench.weights import sha256

Images = Callable[[torch.Tensor], torch.Tensor]
_PREDICTIONS = ("x0", "eps", "v", "velocity", "score")
_trusting = False  # whether the model being loaded may run code of its checkpoint


@dataclass
class Adapter:
    """What `load` returns: a network and its conventions.

    Attributes:
        module: the network. shape: of one sample, (C, H, W).
        path: the noise path it was trained on, by name (`flow`: x = (1 - t) x0 + t n, `edm`: x = x0 + t n,
            `vp-linear`) or from `evalbench.paths`; times run from data at 0 to noise.
        predicts: x0, eps, v, velocity (dx/dt with t as above) or score.
        time: our times, (B,), in the network's convention: `lambda t: 1 - t`, `lambda t: 1000 * t`.
        call: the network's output from (module, x, its time, labels or None).
        classes: number of labels. null: the label that stands for "any"; None when there is none.
        decode: samples to images in [-1, 1]; encode: the other way, for the check of the conventions.
    """

    module: torch.nn.Module
    shape: tuple[int, ...]
    path: NoisePath | str
    predicts: Want
    time: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    call: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None
    classes: int = 0
    null: int | None = None
    decode: Images | None = None
    encode: Images | None = None

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            self.path = make_path(self.path)
        if self.predicts not in _PREDICTIONS:
            raise UserError(f"predicts = '{self.predicts}': write one of {', '.join(_PREDICTIONS)}")


def use_clone(folder: str) -> None:
    """Let the user's own clone of a repository be imported from.

    Raises:
        UserError: it is not there.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"'{folder}' is no folder; clone the repository and give its path as clone=PATH")
    if str(path.resolve()) not in sys.path:
        sys.path.insert(0, str(path.resolve()))


def require_trust(file: str) -> None:
    """Refuse a checkpoint that runs code when it is loaded (a pickle), unless the user said that it may.

    Raises:
        UserError: without --trust-remote-code.
    """
    if not _trusting:
        raise UserError(
            f"'{file}' is a pickle, which runs code when it is loaded; if you trust it: --trust-remote-code"
        )


@register("module")
@dataclass
class ModuleModel(Model):
    """A `torch.nn.Module` through the adapter that a function of a user's file returns.

    Attributes:
        source: SHA-256 of the file's text. function: what returns the `Adapter`. arguments: of the function.
        files: SHA-256 of each argument that names a file, by argument.
        trust_remote_code: whether `require_trust` lets a pickle pass.
    """

    is_image = True
    source: str
    function: str = "load"
    arguments: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.adapter = _adapter(
            self.source, self.function, json.dumps(self.arguments, sort_keys=True), self.trust_remote_code
        )
        self.shape, self.num_classes = tuple(self.adapter.shape), self.adapter.classes
        guidable = self.adapter.null is not None
        self.provides = frozenset({"labels", "gradient"} if guidable else {"gradient"})

    @property
    def native(self) -> Want:  # type: ignore[override]
        """What the adapter says that the network predicts."""
        return self.adapter.predicts

    @property
    def path(self) -> NoisePath:
        assert not isinstance(self.adapter.path, str)
        return self.adapter.path

    @property
    def image_shape(self) -> tuple[int, ...]:
        return () if self.adapter.decode else self.shape

    def check(self) -> None:
        for name, digest in self.files.items():
            file = Path(str(self.arguments[name]))
            if not file.is_file() or sha256(file) != digest:
                raise UserError(f"{file} is not the file that this run began with; give the old one, or another --out")

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.check()
        self.adapter.module.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def given(self, cond: Cond) -> Any:
        if not self.num_classes:
            return None
        if cond.labels is None:
            raise Unsupported("the model needs labels; set [conditions] in the suite")
        if self.adapter.null is None:
            if bool((cond.labels < 0).any()):
                raise Unsupported("not supported: the adapter names no null label")
            return cond.labels
        return torch.where(cond.labels < 0, self.adapter.null, cond.labels)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, given: Any) -> torch.Tensor:
        times = t.to(x.dtype) if isinstance(t, torch.Tensor) else x.new_full((len(x),), float(t))
        times = self.adapter.time(times)
        if self.adapter.call is not None:
            return self.adapter.call(self.adapter.module, x, times, given)
        out: torch.Tensor = self.adapter.module(x, times) if given is None else self.adapter.module(x, times, given)
        return out

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.adapter.decode is None else self.adapter.decode(x)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] as clean samples."""
        return images if self.adapter.encode is None else self.adapter.encode(images)


@lru_cache(maxsize=2)
def _adapter(source: str, function: str, arguments: str, trust: bool) -> Adapter:
    """What the user's function returns, once per process."""
    global _trusting
    module = plugin_module(source)
    load = getattr(module, function, None)
    if not callable(load):
        raise UserError(f"the file of --model has no function '{function}'; write --model FILE.py:FUNCTION")
    given: dict[str, Any] = json.loads(arguments)
    known = inspect.signature(load).parameters
    for name in given:
        if name not in known:
            raise UserError(
                f"{function}() of --model takes no argument '{name}'; it takes {', '.join(known) or 'none'}"
            )
    _trusting = trust
    try:
        found = load(**given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{function}() of --model failed: {type(error).__name__}: {_line(error)}") from error
    finally:
        _trusting = False
    if not isinstance(found, Adapter):
        raise UserError(
            f"{function}() of --model returned {type(found).__name__}; return evalbench.models.adapter.Adapter"
        )
    return found


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
