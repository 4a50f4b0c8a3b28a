"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, MIT): the 10,000 test images ship; training scripts bring the rest."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from evalbench.errors import UserError

_FOLDER = Path(__file__).parent
_UINT8 = 0x08  # the idx code of the only element type the data set uses
_REMEDY = "point --data at the folder of the Fashion-MNIST files"


def read_idx(path: Path | str) -> np.ndarray:
    """The uint8 array of an idx file, gzipped or not.

    Raises:
        UserError: no such file, or not an idx file of bytes.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; {_REMEDY}") from error
    # two zero bytes, the element type, the number of dimensions; then each dimension as big-endian int32
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _UINT8]):
        raise UserError(f"{path} is no idx file of bytes; {_REMEDY}")
    header = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:header], dtype=">i4").tolist())
    if len(raw) - header != int(np.prod(shape)):
        raise UserError(f"{path} is cut short: {len(raw) - header} bytes of {int(np.prod(shape))}; copy it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy()


def pad32(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 28, 28) in a frame of two black pixels, with a channel: (N, 1, 32, 32)."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


def fashion_test() -> tuple[np.ndarray, np.ndarray]:
    """The shipped test set: images uint8 (10000, 1, 32, 32), labels int64 (10000,)."""
    return _load(_FOLDER, "t10k")


def fashion_train(folder: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """The training set from the user's idx files: images uint8 (60000, 1, 32, 32), labels int64 (60000,)."""
    return _load(Path(folder), "train")


def _load(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_file(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_file(folder, f"{part}-labels-idx1-ubyte"))
    if images.shape != (len(labels), 28, 28):
        raise UserError(f"{folder}: {part} images {images.shape} do not fit {len(labels)} labels")
    return pad32(images), labels.astype(np.int64)


def _file(folder: Path, stem: str) -> Path:
    """The file as it is distributed, `.gz`, or unpacked beside it."""
    plain = folder / stem
    return plain if plain.exists() else folder / f"{stem}.gz"
