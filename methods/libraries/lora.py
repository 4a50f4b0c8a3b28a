"""LoRA weights by name: `lora:loras/style.safetensors(scale=0.8)`."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Edit, NetworkWrap, Step, Wrap
from evalbench.registry import register
from evalbench.weights import local_repository
from evalbench.weights import sha256 as digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

_NAME = "pytorch_lora_weights.safetensors"  # what diffusers' save_lora_weights calls its file
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configuration in the file's header
_DIGITS = 16  # of the digest, in names
# Layouts of diffusers/utils/state_dict_utils.py: peft's, diffusers' own, and that of its attention processors before.
_OLDER = ((".processor.", "."), ("to_out_lora.", "to_out.0.lora."), ("_lora.", ".lora."))
_PART = r"(?:(?P<part>unet|transformer|base_model\.model)\.)?"
_MATRIX = re.compile(_PART + r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora\.down|lora\.up)(?:\.default)?\.weight")
_ALPHA = re.compile(_PART + r"(?P<module>.+)\.alpha")
_KINDS = {"lora_A": "down", "lora.down": "down", "lora_B": "up", "lora.up": "up"}

Factor: TypeAlias = Callable[[str, int], float]  # alpha / r of a layer, by its name and rank


@register("lora:*")
@dataclass(frozen=True)
class Lora(Wrap):
    """LoRA weights on the network, by file: `lora:loras/style.safetensors(scale=0.8)`.

    W becomes W + scale (alpha / r) B A for the length of each call (alpha / sqrt(r) where the file says `use_rslora`),
    computed once in float32 at least: the operations are those of the plain network, and afterwards it is what it was,
    to the bit. Reads the safetensors that diffusers writes (`unet.` or `transformer.` with lora_A and lora_B, or
    lora.down and lora.up); no pickle. Without alpha, alpha = r. Only the network of the suite's own model: LoRA weights
    of text encoders are refused, other roles keep theirs. Not `quant:` nor a fine-tuned network, whose layers would
    replace these: such a chain is refused.

    Attributes:
        target: a file, a folder with one (as save_lora_weights makes it), or an id `owner/name` that was fetched.
        scale: strength, 1 as trained. sha256: the file's first 16 digits; filled in, and refused where it differs.
    """

    requires = frozenset({"network"})
    replaces_layers = True

    target: str
    scale: float = 1.0
    sha256: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"lora:{self.target}: scale must be a number, got {self.scale}")
        if not self.sha256:  # a name that is in a record has it, and needs no file to be read
            object.__setattr__(self, "sha256", digest(self._file())[:_DIGITS])

    def identity(self) -> dict[str, Any]:
        return {"name": "lora:*", "target": ""}  # the digest names the weights, wherever they lie

    def check(self, nfe: int, blocks: int) -> None:
        self._updates()

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        network, key = denoiser.network, (self.sha256, self.scale)
        if _kept.get(network, ("", {}))[0] != key:
            _kept[network] = (key, self.merged(network))
        modules = _kept[network][1]
        return denoiser.within(lambda inner: _Adapted(inner, modules, key))

    def merged(self, network: nn.Module) -> dict[str, nn.Module]:
        """The network's layers with the LoRA weights added, by name; the network itself is left alone.

        Raises:
            Unsupported: the weights were made for another network.
        """
        return {name: self._merged(network, name, update) for name, update in self._updates().items()}

    def _merged(self, network: nn.Module, name: str, update: _Update) -> nn.Module:
        import torch

        layer: Any = dict(network.named_modules()).get(name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor) or not update.fits(tuple(weight.shape)):
            found = "has no such layer" if weight is None else f"has {tuple(weight.shape)} there"
            raise Unsupported(
                f"not supported: lora:{self.target} was made for another network: {update.key} of shape "
                f"{tuple(update.up.shape)}, but {type(network).__name__} {found}"
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        up, down = (part.flatten(1).to(weight.device, wide) for part in (update.up, update.down))
        added = (self.scale * update.factor) * (up @ down).view(weight.shape)
        twin: nn.Module = copy.copy(layer)
        changed = torch.nn.Parameter((weight.detach().to(wide) + added).to(weight.dtype), requires_grad=False)
        twin.__dict__["_parameters"] = {**layer._parameters, "weight": changed}
        return twin

    def _file(self) -> Path:
        path = Path(self.target).expanduser()
        if not path.exists():
            try:
                path = local_repository(self.target)
            except UserError:
                raise UserError(
                    f"lora:{self.target}: no such file or folder, and no id that was fetched; give the path of a "
                    f".safetensors file, or type: hf download OWNER/NAME"
                ) from None
        if path.is_file():
            return path
        files = [path / _NAME] if (path / _NAME).is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"lora:{self.target}: holds {len(files)} .safetensors files; name one of them")
        return files[0]

    def _updates(self) -> dict[str, _Update]:
        """What the file holds, by name of the layer.

        Raises:
            UserError: it is another file than the name says, no safetensors, or a key is not known.
        """
        file = self._file()
        if not digest(file).startswith(self.sha256):
            raise UserError(
                f"lora:{self.target} has changed: its SHA-256 is {digest(file)[:_DIGITS]}..., not {self.sha256}...; "
                "restore it, or leave sha256 out to measure the new one"
            )
        return _read(file, f"lora:{self.target}")


# The layers last made of a network: every batch asks for them.
_kept: WeakKeyDictionary[nn.Module, tuple[Hashable, dict[str, nn.Module]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Update:
    """What is added to one layer: factor up @ down.

    Attributes:
        key: of `up` in the file. down: (r, in, ...). up: (out, r, ...). factor: alpha / r.
    """

    key: str
    down: torch.Tensor
    up: torch.Tensor
    factor: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of a shape can take it."""
        return len(shape) > 1 and len(self.up) == shape[0] and self.down[0].numel() == math.prod(shape[1:])


