"""Images that exist already: a folder, a zip, an ADM-style `.npz`, or any Python iterable, as one stream.

Images come in sorted name order as uint8, one after another; nothing is resized, converted or dropped, and no source is
ever held in memory as a whole. What cannot be read is an error that names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from evalbench.errors import UserError, some
from evalbench.interfaces import Cond, Model, SampleBatch, Time

if TYPE_CHECKING:
    import torch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOSSY = (".jpg", ".jpeg", ".webp")
LARGEST = 64 * 2**20  # bytes of one file in a zip, and of one decoded image: a zip bomb holds gigabytes in kilobytes
LEAST = 2  # images; no score has an interval below
ADM_KEY, ADM_LABELS = "arr_0", "arr_1"
BATCH = 256  # images per block handed to extractors, which cut it into their own batches

Images: TypeAlias = "str | Path | Iterable[Any]"
Named: TypeAlias = tuple[str, np.ndarray]  # id, uint8 (H, W, C)


@dataclass(frozen=True)
class Source:
    """A set of images and how to read it, once or more.

    Attributes:
        name: for messages and protocols. kind: folder, zip, npz or iterable.
        read: a fresh stream of (id, uint8 (H, W, C)).
        notes: what must be said beside every number from it.
        promised: the digest that a manifest of `evalbench export` gives; empty without one.
        labels: the class of each image, where the source says (`arr_1` of an ADM npz); None otherwise.
    """

    name: str
    kind: str
    read: Callable[[], Iterator[Named]]
    notes: tuple[str, ...] = ()
    promised: str = ""
    labels: tuple[int, ...] | None = None


@dataclass
class Seen:
    """What a pass over a source has seen; complete when the stream has ended.

    Attributes:
        n: images so far. shape: (C, H, W) of all of them. ids: of the last block.
        constant, repeated: ids of images of one grey level, and of exact copies of an earlier one.
    """

    n: int = 0
    shape: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    constant: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    _pixels: Any = field(default_factory=hashlib.sha256, repr=False)
    _known: set[bytes] = field(default_factory=set, repr=False)

    def add(self, name: str, image: np.ndarray) -> None:
        """Take in one image, uint8 (C, H, W)."""
        content = image.tobytes()
        self._pixels.update(content)
        key = hashlib.blake2b(content, digest_size=16).digest()
        if key in self._known:
            self.repeated.append(name)
        self._known.add(key)
        if (image == image.flat[0]).all():
            self.constant.append(name)
        self.n += 1

    def digest(self) -> str:
        """SHA-256 of all pixels, (N, C, H, W) in order: the same for a folder, a zip and an npz of one set."""
        return str(self._pixels.hexdigest())


@dataclass(frozen=True)
class Block:
    """Some images of a source: ids, and uint8 (B, C, H, W)."""

    ids: tuple[str, ...]
    images: torch.Tensor


def open_source(source: Images) -> Source:
    """A folder, a `.zip`, an `.npz` or an iterable of uint8 arrays, ready to be read.

    Args:
        source: a path; or arrays (H, W) or (H, W, C), or torch tensors (C, H, W), one per image.

    Raises:
        UserError: there is nothing there, or no image in it.
    """
    if not isinstance(source, str | Path):
        return Source("iterable", "iterable", lambda: _from_iterable(source))
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UserError(f"'{source}' not found; give a folder, a .zip or an .npz of images")
    if path.suffix.lower() == ".zip":
        return _zip(path)
    if path.suffix.lower() == ".npz":
        return _npz(path)
    raise UserError(f"'{source}' is no folder, .zip or .npz; give one of these")


def blocks(source: Source, seen: Seen, size: int) -> Iterator[Block]:
    """The images of a source, `size` at a time (the last block may be short).

    Args:
        source: what to read. seen: is filled on the way. size: images per block.

    Raises:
        UserError: an image is broken, differs in size from the first, or there are fewer than 2.
    """
    ids: list[str] = []
    images: list[np.ndarray] = []
    for name, image in source.read():
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        seen.shape = seen.shape or planes.shape
        if planes.shape != seen.shape:
            raise UserError(
                f"'{source.name}': {name} is {_size(planes.shape)}, the images before it {_size(seen.shape)}; "
                "give images of one size and one number of channels"
            )
        seen.add(name, planes)
        ids.append(name)
        images.append(planes)
        if len(ids) == size:
            seen.ids = tuple(ids)
            yield _block(ids, images)
            ids, images = [], []
    if seen.n < LEAST:
        count = "1 image" if seen.n else "no images"
        raise UserError(f"'{source.name}' holds {count}; a score needs at least {LEAST}")
    if ids:
        seen.ids = tuple(ids)
        yield _block(ids, images)
    if source.promised and seen.digest() != source.promised:
        raise UserError(f"'{source.name}' is not what its manifest.json says: images were changed, added or removed")


def sample_batches(
    source: Source, seen: Seen, labels: Sequence[int] | None = None, captions: Mapping[str, str] | None = None
) -> Iterator[SampleBatch]:
    """The images of a source as extractors see finished samples; x is images / 127.5 - 1.

    Args:
        source: what to read. seen: is filled on the way. labels: the class of each image, in order; None without.
        captions: the text of each image, by its id with or without the suffix; None without.

    Raises:
        UserError: as `blocks`, or there are more or fewer labels or captions than images.
    """
    import torch

    start, texts = 0, None if captions is None else _Captions(captions, source.name)
    for block in blocks(source, seen, BATCH):
        stop = start + len(block.ids)
        if labels is not None and len(labels) < stop:
            raise UserError(f"'{source.name}' holds more than {len(labels)} images, one for each label")
        classes = None if labels is None else torch.tensor(labels[start:stop], dtype=torch.int64)
        cond = Cond(classes, None if texts is None else tuple(texts.take(name) for name in block.ids))
        yield SampleBatch(block.images / 127.5 - 1.0, block.images, cond, _Images(tuple(block.images.shape[1:])))
        start = stop
    if labels is not None and len(labels) != start:
        raise UserError(f"'{source.name}' holds {start} images, but there are {len(labels)} labels")
    if texts is not None:
        texts.check_all_taken()


def read_labels(file: Path) -> list[int]:
    """Class numbers, one per line."""
    try:
        return [int(line) for line in file.read_text("utf-8").split()]
    except (OSError, ValueError) as error:
        raise UserError(f"labels '{file}': write one whole number per line ({error})") from None


def read_captions(file: Path) -> dict[str, str]:
    """Captions by image id: a JSON object, or lines `id<TAB>caption`.

    Raises:
        UserError: it cannot be read, or an id stands there twice.
    """
    try:
        text = file.read_text("utf-8")
        pairs = json.loads(text, object_pairs_hook=list) if file.suffix == ".json" else _tab_separated(text)
    except (OSError, ValueError) as error:
        raise UserError(f"captions '{file}': {error}; write a JSON object or lines id<TAB>caption") from None
    if not isinstance(pairs, list) or not all(isinstance(value, str) for pair in pairs for value in pair):
        raise UserError(f"captions '{file}': write a JSON object of texts by image id")
    captions = dict(pairs)
    if len({stem(name) for name in captions}) != len(pairs):
        raise UserError(f"captions '{file}': an image id stands there twice")
    return captions


def _tab_separated(text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if line.strip() and not tab:
            raise ValueError(f"line {number} has no tab")
        if line.strip():
            pairs.append((name.strip(), caption.strip()))
    return pairs


def stem(name: str) -> str:
    """An id without the suffix of an image file: what pairs images with captions and with each other."""
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name


class _Captions:
    """Captions by id, each to be taken once."""

    def __init__(self, captions: Mapping[str, str], source: str) -> None:
        self._left = {stem(name): text for name, text in captions.items()}
        self._source = source

    def take(self, name: str) -> str:
        if stem(name) not in self._left:
            raise UserError(f"'{self._source}': {name} has no caption; they are matched by id, not by position")
        return self._left.pop(stem(name))

    def check_all_taken(self) -> None:
        if self._left:
            named = ", ".join(list(self._left)[:3]) + (", ..." if len(self._left) > 3 else "")
            raise UserError(f"'{self._source}': {len(self._left)} captions have no image ({named}); remove them")


class _Images(Model):
    """Stands where a batch names the model that made it: nobody knows it here."""

    name = "images"
    is_image = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        raise UserError("images that exist already have no model to evaluate")


def _block(ids: list[str], images: list[np.ndarray]) -> Block:
    import torch

    return Block(tuple(ids), torch.from_numpy(np.stack(images)))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


# --- one image ------------------------------------------------------------------------------------------------------


def _decode(content: bytes, where: str) -> np.ndarray:
    """An image file as uint8 (H, W, C), C = 1 or 3; grey stays grey."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.width * image.height * 3 > LARGEST:
            raise UserError(f"{where} has {image.width} x {image.height} pixels; the limit is {LARGEST // 3:,}")
        count = getattr(image, "n_frames", 1)
        if image.mode not in ("L", "RGB") or count > 1:
            frames = f" with {count} frames" if count > 1 else ""
            raise UserError(f"{where} has mode {image.mode}{frames}; save it as 8-bit grey (L) or RGB")
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{where} is no image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{where} has more pixels than the limit of {LARGEST // 3:,}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{where} is broken: {error}") from None
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _checked(image: Any, where: str) -> np.ndarray:
    """An array as uint8 (H, W, C)."""
    if hasattr(image, "detach"):  # a torch tensor: channels first
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise UserError(f"{where} is {pixels.dtype}; give uint8 (from [-1, 1]: evalbench.metrics.images.to_uint8)")
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"{where} has shape {pixels.shape}; give arrays (H, W, C) or tensors (C, H, W), C = 1 or 3")
    return pixels


