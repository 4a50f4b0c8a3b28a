"""`evalbench.run(...)`: the command `evalbench run`, from Python. Both resolve their words here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalbench.errors import UserError, unknown
from evalbench.spec import load_suite

if TYPE_CHECKING:
    import pandas as pd

    from evalbench.runner import Executor, Policy, Request, Shard

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
    model: str = "",
    trust_remote_code: bool = False,
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
        model: instead of the suite's: `FILE.py:FUNCTION(argument=value)`, a folder, or an id; see `with_model`.
        trust_remote_code: the model's checkpoint may be a pickle, and programs that methods name may run.

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
    from evalbench.own_model import with_model
    from evalbench.registry import read_plugin  # imports torch: only once the words make sense
    from evalbench.runner import Request, unique
    from evalbench.timing import Effort

    sources: dict[str, str] = {}
    if model:
        facts, sources = with_model(facts, model, trust_remote_code=trust_remote_code)
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
        plugins=dict(read_plugin(path) for path in plugins) | sources,
        trust_remote_code=trust_remote_code,
    )


@dataclass(frozen=True)
class Placement:
    """Where a run is computed, and how patient it is.

    Attributes:
        serial: no Ray. workers: Ray workers. address: a running Ray cluster. device: its kind of device to use.
        shard: `I/N`, this process of a job array. lease: seconds after which a shard that vanished is replaced.
        timeout: seconds after which a worker that does not answer counts as hanging.

    Raises:
        UserError: choices that contradict each other, or are out of range.
    """

    serial: bool = False
    workers: int | None = None
    address: str | None = None
    device: str = ""
    shard: str = ""
    lease: float = 60.0
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1")
        if self.timeout <= 0:
            raise UserError(f"--timeout {self.timeout:g}: more than 0 seconds")
        alone = "--serial" if self.serial else "--shard" if self.shard else ""
        if alone and (self.workers or self.address or self.device):
            raise UserError(f"{alone} runs without Ray; drop --workers, --address and --device, or drop {alone}")
        if self.shard:
            self.claim()

    def claim(self) -> Shard | None:
        """The shard of a job array; None for a run that holds its folder alone."""
        if not self.shard:
            return None
        from evalbench.runner import Shard

        return Shard.parse(self.shard, self.lease)

    def policy(self) -> Policy:
        """What happens to work that is lost."""
        from evalbench.runner import Policy

        return Policy(timeout=self.timeout)

    def executor(self) -> Executor:
        """Serial in this process, or Ray."""
        if self.serial or self.shard:
            from evalbench.runner import SerialExecutor

            return SerialExecutor()
        from evalbench.cluster import RayExecutor

        return RayExecutor(self.workers, self.address, self.device, self.policy())


def run(
    suite: str,
    out: str | Path | None = None,
    *,
    serial: bool = False,
    workers: int | None = None,
    address: str | None = None,
    device: str = "",
    shard: str = "",
    **options: Any,
) -> pd.DataFrame:
    """Run methods on a suite and return the table, one row per cell.

    Args:
        suite: name, or path of a TOML file. out: run folder; default `results/runs/SUITE`.
        serial, workers, address, device, shard: see `Placement`.
        options: see `make_request`.

    Returns:
        The frame of `evalbench.load(out)`: every cell of the run folder.

    Example:
        >>> frame = evalbench.run("gmm-smooth", methods=["ddim", "unipc"], nfe=[5, 10])  # doctest: +SKIP
    """
    from evalbench import runner
    from evalbench.report import load

    placement = Placement(serial, workers, address, device, shard)
    request = make_request(suite, **options)
    folder = Path(out) if out is not None else Path("results/runs") / request.suite.name
    made: list[Executor] = []

    def executor() -> Executor:
        made.append(placement.executor())
        return made[0]

    try:
        runner.run(request, folder, executor, shard=placement.claim(), policy=placement.policy())
    finally:
        for one in made:
            one.shutdown()
    return load(folder)