class _Adapted(NetworkWrap):
    """Other layers in the place of the base network's own."""

    def __init__(self, inner: Denoiser, modules: Mapping[str, nn.Module], key: Hashable) -> None:
        super().__init__(inner)
        self.modules, self.key = modules, key

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable]:
        return self.blocks.swap(self.modules), ("lora", self.key)

    def role(self, name: str) -> Denoiser:
        return self.inner.role(name)  # another network


def _read(file: Path, where: str) -> dict[str, _Update]:
    """The updates in a file by name of the layer.

    Raises:
        UserError: no safetensors, or a key that none of the layouts has.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            stored = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 - no mapping
            header = content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: cannot read {file.name} as safetensors ({str(error).splitlines()[0]})") from None
    matrices: dict[str, dict[str, str]] = {}  # layer -> up or down -> key
    alphas: dict[str, float] = {}
    for key in sorted(stored):
        plain = _renamed(key)
        if match := _MATRIX.fullmatch(plain):
            matrices.setdefault(match["module"], {})[_KINDS[match["kind"]]] = key
        elif (match := _ALPHA.fullmatch(plain)) and stored[key].numel() == 1:
            alphas[match["module"]] = float(stored[key])
        else:
            raise UserError(f"{where}: {_why_unknown(key)}")
    try:
        factor = _factors(header, alphas)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: {_METADATA} in its header is no JSON object ({error}); save it again") from None
    return {name: _update(name, keys, stored, factor, where) for name, keys in matrices.items()}


def _renamed(key: str) -> str:
    for old, new in _OLDER:
        key = key.replace(old, new)
    return key


def _why_unknown(key: str) -> str:
    if key.startswith("text_encoder"):
        return f"'{key}' adapts a text encoder, and only networks are adapted here; save it without text encoders"
    return f"unknown key '{key}'; known are unet.* and transformer.* with lora_A and lora_B, or lora.down and lora.up"


def _update(name: str, keys: Mapping[str, str], stored: Mapping[str, Any], factor: Factor, where: str) -> _Update:
    if keys.keys() != {"up", "down"}:
        raise UserError(f"{where}: '{next(iter(keys.values()))}' has no partner: each layer needs both matrices")
    down, up = stored[keys["down"]], stored[keys["up"]]
    if down.ndim < 2 or up.ndim < 2 or up[0].numel() != len(down):
        raise UserError(f"{where}: '{keys['up']}' of shape {tuple(up.shape)} does not go with {tuple(down.shape)}")
    return _Update(keys["up"], down, up, factor(name, len(down)))


def _factors(header: Mapping[str, str], alphas: Mapping[str, float]) -> Factor:
    """By peft's configuration in the file's header, or by alphas that stand among the keys."""
    facts: dict[str, Any] = {}
    for key, value in json.loads(header.get(_METADATA, "{}")).items():
        facts[re.sub(r"^(unet|transformer)\.", "", key)] = value

    def factor(name: str, rank: int) -> float:
        alpha = alphas.get(name, facts.get("lora_alpha", rank))
        for pattern, value in facts.get("alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):  # as peft looks them up
                alpha = value
        return float(alpha) / (math.sqrt(rank) if facts.get("use_rslora") else rank)

    return factor
