"""Records as tables. `table.csv` holds what is reproducible, in stable bytes; `timings.csv` what a clock said."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evalbench.durable import write_atomic
from evalbench.report.text import first_line
from evalbench.report.view import display_names, finite, metric_ids, reason, why_missing
from evalbench.spec import Latency, Record, Suite
from evalbench.stats import line_fit, percentiles

KEYS = ("suite", "guidance", "seed", "method", "nfe")
_FACTS = ("suite", "method", "nfe", "guidance", "seed", "samples", "status")
_WHOLE = ("nfe", "seed", "samples")
_TEXT = (
    *("suite", "method", "status", "protocol", "error", "cell"),
    *("device", "variant", "impl", "clock", "session", "flags", "doubt"),
)
_LATENCY = ("median", "p10", "p90", "p99")
PARTS = ("denoiser", "decoder", "conditioning", "arithmetic", "overhead", "excess")
_TIMED = (
    ["variant", "batch", "impl", "device", "threads", "clock", "processes", "rounds", "timings", "warmup", "settled"],
    [f"{kind}_{part}_ms" for kind in ("call", "image") for part in _LATENCY],
    ["cold_s", "build_s", "first_s"],
    [f"{part}_ms" for part in PARTS],
    ["before_mb", "peak_mb", "reserved_mb", "weights_mb", "memory:note", "joules", "energy:note"],
    ["checked", "doubt", "flags", "embedded", "training_free", "session"],
)
_FIT_GROUP = ["suite", "guidance", "method", "variant", "device", "threads", "batch", "session"]
_LEAST_POINTS = 3
_FIT_COLUMNS = (
    *_FIT_GROUP,
    "points",
    "ms_per_nfe",
    "ms_per_nfe:low",
    "ms_per_nfe:high",
    "intercept_ms",
    "r2",
)


def cells_frame(records: Iterable[Record], suite: Suite) -> pd.DataFrame:
    """One row per cell with all that is reproducible, sorted by suite, guidance, seed, method and budget.

    Columns: suite, method, nfe (the budget), guidance, seed, samples, status; the counts nfe_measured, nfe_p95,
    depth, evals_total, evals.ROLE, cost, flops; where something was prepared, prepare.evals_total and the rest of the
    bill; where a network is quantised, footprint.weight_bits and the rest of its footprint; per metric ID, ID:se,
    ID:low, ID:high, ID:bias, ID:note; protocol, error.
    """
    quality = [r for r in records if r.kind == "quality"]
    metrics = metric_ids(quality, suite)
    counts = _count_columns(quality)
    bill = _bill_columns(quality)
    footprint = sorted({f"footprint.{name}" for r in quality for name in r.footprint})
    names = display_names(quality)
    rows = [_cell_row(r, names[r.cell.id], counts, metrics) for r in quality]
    values = [f"{name}{part}" for name in metrics for part in ("", ":se", ":low", ":high", ":bias", ":note")]
    return _sorted_frame(rows, [*_FACTS, *counts, *bill, *footprint, *values, "protocol", "error", "cell"])


def timings_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per cell, variant and batch size with all that a clock said; one row for a cell that was not timed.

    Latencies are milliseconds: `call_*` of one call at `batch`, `image_*` that divided by the batch; parts of a call
    likewise. `cold_s`, `build_s` and `first_s` are medians over processes, `wall_s` is of the quality run's chunks.
    """
    cells: dict[str, list[Record]] = {}
    for record in records:
        cells.setdefault(record.cell.id, []).append(record)
    names = display_names(r for found in cells.values() for r in found)
    rows = [row for cell_id, found in cells.items() for row in _timing_rows(found, names[cell_id])]
    facts = [name for name in _FACTS if name not in ("samples", "status")]
    timed = [name for names in _TIMED for name in names]
    return _sorted_frame(rows, [*facts, "nfe_measured", "prepare_s", "wall_s", *timed, "error", "cell"])


