"""The ledger of network evaluations: every count is per output sample, whatever the batching.

nfe       distinct (x, t) at which the (guided) field was evaluated
evals     network rows by role: guidance costs 2, a plain call 1; a cached or partial call is a row as well
depth     longest chain of dependent calls
cost      denoiser work in units of one unguided full forward of the base model: forwards of every role, each with the
          fraction it really computed, and backward passes; NaN where a fraction cannot be known
flops     floating-point operations of everything in this ledger (a multiply-add is 2), NaN when one was not counted
aux       rows through networks that are no denoiser, by role: `reward`, `decoder`, `text-encoder`. They are part of
          flops, not of cost
backward  backward passes through the field
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from evalbench.errors import BudgetExceeded

Amount: TypeAlias = "float | np.ndarray"  # of each row: one number for all, or one per row


@dataclass
class Ledger:
    """Counts of one batch.

    Args:
        batch: number of output samples.
        budget: evaluations of the field allowed per sample (mean over the batch), or None for no limit.

    Attributes:
        base_flops: operations of one row of a full forward of the base model, NaN until it was counted.
        uncounted: names of operations whose cost the counter does not know; they are why `flops` is NaN.
    """

    batch: int
    budget: float | None = None
    depth: int = 0
    nfe: np.ndarray = field(init=False)
    cost: np.ndarray = field(init=False)
    flops: np.ndarray = field(init=False)
    backward: np.ndarray = field(init=False)
    evals: dict[str, np.ndarray] = field(init=False, default_factory=dict)
    aux: dict[str, np.ndarray] = field(init=False, default_factory=dict)
    base_flops: float = field(init=False, default=float("nan"))
    uncounted: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.nfe, self.cost, self.flops, self.backward = (np.zeros(self.batch) for _ in range(4))

    def add_field(self, rows: np.ndarray | None, count: int) -> None:
        """One evaluation of the field for each of `count` rows; `rows` maps them to samples (None: one each).

        Raises:
            BudgetExceeded: the mean over samples passed the budget.
        """
        self.depth += 1
        self._add(self.nfe, rows, count, 1.0)
        if self.budget is not None and self.nfe.mean() > self.budget:
            raise BudgetExceeded(f"budget {self.budget:g}, spent {self.nfe.mean():g}")

    def add_network(self, role: str, rows: np.ndarray | None, count: int, *, cost: Amount, flops: Amount) -> None:
        """`count` rows through the network of `role`.

        Args:
            role: `base` for the model under test; other denoisers by their own name.
            rows: index of the output sample of each row; None means one row per sample.
            count: number of rows.
            cost: base forwards of each row, a float or (count,). flops: operations of each row, the same.
        """
        self._add(self._of(self.evals, role), rows, count, 1.0)
        self._add(self.cost, rows, count, cost)
        self._add(self.flops, rows, count, flops)

    def add_backward(
        self, rows: np.ndarray | None, count: int, *, cost: Amount = float("nan"), flops: Amount = float("nan")
    ) -> None:
        """A backward pass for each of `count` rows; what it costs is unknown (NaN) unless it is said."""
        self._add(self.backward, rows, count, 1.0)
        self._add(self.cost, rows, count, cost)
        self._add(self.flops, rows, count, flops)

    def add_aux(self, role: str, rows: np.ndarray | None, count: int, *, flops: Amount = float("nan")) -> None:
        """`count` rows through an auxiliary network; its operations are unknown (NaN) unless they are said."""
        self._add(self._of(self.aux, role), rows, count, 1.0)
        self._add(self.flops, rows, count, flops)

    def _of(self, totals: dict[str, np.ndarray], role: str) -> np.ndarray:
        return totals.setdefault(role, np.zeros(self.batch))

    def _add(self, total: np.ndarray, rows: np.ndarray | None, count: int, amount: Amount) -> None:
        if np.ndim(amount) and np.shape(amount) != (count,):
            raise ValueError(f"amounts of shape {np.shape(amount)} for {count} rows")
        if rows is None:
            if count != self.batch:
                raise ValueError(f"{count} rows for a batch of {self.batch}: say with rows= which samples they are for")
            total += amount
        elif len(rows) != count:
            raise ValueError(f"{count} rows, but rows= names {len(rows)} samples")
        else:
            np.add.at(total, rows, amount)
