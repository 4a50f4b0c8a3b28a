"""`evalbench verify RUN` and `evalbench gc RUN`: is a run folder sound, and what in it can go."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evalbench.durable import is_temporary, read_npz
from evalbench.errors import DamagedFile, EvalbenchError
from evalbench.report import build_report
from evalbench.spec import Chunk
from evalbench.store import IMPORTS, TABLE_OF, Store, hold_run


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written, and why."""

    file: Path
    why: str


def damages(store: Store) -> Iterator[Damage]:
    """Everything in a run folder that is damaged: each file is read whole and held against its digest."""
    try:
        store.manifest()
    except EvalbenchError as error:
        yield Damage(store.folder / "manifest.json", str(error))
    try:
        store.records()
    except EvalbenchError as error:
        yield Damage(store.folder / "records.jsonl", str(error))
    try:
        store.imported()
    except EvalbenchError as error:
        yield Damage(store.folder / IMPORTS, str(error))
    for chunk in chunks_in(store):
        try:
            store.read_chunk(chunk)
        except DamagedFile as error:
            yield Damage(store.chunk_file(chunk), str(error).split(";")[0])
    for file in sorted(file for kind in ("artifacts", "references") for file in (store.folder / kind).glob("*.npz")):
        try:
            read_npz(file)
        except DamagedFile as error:
            yield Damage(file, str(error))
    yield from _table_damages(store)


def _table_damages(store: Store) -> Iterator[Damage]:
    """The table when it is not that of the records."""
    file = store.folder / "table.csv"
    if not file.is_file():
        return
    try:
        made = table_of(store)
    except EvalbenchError:  # what it is made of is damaged, and named above
        return
    if made != file.read_bytes():
        yield Damage(file, f"{file} is not the table of the records; make it with `evalbench report {store.folder}`")


def table_of(store: Store) -> bytes:
    """table.csv as the records give it.

    Raises:
        EvalbenchError: manifest or records cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in TABLE_OF:
            if (store.folder / name).is_file():
                shutil.copy(store.folder / name, folder)
        build_report(Store(folder), Path(folder) / "report", ("csv",))
        return (Path(folder) / "table.csv").read_bytes()


def chunks_in(store: Store) -> Iterator[Chunk]:
    """Every chunk that has a file, by cell and order."""
    for folder in sorted((store.folder / "chunks").glob("*")):
        yield from sorted(store.present_chunks(folder.name))


def verify_command(folder: Path, *, repair: bool) -> int:
    """Name what is damaged; the exit code.

    Args:
        repair: remove damaged chunks and preparations, so that the same `evalbench run` makes them again.
    """
    store = Store(folder)
    found = list(damages(store))
    for damage in found:
        print(f"damaged: {damage.why}")
        if repair and damage.file.suffix == ".npz":
            damage.file.unlink(missing_ok=True)
    count = sum(1 for _ in chunks_in(store))
    if not found:
        print(f"{folder}: {count} chunks and every record as they were written")
        return 0
    removed = sum(damage.file.suffix == ".npz" for damage in found)
    if repair and removed == len(found):
        print(f"removed {removed}; the same `evalbench run` command makes them again")
        return 0
    if not repair and removed:
        print(f"next: evalbench verify {folder} --repair")
    return EvalbenchError.exit_code


def gc_command(folder: Path, *, features: bool) -> None:
    """Remove leftovers of kills, and feature arrays when asked; say how much.

    Raises:
        UserError: not a run folder, or a run is writing to it.
    """
    store = Store(folder)
    with hold_run(store.folder):
        freed = sum(_removed(file) for file in list(store.folder.rglob("*")) if file.is_file() and is_temporary(file))
        leases = store.folder / "leases"
        if leases.is_dir():
            freed += sum(_removed(file) for file in list(leases.iterdir()))
        if features:
            freed += sum(_without_features(store, chunk) for chunk in chunks_in(store))
            store.flush()
    print(f"freed {freed / 1e6:.1f} MB; records, counts, scores and the first images stay")


def _removed(file: Path) -> int:
    size = file.stat().st_size
    file.unlink()
    return size


def _without_features(store: Store, chunk: Chunk) -> int:
    """Rewrite a chunk without its rows of features: counts, scores and images stay; bytes freed."""
    arrays, facts = store.read_whole_chunk(chunk)
    kept = {name: values for name, values in arrays.items() if values.ndim == 1 or name == "images"}
    if len(kept) == len(arrays):
        return 0
    before = store.chunk_file(chunk).stat().st_size
    known = {name: fingerprint for name, fingerprint in facts["features"].items() if name in kept}
    store.write_chunk(chunk, kept, facts | {"features": known})
    return before - store.chunk_file(chunk).stat().st_size
