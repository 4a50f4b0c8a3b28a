"""The Inception features of FID, one extractor per published recipe: the recipe is the protocol.

    inception:clean     clean-fid (Parmar et al. 2022): Pillow's bicubic on float, clipped, the TorchScript network
    inception:pytorch   pytorch-fid: two-tap bilinear with half-pixel centres, the port's weights
    inception:tf1       torch-fidelity: TensorFlow 1's bilinear, the port's weights, as TTUR
    inception:adm       the guided-diffusion evaluator: as tf1, with its spatial features. An unverified port: its
                        five published values have not been met with the real weights

A member may name another output and a precision: `inception:adm:spatial`, `inception:tf1:logits`,
`inception:clean:pool:float64`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from evalbench import weights
from evalbench.errors import UserError, unknown
from evalbench.interfaces import ExtractorFamily, SampleBatch
from evalbench.metrics.extractors import colour, images_of, in_batches
from evalbench.metrics.resize import resize
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

SIDE = 299
BATCH = 16  # images per call of the network; changing it changes last bits
_PRECISIONS = ("float32", "float64")


@dataclass(frozen=True)
class Recipe:
    """From uint8 images to the inputs of a network.

    Attributes:
        filter: of `metrics.resize`, to 299 x 299. clip: to [0, 255] after resizing. zero, one: grey levels that become
            0 and 1. weights: in `weights.KNOWN`. outputs: that the network has.
    """

    filter: str
    clip: bool
    zero: float
    one: float
    weights: str
    outputs: tuple[str, ...] = ("pool", "spatial", "logits")

    @property
    def text(self) -> str:
        """For fingerprints."""
        clipped = " clipped" if self.clip else ""
        return f"uint8, {self.filter} {SIDE}{clipped}, (x - {self.zero:g}) / {self.one - self.zero:g}"


RECIPES = {
    "clean": Recipe("pil-bicubic", True, 128, 256, "inception-torchscript", ("pool",)),
    "pytorch": Recipe("torch-bilinear", False, 127.5, 255, "inception-pth"),
    "tf1": Recipe("tf1-bilinear", False, 128, 256, "inception-pth"),
    "adm": Recipe("tf1-bilinear", False, 128, 256, "inception-pth"),
}


def inputs(images: torch.Tensor, recipe: Recipe, dtype: torch.dtype) -> torch.Tensor:
    """Images (B, 1 or 3, H, W), uint8, as the network takes them: (B, 3, 299, 299) in [-1, 1]."""
    x = resize(colour(images), (SIDE, SIDE), recipe.filter, dtype).to(dtype)
    if recipe.clip:
        x = x.clamp_(0, 255)
    return (x - recipe.zero) / (recipe.one - recipe.zero)


@register("inception:*")
class InceptionFeatures(ExtractorFamily):
    """Original Inception network, by a recipe: pool (B, 2048), spatial (B, 2023) or logits (B, 1008), float32."""

    @classmethod
    def members(cls) -> tuple[str, ...]:
        return tuple(RECIPES)

    @classmethod
    def member(cls, target: str) -> type[ExtractorFamily]:
        _parse(target)
        return super().member(target)

    @classmethod
    def missing(cls) -> str:
        if not cls.target:
            return ""
        name = _parse(cls.target)[0].weights
        why = weights.missing(weights.known(name), name)
        return f"features '{cls.name}': {why}" if why else ""

    @classmethod
    def caveat(cls) -> str:
        return "unverified port of the ADM evaluator" if _parse(cls.target)[0] is RECIPES["adm"] else ""

    @classmethod
    def fingerprint(cls) -> str:
        recipe, output, precision = _parse(cls.target)
        digest = weights.sha256(weights.find(weights.known(recipe.weights), recipe.weights))
        return f"{cls.name}/{cls.version} {recipe.text}, sha256:{digest} {output} {precision} batch {BATCH}"

    def __init__(self) -> None:
        recipe, self._output, precision = _parse(self.target)
        file = weights.find(weights.known(recipe.weights), recipe.weights)
        self._forward = _forward(recipe, precision, weights.sha256(file))

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return self._forward(images_of(batch, self.name))[self._output].float()


def _parse(target: str) -> tuple[Recipe, str, str]:
    """`adm:spatial:float64` as recipe, output, precision."""
    name, *rest = target.split(":")
    if name not in RECIPES:
        raise unknown("Inception recipe", name, RECIPES)
    recipe, words = RECIPES[name], {"output": "pool", "precision": "float32"}
    for word in rest:
        kind = "precision" if word in _PRECISIONS else "output"
        if kind == "output" and word not in recipe.outputs:
            raise unknown(f"output of inception:{name}", word, (*recipe.outputs, *_PRECISIONS))
        words[kind] = word
    return recipe, words["output"], words["precision"]


@cache
def _forward(recipe: Recipe, precision: str, digest: str) -> _Forward:
    """One network per process for all its outputs; the digest tells files apart."""
    import torch

    from evalbench.models import inception as networks

    file = weights.find(weights.known(recipe.weights), recipe.weights)
    load: Callable[..., Any] = networks.load_script if file.suffix == ".pt" else networks.load_state
    dtype = getattr(torch, precision)
    return _Forward(load(file, dtype).requires_grad_(False), recipe, dtype)


class _Forward:
    """The network behind a recipe; several outputs of the same images cost one pass."""

    def __init__(self, network: Any, recipe: Recipe, dtype: torch.dtype) -> None:
        self._network, self._recipe, self._dtype = network, recipe, dtype
        self._images: torch.Tensor | None = None
        self._outputs: dict[str, torch.Tensor] = {}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name for uint8 images (B, C, H, W)."""
        if images is not self._images:
            self._outputs, self._images = self._compute(images), images
        return self._outputs

    def _compute(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        network = self._network.to(images.device)
        sizes: dict[str, int] = {}

        def joined(rows: torch.Tensor) -> torch.Tensor:
            found = network(inputs(rows, self._recipe, self._dtype))
            sizes.update({name: array.shape[1] for name, array in found.items()})
            return torch.cat(list(found.values()), dim=1)

        whole = in_batches(joined, images, BATCH)
        return dict(zip(sizes, torch.split(whole, list(sizes.values()), dim=1), strict=True))


def recipe_of(metric: str, target: str) -> str:
    """The extractor behind `METRIC@RECIPE`, for metrics that have a right to the name of the network.

    Raises:
        UserError: something else stands there.
    """
    if target.split(":")[0] not in RECIPES:
        close = unknown(f"recipe of '{metric}'", target, RECIPES)
        raise UserError(f"{close}; features of another network are no FID: write fd@{target or 'FEATURES'}")
    return f"inception:{target}"
