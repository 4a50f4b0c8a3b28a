"""What a method, a metric, a feature extractor and a model must offer. Third parties subclass these and `@register`.

Shapes: B samples, `*S` the shape of one sample, usually (C, H, W) or (F, C, H, W); analytic models may use (D,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource
    from evalbench.paths import Path

# What a network predicts and what a solver may ask for:
#   x0        the clean sample            eps   the noise n in x = alpha x0 + sigma n
#   v         alpha eps - sigma x0 (Salimans & Ho 2022)
#   velocity  dx/dt of the probability flow, alpha' x0 + sigma' eps
#   score     -eps / sigma
Want: TypeAlias = Literal["x0", "eps", "v", "velocity", "score"]
Time: TypeAlias = "float | torch.Tensor"  # one time for all rows, or one per row (B,)


class Registered:
    """Base of everything the registry holds. The registry fills `name`."""

    kind: ClassVar[str]
    name: ClassVar[str] = ""
    version: ClassVar[int] = 1  # raise it when the numbers of a part change; it is part of every cell's id

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring, for `evalbench list`."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def missing(cls) -> str:
        """Why this part cannot run on this machine, with the line to type; empty when it can."""
        return ""


@dataclass(frozen=True)
class Cond:
    """Conditions of a batch.

    Attributes:
        labels: int64 (B,), -1 is the null label; None for an unconditional model.
        captions: one text per sample, for text-image scores and text-conditional models; None without texts.
    """

    labels: torch.Tensor | None = None
    captions: tuple[str, ...] | None = None

    def null(self) -> Cond:
        """The unconditional branch of guidance: all labels -1, all captions empty."""
        labels = None if self.labels is None else self.labels.new_full(self.labels.shape, -1)
        captions = None if self.captions is None else ("",) * len(self.captions)
        return Cond(labels, captions)


@dataclass(frozen=True)
class Step:
    """Where a call stands in the trajectory; wraps read it (caches know key steps, stitches know progress).

    Attributes:
        i: index of the solver's step, 0..n-1.
        n: number of steps.
        t: time the step starts from. t_next: time it goes to.
        x_T: the state sampling started from, (B, *S).
    """

    i: int
    n: int
    t: float
    t_next: float
    x_T: torch.Tensor | None = field(default=None, repr=False)


class Denoiser(ABC):
    """A network on a noise path: the one door through which methods evaluate it.

    Attributes:
        path: the noise path, with start and end.
        grid: the time grid that the suite names; solvers whose own `grid` is empty use it.
        shape: shape of one sample.
        provides: capabilities besides plain calls, such as `labels`, `split`, `gradient`.
    """

    path: Path
    grid: str
    shape: tuple[int, ...]
    provides: frozenset[str]

    @abstractmethod
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
        """Evaluate at (x, t).

        Args:
            x: states, (B, *S).
            t: a time in (0, t_start], or one per row.
            cond: conditions, one per row.
            want: what to return; conversions from the network's own prediction are exact and linear.
            step: where the trajectory stands; None outside a step loop.
            rows: index of the output sample each row is for; None means row i is for sample i.

        Returns:
            The prediction, (B, *S), dtype of x.
        """


class DenoiserWrap(Denoiser):
    """A denoiser around another; subclasses override `__call__` and inherit the rest."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.path, self.grid, self.shape, self.provides = inner.path, inner.grid, inner.shape, inner.provides


class Method(Registered):
    """How samples are made: a solver, or a wrap around the network. Settings are typed dataclass fields.

    Attributes:
        requires: capabilities the denoiser must provide; a pair that lacks one is a row `not supported`.
    """

    kind: ClassVar[str] = "method"
    requires: ClassVar[frozenset[str]] = frozenset()


class Solver(Method, ABC):
    """Turns noise into samples with at most `nfe` evaluations of the field."""

    @abstractmethod
    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        """Samples from x_T.

        Args:
            denoiser: evaluate the network only through it.
            x_T: start states at `denoiser.path.t_start`, (B, *S).
            cond: conditions of the batch.
            nfe: budget of field evaluations per sample, >= 1.
            noise: the only source of randomness.

        Returns:
            Samples at the end of the path, (B, *S), dtype of x_T.

        Raises:
            Unsupported: the method cannot run at this budget; the message says which it can.
        """


