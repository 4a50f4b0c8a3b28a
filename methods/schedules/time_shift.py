"""Time-Shift Sampler, "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps".

With v = Var(x), the variance of one sample's state over all its elements, the time that fits a state is

    t_s = argmin over tau in a window of (v - sigma^2(tau))^2,    sigma^2(tau) = 1 - alpha-bar(tau), tau = 1 .. 1000

which neglects alpha-bar Var(x0) and so means something at high noise only: below a cut-off t_c nothing is shifted, nor
is the first step. The released code holds four realisations of this, of which two are here (methods-a, entry 39):

    1  DDPM, DDIM, S-PNDM, F-PNDM: window around the next nominal time, v of the state before the step; t_s replaces
       the target of the transfer, and the network is next called at the nominal time. Here.
    2  ADM: window around the current time's index; the found index less one step is the target, in a reversed
       alpha-bar table that stands in for 1 - alpha-bar. Not here.
    3  DEIS: the network is called with t_s, the solver's coefficients stay nominal; the window reaches w to either
       side, not w / 2. Here; for DDIM it is the paper's algorithm.
    4  DPM-Solver: v of the last network output; t_s is the target and the next network time. Not here.

Two traps when a published number is compared: the released "S steps" are S - 1 updates, and its F-PNDM spends 4
evaluations in each of the first three, so "10 steps" are 18 evaluations (`pndm` at nfe = 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from evalbench.engine import Plan, PlannedSolver, check_choice
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Claim, Cond, Denoiser, DenoiserWrap, Modifier, Solver, Step, Time, Want
from evalbench.paths import Path, VPDiscrete, VPLinear
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

Coefficient: TypeAlias = "float | torch.Tensor"
_TABLE = 1000  # times of the table, and the unit of w and t_c
_SOURCE = "Time-Shift Sampler; methods-a entry 39"
CLAIM = (
    Claim(
        text="DDIM with the network called at shifted times has a lower Frechet distance at 10 steps.",
        suite="fashion-mixture",
        arm="ddim+time-shift",
        baseline="ddim",
        nfe=10,
        metric="fd@fashion64",
        direction="lower",
        effect=0.18,
        level="E",
        author="paper",
        transfer="fair",
        source=f"{_SOURCE}: TS-DDIM below DDIM at 10 steps; the size is that of our mixture in 3072 dimensions",
        witness="tests/methods/test_time_shift.py",
    ),
    Claim(
        text="DDIM with shifted targets, as released, has a higher Frechet distance at 10 steps on an exact score.",
        suite="fashion-mixture",
        arm="ddim+time-shift(realisation=1)",
        baseline="ddim",
        nfe=10,
        metric="fd@fashion64",
        direction="higher",
        effect=0.6,
        level="E",
        author="catalogue",
        transfer="weak",
        source=f"{_SOURCE} and section 7: +4.6 of 7.73 on a mixture in 3072 dimensions",
        witness="tests/methods/test_time_shift.py",
    ),
)


@register("time-shift")
@dataclass(frozen=True)
class TimeShift(Modifier):
    """Time-Shift Sampler: times chosen per sample by the variance of its state (two of four released realisations).

    No evaluation more than the solver inside. `realisation=3` (any solver): the network is asked for eps at t_s, which
    counts as its answer at the nominal time; all else is the solver's own. `realisation=1` (planned solvers with one
    evaluation per step, of which the first step may have more): step i goes to t_s instead of the next time, with the
    coefficients that the solver has for that target, and the network is called at the nominal time all the same. The
    cut-off is compared with the time that would be replaced. The last step's target is the end of the path and is
    never replaced; a target lies between its step's start and the end of the path. Added noise keeps its numbers.

    The table is that of the path where alpha^2 + sigma^2 = 1, tau = 1000 t. Other paths are read as the VP-linear path
    (beta 0.1 to 20) at the same sigma / alpha: x / sqrt(alpha^2 + sigma^2) is its state, also where a state changes its
    time, so that a solver that does not see the path's scale (`ddim`) gives the same samples on every path.
    v divides by the number of elements less one; with few elements it is too noisy to say anything. On an exact score
    the sign of the effect is that of the neglected term: network times help a little where Var(x0) is well below 1,
    and harm where it is above. Settings in the authors' README: F-PNDM w=5 t_c=550, DEIS (5 steps) w=10 t_c=900; the
    defaults are those of the catalogue's check.

    Attributes:
        realisation: 1 or 3, see above.
        w: width of the window in table times, at least 1: w / 2 to either side (1), or w (3).
        t_c: cut-off in table times, 0..1000; times at or below it are never replaced.
    """

    realisation: Literal[1, 3] = 3
    w: int = 40
    t_c: int = 300

    def __post_init__(self) -> None:
        check_choice("time-shift", "realisation", self.realisation, (1, 3))
        if self.w < 1 or not 0 <= self.t_c <= _TABLE:
            raise UserError(f"time-shift: needs w >= 1 and t_c in 0..{_TABLE}, got w={self.w}, t_c={self.t_c}")

    def modify(self, solver: Solver) -> Solver:
        return ShiftedTargets(solver, self) if self.realisation == 1 else ShiftedNetwork(solver, self)


class Table:
    """Table times tau = 1 .. 1000 of a path with their sigma^2, and times of the path in units of tau."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.preserves = isinstance(path, VPLinear | VPDiscrete)
        self._vp = path if self.preserves else VPLinear()
        self._tau = np.arange(1, _TABLE + 1)
        self._variance = self._vp.sigma(self._tau / _TABLE) ** 2

    def tau(self, t: Any) -> Any:
        """Times of the path, in units of tau."""
        return _TABLE * (t if self.preserves else self._vp.t_of_lambda(self.path.lam(t)))

    def time(self, tau: Any) -> Any:
        """The inverse of `tau`."""
        return tau / _TABLE if self.preserves else self.path.t_of_lambda(self._vp.lam(tau / _TABLE))

    def scale(self, t: Any) -> Any:
        """sqrt(alpha^2 + sigma^2): x over it is the state of the variance preserving path."""
        return 1.0 if self.preserves else np.sqrt(self.path.alpha(t) ** 2 + self.path.sigma(t) ** 2)

    def nearest(self, v: np.ndarray, t: np.ndarray, reach: int, low: float, high: float) -> np.ndarray:
        """The path's times whose sigma^2 is nearest to v, (B,), at most `reach` table times from round(tau(t)).

        Times are kept strictly between `low` and `high`, and at `t` itself where no table time lies there.
        """
        distance = (v[:, None] - self._variance) ** 2  # (B, 1000)
        outside = np.abs(self._tau - np.rint(self.tau(t))[:, None]) > reach
        times = self.time(self._tau)
        outside |= (times <= low) | (times >= high)
        best = times[np.where(outside, np.inf, distance).argmin(1)]
        return np.where(outside.all(1), t, best)


