"""A run's metrics over N, from the features that its chunks hold: `evalbench curve`. Nothing is sampled again."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evalbench import registry
from evalbench.errors import EvalbenchError, UserError
from evalbench.metrics.curve import Curve, curve, halved, parse_sizes
from evalbench.reduce import states_of
from evalbench.spec import Cell, Chunk, Record, chunks_of, parse_suite
from evalbench.store import Store
from evalbench.worker import load_reference


@dataclasses.dataclass(frozen=True)
class CellCurve:
    """The curve of one metric of one cell."""

    cell: Cell
    curve: Curve


def curves_of(run: Path | str, metrics: Sequence[str] = (), sizes: Sequence[int] = ()) -> list[CellCurve]:
    """Curves of every quality cell of a run, sorted by metric, NFE and method.

    Args:
        run: run folder, with its chunks. metrics: ids; empty takes the suite's primary.
        sizes: sample counts; empty takes N / 8, N / 4, N / 2 and N.

    Raises:
        UserError: not a run folder, an unknown metric, one without a curve, sizes that do not fit.
        EvalbenchError: a chunk is missing or damaged.
    """
    store = Store(run)
    manifest = store.manifest()
    suite = parse_suite(manifest["suite"], "", where=f"manifest of {store.folder}")
    wanted = [registry.build_metric(name) for name in (metrics or [suite.metrics.primary])]
    if any(metric.paired for metric in wanted):
        raise UserError(f"{', '.join(m.id for m in wanted)}: paired errors have no curve over N; ask for fd, kid or sw")
    found = []
    for record in store.records():
        if record.kind != "quality" or record.status != "ok":
            continue
        states = states_of(store, _chunks(record), None, wanted)
        for metric in wanted:
            key = metric.reference_key
            reference = load_reference(suite, key, manifest["plugins"]) if key else None
            at = sizes or halved(record.samples)
            found.append(CellCurve(record.cell, curve(metric, states[metric.id], reference, at)))
    return sorted(found, key=lambda one: (one.curve.metric, *_group(one), one.cell.method))


def unstable(curves: Sequence[CellCurve]) -> list[str]:
    """A line for each budget at which the order of the methods at a smaller N is not that at the largest."""
    groups: dict[tuple[str, int, float, int], list[CellCurve]] = defaultdict(list)
    for one in curves:
        groups[(one.curve.metric, *_group(one))].append(one)
    lines = []
    for (metric, nfe, _, _), members in groups.items():
        sizes = [value.n for value in members[0].curve.values]
        orders = [
            [m.cell.method for m in sorted(members, key=lambda m: m.curve.values[i].value)] for i in range(len(sizes))
        ]
        changed = [n for n, order in zip(sizes, orders, strict=True) if order != orders[-1]]
        if changed:
            lines.append(f"{metric} at NFE {nfe}: the order at N = {changed[-1]} is not that at N = {sizes[-1]}")
    return lines


def curve_command(run: Path, metrics: Sequence[str], sizes: str | None, json_out: bool) -> None:
    """`evalbench curve`: a line per cell, or a JSON object per cell."""
    found = curves_of(run, metrics, parse_sizes(sizes))
    if not found:
        raise UserError(f"{run} has no cell with a value")
    if json_out:
        for one in found:
            print(json.dumps({"cell": one.cell.model_dump(mode="json"), **dataclasses.asdict(one.curve)}))
        return
    for one in found:
        cell, values = one.cell, "  ".join(f"{value.value:.4g} at {value.n}" for value in one.curve.values)
        where = f"{cell.method}, NFE {cell.nfe}, guidance {cell.guidance:g}, seed {cell.seed}"
        print(f"{one.curve.metric}  {where}: {values}  |  {one.curve.limit:.4g} {one.curve.slope:+.4g} / N")
    print("\n".join(unstable(found)) or "The order of the methods is the same at every N.")


def _group(one: CellCurve) -> tuple[int, float, int]:
    return one.cell.nfe, one.cell.guidance, one.cell.seed


def _chunks(record: Record) -> list[Chunk]:
    if record.chunk is None:
        raise EvalbenchError(f"the record of cell {record.cell.id} does not say its chunk size; run again")
    return chunks_of(record.cell.id, record.samples, record.chunk)
