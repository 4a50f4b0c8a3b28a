"""`evalbench run ... --plan`: what a run would compute, how long, and how much disk, from a short probe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evalbench import registry, worker
from evalbench.plan import Plan
from evalbench.progress import CostModel
from evalbench.spec import GRID_SAMPLES, Cell, Chunk
from evalbench.store import Store
from evalbench.worker import ChunkResult, Job


@dataclass(frozen=True)
class Forecast:
    """What is left to do.

    Attributes:
        cells: of the table. sampled: the same with the fine solutions they need. chunks, present: to compute, and there
            already. forwards: evaluations of the field over all samples to compute, at most.
        seconds: of one worker; None without a probe. bytes: of chunk files; None without a probe.
    """

    cells: int
    sampled: int
    chunks: int
    present: int
    samples: int
    forwards: int
    seconds: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Probe:
    """What batches of this plan cost here.

    Attributes:
        cost: seconds by forwards and samples. row: bytes a sample leaves. image: bytes of an image that is kept.
    """

    cost: CostModel
    row: float
    image: float


def forecast(plan: Plan, out: Path, probed: Probe | None) -> Forecast:
    """Lay a plan beside what its folder holds.

    Args:
        out: run folder, which need not exist. probed: from `probe`; None leaves time and disk out.
    """
    store = Store(out) if (out / "manifest.json").is_file() else None
    chunks = present = samples = forwards = images = 0
    for cell in plan.work:
        there = store.present_chunks(cell.id) if store else set()
        missing = [chunk for chunk in plan.chunks(cell) if chunk not in there]
        new = sum(chunk.stop - chunk.start for chunk in missing)
        chunks += len(missing)
        present += len(plan.chunks(cell)) - len(missing)
        samples += new
        forwards += new * cell.nfe
        images += new if plan.request.save_samples else min(new, GRID_SAMPLES)
    if probed is None:
        return Forecast(len(plan.cells), len(plan.work), chunks, present, samples, forwards)
    seconds = probed.cost.seconds(forwards, samples)
    if seconds is None:  # one budget was probed: all its time counts as that of the forwards
        seconds = probed.cost.per_forward * forwards
    size = probed.row * samples + probed.image * images
    return Forecast(len(plan.cells), len(plan.work), chunks, present, samples, forwards, seconds, size)


def probe(plan: Plan) -> Probe | None:
    """Compute one batch at each of the two least budgets of the plan; nothing of it is kept.

    None when no batch could be computed: every method prepares first, or the first that does not fails.
    """
    ready = [cell for cell in plan.work if not registry.build_method(cell.method).prepares]
    cells = list({cell.nfe: cell for cell in sorted(ready, key=lambda cell: -cell.nfe)}.values())[:-3:-1]
    cost, row, image = CostModel(), 0.0, 0.0
    for i, cell in enumerate((*cells[:1], *cells)):  # the first batch pays for loading the networks
        outcome = worker.run_job(_job(plan, cell))
        if not isinstance(outcome, ChunkResult):
            return None
        n = len(outcome.arrays["count:nfe"])
        if i:
            cost.add(n * cell.nfe, n, float(outcome.facts["seconds"]))
        images = outcome.arrays.get("images", np.zeros(1, dtype=np.uint8))
        image = images.nbytes / len(images)
        row = max(row, sum(values.nbytes for name, values in outcome.arrays.items() if name != "images") / n)
    return Probe(cost, row, image) if cells else None


def _job(plan: Plan, cell: Cell) -> Job:
    """The first batch of a cell."""
    request = plan.request
    sampling = request.suite.sampling
    chunk = Chunk(cell.id, 0, min(sampling.batch, sampling.samples))
    return Job(request.suite, cell, chunk, plan.parts[cell.id], plugins=request.plugins)


def lines(found: Forecast, workers: int) -> list[str]:
    """A forecast in words.

    Args:
        workers: that would share the work.
    """
    there = f", {found.present:,} there already" if found.present else ""
    said = [
        f"cells: {found.cells}  (with fine solutions: {found.sampled})",
        f"chunks: {found.chunks:,} to compute{there}; {found.samples:,} samples; "
        f"evaluations: at most {found.forwards:,}",
    ]
    if found.seconds is not None and found.bytes is not None:
        hours = found.seconds / 3600
        each = "one worker" if workers == 1 else f"{workers} workers"
        said.append(f"time: {hours:.2g} worker-hours by a short probe; {hours / workers:.2g} hours on {each}")
        said.append(f"disk: {found.bytes / 1e6:,.1f} MB")
    else:
        said.append("time, disk: no batch could be probed; methods that prepare are measured when they run")
    return said


def workers_here() -> int:
    """Workers that a local run would start: one per GPU, or one per CPU core."""
    return torch.cuda.device_count() or os.cpu_count() or 1