class Wrap(Method, ABC):
    """Changes how the network is evaluated: guidance, cache, quantisation, early exit, stitching."""

    guides: ClassVar[bool] = False  # True: it replaces the suite's default guidance

    @abstractmethod
    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that the next wrap, or the solver, sees."""


class Model(Registered, ABC):
    """A network, or an exact model, with its native prediction. Options are typed dataclass fields.

    Building one is cheap and checks its options; weights are loaded by `to`.

    Attributes:
        native: what `predict` returns.
        shape: shape of one sample. num_classes: 0 for an unconditional model.
        is_image: samples live in [-1, 1] and become uint8 images.
        provides: capabilities for methods (`labels` when a null label exists).
    """

    kind: ClassVar[str] = "model"
    native: ClassVar[Want] = "x0"
    is_image: ClassVar[bool] = False
    shape: tuple[int, ...]
    num_classes: int = 0
    provides: frozenset[str] = frozenset()

    @property
    def path(self) -> Path | None:
        """The path the network was trained on; None when any path will do (exact models)."""
        return None

    @abstractmethod
    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        """The native prediction at state x, (B, *S); alpha, sigma belong to t; labels int64 (B,), -1 null."""

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the weights, in `dtype` on `device`; called once before `predict`."""
        raise NotImplementedError

    def caption(self, label: int) -> str:
        """The text that describes a class, for text-image scores."""
        raise NotImplementedError(f"model '{self.name}' has no captions")

    def reference(self, key: str) -> Mapping[str, np.ndarray]:
        """Exact reference of the model itself for a feature (`identity`): mean (D,), cov (D, D), draws (N, D)."""
        raise NotImplementedError(f"model '{self.name}' has no exact reference '{key}'")


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples, as extractors see them.

    Attributes:
        x: samples as the solver returned them, (B, *S).
        images: uint8 (B, C, H, W), by the one rounding rule; None when the model makes no images.
        cond: conditions, one per sample. model: the model that made them, for exact class posteriors and the like.
    """

    x: torch.Tensor
    images: torch.Tensor | None
    cond: Cond
    model: Model


class Extractor(Registered, ABC):
    """Turns finished samples into one array per sample: features (B, D), or a score (B,). Pure, batch-independent.

    Attributes:
        needs: `x`, `images`, `labels`, `captions`: what it reads.
    """

    kind: ClassVar[str] = "extractor"
    needs: ClassVar[tuple[str, ...]] = ("images",)

    @abstractmethod
    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        """(B, ...) features or scores."""

    @classmethod
    def fingerprint(cls) -> str:
        """What makes its numbers comparable: weights digest and recipe; part of the protocol. Loads no network."""
        return f"{cls.name}/{cls.version}"


@dataclass(frozen=True)
class Value:
    """A measured number with its interval.

    Attributes:
        value: the plug-in value at this n. se: its standard error; None when the metric has none.
        low, high: 95 % interval; None without se.
        n: samples it was computed from. bias: estimated finite-sample bias; None when unbiased or unknown.
        note: a caveat that must be printed beside the number, such as `bias-dominated`.
    """

    value: float
    n: int
    se: float | None = None
    low: float | None = None
    high: float | None = None
    bias: float | None = None
    note: str = ""


Parts: TypeAlias = Mapping[str, np.ndarray]  # extractor name -> array with one row per sample
S = TypeVar("S")


class Metric(Registered, ABC, Generic[S]):
    """A metric as pure functions: `update(chunk) -> state`, `merge(a, b)`, `compute(state)`. One id, one protocol.

    Built from its id `name@arg`, such as `fd@fashion64`. `merge` is associative and is called in chunk order.

    Attributes:
        needs: extractor names whose arrays `update` reads.
        paired: `update` also gets the same samples of the suite's fine reference, as `paired:NAME`.
        reference_key: which of the suite's references `compute` gets; empty for none.
        higher_is_better, unit: facts for reports.
    """

    kind: ClassVar[str] = "metric"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    paired: ClassVar[bool] = False

    def __init__(self, arg: str) -> None:
        self.arg = arg

    @property
    def id(self) -> str:
        """The protocol in the name: `fd@fashion64`."""
        return f"{self.name}@{self.arg}" if self.arg else self.name

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]: ...

    @property
    def reference_key(self) -> str:
        return ""

    @abstractmethod
    def update(self, parts: Parts) -> S:
        """State of one chunk."""

    @abstractmethod
    def merge(self, a: S, b: S) -> S:
        """State of two chunks, a before b."""

    @abstractmethod
    def compute(self, state: S, reference: Parts | None, *, allow_small_n: bool = False) -> Value:
        """The value with its interval.

        Raises:
            UserError: too few samples for the statistic (unless allow_small_n).
        """