def variance(x: torch.Tensor, scale: Any) -> np.ndarray:
    """Variance over the elements of each state, (B,), at the scale of the variance preserving path."""
    v = x.flatten(1).var(1).double().cpu().numpy()
    return np.asarray(v / np.asarray(scale) ** 2)


def column(values: Any, x: torch.Tensor) -> Coefficient:
    """Values per row, (B,), as a tensor that broadcasts over x; a float stays one."""
    return float(values) if np.ndim(values) == 0 else x.new_tensor(values).reshape(-1, *(1,) * (x.ndim - 1))


# --- realisation 3: the network's time -------------------------------------------------------------------------------


class ShiftedNetwork(Solver):
    """A solver whose network is called at shifted times."""

    def __init__(self, solver: Solver, settings: TimeShift) -> None:
        self.solver, self.settings = solver, settings

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        return self.solver.sample(AtShiftedTime(denoiser, self.settings), x_T, cond, nfe, noise)


class AtShiftedTime(DenoiserWrap):
    """A denoiser that is asked at t and answers with its eps at t_s."""

    def __init__(self, inner: Denoiser, settings: TimeShift) -> None:
        super().__init__(inner)
        self.settings, self.table = settings, Table(inner.path)

    def __call__(
        self,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        nominal = _per_row(t, len(x))
        # rint: a time that a grid computed as 300.0000001 is the cut-off, not above it
        active = (np.round(self.table.tau(nominal), 6) > self.settings.t_c) & (nominal < self.path.t_start)
        # rows whose times differ take one way together, so that their bits do not depend on each other
        if want == "probs" or (isinstance(t, float | int) and not active.any()):
            return self.inner(x, t, cond, want, step=step, rows=rows)
        v = variance(x, self.table.scale(nominal))
        # the table may end a little beyond the path; the network is called on the path only
        low, high = np.nextafter(self.path.t_end, 0.0), np.nextafter(self.path.t_start, np.inf)
        t_s = np.where(active, self.table.nearest(v, nominal, self.settings.w, low, high), nominal)
        x_s = x if self.table.preserves else x * column(self.table.scale(t_s) / self.table.scale(nominal), x)
        eps = self.inner(x_s, x.new_tensor(t_s), cond, "eps", step=step, rows=rows)
        return _from_eps(eps, x, self.path, nominal, want)


def _per_row(t: Time, batch: int) -> np.ndarray:
    times = np.asarray(t if isinstance(t, float | int) else t.detach().cpu().double().numpy())
    if times.ndim > 1:
        raise Unsupported("time-shift needs one time per sample, this solver has one per element")
    return np.broadcast_to(times, (batch,))


def _from_eps(eps: torch.Tensor, x: torch.Tensor, path: Path, t: np.ndarray, want: Want) -> torch.Tensor:
    """eps at state x and times t, (B,), as another prediction."""
    if want == "eps":
        return eps
    alpha, sigma = column(path.alpha(t), x), column(path.sigma(t), x)
    if want == "score":
        return -eps / sigma
    x0 = (x - sigma * eps) / alpha
    if want == "x0":
        return x0
    if want == "v":
        return alpha * eps - sigma * x0
    return column(path.d_alpha(t), x) * x0 + column(path.d_sigma(t), x) * eps


# --- realisation 1: the step's target --------------------------------------------------------------------------------


class ShiftedTargets(Solver):
    """A planned solver whose steps go to shifted times while the network stays at the nominal ones."""

    def __init__(self, solver: Solver, settings: TimeShift) -> None:
        self.solver, self.settings = solver, settings
        self._updates: dict[tuple[Path, tuple[float, ...], int, float], Any] = {}

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        path = denoiser.path
        if not isinstance(self.solver, PlannedSolver):
            raise Unsupported(f"time-shift(realisation=1) needs a solver that is a plan; {_INSTEAD}")
        steps = _steps(self.solver.plan_for(path, denoiser.grid, nfe), self.solver.name)
        times = (*(ops[0].t for ops in steps), steps[-1][0].t_next)
        table = Table(path)
        states: dict[int, torch.Tensor] = {0: x_T}
        evals: dict[int, torch.Tensor] = {}
        newest = 0
        for i, ops in enumerate(steps):
            before = states[newest]
            for op in ops:
                if hasattr(op, "want"):
                    step = Step(i, len(steps), op.t, op.t_next, x_T)
                    evals[op.out] = denoiser(states[op.state], op.t, cond, op.want, step=step)
                    continue
                targets = self._targets(table, before, times, i)
                rows = self._rows(path, times, i, op, targets)
                x = _combine(op, rows, states, evals, path, noise)
                if not table.preserves and len(ops) == 2:
                    # what the network takes for a state at the nominal time is at that time's scale
                    x = x * column(table.scale(times[i + 1]) / table.scale(targets), x)
                states[op.out], newest = x, op.out
        return states[newest]

    def _targets(self, table: Table, x: torch.Tensor, times: Sequence[float], i: int) -> np.ndarray:
        """Where step i goes, one time per row, (B,)."""
        nominal = np.full(len(x), times[i + 1])
        if i in (0, len(times) - 2) or round(table.tau(times[i + 1]), 6) <= self.settings.t_c:
            return nominal
        v = variance(x, table.scale(times[i]))
        return table.nearest(v, nominal, self.settings.w // 2, low=times[-1], high=times[i])

    def _rows(self, path: Path, times: tuple[float, ...], i: int, op: Any, targets: np.ndarray) -> list[Any]:
        """The update of step i, one per row, with the coefficients for the row's target."""
        found = {times[i + 1]: op}
        for target in sorted(set(targets.tolist()) - set(found)):
            found[target] = self._update(path, times, i, target)
        return [found[target] for target in targets.tolist()]

    def _update(self, path: Path, times: tuple[float, ...], i: int, target: float) -> Any:
        """Step i of the solver's plan over times of which the (i + 1)-th is `target`.

        What follows only has to fall and to be as many, for solvers that lower their order near the end.
        """
        key = (path, times, i, target)
        if key not in self._updates:
            assert isinstance(self.solver, PlannedSolver)
            rest = np.linspace(target, times[-1], len(times) - 1 - i).tolist()
            plan = self.solver.plan(path, (*times[: i + 1], target, *rest[1:]))
            self._updates[key] = _steps(plan, self.solver.name)[i][-1]
        return self._updates[key]


_INSTEAD = "use time-shift(realisation=3), which takes any solver"


def _steps(plan: Plan, name: str) -> list[list[Any]]:
    """The operations of each step.

    Raises:
        Unsupported: a step after the first is more than one evaluation and the update that uses it.
    """
    steps: list[list[Any]] = []
    operations: list[Any] = list(plan.ops)
    for op in operations:
        if hasattr(op, "want") and op.step == len(steps):
            steps.append([])
        steps[-1].append(op)
    newest = [ops[-1].out for ops in steps]
    plain = all(
        len(ops) == 2 and hasattr(ops[0], "want") and ops[0].state == before
        for before, ops in zip(newest, steps[1:], strict=False)
    )
    alternate = all(not hasattr(ops[-1], "want") for ops in steps)
    if not (plain and alternate and newest[-1] == plan.result):
        raise Unsupported(
            f"time-shift(realisation=1) needs one evaluation and one update per step, '{name}' has more; {_INSTEAD}"
        )
    return steps


def _combine(
    nominal: Any,
    rows: Sequence[Any],
    states: dict[int, torch.Tensor],
    evals: dict[int, torch.Tensor],
    path: Path,
    noise: NoiseSource,
) -> torch.Tensor:
    """An update with coefficients of its own for each row."""
    total: Any = 0.0
    for known, name in ((states, "states"), (evals, "evals")):
        for handle in sorted({handle for row in rows for handle, _ in getattr(row, name)}):
            weights = [dict(getattr(row, name)).get(handle, 0.0) for row in rows]
            total = total + known[handle] * column(weights, known[handle])
    added = nominal.noise
    if added is None:
        return total  # type: ignore[no-any-return]
    if added.use:
        unit = noise.normal(added.use, added.step)
    else:
        unit = noise.increment(path.fraction(added.t_from), path.fraction(added.t_to))
    return total + column([row.noise.scale if row.noise else 0.0 for row in rows], unit) * unit  # type: ignore[no-any-return]
