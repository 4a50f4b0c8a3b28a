"""CLIP through open_clip: image towers as features, and the CLIP score as its raw cosine.

An id names architecture, published weights and prompt prefix: `clip@ViT-B-32:openai`, or with a prefix
`clip@ViT-B-32:openai:a-photo-depicts`. The same images score about 17 or 27 by the choice of the model (pitfall P27),
so there is no default. Images are prepared by the transform that open_clip gives for these weights (bicubic to the
shorter side, centre crop), captions by its tokeniser.

    clip        mean raw cosine                       scale 1
    clip-x100   100 cosine                            torchmetrics, MLPerf
    clipscore   2.5 max(cosine, 0) of each image      Hessel et al. 2021, with the prefix a-photo-depicts there
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from evalbench import weights
from evalbench.errors import UserError, unknown
from evalbench.interfaces import ExtractorFamily, Metric, Parts, SampleBatch, Value
from evalbench.metrics.common import Array, rows_of
from evalbench.metrics.extractors import captions_of, exact_float32, images_of, in_batches
from evalbench.metrics.persample import MeanScore, PerSampleScore, Sums
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

PREFIXES = {"a-photo-depicts": "A photo depicts "}  # clipscore.py of Hessel et al.
_FILES = ("open_clip_model.safetensors", "open_clip_config.json")
BATCH = 64


@dataclass(frozen=True)
class ClipId:
    """What stands behind `MODEL:WEIGHTS[:PREFIX]`."""

    model: str
    tag: str
    prefix: str = ""

    @classmethod
    def parse(cls, target: str) -> ClipId:
        """The id of a target.

        Raises:
            UserError: open_clip knows no such model or weights, or the prefix has no name.
        """
        import open_clip

        model, _, rest = target.partition(":")
        tag, _, prefix = rest.partition(":")
        known: list[tuple[str, str]] = open_clip.list_pretrained()
        if model not in {name for name, _ in known}:
            raise unknown("CLIP model", model, {name for name, _ in known})
        tags = {found for name, found in known if name == model}
        if tag not in tags:
            raise unknown(f"weights of CLIP model '{model}'", tag, tags)
        if prefix and prefix not in PREFIXES:
            raise unknown("prompt prefix", prefix, PREFIXES)
        return cls(model, tag, prefix)

    @property
    def weights(self) -> tuple[weights.Weights, ...]:
        """The files that open_clip's own repository of these weights holds, by the place they take here."""
        import open_clip

        place = f"open_clip/{self.model}--{self.tag}"
        source = open_clip.get_pretrained_cfg(self.model, self.tag).get("hf_hub", "").strip("/")
        how = f"hf download {source} {' '.join(_FILES)} --local-dir {{folder}}" if source.count("/") == 1 else ""
        return tuple(weights.Weights(f"{place}/{file}", how=how or "a copy from its makers") for file in _FILES)

    def missing(self) -> str:
        """The first file that is absent, and how to get it."""
        return next((why for file in self.weights if (why := weights.missing(file))), "")

    def digest(self) -> str:
        """SHA-256 of the weights file."""
        return weights.sha256(weights.find(self.weights[0]))


