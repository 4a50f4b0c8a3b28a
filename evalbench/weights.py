"""Weights of published networks: a local folder first, pinned by SHA-256, fetched atomically and only when asked to.

The folder is `weights` in `EVALBENCH_CACHE` (default `~/.cache/evalbench`). A file whose digest nobody here has seen is
`unverified`: its digest is recorded beside it at first use and holds from then on.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from evalbench.durable import write_atomic
from evalbench.errors import UserError, unknown

UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Weights:
    """One file that is to be had elsewhere.

    Attributes:
        file: where it belongs, relative to the folder. sha256: of its bytes, or `unverified`.
        url: where its makers have it; empty when only `how` helps. how: the line to type otherwise; `{folder}` is
            filled in.
    """

    file: str
    sha256: str = UNVERIFIED
    url: str = ""
    how: str = ""


# Digests: published with the files (the .pth carries its first digits in its name). URLs: pytorch_fid/inception.py
# and cleanfid/downloads_helper.py of the packages pytorch-fid 0.3.0 and clean-fid 0.1.35.
KNOWN: dict[str, Weights] = {
    "inception-pth": Weights(
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "inception-torchscript": Weights(
        "inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    ),
}


def cache() -> Path:
    """The user's folder of everything that is not part of the package: EVALBENCH_CACHE."""
    return Path(os.environ.get("EVALBENCH_CACHE") or Path.home() / ".cache" / "evalbench")


def folder() -> Path:
    """Where weights lie."""
    return cache() / "weights"


def local_repository(text: str) -> Path:
    """The folder of a model's id `owner/name`: `models/owner/name` in the cache, else what the hub's client has kept.

    Nothing is downloaded here.

    Raises:
        UserError: neither a folder nor an id that was fetched.
    """
    owner, slash, name = text.partition("/")
    if not (slash and owner and name) or "/" in name or owner.startswith("."):
        raise UserError(f"model folder '{text}' does not exist; give a folder that diffusers' save_pretrained wrote")
    own = cache() / "models" / owner / name
    if own.is_dir():
        return own
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        raise UserError(
            f"model '{text}' is neither a folder nor fetched; put it into {own}, or type: hf download {text}"
        ) from None


def known(name: str) -> Weights:
    """The entry of a name in `KNOWN`."""
    if name not in KNOWN:
        raise unknown("weights", name, KNOWN)
    return KNOWN[name]


def missing(weights: Weights, name: str = "") -> str:
    """What to put where, when a file is absent; empty when it is there.

    Args:
        weights: the file. name: in `KNOWN`, where `evalbench weights NAME` can fetch it.
    """
    path = folder() / weights.file
    if path.is_file():
        return ""
    how = weights.how.format(folder=path.parent) if weights.how else f"evalbench weights {name}"
    return f"put {weights.file} (SHA-256 {weights.sha256}) into {folder()}, or type: {how}"


def find(weights: Weights, name: str = "") -> Path:
    """The file, its digest checked.

    Raises:
        UserError: it is absent, or another file.
    """
    if why := missing(weights, name):
        raise UserError(f"weights not found; {why}")
    path = folder() / weights.file
    check_pinned(path, weights.sha256)
    return path


def check_pinned(path: Path, pinned: str) -> None:
    """Whether a file is the one with a digest; of an `unverified` one the digest of its first use is recorded.

    Raises:
        UserError: it is another file.
    """
    digest, known_as = sha256(path), _expected(path, pinned)
    if known_as == UNVERIFIED:
        _record(path, digest)
    elif digest != known_as:
        raise UserError(f"{path} has SHA-256 {digest}, expected {known_as}; remove it and fetch it again")


def expected(weights: Weights) -> str:
    """The digest that counts: the published one, else the one recorded at first use, else `unverified`."""
    return _expected(folder() / weights.file, weights.sha256)


def _expected(path: Path, pinned: str) -> str:
    note = _note(path)
    if pinned == UNVERIFIED and note.is_file():
        return note.read_text("utf-8").split()[0]
    return pinned


def sha256(path: Path) -> str:
    """Digest of a file; read once per process and state of the file."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache
def _digest(path: Path, mtime: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _record(path: Path, digest: str) -> None:
    """Write the digest beside the file, where the folder can be written to."""
    try:
        write_atomic(_note(path), f"{digest}  {path.name}\n")
    except OSError as error:
        # in a folder shared read-only nobody here could change the file either
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def fetch(name: str) -> Path:
    """Download a known file into the folder, unless it is there: verified before it gets its name.

    Raises:
        UserError: it cannot be reached, or what came is another file; nothing is left behind.
    """
    weights = known(name)
    path = folder() / weights.file
    if path.is_file():
        return find(weights, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream, urllib.request.urlopen(weights.url, timeout=60) as response:
            shutil.copyfileobj(response, stream)
        digest = sha256(Path(part))
        if digest != weights.sha256:
            raise UserError(
                f"{weights.url} gave a file with SHA-256 {digest}, expected {weights.sha256}; try again later"
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot fetch {weights.url} ({error}); {missing(weights, name)}") from None
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def command(names: list[str]) -> int:
    """`evalbench weights [NAME...]`: fetch the named files, or say which are there."""
    for name in names:
        print(fetch(name))
    if not names:
        for name, weights in KNOWN.items():
            print(f"{name:<22} {missing(weights, name) or folder() / weights.file}")
    return 0
