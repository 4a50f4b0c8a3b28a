"""The ledger of network evaluations: every count is per output sample, whatever the batching.

nfe    distinct (x, t) at which the (guided) field was evaluated
evals  network rows by role: guidance costs 2, a plain call 1
depth  longest chain of dependent calls
cost   evaluations in units of one unguided forward of the base model (a cached call counts its fraction)
flops  floating-point operations of all rows (a multiply-add is 2), NaN when an operation could not be counted
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from evalbench.errors import BudgetExceeded


@dataclass
class Ledger:
    """Counts of one batch.

    Args:
        batch: number of output samples.
        budget: evaluations of the field allowed per sample (mean over the batch), or None for no limit.
    """

    batch: int
    budget: float | None = None
    depth: int = 0
    nfe: np.ndarray = field(init=False)
    cost: np.ndarray = field(init=False)
    flops: np.ndarray = field(init=False)
    evals: dict[str, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.nfe, self.cost, self.flops = (np.zeros(self.batch) for _ in range(3))

    def add_field(self, rows: np.ndarray | None, count: int) -> None:
        """One evaluation of the field for each of `count` rows; `rows` maps them to samples (None: one each).

        Raises:
            BudgetExceeded: the mean over samples passed the budget.
        """
        self.depth += 1
        self._add(self.nfe, rows, count, 1.0)
        if self.budget is not None and self.nfe.mean() > self.budget:
            raise BudgetExceeded(f"budget {self.budget:g}, spent {self.nfe.mean():g}")

    def add_network(self, role: str, rows: np.ndarray | None, count: int, *, cost: float, flops: float) -> None:
        """`count` rows through the network of `role`, each costing `cost` base forwards and `flops` operations."""
        evals = self.evals.setdefault(role, np.zeros(self.batch))
        self._add(evals, rows, count, 1.0)
        self._add(self.cost, rows, count, cost)
        self._add(self.flops, rows, count, flops)

    def _add(self, total: np.ndarray, rows: np.ndarray | None, count: int, amount: float) -> None:
        if rows is not None:
            np.add.at(total, rows, amount)
        elif count == self.batch:
            total += amount
        else:
            raise ValueError(f"{count} rows for a batch of {self.batch}: say with rows= which samples they are for")
