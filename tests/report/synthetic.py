"""A synthetic run: four methods at three budgets, with an error, an unsupported pair, a missing metric, latencies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from evalbench.spec import (
    Cell,
    Chunk,
    EnergyUse,
    Failure,
    Latency,
    MemoryUse,
    MetricValue,
    Record,
    Split,
    Suite,
    content_id,
    parse_suite,
)
from evalbench.store import Store, open_run

N = 4096
BUDGETS = (5, 10, 20)
# fd at NFE 5, 10, 20; milliseconds of one evaluation at batch 64
METHODS = {
    "ddim": ((28.4, 8.9, 2.1), 9.0),
    "heun": ((61.0, 6.2, 1.35), 9.1),
    "dpm-solver++(order=2)": ((6.5, 2.02, 0.71), 9.4),
    "unipc": ((4.9, 1.42, 0.55), 9.9),
}
NOTE = "bias-dominated: N below 10 dimensions"


def make_suite(**changes: Any) -> Suite:
    content: dict[str, Any] = {
        "schema": 1,
        "name": "fashion-synthetic",
        "version": 1,
        "summary": "Made-up numbers for the tests of the report; no sampler was run.",
        "model": {"loader": "fashion-mixture"},
        "path": {"kind": "vp-linear"},
        "conditions": {"labels": "cyclic", "classes": 10},
        "sampling": {"samples": N, "batch": 64, "chunk": 512, "nfe": list(BUDGETS)},
        "metrics": {
            "names": ["fd@fashion64", "kd@fashion64", "paired-p90@identity", "precision@fashion64", "align@tiny"],
            "primary": "fd@fashion64",
        },
        "references": {
            "fashion64": {"file": "fashion64.safetensors", "sha256": "ab" * 32},
            "identity": {"model": True},
        },
        "floors": [
            {"metric": "fd@fashion64", "samples": N, "value": 0.42, "sd": 0.013},
            {"metric": "precision@fashion64", "samples": N, "value": 0.93},
            {"metric": "fd@fashion64", "samples": N, "value": 9.3, "what": "blurred"},
            {"metric": "fd@fashion64", "samples": 1024, "value": 1.7},
        ],
    }
    return parse_suite(content | changes, "", where="test")


def make_cell(method: str, nfe: int, *, guidance: float = 1.0, seed: int = 0) -> Cell:
    return Cell(
        suite="fashion-synthetic",
        suite_version=1,
        generation="f" * 16,
        method=method,
        settings=content_id(method),
        nfe=nfe,
        guidance=guidance,
        seed=seed,
    )


def value(number: float, *, half: float, **more: Any) -> MetricValue:
    return MetricValue(value=number, n=N, se=half / 1.96, low=number - half, high=number + half, **more)


def quality(method: str, nfe: int, fd: float, *, guidance: float = 1.0, seed: int = 0, **changes: Any) -> Record:
    """An ok record whose other metrics follow from `fd`."""
    samples = changes.pop("samples", N)
    facts = {"samples": samples, "guidance": guidance, "seed": seed, "generation": {"noise": "philox", "batch": 64}}
    metrics = {
        "fd@fashion64": value(fd, half=0.03 * fd + 0.02, bias=0.04, note=NOTE if method == "ddim" else ""),
        "kd@fashion64": value(1e-4 * fd, half=4e-6 * fd + 1e-6),
        "paired-p90@identity": value(0.2 + 0.3 * math.log1p(fd), half=0.015, unit="rms"),
        "precision@fashion64": value(0.93 / (1 + 0.02 * fd), half=0.008, higher_is_better=True),
    }
    counts = {"nfe": nfe - (method == "heun"), "nfe_p95": nfe, "depth": nfe, "cost": 2.0 * nfe, "flops": 1.3e9 * nfe}
    base: dict[str, Any] = {
        "kind": "quality",
        "status": "ok",
        "cell": make_cell(method, nfe, guidance=guidance, seed=seed),
        "samples": samples,
        "protocol": content_id(facts),
        "protocol_facts": facts,
        "metrics": metrics,
        "missing": {"align@tiny": "the suite has no captions"},
        "counts": counts | {"evals.base": 2.0 * nfe},
        "seconds": 12.5,
        "environment": {"device": "cpu x86_64 AVX512", "threads": 1, "class": "c1", "versions": {"torch": "2.11"}},
    }
    return Record(**base | changes)


def failed(method: str, nfe: int, status: str, message: str, **cell: Any) -> Record:
    failure = Failure(type="BudgetExceeded", message=message, traceback="Traceback: /secret/path")
    return Record(kind="quality", status=status, cell=make_cell(method, nfe, **cell), samples=N, failure=failure)


def timed(method: str, nfe: int, ms_per_nfe: float, **changes: Any) -> Latency:
    """Five processes of one call each."""
    steps = np.array([0.97, 0.99, 1.0, 1.01, 1.12])
    seconds = [float(s) for s in 1e-3 * (4 + ms_per_nfe * nfe) * steps]
    content: dict[str, Any] = {
        "batch": 64,
        "seconds": tuple(((s,),) for s in seconds),
        "warmup": (10,) * 5,
        "steady": True,
        "session": "together",
        "variant": "eager,float32",
        "training_free": True,
        "embedded": True,
        "device": "cpu x86_64 AVX512",
        "threads": 1,
        "clock": "perf_counter_ns",
        "cold": (2.5,),
        "build": (2.0,) * 5,
        "first": (0.3,) * 5,
        "breakdown": Split(
            denoiser=1e-3 * ms_per_nfe * nfe,
            decoder=0.0,
            conditioning=0.0,
            arithmetic=1e-3,
            overhead=3e-3,
            excess=0.0,
            calls=5,
        ),
        "memory": MemoryUse(before=300_000_000, peak=412_000_000, reserved=None, weights=9_000_000),
        "energy": EnergyUse(joules=None, note="no NVIDIA GPU: this runs on cpu"),
        "checked": 20,
    }
    return Latency(**content | changes)


def latency(method: str, nfe: int, ms_per_nfe: float, *, changes: dict[str, Any] | None = None, **cell: Any) -> Record:
    one = timed(method, nfe, ms_per_nfe, **(changes or {}))
    made = make_cell(method, nfe, **cell)
    return Record(kind="latency", status="ok", cell=made, latency=(one,), variant=one.variant)


def make_records(**cell: Any) -> list[Record]:
    found = []
    for method, (values, ms) in METHODS.items():
        for nfe, fd in zip(BUDGETS, values, strict=True):
            if (method, nfe) == ("heun", 5):
                found.append(failed(method, nfe, "error", "budget 5, spent 6\nsecond line", **cell))
            else:
                found += [quality(method, nfe, fd, **cell), latency(method, nfe, ms, **cell)]
    found.append(failed("faster-diffusion(keys=uniform:4)", 10, "unsupported", "needs split", **cell))
    return found


def make_images(method: str, nfe: int, seed: int = 0) -> np.ndarray:
    """Blobs that sharpen with NFE, (16, 1, 28, 28)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    found = []
    for _ in range(16):
        cx, cy, rx, ry, angle = rng.uniform((-0.2, -0.2, 0.3, 0.2, 0), (0.2, 0.2, 0.7, 0.5, 3))
        u, v = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        soft = 2.0 * METHODS[method][0][BUDGETS.index(nfe)] ** 0.5 / 4 + 0.15
        shape = 1 / (1 + np.exp(np.minimum(((u / rx) ** 4 + (v / ry) ** 4 - 1) / soft, 50)))
        found.append(np.clip(255 * shape, 0, 255).astype(np.uint8)[None])
    return np.stack(found)


def write_run(folder: Path, records: Iterable[Record], suite: Suite | None = None) -> Store:
    """A run folder with these records, and images of those that are ok."""
    with open_run(folder, suite or make_suite(), {}) as store:
        for record in records:
            store.append(record)
            known = record.cell.method in METHODS and record.cell.nfe in BUDGETS
            if known and record.kind == "quality" and record.status == "ok":
                pixels = make_images(record.cell.method, record.cell.nfe, record.cell.seed)
                store.write_chunk(Chunk(record.cell.id, 0, 16), {"images": pixels}, {})
        return store
