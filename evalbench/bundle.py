"""`evalbench pack RUN` and `evalbench verify FILE`: a run as one file that somebody else can check.

A zip in the layout of a run folder, so that what is unpacked can be read as one, plus what its numbers rest on:

    bundle.json               schema, versions, the digest of every other file
    manifest.json, records.jsonl, imports.jsonl (scores of other programs, if any), table.csv, timings.csv
    cells/CELL.npz            what a cell has one number of per sample; sums of its features; its first images

`verify` holds every file against its digest, makes the table from the records again, and computes anew what scores and
sums determine: counts, means of scores, Frechet distances. Their intervals need single features, which stay in the run
folder. A bundle is somebody else's: plug-ins in its manifest are text here and are never run, so what needs them, or a
reference that is not here, is taken as recorded. Equal runs are packed to equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import __version__, registry
from evalbench.durable import read_npz, write_atomic, write_npz
from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Metric, Parts
from evalbench.metrics.frechet import FrechetDistance, Moments, frechet_distance, moments, unpack_statistics
from evalbench.metrics.persample import MeanScore
from evalbench.reduce import count_means, counts_in
from evalbench.report import build_report
from evalbench.spec import GRID_SAMPLES, Record, Suite, parse_suite
from evalbench.store import TABLE_OF, Store
from evalbench.upkeep import table_of
from evalbench.worker import load_reference

SCHEMA = 1
SUFFIX = ".evalbench.zip"
LARGEST = 1 << 30  # bytes of all files of a bundle when unpacked: no run needs more, a zip bomb does
_PLAIN = (*TABLE_OF, "table.csv", "timings.csv")
_CELL = re.compile(r"cells/[0-9a-f]{8,64}\.npz")
_DATE = (1980, 1, 1, 0, 0, 0)  # of every entry: a zip's dates say nothing of its content
_SUMS = ("n", "sum", "outer")
_ROUNDING = 1e-9  # relative: libraries of another machine round sums of products otherwise


# --- pack -----------------------------------------------------------------------------------------------------------


def pack(run: Path, out: Path) -> Path:
    """Write a run as one file.

    Args:
        run: run folder. out: file to write.

    Raises:
        UserError: not a run folder, or it holds no record. DamagedFile: a chunk is damaged.
    """
    store = Store(run)
    registry.load_plugins(store.manifest()["plugins"])  # one's own run: its metrics may be a plug-in's
    records = _measured(store)
    if not store.records():
        raise UserError(f"run folder '{run}' holds no record to pack; run `evalbench run` into it first")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        for name in TABLE_OF:
            if (run / name).is_file():
                (there / name).write_bytes((run / name).read_bytes())
        build_report(Store(there), there / "report", ("csv",))
        for record in records:
            write_npz(there / "cells" / f"{record.cell.id}.npz", _kept(store, record), {"cell": record.cell.id})
        files = {name: (there / name).read_bytes() for name in sorted(_names(there))}
    facts = {
        "schema": SCHEMA,
        "evalbench": __version__,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in ({"bundle.json": json.dumps(facts, indent=1).encode() + b"\n"} | files).items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)
    write_atomic(out, stream.getvalue())
    return out


def _measured(store: Store) -> list[Record]:
    return [record for record in store.records() if (record.kind, record.status) == ("quality", "ok")]


def _names(folder: Path) -> Iterator[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return (name for name in names if name in _PLAIN or _CELL.fullmatch(name))


def _kept(store: Store, record: Record) -> dict[str, np.ndarray]:
    """What a bundle keeps of a cell: per-sample numbers, sums of the features that Frechet distances need, images."""
    metrics = [registry.build_metric(name) for name in record.metrics]
    sums = {metric.arg for metric in metrics if isinstance(metric, FrechetDistance)}
    found: dict[str, Moments] = {}
    for chunk in sorted(store.present_chunks(record.cell.id)):
        arrays = store.read_chunk(chunk)
        for name in sums & arrays.keys():
            rows = arrays[name].reshape(len(arrays[name]), -1)
            found[name] = found.get(name, Moments.empty(rows.shape[1])) + moments(rows)
    kept = store.per_sample(record.cell.id)
    for name, one in found.items():
        kept |= {f"{part}:{name}": np.asarray(getattr(one, part)) for part in _SUMS}
    images = store.images(record.cell.id)
    return kept if images is None else kept | {"images": images[:GRID_SAMPLES]}


# --- verify ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a bundle was found to be.

    Attributes:
        wrong: one line for everything that is not as it should be.
        computed: values that were computed again and agree. carried: values that this file cannot show.
    """

    wrong: tuple[str, ...]
    computed: int
    carried: int


