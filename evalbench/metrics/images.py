"""Samples become uint8 here and nowhere else; bad samples are found here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evalbench.errors import BadSamples, some

if TYPE_CHECKING:
    import torch

FAR = 3.0  # root mean square of a sample; that of an image in [-1, 1] is at most 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 by rounding and clipping: clip(round((x + 1) * 127.5), 0, 255). Same shape."""
    return ((x + 1.0) * 127.5).round().clamp(0, 255).byte()


def check_finite(x: torch.Tensor, ids: Sequence[int]) -> None:
    """Raise BadSamples on NaN or infinity, with the ids of the samples, one for each row of x (B, *S)."""
    bad = [ids[i] for i in (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()]
    if bad:
        raise BadSamples(f"{len(bad)} of {len(x)} samples hold NaN or infinity (samples {some(bad)})")


def check_images(
    images: torch.Tensor,
    x: torch.Tensor | None = None,
    *,
    decoded: torch.Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    ids: Sequence[int] | None = None,
) -> None:
    """Raise on samples that no score may be computed from; none is ever dropped.

    Args:
        images: uint8 (B, *S). x: the samples they were made from, (B, *S), or the latents they were decoded from;
            looked at for NaN and for duplicates, as samples that differ may round to one image. decoded: what was
            rounded to `images`, in [-1, 1] but for overshoot; looked at for another scale or divergence, which
            clipping would hide. shape: S as planned; None when any will do. ids: of the samples; None counts from 0.

    Raises:
        BadSamples: wrong size or dtype, NaN or infinity, out of range, a constant image, or two equal samples; with
            the ids of the samples.
    """
    import torch  # slow; the names of metrics are listed without it

    if images.dtype != torch.uint8:
        raise BadSamples(f"images are {images.dtype}, expected torch.uint8; make them with to_uint8")
    count = len(images)
    ids = range(count) if ids is None else ids
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise BadSamples(f"images have size {tuple(images.shape[1:])}, expected {tuple(shape)} (samples {some(ids)})")
    if x is not None and len(x) != count:
        raise BadSamples(f"{len(x)} samples were made into {count} images")

    def refuse(bad: torch.Tensor, what: str) -> None:
        found = [ids[i] for i in bad.nonzero().flatten().tolist()]
        if found:
            raise BadSamples(f"{len(found)} of {count} {what} (samples {some(found)})")

    for made in (x, decoded):
        if made is not None:
            check_finite(made, ids)
    if decoded is not None:
        rms = decoded.flatten(1).double().square().mean(1).sqrt()
        refuse(rms > FAR, f"samples are out of range: root mean square above {FAR:g}, where images lie in [-1, 1]")
    flat = images.flatten(1)
    refuse((flat == flat[:, :1]).all(1), "images are constant")
    _, kind, counts = torch.unique(
        (images if x is None else x).flatten(1), dim=0, return_inverse=True, return_counts=True
    )
    refuse(counts[kind] > 1, "samples are duplicates of each other")
