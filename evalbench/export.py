"""Samples of a run for other tools: image folders, or the ADM evaluator's npz."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evalbench.durable import write_atomic
from evalbench.errors import UserError, unknown
from evalbench.spec import Record
from evalbench.store import Store

LAYOUTS = ("folder", "adm-npz")


def export_run(run_folder: Path, layout: str, to: Path) -> Iterator[Path]:
    """Write the samples of every finished cell and yield what was written.

    Args:
        run_folder: a run made with --save-samples. layout: `folder` (PNG files and manifest.json per cell) or
            `adm-npz` (`arr_0` uint8 (N, H, W, C), as the ADM evaluator reads it, and a manifest).
        to: target folder.

    Raises:
        UserError: unknown layout, or the run did not keep its samples.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    store = Store(run_folder)
    cells = [r for r in store.records() if r.kind == "quality" and r.status == "ok"]
    for record in cells:
        images = store.images(record.cell.id)
        if images is None or len(images) < record.samples:
            kept = 0 if images is None else len(images)
            raise UserError(
                f"{record.cell.method} at NFE {record.cell.nfe} kept {kept} of {record.samples} images; "
                "run again with --save-samples"
            )
        yield _write(record, images[: record.samples], layout, to)


def _write(record: Record, images: np.ndarray, layout: str, to: Path) -> Path:
    name = record.cell.id
    to.mkdir(parents=True, exist_ok=True)
    manifest = {
        "cell": record.cell.model_dump(),
        "protocol": record.protocol,
        "samples": len(images),
        "seed": record.cell.seed,
        "sha256": hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest(),
    }
    if layout == "adm-npz":
        target = to / f"{name}.npz"
        np.savez_compressed(target, arr_0=images.transpose(0, 2, 3, 1))
        write_atomic(to / f"{name}.json", json.dumps(manifest, indent=1) + "\n")
        return target
    target = to / name
    target.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        _save_png(image, target / f"{i:06d}.png")
    write_atomic(target / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return target


def _save_png(image: np.ndarray, file: Path) -> None:
    from PIL import Image

    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(file)
