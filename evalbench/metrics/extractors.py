"""Feature extractors: finished samples -> one array per sample.

Networks run in float32 with TF32 off, in eval mode, and always on batches of one size (a short one is padded and the
padding dropped), so that a sample's features do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from evalbench.errors import BadSamples, EvalbenchError, UserError
from evalbench.interfaces import Extractor, SampleBatch
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

BATCH = 64  # images per call of a network; changing it changes last bits, hence numbers


@register("identity")
class Identity(Extractor):
    """The samples themselves, flattened, (B, D), in their own dtype."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return batch.x.flatten(1)


@register("pixels")
class Pixels(Extractor):
    """The samples as float16, (B, D), for paired errors of images: relative resolution 2^-11."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return batch.x.flatten(1).half()


class _Mixture(Protocol):
    def responsibilities(self, x: torch.Tensor) -> torch.Tensor: ...


@register("gmm-mode")
class MixtureMode(Extractor):
    """The most probable component of an analytic mixture, float64 (B,)."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        if not hasattr(batch.model, "responsibilities"):
            raise UserError(
                f"features 'gmm-mode' need a model with exact modes, and '{batch.model.name}' has none; "
                "leave mode-coverage@gmm-mode out of --metrics"
            )
        mixture = cast(_Mixture, batch.model)
        return mixture.responsibilities(batch.x).argmax(dim=1).double()


@register("gmm-mode-distance")
class MixtureModeDistance(Extractor):
    """Squared distance to the nearest mode of an isotropic mixture in units of D std^2, float64 (B,)."""

    needs = ("x",)

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        means: torch.Tensor | None = getattr(batch.model, "means", None)
        std: float | None = getattr(batch.model, "std", None)
        if means is None or std is None:
            raise UserError(
                f"features 'gmm-mode-distance' need a model with isotropic modes, and '{batch.model.name}' has none; "
                "leave mode-distance@gmm-mode-distance out of --metrics"
            )
        squares = (batch.x.unsqueeze(1) - means).square().sum(-1)  # (B, K)
        return (squares.amin(1) / (batch.x.shape[1] * std**2)).double()


# --- networks -------------------------------------------------------------------------------------------------------


def _nets() -> Any:
    from evalbench.models import nets  # imports torch; the names of metrics are listed without it

    return nets


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32, no kernel choice by timing; restores what was set."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, False
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def in_batches(
    network: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, size: int = BATCH
) -> torch.Tensor:
    """network(inputs), row by row, on batches of exactly `size` rows; a short one is filled with its last row."""
    import torch

    outputs = []
    with exact_float32(inputs.device):
        for rows in torch.split(inputs, size):
            filling = rows[-1:].expand(size - len(rows), *rows.shape[1:])
            outputs.append(network(torch.cat([rows, filling]))[: len(rows)])
    return torch.cat(outputs)


def images_of(batch: SampleBatch, name: str) -> torch.Tensor:
    """The uint8 images (B, C, H, W) of a batch, for the extractor of a name.

    Raises:
        UserError: the model makes no images.
    """
    if batch.images is None:
        raise UserError(
            f"features '{name}' need images, and model '{batch.model.name}' makes none; "
            "leave metrics that need them out of --metrics"
        )
    return batch.images


def captions_of(batch: SampleBatch, name: str, count: int) -> tuple[str, ...]:
    """The captions of a batch of `count` images, one each.

    Raises:
        UserError: there are none. BadSamples: more or fewer.
    """
    captions = batch.cond.captions
    if captions is None:
        raise UserError(f"features '{name}' need captions; set [conditions] in the suite, or give --captions FILE")
    if len(captions) != count:
        raise BadSamples(f"{count} images come with {len(captions)} captions")
    return captions