def _from_iterable(images: Iterable[Any]) -> Iterator[Named]:
    for i, image in enumerate(images):
        yield f"{i:06d}", _checked(image, f"image {i}")


# --- files ----------------------------------------------------------------------------------------------------------


def _notes(names: list[str], others: int) -> tuple[str, ...]:
    lossy = sum(name.lower().endswith(LOSSY) for name in names)
    notes = [f"{lossy} of {len(names)} files are JPEG or WebP: possibly lossy"] if lossy else []
    return (*notes, f"{others} files that are no images were left out") if others else tuple(notes)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _folder(path: Path) -> Source:
    """Image files of a folder and all folders in it, in the order of their relative names."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names = [name for name in files if _is_image(name)]
    if not names:
        raise UserError(f"folder '{path}' holds no images ({', '.join(SUFFIXES)})")

    def read() -> Iterator[Named]:
        for name in names:
            file = path / name
            if file.stat().st_size > LARGEST:
                raise UserError(f"{file} has {file.stat().st_size:,} bytes; the limit is {LARGEST:,}")
            yield name, _decode(file.read_bytes(), str(file))

    others = len(files) - len(names) - ("manifest.json" in files)
    return Source(str(path), "folder", read, _notes(names, others), _promised(path / "manifest.json", names))


def _promised(manifest: Path, names: Sequence[str]) -> str:
    """The digest in a manifest of `evalbench export`; empty when there is none.

    Raises:
        UserError: it promises other images than the folder holds.
    """
    if not manifest.is_file():
        return ""
    try:
        facts = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        return ""
    if not isinstance(facts, dict) or not {"samples", "sha256"} <= facts.keys():
        return ""
    if facts["samples"] != len(names):
        planned = {f"{i:06d}" for i in range(int(facts["samples"]))}  # as export names them
        found = {stem(name) for name in names}
        words = [
            f"{what}: {some(sorted(ids))}"
            for what, ids in (("missing", planned - found), ("more", found - planned))
            if ids
        ]
        raise UserError(
            f"folder '{manifest.parent}' holds {len(names)} images, its manifest.json says {facts['samples']} "
            f"({'; '.join(words)})"
        )
    return str(facts["sha256"])


def _zip(path: Path) -> Source:
    """Image files in a zip, in the order of their names; one is unpacked at a time, and never a large one."""
    with _archive(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    images = sorted((m for m in members if _is_image(m.filename)), key=lambda m: m.filename)
    if not images:
        raise UserError(f"zip '{path}' holds no images ({', '.join(SUFFIXES)})")
    for member in images:
        if member.file_size > LARGEST:
            raise UserError(
                f"'{path}': {member.filename} unpacks to {member.file_size:,} bytes; the limit is {LARGEST:,}"
            )

    def read() -> Iterator[Named]:
        with _archive(path) as archive:
            for member in images:
                where = f"'{path}': {member.filename}"
                with _member(archive, member.filename, where) as stream:
                    content = _taken(stream, LARGEST + 1, where)
                yield member.filename, _decode(content, where)

    names = [member.filename for member in images]
    return Source(str(path), "zip", read, _notes(names, len(members) - len(images)))


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"'{path}' is no readable zip: {error}") from None


def _member(archive: zipfile.ZipFile, name: str, where: str) -> AbstractContextManager[IO[bytes]]:
    try:
        return archive.open(name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:  # RuntimeError: encrypted
        raise UserError(f"{where} cannot be unpacked: {error}") from None


def _taken(stream: IO[bytes], size: int, where: str) -> bytes:
    """Up to `size` bytes of a member; a wrong size in the zip's index shows as a wrong checksum."""
    try:
        return stream.read(size)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{where} cannot be unpacked: {error}") from None


