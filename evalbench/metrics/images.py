"""Samples become uint8 here and nowhere else; bad samples are found here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalbench.errors import BadSamples

if TYPE_CHECKING:
    import torch


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 by rounding and clipping: clip(round((x + 1) * 127.5), 0, 255). Same shape."""
    return ((x + 1.0) * 127.5).round().clamp(0, 255).byte()


def check_images(images: torch.Tensor, x: torch.Tensor | None = None, *, shape: tuple[int, ...] | None = None) -> None:
    """Raise on samples that no score may be computed from; none is ever dropped.

    Args:
        images: uint8 (B, *S). x: the samples they were made from, (B, *S), or the latents they were decoded from;
            looked at for NaN and for duplicates, as samples that differ may round to one image. shape: S as planned;
            None when any will do.

    Raises:
        BadSamples: wrong size or dtype, NaN or infinity, a constant image, or two equal samples.
    """
    import torch  # slow; the names of metrics are listed without it

    if images.dtype != torch.uint8:
        raise BadSamples(f"images are {images.dtype}, expected torch.uint8; make them with to_uint8")
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise BadSamples(f"images have size {tuple(images.shape[1:])}, expected {tuple(shape)}")
    if x is not None and len(x) != len(images):
        raise BadSamples(f"{len(x)} samples were made into {len(images)} images")
    count = len(images)
    if x is not None:
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise BadSamples(f"{bad} of {count} samples hold NaN or infinity")
    flat = images.flatten(1)
    constant = int((flat == flat[:, :1]).all(1).sum())
    if constant:
        raise BadSamples(f"{constant} of {count} images are constant")
    repeated = count - len(torch.unique((images if x is None else x).flatten(1), dim=0))
    if repeated:
        raise BadSamples(f"{repeated} of {count} samples are duplicates")
