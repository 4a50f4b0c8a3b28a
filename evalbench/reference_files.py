"""Reference statistics as files: made of images, shown, verified; and those of other tools, read with a warning.

A file of ours is a safetensors with `mean` (D,), `cov` (D, D), optionally `features` (M, D), and its facts in one
header key, `facts`: how many images, by which extractor (with the digest of its weights), of which pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import registry
from evalbench.errors import EvalbenchError, UserError
from evalbench.images_in import Images, Seen, npz_keys, open_source, read_labels, sample_batches
from evalbench.interfaces import Extractor
from evalbench.metrics.frechet import Moments, moments, unpack_statistics

KEPT = 10_240  # features kept by default, for kernel and neighbour distances
UNKNOWN = "provenance unknown"
_LARGEST = 2**31  # bytes of one array of a foreign npz
_ROUNDING = 1e-6  # of the largest eigenvalue: what float32 storage may push below zero


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        arrays: as metrics read them: `mean`, `cov` or `cov_triu`, `features`.
        facts: the header of the file, or what was found out; empty when nothing is known.
        sha256: of the file, or of the pixels for images. name: for messages. notes: to print beside every number.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    sha256: str
    name: str
    notes: tuple[str, ...] = ()


def of_images(
    source: Images,
    extractor: str,
    *,
    keep: int | None = None,
    extract: Extractor | None = None,
    labels: Sequence[int] | None = None,
) -> Reference:
    """The reference of images: moments of all, features of the first `keep` (None: of all).

    Args:
        source: a folder, zip, npz or iterable of images. extractor: a registered name. keep: features to keep.
        extract: the extractor itself, where it is loaded already. labels: the class of each image, in order.
    """
    opened, seen = open_source(source), Seen()
    extract = extract or registry.build_extractor(extractor)
    total: Moments | None = None
    kept: list[np.ndarray] = []
    room = KEPT**4 if keep is None else keep
    for batch in sample_batches(opened, seen, labels):
        features = extract(batch).cpu().numpy()
        rows = features.reshape(len(features), -1)
        if not np.isfinite(rows).all():
            raise EvalbenchError(f"'{opened.name}': features '{extractor}' are NaN or infinite")
        total = moments(rows) if total is None else total + moments(rows)
        kept.append(rows[: max(room, 0)].astype(np.float32))
        room -= len(rows)
    assert total is not None  # a source of fewer than two images is an error
    gaussian = total.gaussian()
    arrays = {"mean": gaussian.mean, "cov": gaussian.cov}
    if keep != 0:
        arrays["features"] = np.concatenate(kept)
        if labels is not None:
            arrays["labels"] = np.array(labels[: len(arrays["features"])], dtype=np.int64)
    facts = {
        "source": opened.kind,
        "n": str(seen.n),
        "extractor": extract.fingerprint(),
        "pixels_sha256": seen.digest(),
        "shape": list(seen.shape),
        "notes": list(_notes(opened.notes, seen)),
    }
    return Reference(arrays, facts, seen.digest(), opened.name, _notes(opened.notes, seen))


def _notes(notes: tuple[str, ...], seen: Seen) -> tuple[str, ...]:
    repeated = (f"{len(seen.repeated)} of {seen.n} images are copies of others",) if seen.repeated else ()
    constant = (f"{len(seen.constant)} of {seen.n} images are of one grey level",) if seen.constant else ()
    return (*notes, *repeated, *constant)


# --- files ----------------------------------------------------------------------------------------------------------


def make_reference(
    source: Images, extractor: str, out: Path, *, keep: int = KEPT, labels: Sequence[int] | None = None
) -> dict[str, Any]:
    """Write the reference statistics of images to a safetensors file.

    Returns:
        Its facts, with `file` and `sha256`. The same images give the same bytes.
    """
    from safetensors.numpy import save

    if out.suffix != ".safetensors":
        raise UserError(f"'{out}' must end in .safetensors")
    if keep < 0:
        raise UserError(f"--keep {keep}: give the number of features to keep, 0 for none")
    if not out.parent.is_dir():
        raise UserError(f"folder '{out.parent}' not found; create it first")
    made = of_images(source, extractor, keep=keep, labels=labels)
    arrays = {name: np.ascontiguousarray(array) for name, array in made.arrays.items()}
    facts = {**made.facts, "arrays_sha256": arrays_digest(arrays)}
    content = save(arrays, metadata={"facts": json.dumps(facts)})  # one key: several come in no fixed order
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, out)
    return {**facts, "file": str(out), "sha256": hashlib.sha256(content).hexdigest()}


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_reference(file: Path, *, spatial: bool = False) -> Reference:
    """A `.safetensors` of evalbench, or an `.npz` with `mu` and `sigma` of clean-fid, pytorch-fid, EDM or ADM.

    Args:
        file: the file. spatial: from an `.npz` take `mu_s` and `sigma_s`, ADM's statistics for sFID.

    Raises:
        UserError: it is neither, or broken.
    """
    if not file.is_file():
        raise UserError(f"reference '{file}' not found; make it with `evalbench reference make`")
    if file.suffix == ".npz":
        return _foreign(file, *(("mu_s", "sigma_s") if spatial else ("mu", "sigma")))
    if file.suffix != ".safetensors":
        raise UserError(f"reference '{file}' is no .safetensors of evalbench and no .npz with mu and sigma")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        facts = json.loads(metadata.get("facts", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"reference '{file}' cannot be read: {error}") from None
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Reference(arrays, facts, sha256, str(file), () if facts else (UNKNOWN,))


def is_foreign(file: Path) -> bool:
    """Whether an `.npz` holds statistics and no images."""
    keys = npz_keys(file)
    return {"mu", "sigma"} <= set(keys) and "arr_0" not in keys


def _foreign(file: Path, mu: str, sigma: str) -> Reference:
    keys = npz_keys(file)
    if not {mu, sigma} <= set(keys):
        raise UserError(f"reference '{file}' holds {', '.join(keys)}; statistics stand under '{mu}' and '{sigma}'")
    with zipfile.ZipFile(file) as archive:
        for name in (f"{mu}.npy", f"{sigma}.npy"):
            if archive.getinfo(name).file_size > _LARGEST:
                raise UserError(f"reference '{file}': {name} unpacks to more than {_LARGEST:,} bytes")
    try:
        with np.load(file, allow_pickle=False) as content:
            mean, cov = np.asarray(content[mu]), np.asarray(content[sigma])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"reference '{file}' cannot be read: {error}") from None
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or "f" not in (mean.dtype.kind, cov.dtype.kind):
        raise UserError(f"reference '{file}': {mu} {mean.shape} and {sigma} {cov.shape} are no mean and covariance")
    arrays = {"mean": mean.astype(np.float64), "cov": cov.astype(np.float64)}
    return Reference(arrays, {}, hashlib.sha256(file.read_bytes()).hexdigest(), str(file), (UNKNOWN,))


def verify_reference(file: Path, *, source: Images | None = None) -> list[str]:
    """What is wrong with a reference file; empty when nothing is.

    Args:
        file: what to check: digest of its arrays, finite numbers, a symmetric positive semidefinite covariance.
        source: the images it was made of; their pixels must then have the digest in the facts.
    """
    reference = read_reference(file)
    arrays, facts = reference.arrays, reference.facts
    wrong = [f"'{name}' holds NaN or infinity" for name in sorted(arrays) if not np.isfinite(arrays[name]).all()]
    if "arrays_sha256" in facts and arrays_digest(arrays) != facts["arrays_sha256"]:
        wrong.append("the arrays are not those that were written: their digest differs")
    if not wrong:
        wrong += _wrong_moments(arrays)
    if source is not None:
        seen = Seen()
        for _ in sample_batches(open_source(source), seen):
            pass
        if seen.digest() != facts.get("pixels_sha256"):
            wrong.append("it was made of other pixels")
    return wrong


def _wrong_moments(arrays: Mapping[str, np.ndarray]) -> list[str]:
    if "mean" not in arrays:
        return []
    wrong = []
    cov = arrays.get("cov")
    if cov is not None and cov.shape != (len(arrays["mean"]),) * 2:
        return [f"'cov' has shape {cov.shape} for {len(arrays['mean'])} dimensions"]
    if cov is not None and np.abs(cov - cov.T).max() > _ROUNDING * np.abs(cov).max():
        wrong.append("'cov' is not symmetric")
    eigenvalues = np.linalg.eigvalsh(unpack_statistics(arrays).cov)
    if eigenvalues.min() < -_ROUNDING * max(eigenvalues.max(), 0.0):
        wrong.append(f"the covariance is not positive semidefinite: smallest eigenvalue {eigenvalues.min():.3g}")
    return wrong


# --- commands -------------------------------------------------------------------------------------------------------


def make_command(source: str, extractor: str, out: Path, keep: int = KEPT, labels: str | None = None) -> int:
    """`evalbench reference make`: write the file, print its facts."""
    classes = None if labels is None else read_labels(Path(labels))
    print(json.dumps(make_reference(source, extractor, out, keep=keep, labels=classes), indent=1))
    return 0


def show_command(file: Path) -> int:
    """`evalbench reference show`: print facts, arrays and digest."""
    reference = read_reference(file)
    shown = {
        "file": reference.name,
        "sha256": reference.sha256,
        "facts": dict(reference.facts) or UNKNOWN,
        "arrays": {name: f"{array.dtype} {list(array.shape)}" for name, array in sorted(reference.arrays.items())},
    }
    print(json.dumps(shown, indent=1))
    return 0


def verify_command(file: Path, source: str | None = None) -> int:
    """`evalbench reference verify`: say what is wrong; 0 when nothing is.

    Raises:
        UserError: something is wrong with the file.
    """
    wrong = verify_reference(file, source=source)
    if wrong:
        raise UserError(f"reference '{file}': {'; '.join(wrong)}; make it again with `evalbench reference make`")
    print(f"{file}: ok")
    return 0
