"""Rewards learned from people's choices: PickScore v1 and HPS v2.1, one score of image and prompt per sample.

`reward@pickscore-v1` follows the model card (Kirstain et al. 2023, arXiv 2305.01569): logit scale x cosine.
`reward@hpsv2.1` follows score.py of tgxs002/HPSv2 (Wu et al. 2023): the raw cosine, here in float32 and not in mixed
precision. Their digests are recorded at first use: nobody here has seen the files. A method that optimised a reward is
never ranked by it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evalbench import weights
from evalbench.interfaces import Extractor, SampleBatch
from evalbench.metrics.clip import Clip
from evalbench.metrics.extractors import captions_of, colour, exact_float32, images_of, in_batches
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

BATCH = 16


class _Preference(Extractor):
    """A reward of image and prompt.

    Attributes:
        files: its weights, the first of which makes the fingerprint, and what else it reads.
    """

    needs = ("images", "captions")
    files: ClassVar[tuple[weights.Weights, ...]]

    @classmethod
    def missing(cls) -> str:
        why = next((why for file in cls.files if (why := weights.missing(file))), "")
        return f"features '{cls.name}': {why}" if why else ""

    @classmethod
    def digest(cls) -> str:
        """SHA-256 of the weights."""
        return weights.sha256(weights.find(cls.files[0]))

    @classmethod
    def fingerprint(cls) -> str:
        return f"{cls.name}/{cls.version} sha256:{cls.digest()} float32 batch {BATCH}"

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = images_of(batch, self.name)
        return self.scores(images, captions_of(batch, self.name, len(images)))

    def scores(self, images: torch.Tensor, captions: tuple[str, ...]) -> torch.Tensor:
        """Rewards (B,), float32, of uint8 images (B, C, H, W) and their prompts."""
        raise NotImplementedError


@register("pickscore-v1")
class PickScore(_Preference):
    """PickScore v1 of image and prompt, float32 (B,): logit scale x cosine of a fine-tuned CLIP-H."""

    files = (
        weights.Weights(
            "pickscore-v1/model.safetensors", how="hf download yuvalkirstain/PickScore_v1 --local-dir {folder}"
        ),
        weights.Weights(
            "pickscore-v1/processor/preprocessor_config.json",
            how="hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include '*.json' '*.txt' --local-dir {folder}",
        ),
    )

    def __init__(self) -> None:
        self._model, self._processor = _transformers_clip(weights.find(self.files[0]).parent, self.digest())

    def scores(self, images: torch.Tensor, captions: tuple[str, ...]) -> torch.Tensor:
        import torch
        from torch.nn import functional as F

        planes = list(colour(images).cpu().permute(0, 2, 3, 1).numpy())
        pixels = self._processor(images=planes, return_tensors="pt")["pixel_values"].to(images.device)
        self._model.to(images.device)
        seen = F.normalize(in_batches(self._image, pixels, BATCH), dim=-1)
        texts = torch.stack([self._text(caption, images.device) for caption in captions])
        cosines = (seen * F.normalize(texts, dim=-1)).sum(dim=1)
        rewards: torch.Tensor = self._model.logit_scale.exp() * cosines
        return rewards

    def _image(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self._model.visual_projection(self._model.vision_model(pixels).pooler_output)
        return vectors

    def _text(self, caption: str, device: torch.device) -> torch.Tensor:
        tokens = self._processor(text=caption, truncation=True, max_length=77, return_tensors="pt").to(device)
        with exact_float32(device):
            pooled = self._model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            vectors: torch.Tensor = self._model.text_projection(pooled)
        return vectors[0]


@cache
def _transformers_clip(folder: Path, digest: str) -> tuple[Any, Any]:
    """Model and processor of a folder; the digest tells files apart."""
    from transformers import AutoProcessor, CLIPModel

    load: Any = AutoProcessor.from_pretrained
    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.float().eval().requires_grad_(False), load(folder / "processor", local_files_only=True)


@register("hpsv2.1")
class HPS(_Preference):
    """HPS v2.1 of image and prompt, float32 (B,): raw cosine of a fine-tuned CLIP-H."""

    files = (
        weights.Weights(
            "hpsv2.1/HPS_v2.1_compressed.pt",
            how="hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {folder}",
        ),
    )
    architecture: ClassVar[str] = "ViT-H-14"

    def __init__(self) -> None:
        self._clip = _checkpoint(weights.find(self.files[0]), self.architecture, self.digest())

    def scores(self, images: torch.Tensor, captions: tuple[str, ...]) -> torch.Tensor:
        return self._clip.cosines(images, list(captions))[:, 0]


@cache
def _checkpoint(file: Path, architecture: str, digest: str) -> Clip:
    """An open_clip architecture with the weights of a checkpoint; the digest tells files apart."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(architecture)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    return Clip(model.float(), preprocess, open_clip.get_tokenizer(architecture))