# --- npz ------------------------------------------------------------------------------------------------------------


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays of an `.npz`, sorted."""
    with _archive(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


def _npz(path: Path) -> Source:
    """`arr_0`, uint8 (N, H, W, C), as the ADM evaluator reads and writes it, with the classes of `arr_1` where it has
    them; streamed, compressed or not.
    """
    if ADM_KEY not in npz_keys(path):
        raise UserError(f"'{path}' holds {', '.join(npz_keys(path)) or 'nothing'}; images stand under '{ADM_KEY}'")
    shape, _ = _npz_header(path)
    size = math.prod(shape[1:])

    def read() -> Iterator[Named]:
        with _archive(path) as archive, _member(archive, f"{ADM_KEY}.npy", f"'{path}'") as stream:
            _npy_header(stream, f"'{path}'")
            for i in range(shape[0]):
                content = _taken(stream, size, f"'{path}'")
                yield f"{i:06d}", np.frombuffer(content, np.uint8).reshape(shape[1:])

    return Source(str(path), "npz", read, labels=_npz_labels(path, shape[0]))


def _npz_labels(path: Path, count: int) -> tuple[int, ...] | None:
    """The classes that the ADM sampler writes beside its images; None without."""
    if ADM_LABELS not in npz_keys(path):
        return None
    with _archive(path) as archive, _member(archive, f"{ADM_LABELS}.npy", f"'{path}'") as stream:
        shape, _, dtype = _npy_header(stream, f"'{path}'")
        if dtype.kind not in "iu" or shape != (count,):
            return None  # something else that somebody saved beside images
        content = _taken(stream, count * dtype.itemsize, f"'{path}'")
    return tuple(np.frombuffer(content, dtype).tolist())


def _npz_header(path: Path) -> tuple[tuple[int, ...], int]:
    """Shape of `arr_0` and the length of its header, after every check that needs no pixels."""
    where = f"'{path}'"
    with _archive(path) as archive:
        with _member(archive, f"{ADM_KEY}.npy", where) as stream:
            shape, fortran, dtype = _npy_header(stream, where)
            start = stream.tell()
        stored = archive.getinfo(f"{ADM_KEY}.npy").file_size
    if dtype.hasobject:
        raise UserError(f"{where}: '{ADM_KEY}' holds pickled objects, which are never loaded; save a uint8 array")
    if dtype != np.uint8:
        raise UserError(f"{where}: '{ADM_KEY}' is {dtype}; save uint8 (from [-1, 1]: clip(round((x + 1) 127.5)))")
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:] or fortran:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{where}: '{ADM_KEY}' has shape {shape}{order}; save (N, H, W, C) in C order, C = 1 or 3")
    if math.prod(shape[1:]) > LARGEST:
        raise UserError(f"{where}: one image has {math.prod(shape[1:]):,} bytes; the limit is {LARGEST:,}")
    if stored - start != math.prod(shape):
        raise UserError(f"{where}: '{ADM_KEY}' is broken: {stored - start:,} bytes for shape {shape}")
    return shape, start


def _npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an npy stream, which is left at the first byte of its data."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise UserError(f"{where}: npy version {version} is not read; save it with numpy.savez")
        return readers[version](stream)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{where} is broken: {error}") from None
