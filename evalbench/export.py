"""Samples of a run for other tools: image folders, or the ADM evaluator's npz."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evalbench.cards import FILES
from evalbench.durable import write_atomic
from evalbench.errors import UserError, unknown
from evalbench.prompts import Prompt, read_prompts
from evalbench.spec import Record, parse_suite
from evalbench.store import Store

LAYOUTS = ("folder", "adm-npz", "geneval", "dpg")


def export_run(run_folder: Path, layout: str, to: Path) -> Iterator[Path]:
    """Write the samples of every finished cell and yield what was written.

    Args:
        run_folder: a run made with --save-samples. layout: `folder` (PNG files and manifest.json per cell) or
            `adm-npz` (`arr_0` uint8 (N, H, W, C), as the ADM evaluator reads it, and a manifest); with prompts
            `geneval` (NNNNN/metadata.jsonl and NNNNN/samples/IIII.png, as GenEval's evaluator reads them) or `dpg` (one
            ID.png per prompt, four images in two rows, as DPG-Bench's reads them).
        to: target folder.

    Raises:
        UserError: unknown layout, or the run did not keep its samples.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, (*LAYOUTS, *FILES))
    store = Store(run_folder)
    prompts = _prompts(store, layout) if layout in ("geneval", "dpg") else ()
    cells = [r for r in store.records() if r.kind == "quality" and r.status == "ok"]
    for record in cells:
        images = store.images(record.cell.id)
        if images is None or len(images) < record.samples:
            kept = 0 if images is None else len(images)
            raise UserError(
                f"{record.cell.method} at NFE {record.cell.nfe} kept {kept} of {record.samples} images; "
                "run again with --save-samples"
            )
        if prompts:
            yield _by_prompt(record, images[: record.samples], prompts, layout, to)
        else:
            yield _write(record, images[: record.samples], layout, to)


def _prompts(store: Store, layout: str) -> tuple[Prompt, ...]:
    """The prompts of the run's suite, in their order.

    Raises:
        UserError: it has none, or not those that the layout is for.
    """
    suite = parse_suite(store.manifest()["suite"], "", where=f"manifest of {store.folder}")
    if suite.conditions.prompts is None:
        raise UserError(f"--layout {layout}: suite '{suite.name}' has no prompts; use --layout folder")
    found = read_prompts(suite.conditions.prompts)
    if layout == "geneval" and not found[0].facts:
        raise UserError("--layout geneval: its evaluator needs the metadata of GenEval's prompts; use --layout folder")
    return found


def _by_prompt(record: Record, images: np.ndarray, prompts: tuple[Prompt, ...], layout: str, to: Path) -> Path:
    """Images of each prompt together: sample i has prompt i mod the number of prompts."""
    target = to / record.cell.id
    per = len(images) // len(prompts)
    wanted = 4 if layout == "dpg" else 1
    if len(images) % len(prompts) or per < wanted or (layout == "dpg" and per != wanted):
        raise UserError(
            f"--layout {layout}: {len(images)} samples of {len(prompts)} prompts; "
            f"run with --samples {len(prompts) * 4} (4 images each)"
        )
    for number, prompt in enumerate(prompts):
        mine = images[number :: len(prompts)]
        if layout == "dpg":
            target.mkdir(parents=True, exist_ok=True)
            rows = [np.concatenate(list(mine[k : k + 2]), axis=2) for k in (0, 2)]
            _save_png(np.concatenate(rows, axis=1), target / f"{_safe(prompt.id)}.png")
            continue
        folder = target / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "metadata.jsonl", prompt.facts + "\n")
        for k, image in enumerate(mine):
            _save_png(image, folder / "samples" / f"{k:04d}.png")
    order = [prompt.id for prompt in prompts]
    manifest = {"cell": record.cell.model_dump(), "protocol": record.protocol, "per_prompt": per, "prompts": order}
    write_atomic(target.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
    return target


def _safe(identifier: str) -> str:
    """A prompt's id as a file name: it cannot leave its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", identifier):
        raise UserError(f"prompt id '{identifier}' is no file name; correct the prompt file")
    return identifier


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
