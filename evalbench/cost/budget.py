"""Published budgets in units other than evaluations of the field: `--budget-unit nfe|evals|steps`.

Papers call different things NFE: evaluations of the guided field (`nfe`, evalbench's own), rows through the network
(`evals`, twice as many under guidance), or steps of the time grid (`steps`; 18 steps of Heun are 35 or 36 evaluations).
A published row is replayed by turning its budget into nfe here, before anything runs; the record holds nfe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from evalbench.errors import Unsupported, UserError, unknown
from evalbench.interfaces import Cond, Denoiser, Solver, Step
from evalbench.paths import Path

if TYPE_CHECKING:
    import torch

BudgetUnit: TypeAlias = Literal["nfe", "evals", "steps"]
BUDGET_UNITS: tuple[BudgetUnit, ...] = get_args(BudgetUnit)
_MOST_PER_STEP = 16  # evaluations of one grid step, in the search for a budget that makes `steps` steps


@runtime_checkable
class _Planned(Protocol):
    """What `engine.PlannedSolver` offers here (the engine stands above this package)."""

    grid: str

    def steps_for(self, path: Path, nfe: int) -> int: ...

    def plan_for(self, path: Path, suite_grid: str, nfe: int) -> Any: ...


def nfe_of_budget(unit: BudgetUnit, budget: int, solver: Solver, path: Path, rows: int | None = 1) -> int:
    """Evaluations of the field that a published budget allows a method.

        nfe     budget
        evals   budget // rows: 20 rows under guidance are 10 evaluations
        steps   the least nfe with which a planned solver makes `budget` steps of its grid

    Where single-step solvers place nodes inside a step (`dpm-solver(algorithm=singlestep)`), every node is a step, as
    in their authors' code.

    Args:
        unit: what is budgeted. budget: at least 1. solver: the chain's. path: the suite's.
        rows: network rows per evaluation, see `rows_per_evaluation`; None where they vary along the trajectory.

    Raises:
        UserError: unknown unit, or a budget below 1.
        Unsupported: the budget does not say how many evaluations this method may spend.
    """
    if unit not in BUDGET_UNITS:
        raise unknown("budget unit", unit, BUDGET_UNITS)
    if budget < 1:
        raise UserError(f"a budget of {budget} {unit}: it is at least 1")
    if unit == "nfe":
        return budget
    return _nfe_of_evals(budget, rows) if unit == "evals" else _nfe_of_steps(budget, solver, path)


def _nfe_of_evals(budget: int, rows: int | None) -> int:
    if rows is None:
        raise Unsupported("budget unit 'evals': rows per evaluation vary along this method's trajectory; say nfe")
    if budget < rows:
        raise Unsupported(f"budget unit 'evals': {budget} rows, but one evaluation takes {rows}")
    return budget // rows


def _nfe_of_steps(steps: int, solver: Solver, path: Path) -> int:
    if not isinstance(solver, _Planned):
        raise Unsupported(f"budget unit 'steps': '{solver.name}' has no plan that says its steps; say nfe")
    for nfe in range(steps, _MOST_PER_STEP * steps + 1):
        made = solver.steps_for(path, nfe)
        if made == steps:
            return nfe
        if made > steps:
            break
    raise Unsupported(f"budget unit 'steps': '{solver.name}' makes no {steps} steps at any budget")


class _Probe(Denoiser):
    """A network that returns zeros and counts its rows."""

    def __init__(self, path: Path, shape: tuple[int, ...], provides: frozenset[str]) -> None:
        self.path, self.grid, self.shape, self.provides = path, "", shape, provides
        self.rows = 0

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.rows += len(x)
        return x.new_zeros(x.shape)


def rows_per_evaluation(wrap: Callable[[Denoiser], Denoiser], door: Denoiser, times: Sequence[float]) -> int | None:
    """Network rows that one evaluation of a wrapped field takes, counted on a network of zeros.

    Args:
        wrap: puts the guidance and the method's wraps around a denoiser. door: the network's; it is not called.
        times: where the trajectory evaluates, falling, without its end.

    Returns:
        The rows where they are the same at all times, else None (guidance in an interval).
    """
    import torch

    probe = _Probe(door.path, door.shape, door.provides)
    field = wrap(probe)
    x, cond = torch.zeros(1, *door.shape), Cond(torch.zeros(1, dtype=torch.int64))
    spent = set()
    for i, t in enumerate(times):
        probe.rows = 0
        t_next = times[i + 1] if i + 1 < len(times) else float(door.path.t_end)
        field(x, t, cond, step=Step(i, len(times), t, t_next, x))
        spent.add(probe.rows)
    return spent.pop() if len(spent) == 1 else None
