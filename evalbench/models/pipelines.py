"""Networks of the diffusers library as models: a folder as diffusers' `save_pretrained` writes it, or an id.

Path, prediction type, time convention, scale of the latents and size of a sample are read from the folder's own
configuration. Which network stands in the folder decides how it is called:

    DiTTransformer2DModel   labels; the null label is `num_embeds_ada_norm`
    UNet2DConditionModel    texts through CLIPTextModel, as StableDiffusionPipeline gives them
    SD3Transformer2DModel   texts through two CLIP encoders, as StableDiffusion3Pipeline gives them

The others are in `evalbench.models.networks`, each under its class name.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch

from evalbench.errors import Unsupported, UserError, unknown
from evalbench.interfaces import Blocks, Cond, Model, Time, Want
from evalbench.models.blocks import blocks_of, capabilities, depth_of
from evalbench.paths import EDM, Flow, VPDiscrete
from evalbench.paths import Path as NoisePath
from evalbench.registry import register
from evalbench.weights import local_repository, sha256

_PREDICTIONS: dict[str, Want] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_FLOW_START = 1.0 - 1e-5  # pipelines start at t = 1, where lambda is -inf; the network cannot tell the difference
_KEPT_TEXTS = 4096  # encoded texts that a process keeps


# --- the folder -----------------------------------------------------------------------------------------------------


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of all weight files of a model folder, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.relative_to(folder).as_posix().encode())
        found.update(bytes.fromhex(sha256(file)))
    return found.hexdigest()


@dataclass(frozen=True)
class Folder:
    """A model folder: one sub-folder per part, each with its configuration.

    Attributes:
        path: where it lies. weights: one safetensors file with the network's weights instead of the folder's own.
    """

    path: Path
    weights: Path | None = None

    @classmethod
    def find(cls, text: str, weights: str = "") -> Folder:
        """The folder of a suite's option: a path, an id `owner/name`, or `evalbench:` and a folder in the package.

        Raises:
            UserError: there is none, it holds no model, or `weights` is no file.
        """
        inside, _, name = text.partition(":")
        path = Path(str(files("evalbench"))).joinpath(*name.split("/")) if inside == "evalbench" else Path(text)
        if not path.is_dir():
            path = local_repository(text)
        if weights and not Path(weights).is_file():
            raise UserError(f"weights file '{weights}' does not exist; give a .safetensors file")
        folder = cls(path, Path(weights) if weights else None)
        folder.network  # noqa: B018 - refuses a folder without a network now, not on the first sample
        return folder

    @cached_property
    def network(self) -> str:
        """The sub-folder of the network that denoises: `unet` or `transformer`, or the folder itself (`.`)."""
        for name in ("unet", "transformer", "."):
            if (self.path / name / "config.json").is_file():
                return name
        raise UserError(f"{self.path} holds neither unet/config.json nor transformer/config.json")

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return (self.path / part / "config.json").is_file()

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part.

        Raises:
            UserError: missing or no JSON.
        """
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.path / part / name
        if part == "scheduler" and not file.is_file():
            file = self.path / name  # a network saved alone, with its scheduler beside it
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
        if not isinstance(found, dict) or "_class_name" not in found:
            raise UserError(f"{file} names no class of diffusers")
        return found


def schedule(folder: Folder) -> tuple[NoisePath, Want, int]:
    """Path, prediction type and number of training time steps, from the folder's scheduler.

    Raises:
        UserError: a scheduler whose path is not known.
    """
    import diffusers

    config = folder.config("scheduler")
    name = str(config["_class_name"])
    steps = int(config.get("num_train_timesteps", 1000))
    if name.startswith("FlowMatch"):
        return Flow(t_start=_FLOW_START), "velocity", steps
    if name == "CMStochasticIterativeScheduler":  # its network maps a state of the EDM path to a clean sample
        return EDM(t_start=float(config["sigma_max"]), t_end=float(config["sigma_min"])), "x0", steps
    kind = str(config.get("prediction_type", "epsilon"))
    if kind not in _PREDICTIONS:
        raise unknown("prediction_type", kind, _PREDICTIONS, where=str(folder.path / "scheduler"))
    scheduler = getattr(diffusers, name).from_config(config)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UserError(f"{folder.path}: scheduler {name} has no alphas_cumprod; save the pipeline with DDIMScheduler")
    return VPDiscrete(t_end=1.0 / steps, alphas_cumprod=tuple(table.double().tolist())), _PREDICTIONS[kind], steps


