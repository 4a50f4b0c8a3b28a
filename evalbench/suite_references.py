"""Reference files of suites: where they lie, whether they are the suite's, their arrays. No torch, no ray."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np

from evalbench.errors import UserError
from evalbench.spec import Reference, Suite
from evalbench.weights import UNVERIFIED, cache, check_pinned


def reference_file(suite: Suite, reference: Reference) -> Path:
    """Where a reference file lies: inside the package, in the user's cache, or beside the suite's TOML."""
    inside, _, name = reference.file.partition(":")
    if inside == "cache" and name:
        return cache().joinpath(*name.split("/"))
    if inside == "evalbench" and name:
        return Path(str(files("evalbench"))).joinpath(*name.split("/"))
    return Path(suite.folder) / reference.file


def images_file(name: str) -> Path:
    """Where the images of a split lie: `arr_0` uint8 (N, H, W, C), and classes in `arr_1`."""
    return cache() / "images" / f"{name}.npz"


def check_reference_file(suite: Suite, key: str) -> None:
    """Whether the file of a reference is there, and is the one that the suite means.

    Raises:
        UserError: a reference file is missing or its SHA-256 is not the suite's.
    """
    reference = suite.references[key]
    file = reference_file(suite, reference)
    if reference.sha256 == UNVERIFIED:
        check_pinned(file, UNVERIFIED)
        return
    if not file.is_file():
        raise UserError(f"suite '{suite.name}': reference '{key}' names {file}, which does not exist")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != reference.sha256:
        raise UserError(
            f"suite '{suite.name}': reference '{key}' has SHA-256 {digest[:16]}..., the suite says "
            f"{reference.sha256[:16] or 'nothing'}...; restore the file or correct the suite"
        )


def why_missing(suite: Suite, key: str) -> str:
    """What to type when a reference of the user's cache has not been made; empty when it is there."""
    reference = suite.references.get(key)
    if reference is None or not reference.file.startswith("cache:"):
        return ""
    file = reference_file(suite, reference)
    if file.is_file():
        return ""
    images = images_file(suite.images)
    line = f"evalbench reference make {images} --features {key} --out {file}"
    return f"suite '{suite.name}': reference '{key}' has not been made; type: {line}" + (
        "" if images.exists() else f" (after: evalbench suite fetch {suite.name})"
    )


def read_reference(suite: Suite, key: str) -> dict[str, np.ndarray]:
    """The arrays of a reference that is a file."""
    from safetensors.numpy import load_file

    return load_file(reference_file(suite, suite.references[key]))