class Clip:
    """A CLIP with its transform and tokeniser, in eval mode.

    Args:
        model, preprocess, tokenizer: as open_clip makes them.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)  # open_clip hands models out in train mode
        self._preprocess, self._tokenizer = preprocess, tokenizer
        self._texts: dict[tuple[str, str], torch.Tensor] = {}

    def image_vectors(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, D) of uint8 images (B, 1 or 3, H, W)."""
        import torch
        from PIL import Image

        planes = images.cpu().permute(0, 2, 3, 1).numpy()
        prepared = [self._preprocess(Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)) for x in planes]
        pixels = torch.stack(prepared).to(images.device)
        self.model.to(images.device)
        return in_batches(lambda x: self.model.encode_image(x, normalize=True), pixels, BATCH)

    def text_vector(self, text: str, device: torch.device) -> torch.Tensor:
        """Unit vector (D,) of one text: it then depends on no other, and prompts repeat."""
        key = (str(device), text)
        if key not in self._texts:
            with exact_float32(device):
                self._texts[key] = self.model.to(device).encode_text(
                    self._tokenizer([text]).to(device), normalize=True
                )[0]
        return self._texts[key]

    def is_cut(self, text: str) -> bool:
        """Whether a text has more tokens than the model reads (77 in most), with its two marks."""
        tokenizer = self._tokenizer
        tokens = tokenizer.encode(text) if hasattr(tokenizer, "encode") else tokenizer.tokenizer.encode(text)[1:-1]
        return len(tokens) + 2 > int(tokenizer.context_length)

    def cosines(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosine of image and its own text, and 1.0 where the text was cut: float32 (B, 2)."""
        import torch

        seen = self.image_vectors(images)
        vectors = torch.stack([self.text_vector(text, images.device) for text in texts])
        cut = seen.new_tensor([float(self.is_cut(text)) for text in texts])
        return torch.stack([(seen * vectors).sum(dim=1), cut], dim=1)


@cache
def load(model: str, tag: str, digest: str) -> Clip:
    """A CLIP from its folder of weights; the digest tells files apart."""
    import open_clip

    folder = Path(weights.find(ClipId(model, tag).weights[0])).parent
    return from_folder(folder, open_clip.create_model(f"local-dir:{folder}", require_pretrained=True))


def from_folder(folder: Path, model: Any) -> Clip:
    """A model with the transform and the tokeniser of its folder."""
    import open_clip

    settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)
    return Clip(model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))


class _ClipFamily(ExtractorFamily):
    @classmethod
    def member(cls, target: str) -> type[ExtractorFamily]:
        ClipId.parse(target)
        return super().member(target)

    @classmethod
    def missing(cls) -> str:
        if not cls.target:
            return ""
        why = ClipId.parse(cls.target).missing()
        return f"features '{cls.name}': {why}" if why else ""

    @classmethod
    def fingerprint(cls) -> str:
        clip = ClipId.parse(cls.target)
        prefix = f" prefix '{PREFIXES[clip.prefix]}'" if clip.prefix else ""
        return f"{cls.name}/{cls.version} sha256:{clip.digest()}{prefix} float32 batch {BATCH}"

    def __init__(self) -> None:
        self._id = ClipId.parse(self.target)
        self._clip = load(self._id.model, self._id.tag, self._id.digest())


@register("clip-image:*")
class ClipImage(_ClipFamily):
    """Unit vectors of a CLIP image tower, float32 (B, D): `clip-image:ViT-L-14-336:openai`."""

    @classmethod
    def member(cls, target: str) -> type[ExtractorFamily]:
        if ClipId.parse(target).prefix:
            raise UserError(f"features 'clip-image:{target}' see no prompt; leave its prefix out")
        return super().member(target)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return self._clip.image_vectors(images_of(batch, self.name))


@register("clip-cosine:*")
class ClipCosine(_ClipFamily):
    """Raw cosine of image and caption by a CLIP, and whether the caption was cut: float32 (B, 2)."""

    needs = ("images", "captions")

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = images_of(batch, self.name)
        captions = captions_of(batch, self.name, len(images))
        prefix = PREFIXES.get(self._id.prefix, "")
        return self._clip.cosines(images, [prefix + caption for caption in captions])


# --- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionSums:
    """Sums of a score, and how many captions were cut."""

    scores: Sums
    cut: int


class CaptionScore(PerSampleScore, Metric[CaptionSums]):
    """Mean of a score of image and caption, which an extractor gives beside whether the caption was cut.

    Attributes:
        family: of extractors; empty where the argument is the extractor.
    """

    higher_is_better = True
    family: ClassVar[str] = ""

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"{self.family}{self.arg}",)

    def scale(self, scores: Array) -> Array:
        """The number to show of each raw one, float64 (B,)."""
        return scores

    def update(self, parts: Parts) -> CaptionSums:
        scores, cut = self.per_sample(parts), parts[self.needs[0]][:, 1]
        return CaptionSums(Sums.of(scores, parts), int(cut.sum()))

    def per_sample(self, parts: Parts) -> Array:
        return self.scale(rows_of(self.id, parts, self.needs[0])[:, 0].astype(np.float64))

    def merge(self, a: CaptionSums, b: CaptionSums) -> CaptionSums:
        return CaptionSums(a.scores + b.scores, a.cut + b.cut)

    def compute(self, state: CaptionSums, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        value = _MEAN.compute(state.scores, reference, allow_small_n=allow_small_n)
        note = f"{state.cut} of {value.n} captions cut to the length the model reads" if state.cut else ""
        return dataclasses.replace(value, note=note)


_MEAN = MeanScore("")


@register("clip")
class ClipScore(CaptionScore):
    """CLIP score as the mean raw cosine of image and caption (scale 1, not clipped)."""

    family = "clip-cosine:"
    unit = "cosine"


@register("clip-x100")
class ClipScoreX100(ClipScore):
    """CLIP score on the scale of torchmetrics and MLPerf: 100 x mean cosine."""

    unit = "cosine x 100"

    def scale(self, scores: Array) -> Array:
        return 100 * scores


@register("clipscore")
class HesselClipScore(ClipScore):
    """CLIPScore (Hessel et al. 2021): mean of 2.5 max(cosine, 0); with their prefix it is `...:a-photo-depicts`."""

    unit = "2.5 cosine"

    def scale(self, scores: Array) -> Array:
        return 2.5 * np.maximum(scores, 0)
