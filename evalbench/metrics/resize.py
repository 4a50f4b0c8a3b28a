"""Resizing as two matrix products, one per axis, so that a recipe is the same numbers on every device.

    pil-bicubic      Pillow's float path (`Image.resize` of mode F), antialiased: what clean-fid does
    torch-bilinear   half-pixel centres, two taps, no antialiasing: `F.interpolate`, what pytorch-fid does
    tf1-bilinear     TensorFlow 1: source = target x scale, two taps: what the original FID and ADM do

In float64 with the result of the first pass (along the width) rounded to float32 `pil-bicubic` gives Pillow's bits.
The other two take their positions in float32, as there: it decides last digits and, at whole numbers, which pixels
count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evalbench.errors import unknown

if TYPE_CHECKING:
    import torch

Matrix = NDArray[np.float64]


def _cubic(x: float) -> float:
    """Keys' cubic convolution with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * (x - 5)) * x - 4) * x + 2 if x < 2 else 0.0


def _pil_bicubic(source: int, target: int) -> Matrix:
    """The cubic stretched to the target's pixels, normalised over the pixels it meets."""
    support = 2.0
    scale = source / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale
        low = max(0, int(centre - support * stretch + 0.5))
        high = min(source, int(centre + support * stretch + 0.5))
        row = [_cubic((j - centre + 0.5) * (1 / stretch)) for j in range(low, high)]
        total = 0.0
        for weight in row:  # in order, as Pillow adds
            total += weight
        weights[i, low:high] = np.array(row) / total
    return weights


def _two_taps(positions: Matrix, source: int) -> Matrix:
    """Linear interpolation at positions (target,) in pixels of the source."""
    weights = np.zeros((len(positions), source))
    rows, low = np.arange(len(positions)), np.floor(positions).astype(int)
    share = positions - low
    np.add.at(weights, (rows, low), 1 - share)
    np.add.at(weights, (rows, np.minimum(low + 1, source - 1)), share)
    return weights


def _half_pixel(source: int, target: int) -> Matrix:
    half = np.float32(0.5)
    positions = (np.arange(target, dtype=np.float32) + half) * np.float32(source / target) - half
    return _two_taps(np.maximum(positions, 0).astype(np.float64), source)


def _tf1(source: int, target: int) -> Matrix:
    positions = np.arange(target, dtype=np.float32) * np.float32(source / target)
    return _two_taps(positions.astype(np.float64), source)


_FILTERS: dict[str, Callable[[int, int], Matrix]] = {
    "pil-bicubic": _pil_bicubic,
    "torch-bilinear": _half_pixel,
    "tf1-bilinear": _tf1,
}


@lru_cache(maxsize=64)
def matrix(kind: str, source: int, target: int) -> Matrix:
    """Weights (target, source) of one axis; the unit matrix when nothing changes.

    Raises:
        UserError: no such filter.
    """
    if kind not in _FILTERS:
        raise unknown("resizing", kind, _FILTERS)
    return np.eye(source) if source == target else _FILTERS[kind](source, target)


def resize(images: torch.Tensor, size: tuple[int, int], kind: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Images of another size, neither rounded nor clipped.

    Args:
        images: (B, C, H, W), uint8 or float. size: (height, width). kind: a filter.
        dtype: to compute in; float32 by default (within 1e-4 grey levels). float64 rounds to float32 between the
            passes, as Pillow does.

    Returns:
        float32 (B, C, *size).
    """
    import torch

    dtype = dtype or torch.float32
    across, down = (
        torch.as_tensor(matrix(kind, source, target), dtype=dtype, device=images.device)
        for source, target in ((images.shape[3], size[1]), (images.shape[2], size[0]))
    )
    x = images.to(dtype)
    if images.shape[3] != size[1]:
        x = (x @ across.T).float().to(dtype)
    if images.shape[2] != size[0]:
        x = down @ x
    return x.float()
