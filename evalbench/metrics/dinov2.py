"""DINOv2 features (Oquab et al. 2023, 2304.07193) through transformers: the class token of ViT-B/14 and ViT-L/14.

As features for distances: Stein et al. 2023 (arXiv 2306.04675). Images are resized by Pillow's bicubic on float,
clipped, to 224 x 224 and normalised by the mean and spread of ImageNet. Published numbers resize otherwise.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evalbench import weights
from evalbench.interfaces import Extractor, SampleBatch
from evalbench.metrics.extractors import colour, images_of, in_batches
from evalbench.metrics.resize import resize
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

SIDE = 224
BATCH = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's IMAGENET constants
_FILES = ("model.safetensors", "config.json")


class DinoV2(Extractor):
    """The class token after the last norm, float32 (B, D).

    Attributes:
        folder: of the weights. source: the repository they come from.
    """

    folder: ClassVar[str]
    source: ClassVar[str]

    @classmethod
    def files(cls) -> tuple[weights.Weights, ...]:
        """Weights and architecture."""
        how = f"hf download {cls.source} {' '.join(_FILES)} --local-dir {{folder}}"
        return tuple(weights.Weights(f"{cls.folder}/{file}", how=how) for file in _FILES)

    @classmethod
    def missing(cls) -> str:
        why = next((why for file in cls.files() if (why := weights.missing(file))), "")
        return f"features '{cls.name}': {why}" if why else ""

    @classmethod
    def fingerprint(cls) -> str:
        digest = weights.sha256(weights.find(cls.files()[0]))
        recipe = f"pil-bicubic {SIDE} clipped, ImageNet mean and std, class token"
        return f"{cls.name}/{cls.version} {recipe}, sha256:{digest} float32 batch {BATCH}"

    def __init__(self) -> None:
        file = weights.find(self.files()[0])
        self._network = _load(file.parent, weights.sha256(file))

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = images_of(batch, self.name)
        self._network.to(images.device)
        return in_batches(self._tokens, images, BATCH)

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        x = resize(colour(images), (SIDE, SIDE), "pil-bicubic").clamp_(0, 255) / 255
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        tokens: torch.Tensor = self._network((x - mean) / std).last_hidden_state[:, 0]
        return tokens


@cache
def _load(folder: Path, digest: str) -> Any:
    """The network of a folder; the digest tells files apart."""
    from transformers import Dinov2Model

    network: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return network.float().eval().requires_grad_(False)


@register("dinov2-vitb14")
class DinoV2Base(DinoV2):
    """768 features of DINOv2 ViT-B/14, float32 (B, 768)."""

    folder, source = "dinov2-vitb14", "facebook/dinov2-base"


@register("dinov2-vitl14")
class DinoV2Large(DinoV2):
    """1024 features of DINOv2 ViT-L/14, float32 (B, 1024)."""

    folder, source = "dinov2-vitl14", "facebook/dinov2-large"