def check(file: Path) -> Verdict:
    """Check a bundle.

    Raises:
        UserError: not a bundle. EvalbenchError: of a newer schema.
    """
    with tempfile.TemporaryDirectory() as folder:
        wrong = tuple(_unpacked(file, Path(folder)))
        if wrong:  # nothing in it is worth computing
            return Verdict(wrong, 0, 0)
        store = Store(folder)
        if table_of(store) != (Path(folder) / "table.csv").read_bytes():
            wrong = ("table.csv is not the table of the records",)
        suite = parse_suite(store.manifest()["suite"], "", where=f"manifest of {file}")
        computed = carried = 0
        for record in _measured(store):
            for name, known, found in _again(store.folder, record, suite):
                if found is None:
                    carried += 1
                elif math.isclose(known, found, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                    computed += 1
                else:
                    place = f"{record.cell.method} at NFE {record.cell.nfe}"
                    wrong += (f"{place}: {name} is {known:.10g} in the record, {found:.10g} from what it rests on",)
    return Verdict(wrong, computed, carried)


def _unpacked(file: Path, folder: Path) -> Iterator[str]:
    """Unpack a bundle, and say what of it is not what was packed; only names of the layout are written."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if "bundle.json" not in entries:
                raise UserError(f"'{file}' is no bundle (no bundle.json); make one with `evalbench pack RUN`")
            if len(entries) != len(archive.infolist()) or sum(e.file_size for e in entries.values()) > LARGEST:
                raise UserError(f"'{file}' is no bundle: names twice, or over {LARGEST >> 20} MiB unpacked")
            facts = json.loads(archive.read("bundle.json"))
            if facts["schema"] != SCHEMA:
                raise EvalbenchError(f"'{file}' has schema {facts['schema']}, this evalbench reads {SCHEMA}")
            digests: dict[str, str] = facts["files"]
            yield from (f"{name} is not listed in bundle.json" for name in entries.keys() - digests - {"bundle.json"})
            yield from (f"{name} is missing" for name in sorted(digests.keys() - entries))
            for name in sorted(digests.keys() & entries):
                content = archive.read(name)
                if not (name in _PLAIN or _CELL.fullmatch(name)):
                    yield f"{name} has no place in a bundle"
                elif hashlib.sha256(content).hexdigest() != digests[name]:
                    yield f"{name} is not what was packed (another SHA-256)"
                else:
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(content)
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"'{file}' is no bundle ({error}); make one with `evalbench pack RUN`") from None


def _again(folder: Path, record: Record, suite: Suite) -> Iterator[tuple[str, float, float | None]]:
    """Each number of a record with its value from what the bundle keeps; None where that does not determine it."""
    file = folder / "cells" / f"{record.cell.id}.npz"
    if not file.is_file():
        yield from ((name, value.value, None) for name, value in record.metrics.items())
        return
    kept, _ = read_npz(file)
    counts = count_means(counts_in(kept))
    for name, known in record.counts.items():
        yield name, known, counts.get(name, math.nan)
    for name, value in record.metrics.items():
        try:
            found = _value(registry.build_metric(name), kept, partial(load_reference, suite, plugins={}))
        except UserError:  # a metric of a plug-in, or a reference that is not here
            found = None
        yield name, value.value, found


def _value(metric: Metric[Any], kept: Parts, reference: Callable[[str], Parts | None]) -> float | None:
    if isinstance(metric, MeanScore) and set(metric.needs) <= kept.keys():
        return metric.compute(metric.update(kept), None).value
    if isinstance(metric, FrechetDistance) and f"n:{metric.arg}" in kept:
        target = reference(metric.reference_key)
        if target is not None:
            sums = Moments(int(kept[f"n:{metric.arg}"]), *(kept[f"{part}:{metric.arg}"] for part in _SUMS[1:]))
            return frechet_distance(sums.gaussian(), unpack_statistics(target))
    return None


# --- commands -------------------------------------------------------------------------------------------------------


def pack_command(run: Path, out: Path | None) -> None:
    """Pack a run; say where and how large."""
    file = pack(run, out or run.with_name(run.resolve().name + SUFFIX))
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; check it with `evalbench verify {file}`")


def verify_command(file: Path) -> int:
    """Say what is wrong with a bundle, or what was found to hold; the exit code."""
    found = check(file)
    for line in found.wrong:
        print(f"wrong: {line}")
    if found.wrong:
        return EvalbenchError.exit_code
    print(
        f"{file}: every file as packed, table.csv that of its records, {found.computed} values computed again and "
        f"equal, {found.carried} that need single features taken as recorded"
    )
    return 0