# --- networks -------------------------------------------------------------------------------------------------------


class Network(ABC):
    """How one class of network is called. Parts are loaded by `load`.

    Attributes:
        classes: number of labels; 0 for texts. has_null: it knows a null condition, so it can be guided.
    """

    has_null = True

    def __init__(self, folder: Folder) -> None:
        self.folder, self.config = folder, folder.config(folder.network)
        self.net: Any = None

    def cut(self, text: str) -> bool:
        """Whether a text is longer than what an encoder reads, so that its end is lost."""
        return False

    @property
    def classes(self) -> int:
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a state."""
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.config["in_channels"]), int(height), int(width)

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the network and what encodes its conditions, for use only."""
        import diffusers

        kind = getattr(diffusers, str(self.config["_class_name"]))
        if self.folder.weights is None:
            net = _loaded(kind, self.folder.path / self.folder.network, dtype)
        else:
            net = single_file(kind, self.folder, dtype)
        self.net = _ready(net, device)

    @abstractmethod
    def given(self, cond: Cond) -> Any:
        """What `__call__` takes for the conditions."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        """The network's output at a state, (B, C, H, W); timestep (B,) in the network's own units."""


class LabelledTransformer(Network):
    """DiTTransformer2DModel: labels, and one more for "any"."""

    @property
    def classes(self) -> int:
        return int(self.config["num_embeds_ada_norm"])

    def given(self, cond: Cond) -> Any:
        if cond.labels is None:
            raise Unsupported("DiTTransformer2DModel needs labels; set [conditions] in the suite")
        return torch.where(cond.labels < 0, self.classes, cond.labels)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        out: torch.Tensor = self.net(x, timestep=timestep, class_labels=given, return_dict=False)[0]
        return out[:, : x.shape[1]]  # a learned variance comes after the mean


class TextNetwork(Network):
    """A network that reads texts; each is encoded once, alone, so that it depends on no other."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self._kept: dict[str, tuple[torch.Tensor, ...]] = {}

    def given(self, cond: Cond) -> tuple[torch.Tensor, ...]:
        if cond.captions is None:
            raise Unsupported(f"{self.config['_class_name']} needs texts; set [conditions] in the suite")
        for text in dict.fromkeys(cond.captions):
            if text not in self._kept:
                if len(self._kept) >= _KEPT_TEXTS:
                    self._kept.clear()
                with torch.no_grad():
                    self._kept[text] = self.encode(text)
        return tuple(torch.cat(rows) for rows in zip(*(self._kept[text] for text in cond.captions), strict=True))

    @abstractmethod
    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        """Tensors of one text, each (1, ...)."""

    @property
    @abstractmethod
    def readers(self) -> list[tuple[Any, int]]:
        """Tokenisers, each with the number of tokens that are read."""

    def cut(self, text: str) -> bool:
        return any(len(tokenizer(text, verbose=False).input_ids) > limit for tokenizer, limit in self.readers)


class StableDiffusion(TextNetwork):
    """UNet2DConditionModel with CLIPTextModel, whose last hidden state it attends to."""

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import CLIPTextModel

        super().load(dtype, device)
        self.tokenizer, self.text = _text_encoder(self.folder, "", CLIPTextModel, dtype, device)
        self._kept.clear()

    @property
    def readers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, self.tokenizer.model_max_length)]

    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        tokens = _tokens(self.tokenizer, text).to(self.text.device)
        return (self.text(tokens)[0],)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        out: torch.Tensor = self.net(x, timestep, encoder_hidden_states=given[0], return_dict=False)[0]
        return out


