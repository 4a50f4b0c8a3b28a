"""The networks trained here on Fashion-MNIST, of the diffusers classes that people use: their captions and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from evalbench.errors import Unsupported, UserError
from evalbench.models.data import fashion_test
from evalbench.models.nets import CLASS_NAMES, caption
from evalbench.models.pipelines import DiffusersPipeline
from evalbench.noise import Philox, use_code
from evalbench.registry import register


@register("fashion-zoo")
@dataclass
class FashionZoo(DiffusersPipeline):
    """A network of the embedded zoo: 32x32 images of ten classes, with a null label or an empty caption.

    `data` draws from the 10,000 shipped test images: what searches see is no image that a network or the references
    were made from.
    """

    embedded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_classes = len(CLASS_NAMES)

    def caption(self, label: int) -> str:
        return caption(label)

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Test images of the labels, with replacement, as clean samples; a row is that of its (seed, index, label)."""
        if labels is None:
            raise Unsupported("not supported: data without labels")
        images, of_class = _test_images()
        rng = Philox()
        draws = [float(rng.uniform(seed, i, use_code("data"), 0, 1)[0]) for i in indices]
        rows = [of_class[label][int(u * len(of_class[label]))] for label, u in zip(labels.tolist(), draws, strict=True)]
        pixels = torch.from_numpy(images[rows]).to(next(self.network.net.parameters())) / 127.5 - 1.0
        return torch.cat([self.encode(block) for block in torch.split(pixels, 500)])

    def held_out(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Real images of the labels that no network has seen, uint8 (N, 1, 32, 32): each at most once.

        Raises:
            UserError: more of a class than there are, 1,000.
        """
        images, of_class = _test_images()
        rng = np.random.Generator(np.random.Philox(key=seed))
        rows = np.empty(len(labels), dtype=np.int64)
        for label, known in enumerate(of_class):
            wanted = np.flatnonzero(labels == label)
            if len(wanted) > len(known):
                raise UserError(f"{len(wanted)} images of class {label}, but only {len(known)} are held out")
            rows[wanted] = rng.permutation(known)[: len(wanted)]
        return images[rows]


def _test_images() -> tuple[np.ndarray, list[np.ndarray]]:
    """The test images, and which of them show each class."""
    images, classes = fashion_test()
    return images, [np.flatnonzero(classes == label) for label in range(len(CLASS_NAMES))]