def samples_frame(records: Iterable[Record], per_sample: Callable[[str], Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """One row per sample of every ok cell, sorted as the cells and by sample.

    Columns: suite, method, nfe (the budget), guidance, seed, sample (its index); the counts nfe_measured, evals.ROLE,
    cost, flops, depth; every per-sample score under the name of its extractor, such as `fashion-classifier` of
    `accuracy@fashion-classifier`; cell. Equal (seed, sample) had the same noise in every cell.

    Args:
        per_sample: the stored numbers of a cell by its id, see `Store.per_sample`.
    """
    quality = [r for r in records if r.kind == "quality" and r.status == "ok"]
    names = display_names(quality)
    frames = [_samples(r, names[r.cell.id], per_sample(r.cell.id)) for r in quality]
    facts = ["suite", "method", "nfe", "guidance", "seed", "sample"]
    held = [frame for frame in frames if len(frame)]
    if not held:
        return pd.DataFrame(columns=[*facts, "cell"])
    found = pd.concat(held, ignore_index=True)
    counts = [name for name in _count_columns(quality) if name in found.columns]
    scores = sorted(set(found.columns) - {*facts, *counts, "cell"})
    ordered = found[[*facts, *counts, *scores, "cell"]]
    return ordered.sort_values([*KEYS, "cell", "sample"], kind="stable", ignore_index=True)


def _samples(record: Record, name: str, found: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The samples that the record is about: the folder may hold more."""
    if not found:
        return pd.DataFrame()
    cell = record.cell
    numbers = {_sample_column(key): values.astype(float) for key, values in found.items() if key != "sample"}
    frame = pd.DataFrame({"sample": found["sample"], **numbers})
    for key in KEYS:
        frame[key] = name if key == "method" else getattr(cell, key)
    frame["cell"] = cell.id
    return frame[frame["sample"] < record.samples]


def _sample_column(key: str) -> str:
    return "nfe_measured" if key == "count:nfe" else key.removeprefix("count:")


def latency_fits(timings: pd.DataFrame) -> pd.DataFrame:
    """Robust line through the median call milliseconds over measured NFE, per method and hardware.

    Two points fit any line, so a method has one from three different NFE on.
    """
    timed = timings.dropna(subset=["call_median_ms", "nfe_measured"])
    rows = []
    for group, found in timed.groupby(_FIT_GROUP, sort=True):
        if found["nfe_measured"].nunique() >= _LEAST_POINTS:
            line = line_fit(found["nfe_measured"].to_numpy(float), found["call_median_ms"].to_numpy(float))
            numbers = (len(found), line.slope, line.slope_low, line.slope_high, line.intercept, line.r2)
            rows.append((*group, *numbers))
    return pd.DataFrame(rows, columns=list(_FIT_COLUMNS))


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    """Write a frame as CSV in the same bytes for the same content, whatever the order of its rows; atomically."""
    keys = [name for name in (*KEYS, "variant", "batch", "cell") if name in frame.columns]
    ordered = frame.sort_values(keys, kind="stable") if keys else frame
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(ordered.columns)
    writer.writerows([_text(value) for value in row] for row in ordered.itertuples(index=False, name=None))
    return write_bytes(path, stream.getvalue().encode())


def write_timings(records: Iterable[Record], path: Path) -> Path:
    """Write `timings_frame` as CSV."""
    return write_table(timings_frame(records), path)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old or the new content, never half."""
    write_atomic(path, content)
    return path


def _sorted_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame whose types are those of its columns, even when a column holds nothing but missing values."""
    frame = pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=list(columns), dtype=object)
    types = {name: int if name in _WHOLE else float for name in columns if not _is_text(name)}
    frame = frame.astype(types)
    keys = [name for name in (*KEYS, "variant", "batch", "cell") if name in frame.columns]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def _is_text(column: str) -> bool:
    return column in _TEXT or column.endswith(":note")


def _count_columns(records: Iterable[Record]) -> list[str]:
    held = {name for r in records for name in r.counts}
    roles = sorted(name for name in held if name.startswith("evals."))
    known = ["nfe_measured", "nfe_p95", "depth", "evals_total", *roles, "cost", "flops"]
    return [*known, *sorted(held - set(known) - {"nfe"})]


def _bill_columns(records: Iterable[Record]) -> list[str]:
    """Columns of what preparations evaluated; none where nothing was prepared. Their seconds are a clock's."""
    held = sorted({f"prepare.{name}" for r in records for name in r.bill} - {"prepare.seconds"})
    return ["prepare.evals_total", *held] if held else []


def _cell_row(record: Record, name: str, counts: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    cell = record.cell
    row: dict[str, Any] = {
        "suite": cell.suite,
        "method": name,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "samples": record.samples,
        "status": record.status,
        "protocol": record.protocol,
        "error": reason(record),
        "cell": cell.id,
    }
    row |= {count: record.counts.get(count) for count in counts}
    roles = [value for role, value in record.counts.items() if role.startswith("evals.")]
    row |= {"nfe_measured": record.counts.get("nfe"), "evals_total": sum(roles) if roles else None}
    row |= {f"prepare.{name}": value for name, value in record.bill.items()}
    row |= {f"footprint.{name}": value for name, value in record.footprint.items()}
    if record.bill:
        row["prepare.evals_total"] = sum(value for name, value in record.bill.items() if name.startswith("evals."))
    for metric in metrics:
        row |= _metric_columns(record, metric)
    return row


def _metric_columns(record: Record, metric: str) -> dict[str, Any]:
    found = finite(record).get(metric)
    if found is None:
        why = why_missing(record).get(metric)
        return {f"{metric}:note": f"missing: {first_line(why)}"} if why else {}
    parts = {f"{metric}:{part}": getattr(found, part) for part in ("se", "low", "high", "bias")}
    return {metric: found.value, **parts, f"{metric}:note": found.note}


def _timing_rows(found: Sequence[Record], name: str) -> list[dict[str, Any]]:
    quality = next((r for r in found if r.kind == "quality"), None)
    cell, counts = found[0].cell, quality.counts if quality else {}
    base: dict[str, Any] = {
        "suite": cell.suite,
        "method": name,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "nfe_measured": counts.get("nfe"),
        "prepare_s": quality.bill.get("seconds") if quality else None,
        "wall_s": quality.seconds if quality else None,
        "variant": "",
        "error": "",
        "cell": cell.id,
    }
    timed = [r for r in found if r.kind == "latency"]
    rows = [base | latency_columns(one) for r in timed for one in r.latency]
    rows += [base | {"variant": r.variant, "error": reason(r)} for r in timed if r.status != "ok"]
    return rows or [base]


def latency_columns(one: Latency) -> dict[str, Any]:
    """A timed cell at one batch size as columns."""
    row: dict[str, Any] = {
        "variant": one.variant,
        "batch": one.batch,
        "impl": one.impl,
        "device": one.device,
        "threads": one.threads,
        "clock": one.clock,
        "processes": len(one.seconds),
        "rounds": min((len(process) for process in one.seconds), default=0),
        "timings": len(one.calls),
        "warmup": max(one.warmup, default=0),
        "settled": one.steady,
        "cold_s": _median(one.cold),
        "build_s": _median(one.build),
        "first_s": _median(one.first),
        "memory:note": one.memory.note,
        "joules": one.energy.joules,
        "energy:note": one.energy.note,
        "checked": one.checked,
        "doubt": one.doubt,
        "flags": "; ".join(one.flags),
        "embedded": one.embedded,
        "training_free": one.training_free,
        "session": one.session,
    }
    for part in ("before", "peak", "reserved", "weights"):
        found = getattr(one.memory, part)
        row[f"{part}_mb"] = None if found is None else found / 1e6
    for part in PARTS:
        row[f"{part}_ms"] = 1e3 * getattr(one.breakdown, part) if one.breakdown else None
    if one.calls:
        summary = percentiles(1e3 * np.array(one.calls))
        for part in _LATENCY:
            row[f"call_{part}_ms"] = getattr(summary, part)
            row[f"image_{part}_ms"] = getattr(summary, part) / one.batch
    return row


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _text(value: Any) -> str:
    """A cell of a CSV: floats with ten digits, missing values empty."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating):
        return format(float(value), ".10g")
    return str(value)