def colour(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 1 or 3, H, W) with three channels; grey ones are repeated, as opening them in RGB does."""
    return images.expand(-1, 3, -1, -1)


class _NetworkExtractor(Extractor):
    """An extractor around a network of `evalbench.models.nets`.

    Attributes:
        weights: the name `nets.weights_sha256` knows its weights by.
    """

    weights: ClassVar[str]

    @classmethod
    def missing(cls) -> str:
        try:
            _nets().weights_sha256(cls.weights)
        except FileNotFoundError as error:
            return f"features '{cls.name}': {error.filename} is not there; reinstall evalbench"
        except (ImportError, OSError, EvalbenchError) as error:
            return f"features '{cls.name}': {error}"
        return ""

    @classmethod
    def fingerprint(cls) -> str:
        digest = _nets().weights_sha256(cls.weights)
        return f"{cls.name}/{cls.version} sha256:{digest} float32 batch {BATCH}"

    def images(self, batch: SampleBatch) -> torch.Tensor:
        """The uint8 images (B, C, H, W) of a batch."""
        return images_of(batch, self.name)


@register("fashion64")
class Fashion64(_NetworkExtractor):
    """64 features of a small network trained on Fashion-MNIST, float32 (B, 64); for 1 x 32 x 32 images."""

    weights = "fashion64"

    def __init__(self) -> None:
        self._network: Any = _nets().load_fashion64().eval()

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = self.images(batch)
        return in_batches(self._network.to(images.device), images)


@register("fashion-classifier")
class FashionClassifier(_NetworkExtractor):
    """1.0 where the Fashion-MNIST classifier sees the label the image was made for, else 0.0; float64 (B,)."""

    needs = ("images", "labels")
    weights = "fashion-classifier"

    def __init__(self) -> None:
        self._network: Any = _nets().load_fashion_classifier().eval()

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images, labels = self.images(batch), batch.cond.labels
        if labels is None:
            raise UserError("features 'fashion-classifier' need labels; set [conditions] labels in the suite")
        if len(labels) != len(images) or bool((labels < 0).any()):
            raise BadSamples(f"{len(images)} images need {len(images)} labels >= 0")
        seen = in_batches(self._network.to(images.device), images).argmax(dim=1)
        return (seen == labels.to(seen.device)).double()


@register("efficientnet-lite0-96")
class EfficientNetLite0(_NetworkExtractor):
    """1280 features of an ImageNet-trained EfficientNet-Lite0 at 96 x 96, float32 (B, 1280)."""

    weights = "efficientnet-lite0"

    def __init__(self) -> None:
        self._network: Any = _nets().load_efficientnet_lite0().eval()

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        images = self.images(batch)
        return in_batches(self._network.to(images.device), images)


@register("tiny-fashion")
class TinyFashion(_NetworkExtractor):
    """Raw cosine between image and caption by a CLIP trained on Fashion-MNIST here, float32 (B,); no CLIP score."""

    needs = ("images", "captions")
    weights = "tiny-fashion-clip"

    def __init__(self) -> None:
        model, self._tokenizer = _nets().load_tiny_clip()
        self._model: Any = model.eval()  # open_clip hands models out in train mode
        self._texts: dict[tuple[str, str], torch.Tensor] = {}  # (device, caption) -> unit vector

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        import torch

        images = self.images(batch)
        captions = captions_of(batch, self.name, len(images))
        self._model.to(images.device)
        seen = in_batches(self._image_vectors, images)
        texts = torch.stack([self._text_vector(caption, images.device) for caption in captions])
        return (seen * texts).sum(dim=1)

    def _image_vectors(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float() / 255
        recipe = self._model.visual.preprocess_cfg
        mean, std = (pixels.new_tensor(recipe[key]).view(-1, 1, 1) for key in ("mean", "std"))
        pixels = (pixels.expand(-1, len(mean), -1, -1) - mean) / std  # (B, 3, H, W), grey images too
        vectors: torch.Tensor = self._model.encode_image(pixels, normalize=True)
        return vectors

    def _text_vector(self, caption: str, device: torch.device) -> torch.Tensor:
        """One caption at a time: its vector then depends on no other, and class names repeat."""
        key = (str(device), caption)
        if key not in self._texts:
            with exact_float32(device):
                tokens = self._tokenizer([caption]).to(device)
                self._texts[key] = self._model.encode_text(tokens, normalize=True)[0]
        return self._texts[key]
