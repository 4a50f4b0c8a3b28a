"""What the user asked for, laid out as cells and chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from evalbench import conventions, registry, sampling, starts, worker
from evalbench.cost.budget import BudgetUnit
from evalbench.errors import UserError
from evalbench.interfaces import Metric, Outside
from evalbench.reduce import paired_parts, parts_of
from evalbench.spec import Cell, Chunk, Solution, Suite, chunks_of, content_id
from evalbench.suite_references import why_missing
from evalbench.timing import Effort


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved against a suite.

    Attributes:
        suite: with overrides applied. methods: chain texts as written. nfe, guidance, seeds: the grid of cells.
        budget_unit: what `nfe` counts: evaluations of the field, network rows (`evals`), or steps of the grid.
        metrics: metric ids. measure: `quality`, `latency`.
        effort: how much a latency run measures. variant: text of how it executes networks; empty is as quality runs.
        save_samples: keep every image. allow_small_n: see `reduce_cell`.
        plugins: file name -> source. trust_remote_code: programs that methods name may run.
    """

    suite: Suite
    methods: tuple[str, ...]
    nfe: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    budget_unit: BudgetUnit = "nfe"
    measure: frozenset[str] = frozenset({"quality"})
    effort: Effort = field(default_factory=Effort)
    variant: str = ""
    save_samples: bool = False
    allow_small_n: bool = False
    plugins: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """Cells to measure, and the fine solutions that their paired metrics need.

    Attributes:
        request: with a file of starts known by its digest. metrics: what can be computed here.
        unavailable: the other metrics asked for, by id, with the reason.
    """

    request: Request
    cells: tuple[Cell, ...]
    metrics: tuple[Metric[Any], ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def solutions(self) -> dict[str, Cell]:
        """Fine solution of each cell, by cell id; empty when no metric is paired or the suite names none."""
        solution = self.request.suite.solution
        if solution is None or not paired_parts(self.metrics):
            return {}
        return {cell.id: self._solution(cell, solution) for cell in self.cells}

    def _solution(self, cell: Cell, solution: Solution) -> Cell:
        """The fine solution of the field that the cell solves; a method that guides itself has a field of its own."""
        guidance = registry.build_method(cell.method).guidance
        method = f"{solution.method}+{guidance}" if guidance else solution.method
        return make_cell(self.request.suite, method, solution.nfe, cell.guidance, cell.seed)

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Extractors to run, by cell id (fine solutions included)."""
        wanted = {cell.id: set(parts_of(self.metrics)) - self._unseen(cell) for cell in self.cells}
        for cell in self.solutions.values():
            wanted.setdefault(cell.id, set()).update(paired_parts(self.metrics))
        return {cell_id: tuple(sorted(parts)) for cell_id, parts in wanted.items()}

    def metrics_of(self, cell: Cell) -> tuple[tuple[Metric[Any], ...], dict[str, str]]:
        """What can be computed of a cell, and why the other metrics cannot, by id."""
        unseen = self._unseen(cell)
        usable = tuple(metric for metric in self.metrics if not unseen.intersection(metric.needs))
        why = f"{cell.method} makes finished images, and this reads states" if unseen else ""
        return usable, {**self.unavailable, **{m.id: why for m in self.metrics if m not in usable}}

    def _unseen(self, cell: Cell) -> set[str]:
        """Extractors that read what a cell does not have: the states of a program that makes images."""
        if not isinstance(registry.build_method(cell.method).solver, Outside):
            return set()
        return {name for name in parts_of(self.metrics) if "x" in registry.get("extractor", name).needs}  # type: ignore[attr-defined]

    @cached_property
    def work(self) -> tuple[Cell, ...]:
        """Every cell to sample once: fine solutions first, since others wait for them."""
        return tuple({cell.id: cell for cell in (*self.solutions.values(), *self.cells)}.values())

    def chunks(self, cell: Cell) -> list[Chunk]:
        """Chunks of a cell, in order."""
        sampling = self.request.suite.sampling
        return chunks_of(cell.id, sampling.samples, sampling.chunk)


def make_cell(suite: Suite, method: str, nfe: int, guidance: float, seed: int) -> Cell:
    """The cell of a method text; the id covers every setting, so two spellings of one method are one cell."""
    chain = registry.build_method(method)
    return Cell(
        suite=suite.name,
        suite_version=suite.version,
        generation=content_id(suite.generation()),
        method=chain.text,
        settings=content_id(chain.settings()),
        nfe=nfe,
        guidance=guidance,
        seed=seed,
    )


def make_plan(request: Request) -> Plan:
    """Check a request and lay out its cells.

    Raises:
        UserError: anything wrong with the suite, a method, a metric, or the grid.
    """
    registry.load_plugins(request.plugins)
    worker.check_suite(request.suite)
    request = replace(request, suite=starts.pinned(request.suite))
    if request.suite.model.loader == "module":  # nobody here has seen it
        conventions.check_suite(request.suite)
    metrics = tuple(registry.build_metric(metric) for metric in request.metrics)
    for values, option in (
        (request.nfe, "--nfe"),
        (request.methods, "--methods"),
        (request.seeds, "--seeds"),
    ):
        if not values:
            raise UserError(f"{option} is empty; name at least one")
    for nfe in request.nfe:
        if nfe < 1:
            raise UserError(f"--nfe {nfe}: a budget is at least 1 evaluation")
    for seed in request.seeds:
        if seed < 0:
            raise UserError(f"--seeds {seed}: a seed is 0 or more")
    starts.check_seeds(request.suite.sampling, request.seeds)
    cells = {
        cell.id: cell
        for seed in request.seeds
        for guidance in request.guidance
        for method in request.methods
        for nfe in request.nfe
        for cell in [make_cell(request.suite, method, _nfe(request, method, nfe, guidance), guidance, seed)]
    }
    _check_methods(request, cells.values())
    reasons = {metric.id: _why_unavailable(metric) for metric in metrics}
    usable = tuple(metric for metric in metrics if not reasons[metric.id])
    for metric in usable:
        if why := why_missing(request.suite, metric.reference_key):
            raise UserError(f"metric '{metric.id}': {why}")
    return Plan(request, tuple(cells.values()), usable, {name: why for name, why in reasons.items() if why})


def _check_methods(request: Request, cells: Iterable[Cell]) -> None:
    """Refuse settings that name a block or a step that does not exist, and programs that nobody trusts."""
    wanted = {(cell.method, cell.nfe) for cell in cells}
    chains = {method: registry.build_method(method) for method, _ in wanted}
    for method in sorted(method for method, chain in chains.items() if isinstance(chain.solver, Outside)):
        if not request.trust_remote_code:
            raise UserError(f"'{method}' runs somebody's program; if you trust it: --trust-remote-code")
        if "latency" in request.measure:
            raise UserError(f"'{method}' runs as a program of its own and cannot be timed; leave out --measure latency")
    inside = any({"network", "blocks", "split"} & chain.requires for chain in chains.values())
    facts = request.suite.model
    depth = registry.build_model(facts.loader, facts.options).depth() if inside else 0
    for method, nfe in sorted(wanted):
        for part in chains[method].parts:
            part.check(nfe, depth)


def _nfe(request: Request, method: str, budget: int, guidance: float) -> int:
    """A budget in evaluations of the field."""
    if request.budget_unit == "nfe":
        return budget
    return sampling.nfe_of(request.suite, method, request.budget_unit, budget, guidance)


def _why_unavailable(metric: Metric[Any]) -> str:
    """Why a metric's features cannot be had on this machine; empty when they can."""
    return "; ".join(why for part in metric.needs if (why := registry.get("extractor", part).missing()))


def unique(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values without repeats, order kept."""
    return tuple(dict.fromkeys(values))
