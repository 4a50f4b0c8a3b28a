"""DPM-Solver-v3, Zheng, Lu, Chen & Zhu 2023 (arXiv 2310.13268).

With y = x / alpha the flow is dy/dlambda = -l y - f, f = (sigma eps - l x) / alpha, for any l(lambda). Three empirical
model statistics, one number per dimension and lambda, leave as little to extrapolate as a linear choice can:

    l = E[diag(sigma d eps / dx)]                       f is what is not linear in x
    s, b: least squares of f1 ~ s f + b over samples    g = e^-S (f - ...) is what is not linear in f

where f1 = df / dlambda along the flow. With L, S the integrals of l, s from lambda_s, and B that of e^-S b,

    g(lambda) = e^-S f - B
    x_t = alpha_t e^-L_t (x_s / alpha_s - sum_k g^(k)(lambda_s) E_k - int e^(L + S) B dlambda)
    E_k = int e^(L + S) (lambda - lambda_s)^k / k! dlambda

The derivatives g^(k) come from earlier nodes. Integrals are trapezoids over the nodes of the statistics, and sampling
times are nodes: all as in the authors' code (github.com/thu-ml/DPM-Solver-v3), which has no code for the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from evalbench.engine import check_choice, check_grid, derivative_weights, multistep_order
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Claim, Cond, Denoiser, Preparation, Solver, Step
from evalbench.paths import Path, grid
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_SOURCE = "Zheng et al. 2023, arXiv 2310.13268; methods-b section A item 5"
_PREPARES = (0, 1, 2)
_WITNESS = "tests/methods/test_dpm_solver_v3.py"


def _gain(nfe: int, ours: float, theirs: float) -> Claim:
    return Claim(
        text=f"At {nfe} evaluations DPM-Solver-v3 of order 3 ends nearer to the flow's end than DPM-Solver++(2M).",
        suite="gmm-smooth",
        arm="dpm-solver-v3",
        baseline="dpm-solver++(order=2)",
        nfe=nfe,
        metric="paired-median@identity",
        direction="lower",
        effect=round(1.0 - ours / theirs, 2),
        level="E",
        author="catalogue",
        transfer="fair",
        source=f"{_SOURCE}: median {ours} against {theirs}",
        prepare_seeds=_PREPARES,
        witness=_WITNESS,
    )


CLAIM = (
    _gain(5, 0.047, 0.11),
    _gain(8, 0.019, 0.044),
    _gain(10, 0.011, 0.033),
    Claim(
        text="The gain is that of the statistics: with l = 1, s = b = 0 the same solver ends farther away (size ours).",
        suite="gmm-smooth",
        arm="dpm-solver-v3(degenerate=true)",
        baseline="dpm-solver-v3",
        nfe=8,
        metric="paired-median@identity",
        direction="higher",
        effect=0.5,
        level="M",
        author="catalogue",
        transfer="fair",
        source=f"{_SOURCE}: with l=1, s=0, b=0 the gain vanishes",
        prepare_seeds=_PREPARES,
        witness=_WITNESS,
    ),
)

_ELEMENTS = 2**18  # numbers per call in `prepare`: bounds its memory, changes no result beyond rounding
_CONSTANT = 1e-8  # f with less variance than this share of its square is constant: no slope can be fitted


@register("dpm-solver-v3")
@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """DPM-Solver-v3 (Zheng et al. 2023): exponential integrator in the parameterisation the model's statistics choose.

    Order 1 to 3, multistep, one evaluation per step. `prepare` estimates l, s, b once for all budgets: per node and
    sample two evaluations and two derivatives (forward mode), on draws of the forward process; they belong to the
    model, the path, its start and end, and the guidance. The corrector repeats the last step with the evaluation at its
    end as a node and costs nothing; the evaluation is kept as f. The last step has none. A step to t = 0 is first
    order with f constant.

    It is not `dpm-solver++`, to which it falls with l = 1, s = b = 0 (`degenerate=true`: order 2 is that of
    `solver_type="heun"`, order 3 that of `d2="taylor"`, up to the trapezoids); l = b = 0, s = -1 would be `dpm-solver`.
    The authors advise order 3 for unconditional models and order 2 with `corrector_pseudo` for guided ones, and no
    corrector at many steps.

    Attributes:
        order: 1, 2 or 3.
        pseudo: the k-th derivative of the predictor is a divided difference over the k + 1 newest nodes, not that of
            the polynomial through all nodes.
        corrector: `off`, `full`, or `half` for a part of the trajectory, see `variant`.
        corrector_pseudo: the corrector takes one more node than the predictor, and divided differences.
        variant: which part `half` corrects: `paper` where t <= 0.5, `released` (the code) where t > 0.5, in units of
            the path's t_start.
        lower_order_final: the last steps fall to orders 2, 1.
        nodes: N, intervals of the statistics, uniform in lambda; sampling times are rounded to their ends.
        samples: K, draws that the statistics are means over. seed: of these draws.
        degenerate: l = 1, s = b = 0 in the place of statistics: an ablation, it evaluates nothing in `prepare`.
        grid: time grid before rounding; empty takes the suite's.
    """

    requires = frozenset({"gradient"})
    prepares = "once"

    order: int = 3
    pseudo: bool = False
    corrector: Literal["off", "full", "half"] = "full"
    corrector_pseudo: bool = False
    variant: Literal["paper", "released"] = "paper"
    lower_order_final: bool = True
    nodes: int = 120
    samples: int = 1024
    seed: int = 0
    degenerate: bool = False
    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_choice("dpm-solver-v3", "order", self.order, (1, 2, 3))
        check_choice("dpm-solver-v3", "corrector", self.corrector, ("off", "full", "half"))
        check_choice("dpm-solver-v3", "variant", self.variant, ("paper", "released"))
        if self.nodes < 2 or self.samples < 2 or self.seed < 0:
            raise UserError(
                f"dpm-solver-v3: nodes and samples are at least 2, seed at least 0; got nodes={self.nodes}, "
                f"samples={self.samples}, seed={self.seed}"
            )

    def prepare(self, context: Preparation) -> Artifact:
        shape = (self.nodes + 1, *context.shape)
        if self.degenerate:
            return Artifact({"l": np.ones(shape), "s": np.zeros(shape), "b": np.zeros(shape)})
        lam, times = node_times(context.path, self.nodes)
        moments = _moments(context, lam, times, self.samples, self.seed)
        ell, s, b = statistics_of(lam, *moments)
        facts = {"l at the noise": float(ell[0].mean()), "l at the data": float(ell[-1].mean())}
        return Artifact({"l": ell, "s": s, "b": b}, facts)

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        arrays = self.prepared().arrays
        statistics = Statistics(denoiser.path, arrays["l"], arrays["s"], arrays["b"])
        kind = self.grid or denoiser.grid
        at = statistics.snapped(grid(denoiser.path, kind, nfe))
        times = [statistics.times[i] for i in at] + ([0.0] if denoiser.path.final == "zero" else [])
        x, order = x_T, 0
        history: list[Node] = []
        for i, (t, t_next) in enumerate(pairwise(times)):
            eps = denoiser(x, t, cond, "eps", step=Step(i, nfe, t, t_next, x_T))
            new = Node(at[i], x, statistics.f(at[i], x, eps))
            if history and self._corrects(t, denoiser.path):
                nodes = [history[0], new, *history[1:]][: order + self.corrector_pseudo]
                if len(nodes) > 1:
                    x = statistics.step(nodes, at[i], pseudo=self.corrector_pseudo)
            history = [Node(at[i], x, new.f), *history[:2]]
            if t_next == 0.0:
                return statistics.clean(history[0])
            order = multistep_order(self.order, i, times, lower_order_final=self.lower_order_final)
            x = statistics.step(history[:order], at[i + 1], pseudo=self.pseudo)
        return x

    def _corrects(self, t: float, path: Path) -> bool:
        if self.corrector == "half":
            return (t <= 0.5 * path.t_start) == (self.variant == "paper")
        return self.corrector == "full"


class Node(NamedTuple):
    """A point of the trajectory: its node of the statistics, its state and f there, (B, *S) each."""

    at: int
    x: torch.Tensor
    f: torch.Tensor


class Statistics:
    """l, s, b on the nodes of a path, each (N + 1, *S) float64, and the steps they define.

    Attributes:
        lam: N + 1 values, uniform from t_start to t_end. times: the times there.
    """

    def __init__(self, path: Path, ell: np.ndarray, s: np.ndarray, b: np.ndarray) -> None:
        self.path, self.l, self.s, self.b = path, ell, s, b
        self.lam, self.times = node_times(path, len(ell) - 1)
        self._L, self._S = trapezoids(self.lam, ell), trapezoids(self.lam, s)

    def snapped(self, times: Sequence[float]) -> list[int]:
        """The nearest node of each time above 0.

        Raises:
            Unsupported: two times have one nearest node.
        """
        inner = [t for t in times if t > 0.0]
        where = (self.path.lam(np.asarray(inner)) - self.lam[0]) / (self.lam[-1] - self.lam[0])
        at = [round(u * (len(self.lam) - 1)) for u in where.tolist()]
        if len(set(at)) < len(at):
            raise Unsupported(
                f"dpm-solver-v3: nodes={len(self.lam) - 1} are too few for this grid at {len(times) - 1} steps; "
                f"type nodes={4 * (len(self.lam) - 1)}"
            )
        return at

    def f(self, at: int, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """(sigma eps - l x) / alpha at a node."""
        t = self.times[at]
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        return eps * (sigma / alpha) - x * x.new_tensor(self.l[at] / alpha)

    def clean(self, node: Node) -> torch.Tensor:
        """x0 with f kept: the first-order step to t = 0."""
        alpha = float(self.path.alpha(self.times[node.at]))
        return node.x * node.x.new_tensor((1.0 - self.l[node.at]) / alpha) - node.f

    def step(self, nodes: Sequence[Node], to: int, *, pseudo: bool) -> torch.Tensor:
        """The state at node `to` from that at nodes[0], with g through all nodes (`pseudo`: divided differences)."""
        a, weights, constant = self.coefficients([node.at for node in nodes], to, pseudo=pseudo)
        x = nodes[0].x
        result = x * x.new_tensor(a) + x.new_tensor(constant)
        for node, weight in zip(nodes, weights, strict=True):
            result = result + node.f * x.new_tensor(weight)
        return result

    def coefficients(self, at: Sequence[int], to: int, *, pseudo: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(a, w, c) of x_t = a x_s + sum_j w_j f_j + c: (*S,), (len(at), *S), (*S,)."""
        start, order = at[0], len(at)
        first, last = min(*at, to), max(*at, to)
        lam = self.lam[first : last + 1] - self.lam[start]
        L = self._L[first : last + 1] - self._L[start]
        S = self._S[first : last + 1] - self._S[start]
        B = trapezoids(lam, np.exp(-S) * self.b[first : last + 1])  # from `first` on: its origin cancels
        span = slice(start - first, to - first + 1)

        def integral(values: np.ndarray) -> np.ndarray:
            return trapezoids(lam[span], np.exp(L[span] + S[span]) * values)[-1]  # type: ignore[no-any-return]

        E = [integral(_column(lam[span] ** k / math.factorial(k), L)) for k in range(order)]  # order x (*S,)
        offsets = [float(lam[j - first]) for j in at]
        differences = divided_differences(offsets) if pseudo else derivative_weights(offsets, order)
        g_weights = np.tensordot(differences.T, np.stack(E), 1)  # (order, *S)
        here = [j - first for j in at]
        alpha_s, alpha_t = float(self.path.alpha(self.times[start])), float(self.path.alpha(self.times[to]))
        decay = np.exp(-L[to - first])
        constant = alpha_t * decay * ((g_weights * B[here]).sum(0) - integral(B[span]))
        return alpha_t / alpha_s * decay, -alpha_t * decay * g_weights * np.exp(-S[here]), constant


