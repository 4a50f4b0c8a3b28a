"""The modalities of a joint model's samples, and whether they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from evalbench.errors import UserError
from evalbench.interfaces import Extractor, SampleBatch
from evalbench.registry import register

if TYPE_CHECKING:
    import torch


class _Mixture(Protocol):
    def responsibilities(self, x: torch.Tensor, *, elements: slice) -> torch.Tensor: ...


def _where(extractor: str, batch: SampleBatch, modality: str) -> slice:
    if "modalities" not in batch.model.provides:
        raise UserError(
            f"features '{extractor}' need a joint model, and '{batch.model.name}' is none; "
            "leave its metrics out of --metrics"
        )
    return batch.model.modalities[modality]


class _Part(Extractor):
    needs = ("x",)
    modality: ClassVar[str]

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return batch.x[:, _where(self.name, batch, self.modality)].flatten(1)


@register("image-part")
class ImagePart(_Part):
    """The image's elements of a joint sample, flattened, (B, D)."""

    modality = "image"


@register("text-part")
class TextPart(_Part):
    """The text's elements of a joint sample, flattened, (B, D)."""

    modality = "text"


@register("gmm-agreement")
class Agreement(Extractor):
    """1 where image and text of a joint mixture's sample most probably come from one component, float64 (B,)."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        image, text = (_where("gmm-agreement", batch, name) for name in ("image", "text"))
        mixture = cast(_Mixture, batch.model)
        best = [mixture.responsibilities(batch.x, elements=where).argmax(1) for where in (image, text)]
        return (best[0] == best[1]).double()
