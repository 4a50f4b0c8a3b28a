"""Everything one device does: a job in, arrays out. No ray, no scheduling, no files of the run.

A chunk's bits depend on its job alone: each sample's noise is keyed by its global index, batches always have the
suite's size (a short one is padded with the following indices and the padding dropped).
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from evalbench import environment, registry, starts, warm
from evalbench.beside import Beside, at_once
from evalbench.cost.ledger import Ledger
from evalbench.errors import BadSamples, Unsupported, UserError, some
from evalbench.interfaces import Artifact, Cond, Extractor, Model, Outside, Parts, SampleBatch
from evalbench.metrics.common import CLUSTER
from evalbench.metrics.images import check_finite, check_images, to_uint8
from evalbench.preparation import Prepared, prepare
from evalbench.prompts import read_prompts
from evalbench.registry import Chain
from evalbench.sampling import Setup, conditions, decoded_of, delivered, noise_path, sample, setup_of
from evalbench.spec import DECLARED, GRID_SAMPLES, Cell, Chunk, Failure, Suite
from evalbench.suite_references import check_reference_file, read_reference, why_missing

_DIGEST = "digest"  # the array of a batch that becomes a fact of the chunk
_REPEAT = np.uint64(0)  # in place of the digest of a sample that is planned to repeat another


@dataclass(frozen=True)
class Job:
    """One chunk to compute. Travels as it is to any process.

    Attributes:
        parts: extractors to run. keep_images: keep every image, not only the first ones of the cell.
        plugins: file name -> source text. artifacts: what the parts of the method prepared.
    """

    suite: Suite
    cell: Cell
    chunk: Chunk
    parts: tuple[str, ...]
    keep_images: bool = False
    plugins: Mapping[str, str] = field(default_factory=dict)
    artifacts: tuple[Artifact | None, ...] = ()

    def __str__(self) -> str:
        return f"samples {self.chunk.start}-{self.chunk.stop - 1}"


@dataclass(frozen=True)
class PrepareJob:
    """What a method does before sampling: for `cell`, and for every cell with the same preparation key."""

    suite: Suite
    cell: Cell
    key: str
    plugins: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"the preparation of {self.cell.method}"


@dataclass(frozen=True)
class ChunkResult:
    """What a worker returns: arrays with one row per sample, and facts about how they were made."""

    job: Job
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


@dataclass(frozen=True)
class PreparedResult:
    """What a preparation made, with its bill and the environment it ran in."""

    job: PrepareJob
    prepared: Prepared
    environment: dict[str, Any]


@dataclass(frozen=True)
class JobFailure:
    """A job that raised; the cell becomes an error row, or `unsupported` when the pair lacks a capability.

    Attributes:
        out_of_memory: worth another try, once, on a worker that holds nothing yet.
    """

    job: Job | PrepareJob
    failure: Failure
    unsupported: bool
    out_of_memory: bool = False


def describe() -> dict[str, Any]:
    """The environment that this process would compute in."""
    environment.prepare_process()
    return environment.describe(environment.pick_device())


Outcome: TypeAlias = ChunkResult | PreparedResult | JobFailure


def run_job(job: Job | PrepareJob) -> Outcome:
    """Compute a job; whatever the method raises becomes a JobFailure."""
    warm.kept.next_job()
    try:
        return _run_prepare(job) if isinstance(job, PrepareJob) else _run_chunk(job)
    except Exception as error:  # whatever a method raises is that cell's record
        return JobFailure(job, _failure(error), isinstance(error, Unsupported), _is_out_of_memory(error))


def forget() -> None:
    """Let go of models, feature networks and the device's cached memory."""
    warm.kept.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """The device's memory, or the host's (which torch reports as a plain RuntimeError)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _run_prepare(job: PrepareJob) -> PreparedResult:
    setup = setup_of(job.suite, job.plugins)
    prepared = prepare(setup, registry.build_method(job.cell.method), job.cell)
    return PreparedResult(job, prepared, environment.describe(setup.device))


def _run_chunk(job: Job) -> ChunkResult:
    setup = setup_of(job.suite, job.plugins)
    extractors = {name: _extractor(name) for name in job.parts}
    started = time.perf_counter()  # what was loaded serves many chunks: it is no chunk's cost
    arrays = _compute(job, setup, extractors)
    digests = arrays.pop(_DIGEST, np.array([], np.uint64))
    facts = {
        "digests": ["" if digest == _REPEAT else f"{digest:016x}" for digest in digests.tolist()],
        "seconds": time.perf_counter() - started,
        "environment": environment.describe(setup.device),
        "features": {name: registry.extractor_fingerprint(name) for name in job.parts},
    }
    return ChunkResult(job, arrays, facts)


def _failure(error: Exception) -> Failure:
    """The record of an exception that is being handled."""
    text = str(error).strip()
    message = text.splitlines()[0] if text else type(error).__name__
    return Failure(type=type(error).__name__, message=message, traceback=traceback.format_exc())


def _check_conditions(suite: Suite, model: Model) -> None:
    """Whether a model can be asked what the suite asks, and makes images of the suite's size."""
    if suite.conditions.prompts is not None:
        read_prompts(suite.conditions.prompts)
        if not model.reads_texts:
            raise UserError(f"suite '{suite.name}' has prompts, but model '{suite.model.loader}' reads no texts")
    made = model.image_shape
    if suite.image and made and made != suite.image:
        raise UserError(
            f"suite '{suite.name}' has images of {_size(suite.image)}, but the model makes {_size(made)}; "
            "take another suite, or a model of that size"
        )
    wanted = suite.conditions.classes if suite.conditions.labels == "cyclic" else 0
    if wanted > model.num_classes:
        raise UserError(
            f"suite '{suite.name}': conditions.classes = {wanted}, but model '{suite.model.loader}' has "
            f"{model.num_classes} classes"
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _compute(job: Job, setup: Setup, extractors: Mapping[str, Extractor]) -> dict[str, np.ndarray]:
    chain = registry.build_method(job.cell.method).equipped(job.artifacts)
    start, stop = job.chunk.start, job.chunk.stop
    batch = job.suite.sampling.batch
    draw = _draws(job, setup, chain)
    with Beside(environment.prepare_process) as beside:
        seen = beside if overlaps(setup.device) else at_once
        looks: list[Future[dict[str, np.ndarray]]] = []
        for first in range(start, stop, batch):
            indices = range(first, first + batch)
            cond = conditions(job.suite, setup.model, indices, setup.device)
            drawn = draw(indices, cond)
            if looks:
                looks[-1].result()  # of two batches at most is anything held; a bad one ends the chunk here
            looks.append(seen(partial(_looked_at, job, setup, drawn, cond, extractors, indices[: stop - first])))
        blocks = [look.result() for look in looks]
    return {name: np.concatenate([_column(block, name) for block in blocks]) for name in _names(blocks)}


def _names(blocks: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    return list(dict.fromkeys(name for block in blocks for name in block))


def _digests(x: torch.Tensor) -> np.ndarray:
    """64 bits of each sample's content, uint64 (B,): equal samples of other chunks are found by it."""
    rows = x.contiguous().cpu().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.uint64)


def _column(block: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array of a batch; a count that only other batches have is zero in this one."""
    missing_count = name.startswith("count:") and name not in block
    return np.zeros(len(block["count:nfe"])) if missing_count else block[name]


class _Drawn(NamedTuple):
    """A batch of samples.

    Attributes:
        x: samples, (B, *S). images: uint8 (B, C, H, W); None when there are none.
        decoded: what was rounded to them; None when nothing was. counts: per sample, by name, each (B,).
    """

    x: torch.Tensor
    images: torch.Tensor | None
    decoded: torch.Tensor | None
    counts: dict[str, np.ndarray]


Draw: TypeAlias = Callable[[range, Cond], _Drawn]


def _draws(job: Job, setup: Setup, chain: Chain) -> Draw:
    """How the samples of global indices are had: drawn batch by batch, or from the chunk that a program has made."""
    if isinstance(chain.solver, Outside):
        return _delivery(job, setup, chain.solver)

    def draw(indices: range, cond: Cond) -> _Drawn:
        ledger = Ledger(len(indices), budget=job.cell.nfe)
        x = sample(setup, chain, job.cell, indices, cond, ledger)
        decoded = decoded_of(setup.model, x)
        return _Drawn(x, None if decoded is None else to_uint8(decoded), decoded, _counts(ledger))

    return draw


def _delivery(job: Job, setup: Setup, solver: Outside) -> Draw:
    """Images of a chunk that a program made, by batch; a short one is filled up with its last image."""
    chunk = range(job.chunk.start, job.chunk.stop)
    images, spends = delivered(setup, solver, job.cell, chunk)

    def draw(indices: range, cond: Cond) -> _Drawn:
        rows = np.minimum(np.array(indices), chunk[-1]) - chunk.start
        found = torch.from_numpy(images[rows]).to(setup.device)
        # nothing was counted, and what is declared has names of its own
        counts = {name: np.full(len(rows), math.nan) for name in ("nfe", "cost", "flops", "depth")}
        counts |= {f"{name}{DECLARED}": np.full(len(rows), float(value)) for name, value in spends.items()}
        x = found.to(setup.dtype) / 127.5 - 1.0
        return _Drawn(x, found, None, {f"count:{name}": values for name, values in counts.items()})

    return draw


def overlaps(device: torch.device) -> bool:
    """Whether features, checks and digests of a batch are made while the next one is drawn.

    On a GPU drawing leaves the processor idle; on a CPU the one thread of a worker has no time to share.
    """
    return device.type == "cuda"


def _looked_at(
    job: Job, setup: Setup, drawn: _Drawn, cond: Cond, extractors: Mapping[str, Extractor], indices: range
) -> dict[str, np.ndarray]:
    """What the extractors make of samples, with their counts; the rows of `indices` count, those after them pad."""
    x, images, decoded, counts = drawn
    keep = len(indices)
    batch = SampleBatch(x, images, cond, setup.model)
    repeated = starts.repeats(job.suite, setup.model.shape, indices)
    _check(batch, decoded, indices, repeated)
    with torch.no_grad():
        arrays = {name: extract(batch)[:keep].cpu().numpy() for name, extract in extractors.items()}
    for name, rows in arrays.items():
        _check_features(name, rows, indices)
    if batch.images is not None:
        arrays[_DIGEST] = np.where(repeated, _REPEAT, _digests(x[:keep]))
    return (
        arrays
        | {name: values[:keep] for name, values in counts.items()}
        | _prompted(job.suite, cond, setup.model, indices)
        | _kept_images(batch, indices, keep, job.keep_images)
    )


def _check(batch: SampleBatch, decoded: torch.Tensor | None, ids: Sequence[int], repeated: Sequence[bool]) -> None:
    """A bad sample is an error of the cell that names it, never silently dropped; a planned repeat may be a copy."""
    if batch.images is None:
        check_finite(batch.x[: len(ids)], ids)
        return
    own = [row for row, again in enumerate(repeated) if not again]
    for rows in (own, *([row] for row, again in enumerate(repeated) if again)):
        if rows:
            exact = None if decoded is None else decoded[rows]
            check_images(batch.images[rows], batch.x[rows], decoded=exact, ids=[ids[row] for row in rows])


def _check_features(name: str, rows: np.ndarray, ids: Sequence[int]) -> None:
    if len(rows) != len(ids):
        raise BadSamples(f"features '{name}' have {len(rows)} rows for {len(ids)} samples ({some(ids)})")
    bad = [ids[i] for i in np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)).tolist()]
    if bad:
        raise BadSamples(f"features '{name}' are NaN or infinite for {len(bad)} of {len(ids)} samples ({some(bad)})")


def _counts(ledger: Ledger) -> dict[str, np.ndarray]:
    counts = {"nfe": ledger.nfe, "cost": ledger.cost, "flops": ledger.flops}
    counts |= {f"evals.{role}": evals for role, evals in ledger.evals.items()}
    counts |= {f"aux.{role}": rows for role, rows in ledger.aux.items()}
    if ledger.backward.any():
        counts["backward"] = ledger.backward
    counts["depth"] = np.full(ledger.batch, float(ledger.depth))
    return {f"count:{name}": values for name, values in counts.items()}


def _prompted(suite: Suite, cond: Cond, model: Model, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Of a suite with prompts: which one a sample has, and 1 where it is longer than what the model's encoders read."""
    asked = suite.conditions.prompt_of(indices)
    if asked is None or cond.captions is None:
        return {}
    cut = [float(model.cuts(text)) for text in cond.captions[: len(asked)]]
    return {CLUSTER: np.array(asked, dtype=np.int32), "count:prompts_cut": np.array(cut)}


def _kept_images(batch: SampleBatch, indices: range, keep: int, keep_all: bool) -> dict[str, np.ndarray]:
    """uint8 images to keep: all, or those among the first samples of the cell."""
    if batch.images is None:
        return {}
    wanted = keep if keep_all else max(0, min(keep, GRID_SAMPLES - indices.start))
    return {"images": batch.images[:wanted].cpu().numpy()}


def _extractor(name: str) -> Extractor:
    return warm.kept.get(("features", name), lambda: registry.build_extractor(name))


# --- references -----------------------------------------------------------------------------------------------------


def check_suite(suite: Suite) -> None:
    """Everything about a suite that can be wrong before the first sample is drawn.

    Raises:
        UserError: unknown model, option or path; weights or a reference file are missing or not those of the suite.
    """
    model = registry.build_model(suite.model.loader, suite.model.options)
    for each in (model, *(registry.build_model(role.loader, role.options) for role in suite.roles.values())):
        each.check()
    noise_path(suite, model)
    _check_conditions(suite, model)
    starts.check(suite, model.shape, gaussian=type(model).start is Model.start)
    for key, reference in suite.references.items():
        if reference.model or why_missing(suite, key):  # what a metric then lacks, the plan says
            continue
        check_reference_file(suite, key)


def load_reference(suite: Suite, key: str, plugins: Mapping[str, str]) -> Parts | None:
    """Arrays of a reference; None when the suite has none under that key."""
    reference = suite.references.get(key)
    if reference is None:
        return None
    if why_missing(suite, key):
        return None
    if reference.model:
        return setup_of(suite, plugins).model.reference(key)
    return read_reference(suite, key)