def divided_differences(offsets: Sequence[float]) -> np.ndarray:
    """Weights (n, n) of k! times the divided difference over the first k + 1 of n offsets: a k-th derivative each."""
    n = len(offsets)
    weights = np.zeros((n, n))
    for k in range(n):
        for j in range(k + 1):
            gaps = [offsets[j] - offsets[m] for m in range(k + 1) if m != j]
            weights[k, j] = math.factorial(k) / math.prod(gaps)
    return weights


@lru_cache(maxsize=8)
def node_times(path: Path, nodes: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """nodes + 1 values of lambda, uniform and rising, and their times, the path's ends exactly."""
    lam = np.linspace(float(path.lam(path.t_start)), float(path.lam(path.t_end)), nodes + 1)
    inner = path.t_of_lambda(lam[1:-1])
    return lam, (float(path.t_start), *(float(t) for t in inner), float(path.t_end))


def trapezoids(lam: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Integral from lam[0] to each lam, of values (n, *S): (n, *S)."""
    steps = _column(np.diff(lam), values) * 0.5 * (values[1:] + values[:-1])
    return np.concatenate([np.zeros_like(values[:1]), np.cumsum(steps, axis=0)])


def _column(per_node: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(n,) as (n, 1, ...) that broadcasts over (n, *S)."""
    return per_node.reshape(-1, *(1,) * (like.ndim - 1))


# --- statistics -----------------------------------------------------------------------------------------------------


def _moments(
    context: Preparation, lam: np.ndarray, times: Sequence[float], samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per node and dimension: l (N + 1, *S), the means (N + 1, 3, *S) and second moments (N + 1, 3, 3, *S) of u.

    u = (e^-lambda eps, e^-lambda d eps / d lambda along the flow, x / alpha), of which f and f1 are linear functions.
    The same draws serve every node, so that the statistics are smooth in lambda.
    """
    import torch

    path = context.path
    data, all_cond = context.data(samples, seed)
    ell = np.zeros((len(lam), *context.shape))
    mean, second = np.zeros((len(lam), 3, *context.shape)), np.zeros((len(lam), 3, 3, *context.shape))
    rows = max(1, _ELEMENTS // math.prod(context.shape))
    for first in range(0, samples, rows):
        indices = torch.arange(first, min(first + rows, samples))
        x_0, cond = data[indices.to(data.device)], all_cond.rows(indices.to(data.device))
        source = context.noise(indices.tolist(), seed)
        n = source.normal("forward")
        v = torch.where(source.uniform("rademacher") < 0.5, -torch.ones_like(n), torch.ones_like(n))
        denoiser = context.denoiser(len(indices))
        for k, t in enumerate(times):
            alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
            x = alpha * x_0 + sigma * n
            eps, Jv = denoiser.jvp(x, t, cond, "eps", v)
            d_log_alpha, d_log_sigma = path.d_alpha(t) / alpha, path.d_sigma(t) / sigma
            dt = 1.0 / float(d_log_alpha - d_log_sigma)  # dt / dlambda
            _, eps1 = denoiser.jvp(x, t, cond, "eps", float(d_log_alpha) * dt * x - sigma * eps, dt)
            u = torch.stack([eps * (sigma / alpha), eps1 * (sigma / alpha), x / alpha]).double()  # (3, B, *S)
            ell[k] += (sigma * v * Jv).double().sum(0).cpu().numpy() / samples
            mean[k] += u.sum(1).cpu().numpy() / samples
            second[k] += torch.einsum("ib...,jb...->ij...", u, u).cpu().numpy() / samples
    return ell, mean, second


def statistics_of(
    lam: np.ndarray, ell: np.ndarray, mean: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(l, s, b), each (N + 1, *S), from the moments of u: s and b are the least-squares line of f1 over f."""
    d_l = np.gradient(ell, lam, axis=0, edge_order=2)
    one, zero = np.ones_like(ell), np.zeros_like(ell)
    f = np.stack([one, zero, -ell], axis=1)  # f = e^-lambda eps - l x / alpha
    f1 = np.stack([ell - one, one, -d_l], axis=1)  # f1 = e^-lambda ((l - 1) eps + eps1) - l' x / alpha
    covariance = second - mean[:, :, None] * mean[:, None, :]
    mean_f, mean_f1 = (f * mean).sum(1), (f1 * mean).sum(1)
    variance = np.einsum("ni...,nij...,nj...->n...", f, covariance, f)
    slope = np.einsum("ni...,nij...,nj...->n...", f, covariance, f1)
    fitted = variance > _CONSTANT * (variance + mean_f**2)
    s = np.where(fitted, slope / np.where(fitted, variance, 1.0), 0.0)
    return ell, s, mean_f1 - s * mean_f
