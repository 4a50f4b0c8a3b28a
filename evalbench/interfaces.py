"""What a method, a metric, a feature extractor and a model must offer. Third parties subclass these and `@register`.

Shapes: B samples, `*S` the shape of one sample, usually (C, H, W) or (F, C, H, W); analytic models may use (D,).
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar

import numpy as np

from evalbench.errors import Unsupported, UserError

if TYPE_CHECKING:
    import pathlib

    import torch

    from evalbench.noise import NoiseSource
    from evalbench.paths import Path

# What a network predicts and what a solver may ask for:
#   x0        the clean sample            eps   the noise n in x = alpha x0 + sigma n
#   v         alpha eps - sigma x0 (Salimans & Ho 2022)
#   velocity  dx/dt of the probability flow, alpha' x0 + sigma' eps
#   score     -eps / sigma
#   probs     probabilities of clean tokens, (B, L, V), for integer states
Want: TypeAlias = Literal["x0", "eps", "v", "velocity", "score", "probs"]
Time: TypeAlias = "float | torch.Tensor"  # one time for all rows, one per row (B,), or one per element (B, *S)

Edit: TypeAlias = Callable[[], AbstractContextManager[None]]  # within the context the network is another one
# what runs instead of a module's forward, which it is given with the call's arguments
Around: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
# a share of a full forward: of all rows, of each, or not known before the call
Share: TypeAlias = "float | np.ndarray | Callable[[], float | np.ndarray]"
Features: TypeAlias = dict[str, Any]  # outputs of modules by their names: tensors, or tuples of tensors
# see `Blocks.leave`
After: TypeAlias = Callable[[int, "torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor] | None"]


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
        measured: y of an inverse problem, (B, *M); None in every other suite.
    """

    labels: torch.Tensor | None = None
    captions: tuple[str, ...] | None = None
    measured: torch.Tensor | None = None

    def null(self) -> Cond:
        """The unconditional branch of guidance: all labels -1, all captions empty."""
        labels = None if self.labels is None else self.labels.new_full(self.labels.shape, -1)
        captions = None if self.captions is None else ("",) * len(self.captions)
        return Cond(labels, captions, self.measured)

    def rows(self, indices: torch.Tensor) -> Cond:
        """The conditions of some rows: int64 indices into the batch, (b,)."""
        captions = None if self.captions is None else tuple(self.captions[i] for i in indices.tolist())
        labels = None if self.labels is None else self.labels[indices]
        return Cond(labels, captions, None if self.measured is None else self.measured[indices])


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
        provides: capabilities besides plain calls, such as `labels`, `split`, `gradient`; `time features`: the network
            computes an embedding of the time, and projections of it in its blocks, from the time alone (a UNet).
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
            t: a time in (0, t_start], one per row, or one per element.
            cond: conditions, one per row.
            want: what to return; conversions from the network's own prediction are exact and linear.
            step: where the trajectory stands; None outside a step loop.
            rows: index of the output sample each row is for; None means row i is for sample i.

        Returns:
            The prediction, (B, *S), dtype of x.
        """

    def gradient(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        *,
        grad_outputs: torch.Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        """d out / d x by a backward pass, which is counted: once per row, with its FLOPs and their cost.

        Evaluate the denoiser on an x that requires a gradient, inside `torch.enable_grad()`; the graph is freed.

        Args:
            out: made from outputs of this denoiser at x; a scalar, or any shape with `grad_outputs`.
            x: where it was evaluated, (B, *S). grad_outputs: as in `torch.autograd.grad`.
            rows: index of the output sample each row is for; None means row i is for sample i.

        Returns:
            The gradient, (B, *S).
        """
        raise Unsupported("not supported: needs gradient")

    def jvp(
        self, x: torch.Tensor, t: float, cond: Cond, want: Want, dx: torch.Tensor, dt: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction at (x, t) and its derivative along (dx, dt), by forward-mode differentiation.

        Counted as an evaluation and, for the derivative, as a backward pass (`backward` counts derivatives of either
        mode). Rows are samples 0..B-1.

        Args:
            x, dx: (B, *S). t, dt: time and its direction. cond, want: as in a call.
        """
        raise Unsupported("not supported: needs gradient")

    def role(self, name: str) -> Denoiser:
        """The same field of another model of the suite (`[roles.NAME]` in its TOML): `small`, `student`, `guide`.

        Guidance and wraps that stand between here and the network stay; rows, FLOPs and cost are counted under its
        role, in units of the base model.

        Raises:
            Unsupported: the suite has no model of that role.
        """
        raise Unsupported(f"not supported: needs role {name}")

    def auxiliary(
        self, role: str, call: Callable[[], torch.Tensor], n: int, *, rows: np.ndarray | None = None
    ) -> torch.Tensor:
        """Run a network that is no denoiser, and count it: n rows under `aux.ROLE`, and its FLOPs.

        Args:
            role: `reward.NAME`, `classifier`. call: runs it on a batch of n rows.
            rows: index of the output sample each row is for; None means row i is for sample i.
        """
        raise Unsupported(f"not supported: needs {role}")

    def reward(self, name: str, x0: torch.Tensor, cond: Cond, *, rows: np.ndarray | None = None) -> torch.Tensor:
        """Reward of clean samples x0, (B, *S), by a name the model knows; (B,), higher is better; each is counted.

        Raises:
            Unsupported: the model has no such reward.
        """
        raise Unsupported(f"not supported: needs reward {name}")

    @property
    def native(self) -> Want:
        """What the network itself predicts: what an edited call's blocks make, whatever is asked for.

        Raises:
            Unsupported: there is no network.
        """
        raise Unsupported("not supported: needs network")

    @property
    def network(self) -> torch.nn.Module:
        """The network itself (capability `network`); change it only within an edit.

        Raises:
            Unsupported: the model has none.
        """
        raise Unsupported("not supported: needs network")

    @property
    def blocks(self) -> Blocks:
        """The network's inside (capability `blocks`).

        Raises:
            Unsupported: the model shows none.
        """
        raise Unsupported("not supported: needs blocks")

    def split(self, at: int | None = None) -> Split:
        """The network in two (capability `split`); `at` as in `Blocks.split`.

        Raises:
            Unsupported: the model cannot be split.
        """
        raise Unsupported("not supported: needs split")

    def edited(
        self,
        edit: Edit,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable,
        fraction: Share | None = None,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Evaluate the network while an edit is in force; only at the network, beneath guidance (see `NetworkWrap`).

        Args:
            edit: entered once or twice: the call may be repeated to count its FLOPs.
            key: names the way it runs, settings included, among all edits of all methods; its FLOPs are counted once
                per key and call signature.
            fraction: what each row computed, as a share of a full forward: a float, (B,), or a function that says it
                after the call. None: as counted.
            x, t, cond, want, step, rows: as in a call.
        """
        raise Unsupported("not supported: needs network")

    def share(self, edit: Edit, x: torch.Tensor, t: Time, cond: Cond, *, key: Hashable) -> float:
        """What an edited call would compute, as a share of a full forward; counted, not charged. NaN while timed."""
        raise Unsupported("not supported: needs network")

    def within(self, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
        """This denoiser with a wrap at its network: inside guidance and all that stands around it."""
        return wrap(self)

    @property
    def operator(self) -> Operator:
        """The known degradation of an inverse problem.

        Raises:
            Unsupported: the suite is no inverse problem.
        """
        raise Unsupported("not supported: needs operator")

    @property
    def modalities(self) -> Mapping[str, slice]:
        """Where the modalities of a joint model stand in a sample (its first axis), by name, in their order.

        Such a model takes a time per element, 0 for a modality that is given clean.

        Raises:
            Unsupported: the model has one modality only.
        """
        raise Unsupported("not supported: needs modalities")


class DenoiserWrap(Denoiser):
    """A denoiser around another; everything is forwarded, subclasses override what they change."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.path, self.grid, self.shape, self.provides = inner.path, inner.grid, inner.shape, inner.provides

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
        return self.inner(x, t, cond, want, step=step, rows=rows)

    def gradient(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        *,
        grad_outputs: torch.Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        return self.inner.gradient(out, x, grad_outputs=grad_outputs, rows=rows)

    def role(self, name: str) -> Denoiser:
        return self._around(self.inner.role(name))

    def _around(self, inner: Denoiser) -> Self:
        """The same wrap around another denoiser."""
        clone = copy.copy(self)
        clone.inner = inner
        return clone

    def within(self, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
        return self._around(self.inner.within(wrap))

    @property
    def native(self) -> Want:
        return self.inner.native

    @property
    def network(self) -> torch.nn.Module:
        return self.inner.network

    @property
    def blocks(self) -> Blocks:
        return self.inner.blocks

    def split(self, at: int | None = None) -> Split:
        return self.inner.split(at)

    def share(self, edit: Edit, x: torch.Tensor, t: Time, cond: Cond, *, key: Hashable) -> float:
        return self.inner.share(edit, x, t, cond, key=key)

    def auxiliary(
        self, role: str, call: Callable[[], torch.Tensor], n: int, *, rows: np.ndarray | None = None
    ) -> torch.Tensor:
        return self.inner.auxiliary(role, call, n, rows=rows)

    def reward(self, name: str, x0: torch.Tensor, cond: Cond, *, rows: np.ndarray | None = None) -> torch.Tensor:
        return self.inner.reward(name, x0, cond, rows=rows)

    @property
    def operator(self) -> Operator:
        return self.inner.operator

    @property
    def modalities(self) -> Mapping[str, slice]:
        return self.inner.modalities


class NetworkWrap(DenoiserWrap):
    """A wrap that changes what the network computes. It stands at the network, where guidance is two calls of it.

        def wrap(self, denoiser): return denoiser.within(Cached)

    Subclasses say with `edit` what a call is to change; those inside each other add up. One that answers without the
    network, or in a batch of its own, overrides `edited`.
    """

    def edit(self, cond: Cond, step: Step | None, rows: np.ndarray | None) -> tuple[Edit, Hashable] | None:
        """What a call changes, and the name of the way it then runs (see `Denoiser.edited`); None for nothing."""
        return None

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
        found = self.edit(cond, step, rows)
        if found is None:
            return self.inner(x, t, cond, want, step=step, rows=rows)
        return self.inner.edited(found[0], x, t, cond, want, key=found[1], step=step, rows=rows)

    def edited(
        self,
        edit: Edit,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want = "x0",
        *,
        key: Hashable,
        fraction: Share | None = None,
        step: Step | None = None,
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        found = self.edit(cond, step, rows)
        if found is not None:
            edit, key = both(found[0], edit), (found[1], key)
        return self.inner.edited(edit, x, t, cond, want, key=key, fraction=fraction, step=step, rows=rows)

    def within(self, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
        return wrap(self)  # outside those that are there: they see its calls


def both(*edits: Edit) -> Edit:
    """Several edits at once, the first one outermost."""

    @contextmanager
    def edit() -> Iterator[None]:
        with ExitStack() as stack:
            for each in edits:
                stack.enter_context(each())
            yield

    return edit


def block_range(where: str, text: str, n: int | None = None) -> range:
    """`2-5` or `3` as a range of block indices.

    Raises:
        UserError: it says none, or a block that the network, of n blocks, does not have.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
        raise UserError(f"{where}: blocks={text}: write first-last, such as 2-5")
    found = range(int(first), int(last or first) + 1)
    if n is not None and found[-1] >= n:
        raise UserError(f"{where}: block {found[-1]} does not exist: the network has {n}; give blocks in 0..{n - 1}")
    return found


class Blocks(ABC):
    """The inside of a network: its residual bodies by name, and edits that hold for one call.

    A name is a module's path in the network. Edits of one module add up, the later one outside. After an edit, weights
    and outputs are what they were, to the bit.
    """

    @property
    @abstractmethod
    def network(self) -> torch.nn.Module:
        """The network."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The blocks, in the order they run."""

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """The sub-layers of a block whose outputs are added to its stream: attention, feed-forward; may be none."""

    @abstractmethod
    def around(self, functions: Mapping[str, Around]) -> Edit:
        """Run something else instead of modules.

        Raises:
            UserError: there is no such module; all edits say so.
        """

    @abstractmethod
    def read(self, names: Iterable[str], into: MutableMapping[str, Any]) -> Edit:
        """Keep the outputs of modules."""

    @abstractmethod
    def replace(self, outputs: Mapping[str, Any]) -> Edit:
        """Do not run modules; these are their outputs."""

    @abstractmethod
    def bypass(self, names: Iterable[str]) -> Edit:
        """Do not run blocks: their bodies add nothing to what they were given."""

    @abstractmethod
    def gate(self, gates: Mapping[str, float | torch.Tensor]) -> Edit:
        """Scale what the bodies of blocks add, by a number or by a tensor that broadcasts with their outputs."""

    @abstractmethod
    def keep_additions(self, names: Iterable[str], into: MutableMapping[str, Any]) -> Edit:
        """Keep what the bodies of blocks add to what they are given."""

    @abstractmethod
    def add(self, additions: Mapping[str, Any]) -> Edit:
        """Do not run the bodies of blocks: this is what they add."""

    @abstractmethod
    def swap(self, modules: Mapping[str, torch.nn.Module]) -> Edit:
        """Put other modules in the place of modules."""

    def leave(self, after: After) -> Edit:
        """Let rows of a batch leave before the last block (capability `exits`).

        After each block but the last, `after(i, tokens, rows)` sees the tokens (b, N, D) of the rows that are still in,
        and which of the batch they are, int64 (b,). It says which of them leave, bool (b,), with the tokens, one row
        each, that the network's head gets for these; or None where nobody does. A block runs for the rows that are in,
        filled up with a few that are there already, and not at all where none is.

        Raises:
            Unsupported: the blocks do not work on one stream of tokens.
        """
        raise Unsupported("not supported: needs exits")

    def end(self, tokens: torch.Tensor) -> Edit:
        """Run no block: the network's head on these tokens, (B, N, D) (capability `exits`)."""
        raise Unsupported("not supported: needs exits")

    @abstractmethod
    def split(self, at: int | None = None) -> Split:
        """The network in two.

        Args:
            at: number of blocks before the cut, for a transformer; None takes 18 of 28 of them. A UNet is always cut
                before its first up block.
        """


class Split(ABC):
    """A network in two: an encoder, whose features do not change much over time, and a decoder."""

    @abstractmethod
    def keep(self, into: Features) -> Edit:
        """Run all, and keep the encoder's features."""

    @abstractmethod
    def resume(self, features: Mapping[str, Any]) -> Edit:
        """Run the decoder alone from features: the call's state is not read, its time and conditions are."""

    @abstractmethod
    def keep_decoder(self, into: Features) -> Edit:
        """Run all, and keep the decoder's features."""

    @abstractmethod
    def reuse_decoder(self, features: Mapping[str, Any]) -> Edit:
        """Run the encoder, and the head on the decoder's old features."""

    @abstractmethod
    def encode(self, call: Callable[[], object]) -> Features:
        """The features of a call of the network, which ends after the encoder."""


class Operator(ABC):
    """A known linear degradation H of an inverse problem: y = H x0 + noise * n.

    Attributes:
        noise: standard deviation of the measurement noise.
    """

    noise: float

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """H x, (B, *M), differentiable."""

    @abstractmethod
    def pinv(self, y: torch.Tensor) -> torch.Tensor:
        """H^+ y, (B, *S)."""


@dataclass(frozen=True)
class Artifact:
    """What a method's `prepare` made: arrays by name and JSON-able facts. Small enough to travel with every job."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Preparation(ABC):
    """What `prepare` may use. All it evaluates goes on a bill of its own.

    Its noise and its data are never those of the reported samples: `noise` draws from seeds of its own, `data` has a
    split of its own.

    Attributes:
        solver: the solver of the chain, inside the modifiers before the part that prepares.
        path, grid, shape: of the suite. nfe: the cell's budget where the part prepares `per-nfe`, else 0.
    """

    solver: Solver
    path: Path
    grid: str
    shape: tuple[int, ...]
    nfe: int

    @abstractmethod
    def noise(self, indices: Sequence[int], seed: int = 0) -> NoiseSource:
        """Random numbers of search samples `indices`; `seed` is the method's own prepare seed."""

    @abstractmethod
    def rng(self, seed: int = 0) -> np.random.Generator:
        """A generator for everything that is not a sample's noise: mutations, choices."""

    @abstractmethod
    def cond(self, indices: Sequence[int]) -> Cond:
        """Conditions of samples, as in the run."""

    @abstractmethod
    def denoiser(self, batch: int) -> Denoiser:
        """The field as the method will see it (guided, inside the wraps before it), for a batch, without a budget."""

    @abstractmethod
    def x_T(self, noise: NoiseSource) -> torch.Tensor:
        """Start states of a noise source, (B, *S)."""

    @abstractmethod
    def data(self, n: int, seed: int = 0) -> tuple[torch.Tensor, Cond]:
        """n clean samples (n, *S) with their conditions, of the search split.

        Raises:
            Unsupported: the suite's model has no data to draw.
        """

    def features(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Features of samples x, (N, *S), by a network that can be differentiated: (N, D), with x's gradient.

        Args:
            name: `identity`, or a network of images that the preparation knows.

        Raises:
            Unsupported: the suite's samples have no such features.
        """
        raise Unsupported(f"not supported: needs differentiable features {name}")

    @abstractmethod
    def distance(self, x: torch.Tensor) -> float:
        """The metric oracle: Frechet distance of samples x, (n, *S), to the search split of the data.

        In the features of the suite's first Frechet distance; in the samples themselves where it has none.
        """

    @abstractmethod
    def distance_to(self, data: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """The same oracle against other clean samples, (n, *S), such as those of one class."""


class Method(Registered):
    """How samples are made: a solver, or a wrap around the network. Settings are typed dataclass fields.

    Attributes:
        requires: capabilities the denoiser must provide; a pair that lacks one is a row `not supported`.
        prepares: empty, or when `prepare` runs: `once` for all budgets of a cell's settings, or `per-nfe`.
        replaces_layers: layers of the network, or their weights, are others while it runs; two such parts in one chain
            would undo each other and are refused.
        artifact: what `prepare` made; None before.
    """

    kind: ClassVar[str] = "method"
    requires: ClassVar[frozenset[str]] = frozenset()
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = ""
    replaces_layers: ClassVar[bool] = False
    artifact: Artifact | None = None

    def identity(self) -> dict[str, Any]:
        """What a cell's id hashes in place of the settings of these names: of a file its content, not where it lies."""
        return {}

    def prepare(self, context: Preparation) -> Artifact:
        """Search, statistics, calibration or training before sampling; billed apart.

        Called only where `prepares` is not empty; the artefact is kept in the run folder and `equipped` with before
        `sample`, `wrap` or `modify` is called.
        """
        raise NotImplementedError

    def check(self, nfe: int, blocks: int) -> None:
        """Whether its settings fit a cell, before anything runs.

        Args:
            nfe: the cell's budget. blocks: of the suite's network; 0 where the model shows none.

        Raises:
            UserError: a block or a step that does not exist, with those that do.
        """

    def equipped(self, artifact: Artifact | None) -> Self:
        """This method with its artefact."""
        clone = copy.copy(self)
        object.__setattr__(clone, "artifact", artifact)
        return clone

    def prepared(self) -> Artifact:
        """The artefact, for methods that cannot run without one.

        Raises:
            Unsupported: nothing was prepared.
        """
        if self.artifact is None:
            raise Unsupported(f"'{self.name}' has nothing prepared; run it through `evalbench run`")
        return self.artifact


@dataclass(frozen=True)
class Claim:
    """A falsifiable statement about a method, committed before it is run: `CLAIM = Claim(...)` in the method's file.

    A file with several states them as a tuple. Arms are chain texts; both run from the same noise.

    Attributes:
        text: one sentence that could be false.
        suite: where it is judged. arm, baseline: the method claimed to differ, and what it is held against.
        nfe: budget of the arm. baseline_nfe: of the baseline; 0 is the same.
        metric: id of the metric that decides. direction: what the arm's value is claimed to be against the baseline's;
            `equal` means within `effect`.
        effect: size of the claimed difference relative to the baseline's value, above 0: what the power refers to, and
            for `equal` the tolerance.
        seeds: run seeds, at least 5. prepare_seeds: settings such as `seed=1` that an arm with a random prepare is
            repeated with, by the name of its setting.
        samples: N per cell; 0 is the suite's. guidance: scale; 0 is the suite's.
        level: `M` a mechanism, true of any model, or `E` a direction on an embedded suite (design, section 12).
        author: who made it, the paper or our catalogue. transfer: what it says about large models.
        source: paper, and where the catalogue states it.
        witness: the test that is the second witness of the implementation (released output, diffusers, a closed form),
            such as `tests/methods/test_ddim.py`; without one a claim of level E is never "not observed".
    """

    text: str
    suite: str
    arm: str
    baseline: str
    nfe: int
    metric: str
    direction: Literal["lower", "higher", "equal"]
    effect: float
    level: Literal["M", "E"]
    author: Literal["paper", "catalogue"]
    transfer: Literal["fair", "weak", "none"]
    source: str
    baseline_nfe: int = 0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    prepare_seeds: tuple[int, ...] = ()
    samples: int = 0
    guidance: float = 0.0
    witness: str = ""


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


PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
PLACEHOLDERS = frozenset({"noise", "labels", "prompts", "seed", "start", "count", "nfe", "guidance", "out"})


@dataclass(frozen=True)
class Program:
    """Somebody's program that makes the finished images of some samples; see `evalbench.outside`.

    Attributes:
        words: the command and its arguments, run without a shell; `{noise}` and the like are filled in.
        folder: where it runs. env: added to the environment, filled in likewise. timeout: seconds it may take.
        spends: what is declared of each sample, by the names of the counts: `nfe`, and maybe `depth` and `cost`.
    """

    words: tuple[str, ...]
    folder: pathlib.Path
    env: Mapping[str, str]
    timeout: float
    spends: Mapping[str, float]

    @property
    def reads(self) -> frozenset[str]:
        """What it is told: the names of its placeholders."""
        return frozenset(PLACEHOLDER.findall(" ".join((*self.words, *self.env.values()))))


class Outside(Solver):
    """A method that runs as a program of its own, which makes finished images; its counts are declared, not measured.

    Nothing stands around it, and it is not timed. It runs only where the user said `--trust-remote-code`.
    """

    @abstractmethod
    def program(self, nfe: int, guidance: float) -> Program:
        """What runs for a cell.

        Args:
            nfe: the budget. guidance: the scale.

        Raises:
            Unsupported: it declares more than the budget, or another guidance.
        """

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        raise Unsupported(f"not supported: {self.name} makes finished images, no states to go on from")


class Wrap(Method, ABC):
    """Changes how the network is evaluated: guidance, cache, quantisation, early exit, stitching."""

    guides: ClassVar[bool] = False  # True: it replaces the suite's default guidance

    @abstractmethod
    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that the next wrap, or the solver, sees."""


class Modifier(Method, ABC):
    """Changes how any solver walks: its start, its times, its noise, the number of its candidates."""

    @abstractmethod
    def modify(self, solver: Solver) -> Solver:
        """The solver that runs instead; it may call `solver.sample` as often as it likes, with another denoiser,
        start or noise.
        """


class Model(Registered, ABC):
    """A network, or an exact model, with its native prediction. Options are typed dataclass fields.

    Building one is cheap and checks its options; weights are loaded by `to`.

    Attributes:
        native: what `predict` returns.
        shape: shape of one sample. num_classes: 0 for an unconditional model.
        is_image: `decode` makes images in [-1, 1] of samples, which become uint8.
        provides: capabilities for methods (`labels` when a null label exists).
        reads_texts: it is conditioned on captions, not on labels.
    """

    reads_texts: bool = False
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
    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, given: Any) -> torch.Tensor:
        """The native prediction at state x, (B, *S).

        Args:
            t, alpha, sigma: the time and what belongs to it. given: what the method `given` returns; of most models
                labels, int64 (B,), -1 null, or None.
        """

    def given(self, cond: Cond) -> Any:
        """What `predict` takes for a batch's conditions: a tensor, a tuple of tensors, or None.

        Labels, unless a model reads texts. What is encoded here is no part of a forward: it is neither counted among
        its FLOPs nor compiled with it. A text is encoded once and kept.
        """
        return cond.labels

    def check(self) -> None:
        """What can be wrong before a sample is drawn: weights that are missing, or not the suite's.

        Raises:
            UserError: with the file, and what to do.
        """

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Samples as images in [-1, 1], (B, C, H, W), of an image model; latents go through the decoder here."""
        return x

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than what the model's encoders read, so that its end is lost."""
        return False

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what `decode` makes; empty where it is not known before."""
        return self.shape if self.is_image else ()

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the weights, in `dtype` on `device`; called once before `predict`."""
        raise NotImplementedError

    def start(self, noise: NoiseSource, path: Path) -> torch.Tensor:
        """Where sampling starts, (B, *S): the noise at t_start, unless the state is no Gaussian's."""
        return noise.start() * float(path.sigma(path.t_start))

    def data(self, indices: Sequence[int], labels: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Clean samples of the data, (B, *S), in the dtype and on the device of the model.

        A function of (seed, index, label) alone, so that no two parts of a split overlap.
        """
        raise Unsupported(f"not supported: model '{self.name}' has no data to draw")

    def reward(self, name: str, x0: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """A reward of clean samples by name, (B,), higher is better."""
        raise Unsupported(f"not supported: needs reward {name}")

    def depth(self) -> int:
        """Number of blocks of the network, without its weights; 0 for models that show none."""
        return 0

    @property
    def blocks(self) -> Blocks:
        """The inside of the network, for models that provide `network`, `blocks` and `split`."""
        raise Unsupported("not supported: needs blocks")

    @property
    def operator(self) -> Operator:
        """The degradation of an inverse problem."""
        raise Unsupported("not supported: needs operator")

    @property
    def modalities(self) -> Mapping[str, slice]:
        """Where the modalities of a joint model stand in a sample (its first axis), by name, in their order."""
        raise Unsupported("not supported: needs modalities")

    def measure(self, indices: Sequence[int], seed: int) -> torch.Tensor | None:
        """y of an inverse problem for global sample indices, (B, *M); None when the model is none."""
        return None

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
        x: samples as the solver returned them, (B, *S); of a program, which has none, its images in [-1, 1].
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

    @classmethod
    def caveat(cls) -> str:
        """What must stand beside every number made of its features; empty when nothing must."""
        return ""


class ExtractorFamily(Extractor):
    """Extractors that share all but one word, registered as `prefix:*`; `prefix:word` is one of them.

    Attributes:
        target: the word; empty in the family itself.
    """

    target: ClassVar[str] = ""

    @classmethod
    def member(cls, target: str) -> type[ExtractorFamily]:
        """The extractor of a word.

        Raises:
            UserError: there is none.
        """
        return type(cls.__name__, (cls,), {"name": cls.name.replace("*", target), "target": target})

    @classmethod
    def members(cls) -> tuple[str, ...]:
        """Words to list; there may be more."""
        return ()


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