class StableDiffusion3(TextNetwork):
    """SD3Transformer2DModel with two CLIP text encoders, side by side, and T5 behind them.

    A folder without T5 has `t5_tokens` zeros in its place.
    """

    def __init__(self, folder: Folder, t5_tokens: int) -> None:
        super().__init__(folder)
        self.t5_tokens = t5_tokens
        self.t5: tuple[Any, Any] | None = None

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import CLIPTextModelWithProjection

        super().load(dtype, device)
        kind = CLIPTextModelWithProjection
        self.encoders = [_text_encoder(self.folder, suffix, kind, dtype, device) for suffix in ("", "_2")]
        self.t5 = t5_encoder(self.folder, "_3", dtype, device) if self.folder.has("text_encoder_3") else None
        self._kept.clear()

    @property
    def readers(self) -> list[tuple[Any, int]]:
        found = [(tokenizer, tokenizer.model_max_length) for tokenizer, _ in self.encoders]
        return [*found, (self.t5[0], self.t5_tokens)] if self.t5 else found

    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        found = [
            encoder(_tokens(tokenizer, text).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in self.encoders
        ]
        words = torch.cat([out.hidden_states[-2] for out in found], dim=-1)  # (1, L, D)
        width = int(self.config["joint_attention_dim"])
        words = torch.nn.functional.pad(words, (0, width - words.shape[-1]))
        more = words.new_zeros(1, self.t5_tokens, width)
        if self.t5:
            tokenizer, encoder = self.t5
            more = encoder(_tokens(tokenizer, text, self.t5_tokens).to(encoder.device))[0]
        words = torch.cat([words, more], dim=1)
        return words, torch.cat([out.text_embeds for out in found], dim=-1)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        words, pooled = given
        out: torch.Tensor = self.net(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return out


def _loaded(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    # with low_cpu_mem_usage the library asks for one more package, with a message at each load
    return kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)


def single_file(kind: Any, folder: Folder, dtype: torch.dtype) -> Any:
    """A network with the weights of one file, in diffusers' names or those of the original release.

    Raises:
        UserError: no safetensors file, or not of this network.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    file, part = str(folder.weights), "" if folder.network == "." else folder.network
    try:
        with safe_open(file, "pt") as content:
            names = set(content.keys())
        net = kind.from_config(folder.config(folder.network)).to(dtype)
        if names == set(net.state_dict()):
            net.load_state_dict(load_file(file))
        else:  # the library knows the names of some original releases
            net = kind.from_single_file(file, config=str(folder.path), subfolder=part, torch_dtype=dtype)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file} ({error}); a single-file checkpoint must be safetensors") from None
    except Exception as error:  # whatever the library says when it does not know the names
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{file} does not hold the weights of {kind.__name__} as {folder.path} says: {reason}"
        ) from None
    return net


def _ready(module: Any, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)


def _text_encoder(folder: Folder, suffix: str, kind: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    from transformers import CLIPTokenizer
    from transformers.utils import logging

    tokenizer = CLIPTokenizer.from_pretrained(folder.path / f"tokenizer{suffix}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = kind.from_pretrained(folder.path / f"text_encoder{suffix}", dtype=dtype)
    return tokenizer, _ready(encoder, device)


def t5_encoder(folder: Folder, suffix: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """T5's tokeniser and encoder of a folder: the sub-folders `tokenizer` and `text_encoder` with a suffix."""
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder.path / f"tokenizer{suffix}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = T5EncoderModel.from_pretrained(folder.path / f"text_encoder{suffix}", dtype=dtype)
    return tokenizer, _ready(encoder, device)


def _tokens(tokenizer: Any, text: str, length: int = 0) -> torch.Tensor:
    """int64 (1, context), padded and cut to the encoder's length, or to another."""
    length = length or tokenizer.model_max_length
    found: torch.Tensor = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return found


# --- the model ------------------------------------------------------------------------------------------------------


@register("diffusers")
@dataclass
class DiffusersPipeline(Model):
    """A folder that diffusers' `save_pretrained` wrote: network, scheduler, and what there is besides.

    Attributes:
        folder: where it lies, or an id `owner/name`; `evalbench:` before it means inside the package.
        sha256: digest of its weights (`weights_digest`), which are refused when it differs; empty takes any.
        weights: a single safetensors file with the network's weights; the folder gives everything else.
        t5_tokens: tokens that T5 reads (diffusers' max_sequence_length), without T5 as many zeros; None is the
            pipeline's own number.
        size: side of the latents where the network's configuration names none (Flux); 0 is the pipeline's.
        embedded_guidance: scale that networks with distilled guidance are told (Flux); it costs no second row.
    """

    is_image = True
    embedded: ClassVar[bool] = False  # a network that somebody else trained
    folder: str
    sha256: str = ""
    weights: str = ""
    t5_tokens: int | None = None
    size: int = 0
    embedded_guidance: float = 3.5
    network: Network = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._folder = Folder.find(self.folder, self.weights)
        self.network = self._network()
        self._path, self._native, self._steps = schedule(self._folder)
        self.shape = self.network.shape
        self.num_classes = self.network.classes
        self.reads_texts = isinstance(self.network, TextNetwork)
        inside = capabilities(str(self.network.config["_class_name"]))
        null = {"labels"} if self.network.has_null else set()
        self.provides = frozenset({"gradient", "network"} | inside | null)
        self._vae_part = next((part for part in ("vae", "vqvae") if self._folder.has(part)), "")
        self._vae_config = self._folder.config(self._vae_part) if self._vae_part else None
        self._vae: Any = None

    def _network(self) -> Network:
        from evalbench.models.networks import NETWORKS, Calling  # which import this file

        name = str(self._folder.config(self._folder.network)["_class_name"])
        if name not in NETWORKS:
            raise unknown("network class", name, NETWORKS)
        return NETWORKS[name](self._folder, Calling(self.t5_tokens, self.size, self.embedded_guidance))

    @property
    def native(self) -> Want:  # type: ignore[override]
        """What the scheduler says that the network predicts."""
        return self._native

    @property
    def path(self) -> NoisePath:
        return self._path

    def depth(self) -> int:
        return depth_of(self.network.config)

    @property
    def blocks(self) -> Blocks:
        return blocks_of(self.network.net)

    def check(self) -> None:
        if not self.sha256:
            return
        digest = sha256(self._folder.weights) if self._folder.weights else weights_digest(self._folder.path)
        if digest != self.sha256:
            raise UserError(
                f"weights in {self._folder.path} have SHA-256 {digest[:16]}..., the suite says {self.sha256[:16]}...; "
                "restore the files or correct the suite"
            )

    def cuts(self, text: str) -> bool:
        return self.network.cut(text)

    @property
    def image_shape(self) -> tuple[int, ...]:
        if self._vae_config is None:
            return self.shape
        factor = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        return int(self._vae_config["out_channels"]), *(factor * side for side in self.shape[1:])

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.check()
        self.network.load(dtype, device)
        if self._vae_config is not None:
            import diffusers

            kind = getattr(diffusers, str(self._vae_config["_class_name"]))
            self._vae = _ready(_loaded(kind, self._folder.path / self._vae_part, dtype), device)

    def given(self, cond: Cond) -> Any:
        return self.network.given(cond)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, given: Any) -> torch.Tensor:
        """The network at (x, t): alpha and sigma are known to it by t alone."""
        return self.network(x, self.timesteps(t, x), given)

    def timesteps(self, t: Time, x: torch.Tensor) -> torch.Tensor:
        """Times of the path in the network's units, (B,): entry i of a VP table is at t = (i + 1) / N, a flow's t N.

        A consistency model's are 250 log(sigma).
        """
        times = t.to(x.dtype) if isinstance(t, torch.Tensor) else x.new_full((len(x),), float(t))
        if isinstance(self._path, EDM):
            return 250.0 * times.log()
        return times * self._steps - (0.0 if self._native == "velocity" else 1.0)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents through the decoder; pixels as they are."""
        if self._vae_config is None:
            return x
        scale, shift = self._scale()
        images: torch.Tensor = self._vae.decode((x / scale + shift).to(self._vae.dtype), return_dict=False)[0]
        return images

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], (B, C, H, W), as clean samples: the means of their latents, or themselves."""
        if self._vae_config is None:
            return images
        scale, shift = self._scale()
        with torch.no_grad():
            found = self._vae.encode(images.to(self._vae.dtype))
            mean: torch.Tensor = found.latents if self._vae_part == "vqvae" else found.latent_dist.mean
        return (mean - shift) * scale

    def _scale(self) -> tuple[float, float]:
        assert self._vae_config is not None
        return float(self._vae_config.get("scaling_factor", 1.0)), float(self._vae_config.get("shift_factor") or 0.0)
