"""How each class of network of the diffusers library is called, by its class name.

UNet2DModel             no condition, or labels without a null label: DDPMPipeline, LDMPipeline
... with CMStochasticIterativeScheduler   a map from any noise to a clean sample: ConsistencyModelPipeline
UNet2DConditionModel    texts: StableDiffusionPipeline; with two text encoders StableDiffusionXLPipeline
PixArtTransformer2DModel   texts through T5 with a mask: PixArtAlphaPipeline, PixArtSigmaPipeline
SD3Transformer2DModel   texts through two CLIP encoders and T5: StableDiffusion3Pipeline
FluxTransformer2DModel  texts through T5, and one CLIP encoder for the whole: FluxPipeline
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from evalbench.errors import Unsupported
from evalbench.interfaces import Cond
from evalbench.models.pipelines import (
    Folder,
    LabelledTransformer,
    Network,
    StableDiffusion,
    StableDiffusion3,
    TextNetwork,
    _text_encoder,
    _tokens,
    t5_encoder,
)

# Tokens that T5 reads where nothing else is said: max_sequence_length of the pipelines of diffusers 0.42.
_T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512, "PixArtSigmaPipeline": 300}
_PIXART_TOKENS = 120
_FLUX_SIZE = 128  # default_sample_size of FluxPipeline


@dataclass(frozen=True)
class Calling:
    """Options that say how a network is called, where its folder does not; see `DiffusersPipeline`."""

    t5_tokens: int | None
    size: int
    embedded_guidance: float


def pipeline_facts(folder: Folder) -> dict[str, Any]:
    """What model_index.json says; empty for a folder without one."""
    file = folder.path / "model_index.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text("utf-8"))
    return found if isinstance(found, dict) else {}


def _t5_tokens(folder: Folder, calling: Calling, default: int) -> int:
    if calling.t5_tokens is not None:
        return calling.t5_tokens
    return _T5_TOKENS.get(str(pipeline_facts(folder).get("_class_name")), default)


class PlainUNet(Network):
    """UNet2DModel: a state and a time, and a label where it was trained with labels (there is no null label)."""

    has_null = False

    @property
    def classes(self) -> int:
        return int(self.config.get("num_class_embeds") or 0)

    def given(self, cond: Cond) -> Any:
        if not self.classes:
            return None
        if cond.labels is None:
            raise Unsupported("this UNet2DModel needs labels; set [conditions] in the suite")
        if bool((cond.labels < 0).any()):
            raise Unsupported("not supported: UNet2DModel has no null label")
        return cond.labels

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        out: torch.Tensor = self.net(x, timestep, class_labels=given, return_dict=False)[0]
        return out[:, : x.shape[1]]


class ConsistencyUNet(PlainUNet):
    """UNet2DModel inside the boundary condition of consistency models (Song et al. 2023, appendix C): predicts x0.

    A time is 250 log(sigma), as its scheduler has it; the output is c_skip x + c_out net(c_in x), clipped where the
    scheduler clips.
    """

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        facts = folder.config("scheduler")
        self.sigma_data, self.sigma_min = float(facts.get("sigma_data", 0.5)), float(facts["sigma_min"])
        self.clips = bool(facts.get("clip_denoised", True))

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        sigma = (timestep / 250.0).exp().reshape(-1, *(1,) * (x.ndim - 1))
        data, above = self.sigma_data, sigma - self.sigma_min
        scale = (sigma**2 + data**2).sqrt()
        out = super().__call__(x / scale, timestep, given)
        found = data**2 / (above**2 + data**2) * x + above * data / scale * out
        return found.clamp(-1, 1) if self.clips else found


class StableDiffusionXL(TextNetwork):
    """UNet2DConditionModel with two CLIP text encoders, a pooled text and the sizes of the image.

    Sizes are those of a whole image, uncropped. The empty text is zeros where model_index.json says so, as the
    released models have it.
    """

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        super().load(dtype, device)
        self.encoders = [
            _text_encoder(self.folder, "", CLIPTextModel, dtype, device),
            _text_encoder(self.folder, "_2", CLIPTextModelWithProjection, dtype, device),
        ]
        self.zeros_for_empty = bool(pipeline_facts(self.folder).get("force_zeros_for_empty_prompt", True))
        factor = 2 ** (len(self.folder.config("vae")["block_out_channels"]) - 1)
        height, width = (factor * side for side in self.shape[1:])
        self.sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=device)
        self._kept.clear()

    @property
    def readers(self) -> list[tuple[Any, int]]:
        return [(tokenizer, tokenizer.model_max_length) for tokenizer, _ in self.encoders]

    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        found = [
            encoder(_tokens(tokenizer, text).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in self.encoders
        ]
        words = torch.cat([out.hidden_states[-2] for out in found], dim=-1)
        pooled = found[-1].text_embeds
        if not text and self.zeros_for_empty:
            return torch.zeros_like(words), torch.zeros_like(pooled)
        return words, pooled

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        words, pooled = given
        more = {"text_embeds": pooled, "time_ids": self.sizes.expand(len(x), -1)}
        out: torch.Tensor = self.net(
            x, timestep, encoder_hidden_states=words, added_cond_kwargs=more, return_dict=False
        )[0]
        return out


class PixArt(TextNetwork):
    """PixArtTransformer2DModel with T5; its padding is masked. Texts are lower-cased, as the pipelines do."""

    def __init__(self, folder: Folder, calling: Calling) -> None:
        super().__init__(folder)
        self.tokens = _t5_tokens(folder, calling, _PIXART_TOKENS)

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        super().load(dtype, device)
        self.tokenizer, self.text = t5_encoder(self.folder, "", dtype, device)
        self._kept.clear()

    @property
    def readers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, self.tokens)]

    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        found = self.tokenizer(
            text.lower().strip(), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).to(self.text.device)
        return self.text(found.input_ids, attention_mask=found.attention_mask)[0], found.attention_mask

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        words, mask = given
        more: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.config["sample_size"] == 128:  # the networks of 1024 pixels are told the size of the image
            height, width = (8.0 * side for side in x.shape[-2:])
            more = {
                "resolution": x.new_tensor([[height, width]]).expand(len(x), -1),
                "aspect_ratio": x.new_full((len(x), 1), height / width),
            }
        out: torch.Tensor = self.net(
            x,
            encoder_hidden_states=words,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs=more,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]


class Flux(TextNetwork):
    """FluxTransformer2DModel: states in squares of 2 x 2, texts through T5, and CLIP's pooled text."""

    def __init__(self, folder: Folder, calling: Calling) -> None:
        super().__init__(folder)
        self.tokens = _t5_tokens(folder, calling, _T5_TOKENS["FluxPipeline"])
        self.size, self.scale = calling.size or _FLUX_SIZE, calling.embedded_guidance

    @property
    def shape(self) -> tuple[int, ...]:
        return int(self.config["in_channels"]) // 4, self.size, self.size

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import CLIPTextModel

        super().load(dtype, device)
        self.clip = _text_encoder(self.folder, "", CLIPTextModel, dtype, device)
        self.t5 = t5_encoder(self.folder, "_2", dtype, device)
        self._kept.clear()

    @property
    def readers(self) -> list[tuple[Any, int]]:
        return [(self.clip[0], self.clip[0].model_max_length), (self.t5[0], self.tokens)]

    def encode(self, text: str) -> tuple[torch.Tensor, ...]:
        tokenizer, encoder = self.clip
        pooled = encoder(_tokens(tokenizer, text).to(encoder.device)).pooler_output
        tokenizer, encoder = self.t5
        return encoder(_tokens(tokenizer, text, self.tokens).to(encoder.device))[0], pooled

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, given: Any) -> torch.Tensor:
        words, pooled = given
        (b, c), (h, w) = x.shape[:2], (side // 2 for side in x.shape[2:])
        squares = x.reshape(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c)
        rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        places = torch.stack([torch.zeros(h, w, device=x.device), *torch.meshgrid(rows, columns, indexing="ij")], -1)
        out = self.net(
            hidden_states=squares,
            timestep=timestep / 1000.0,
            guidance=x.new_full((b,), self.scale) if self.config.get("guidance_embeds") else None,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=x.new_zeros(words.shape[1], 3),
            img_ids=places.reshape(h * w, 3).to(x.dtype),
            return_dict=False,
        )[0]
        found: torch.Tensor = out.reshape(b, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        return found


def _unet(folder: Folder, calling: Calling) -> Network:
    is_map = folder.config("scheduler")["_class_name"] == "CMStochasticIterativeScheduler"
    return ConsistencyUNet(folder) if is_map else PlainUNet(folder)


def _text_unet(folder: Folder, calling: Calling) -> Network:
    return StableDiffusionXL(folder) if folder.has("text_encoder_2") else StableDiffusion(folder)


NETWORKS: dict[str, Callable[[Folder, Calling], Network]] = {
    "DiTTransformer2DModel": lambda folder, calling: LabelledTransformer(folder),
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _text_unet,
    "SD3Transformer2DModel": lambda folder, calling: StableDiffusion3(folder, _t5_tokens(folder, calling, 256)),
    "PixArtTransformer2DModel": PixArt,
    "FluxTransformer2DModel": Flux,
}
