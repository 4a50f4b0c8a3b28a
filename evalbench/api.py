"""`evalbench.run(...)`: the command `evalbench run`, from Python. Both resolve their words here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalbench.errors import UserError, unknown
from evalbench.spec import load_suite

if TYPE_CHECKING:
    import pandas as pd

    from evalbench.runner import Executor, Request

MEASURES = ("quality", "latency")


def make_request(
    suite: str,
    *,
    methods: Sequence[str] | None = None,
    nfe: Sequence[int] | None = None,
    budget_unit: str = "nfe",
    guidance: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    metrics: Sequence[str] | None = None,
    measure: Sequence[str] = ("quality",),
    processes: int | None = None,
    latency_rounds: int | None = None,
    latency_batch: Sequence[int] = (),
    variant: str = "",
    samples: int | None = None,
    batch: int | None = None,
    dtype: str | None = None,
    save_samples: bool = False,
    allow_small_n: bool = False,
    plugins: Sequence[str] = (),
) -> Request:
    """What to run, with everything left out taken from the suite.

    Args:
        suite: name, or path of a TOML file.
        methods: chains such as `dpm-solver++(order=3)+cfg(scale=2)`. nfe: budgets. guidance: scales, 1 is off.
        budget_unit: what `nfe` counts: `nfe`, `evals` (network rows) or `steps` of the time grid.
        seeds: run seeds. metrics: ids. measure: `quality`, `latency`. samples, batch, dtype: override the suite's.
        processes, latency_rounds: fresh processes of a latency run (below 5, ratios have no interval) and the least
            number of rounds in each. latency_batch: samples per timed call; empty is 1 and the suite's.
        variant: how a latency run executes the network: `compile,bfloat16`; empty is eager in the suite's dtype.
        save_samples: keep every image. allow_small_n: compute set distances below their least N.
        plugins: paths of Python files that register methods, metrics or models.

    Raises:
        UserError: unknown suite or measure, value out of range, missing plug-in. (Methods and metrics are checked
            when the run is planned.)
    """
    for word in measure:
        if word not in MEASURES:
            raise unknown("measure", word, MEASURES)
    from evalbench.cost.budget import BUDGET_UNITS  # imports numpy

    if budget_unit not in BUDGET_UNITS:
        raise unknown("budget unit", budget_unit, BUDGET_UNITS)
    for option, value in (("--processes", processes), ("--latency-rounds", latency_rounds)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: at least 1")
    for size in latency_batch:
        if size < 1:
            raise UserError(f"--latency-batch {size}: at least 1")
    facts = load_suite(suite).override(samples=samples, batch=batch, dtype=dtype)

    from evalbench.cost.variants import Variant
    from evalbench.registry import read_plugin  # imports torch: only once the words make sense
    from evalbench.runner import Request, unique
    from evalbench.timing import Effort

    if variant:
        Variant.parse(variant)
    usual = Effort()
    effort = Effort(processes or usual.processes, latency_rounds or usual.rounds, batches=unique(latency_batch))
    return Request(
        suite=facts,
        methods=unique(methods or facts.methods),
        nfe=unique(facts.sampling.nfe if nfe is None else nfe),
        budget_unit=budget_unit,
        guidance=unique((facts.sampling.guidance,) if guidance is None else guidance),
        seeds=unique(facts.sampling.seeds if seeds is None else seeds),
        metrics=unique(facts.metrics.names if metrics is None else metrics),
        measure=frozenset(measure),
        effort=effort,
        variant=variant,
        save_samples=save_samples,
        allow_small_n=allow_small_n,
        plugins=dict(read_plugin(path) for path in plugins),
    )


def check_executor(*, serial: bool, workers: int | None, address: str | None) -> None:
    """Refuse contradicting choices before anything is loaded.

    Raises:
        UserError: no workers, or Ray's options together with serial.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    if serial and (workers or address):
        raise UserError("--serial runs without Ray; drop --workers and --address, or drop --serial")


def make_executor(*, serial: bool, workers: int | None, address: str | None) -> Executor:
    """Serial in this process, or Ray."""
    if serial:
        from evalbench.runner import SerialExecutor

        return SerialExecutor()
    from evalbench.cluster import RayExecutor

    return RayExecutor(workers, address)


def run(
    suite: str,
    out: str | Path | None = None,
    *,
    serial: bool = False,
    workers: int | None = None,
    address: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Run methods on a suite and return the table, one row per cell.

    Args:
        suite: name, or path of a TOML file. out: run folder; default `results/runs/SUITE`.
        serial: no Ray. workers: Ray workers. address: a running Ray cluster.
        options: see `make_request`.

    Returns:
        The frame of `evalbench.load(out)`: every cell of the run folder.

    Example:
        >>> frame = evalbench.run("gmm-smooth", methods=["ddim", "unipc"], nfe=[5, 10])  # doctest: +SKIP
    """
    from evalbench import runner
    from evalbench.report import load

    check_executor(serial=serial, workers=workers, address=address)
    request = make_request(suite, **options)
    folder = Path(out) if out is not None else Path("results/runs") / request.suite.name
    made: list[Executor] = []

    def executor() -> Executor:
        made.append(make_executor(serial=serial, workers=workers, address=address))
        return made[0]

    try:
        runner.run(request, folder, executor)
    finally:
        for one in made:
            one.shutdown()
    return load(folder)
