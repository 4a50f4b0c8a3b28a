"""The caches of diffusers by name: `diffusers-cache:FirstBlockCache(threshold=0.1)`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from evalbench.errors import Unsupported, UserError, line, unknown
from evalbench.interfaces import (
    Artifact,
    Cond,
    Denoiser,
    Edit,
    NetworkWrap,
    Preparation,
    Share,
    Step,
    Time,
    Want,
    Wrap,
    both,
)
from evalbench.registry import register

from ._network import KINDS, probe_time, quiet, restored, run_tiny, tiny

if TYPE_CHECKING:
    import torch
    from torch import nn

# names as people say them, and the classes' configurations in diffusers.hooks
_CONFIGS = {
    "FirstBlockCache": "FirstBlockCacheConfig",
    "TaylorSeer": "TaylorSeerCacheConfig",
    "MagCache": "MagCacheConfig",
    "FasterCache": "FasterCacheConfig",
    "PAB": "PyramidAttentionBroadcastConfig",
    "SeaCache": "SeaCacheConfig",
    "TextKVCache": "TextKVCacheConfig",
}
_APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "MagCacheConfig": "apply_mag_cache",
    "FasterCacheConfig": "apply_faster_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "SeaCacheConfig": "apply_sea_cache",
    "TextKVCacheConfig": "apply_text_kv_cache",
}
_BY_SAMPLE = {"FirstBlockCache", "SeaCache"}  # they decide on what they see: each sample alone, or neighbours count
_CALIBRATED = {"MagCache"}
_SETTINGS = (
    "threshold",
    "cache_interval",
    "disable_cache_before_step",
    "max_order",
    "max_skip_steps",
    "retention_ratio",
    "spatial_attention_block_skip_range",
    "cross_attention_block_skip_range",
    "spatial_attention_timestep_skip_range",
    "cross_attention_timestep_skip_range",
    "cache_identifiers",
)
_NAMES = itertools.count()  # of calls whose pattern nobody can name beforehand
_CALIBRATION_SAMPLES = 8
_PROBES = 6  # calls that a cache is tried with


@register("diffusers-cache:*")
@dataclass(frozen=True)
class DiffusersCache(Wrap):
    """A cache of diffusers by name, as `network.enable_cache(config)` applies it: `diffusers-cache:TaylorSeer`.

    The library's hooks stand in the network for the length of a call, with the state of the branch (conditional or
    not) that the call is for. FirstBlockCache and SeaCache decide by the mean over a batch, which would make a sample
    depend on its neighbours: each sample is run alone here, as in a pipeline that makes one image. FasterCache caches
    attention only: its other half needs both branches of guidance in one call, and here they are two. MagCache's ratios
    belong to a network and a number of steps: they are calibrated in its own mode before sampling, and billed.
    TaylorSeer keeps its factors in the network's dtype, not in bfloat16. Time steps are 1000 times the share of the
    path. Settings have the library's names; None and empty leave its defaults. A network whose blocks the library does
    not know, or on which it fails, is a row with its complaint.

    Attributes:
        target: FirstBlockCache, TaylorSeer, MagCache, FasterCache or PAB.
        threshold, cache_interval, disable_cache_before_step, max_order, max_skip_steps, retention_ratio,
            spatial_attention_block_skip_range, cross_attention_block_skip_range,
            spatial_attention_timestep_skip_range, cross_attention_timestep_skip_range: the library's own settings.
        cache_identifiers: of TaylorSeer, one pattern of names of modules; its own know no DiT and no UNet, but
            `transformer_blocks.*attn1` and `.*transformer_blocks.*attn1` are what it would cache there.
    """

    requires = frozenset({"network"})
    prepares: ClassVar[Literal["", "once", "per-nfe"]] = ""

    target: str
    threshold: float | None = None
    cache_interval: int | None = None
    disable_cache_before_step: int | None = None
    max_order: int | None = None
    max_skip_steps: int | None = None
    retention_ratio: float | None = None
    spatial_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, ...] = ()
    cross_attention_timestep_skip_range: tuple[int, ...] = ()
    cache_identifiers: str = ""

    def __post_init__(self) -> None:
        if self.target not in _CONFIGS:
            raise unknown("diffusers cache", self.target, _CONFIGS)
        known = _fields(self.target)
        for name in self._own():
            if name not in known:
                raise unknown("setting", name, known.intersection(_SETTINGS), where=f"diffusers-cache:{self.target}")
        for name in ("cache_interval", "spatial_attention_block_skip_range", "cross_attention_block_skip_range"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"diffusers-cache:{self.target}: {name} must be at least 1, got {value}")
        if self.target in _CALIBRATED:
            object.__setattr__(self, "prepares", "per-nfe")

    @classmethod
    def members(cls) -> list[tuple[str, str]]:
        """Every cache of the installed diffusers, with the reason it cannot be used, empty when it can."""
        return [(name, _reason(name)) for name in _CONFIGS]

    def prepare(self, context: Preparation) -> Artifact:
        """MagCache's ratios of the chain's solver at the cell's budget, by its own calibration."""
        indices = range(_CALIBRATION_SAMPLES)
        noise, cond = context.noise(indices), context.cond(indices)
        field = context.denoiser(len(indices))
        found: list[list[float]] = []
        settings = {
            "calibrate": True,
            "num_inference_steps": 10**9,
        }  # it prints its ratios where it ends: it never does

        def wrap(inner: Denoiser) -> Denoiser:
            return _Cached(inner, self, settings, lambda states: found.append(_ratios(states)))

        context.solver.sample(field.within(wrap), context.x_T(noise), cond, context.nfe, noise)
        return Artifact(facts={"mag_ratios": max(found, key=len)})

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        extra: dict[str, Any] = {}
        if self.target in _CALIBRATED:
            ratios = self.prepared().facts["mag_ratios"]
            extra = {"mag_ratios": list(ratios), "num_inference_steps": len(ratios)}
        return denoiser.within(lambda inner: _Cached(inner, self, extra))

    def _own(self) -> dict[str, Any]:
        return {name: value for name in _SETTINGS if (value := getattr(self, name)) not in (None, (), "")}

    def config(self, timestep: Callable[[], float], dtype: Any, extra: dict[str, Any]) -> Any:
        """The library's configuration."""
        import diffusers.hooks as hooks

        known = _fields(self.target)
        given = self._own() | extra
        if "cache_identifiers" in given:
            given["cache_identifiers"] = [given["cache_identifiers"]]
        if "current_timestep_callback" in known:
            given["current_timestep_callback"] = timestep
        if "taylor_factors_dtype" in known:
            given["taylor_factors_dtype"] = dtype
        if "is_guidance_distilled" in known:
            given |= {"is_guidance_distilled": True, "tensor_format": "BCHW"}
        if self.target == "PAB" and not {"spatial_attention_block_skip_range", "cross_attention_block_skip_range"} & {
            *given
        }:
            given["spatial_attention_block_skip_range"] = 2  # what it defaults to, with a message
        return getattr(hooks, _CONFIGS[self.target])(**given)


class _Cached(NetworkWrap):
    """The network under a cache's hooks, with one state per branch, and per sample where the cache looks at it.

    Args:
        told: called with the states after each call.
    """

    def __init__(
        self,
        inner: Denoiser,
        cache: DiffusersCache,
        extra: dict[str, Any],
        told: Callable[[list[Any]], None] | None = None,
    ) -> None:
        super().__init__(inner)
        self.cache, self.extra, self.told = cache, extra, told
        self._states: dict[Hashable, list[Any]] = {}
        self._calls: dict[Hashable, int] = {}
        self._last = -1

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
        return self.edited(_unchanged, x, t, cond, want, key="", step=step, rows=rows)

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
        if step is None:
            raise Unsupported(f"not supported: diffusers-cache:{self.cache.target} needs a solver that says its steps")
        if step.i < self._last:  # another trajectory begins
            self._states, self._calls = {}, {}
        self._last = step.i
        rest = {"fraction": fraction, "step": step}
        if self.cache.target not in _BY_SAMPLE:
            return self._once(edit, x, t, cond, want, key, rows, rest)
        import torch

        index = np.arange(len(x)) if rows is None else rows
        out = []
        for i in range(len(x)):
            one = torch.tensor([i], device=x.device)
            own = t[one] if isinstance(t, torch.Tensor) else t
            out.append(self._once(edit, x[one], own, cond.rows(one), want, key, index[i : i + 1], rest))
        return torch.cat(out)

    def _once(
        self,
        edit: Edit,
        x: torch.Tensor,
        t: Time,
        cond: Cond,
        want: Want,
        key: Hashable,
        rows: np.ndarray | None,
        rest: dict[str, Any],
    ) -> torch.Tensor:
        branch = _branch(cond, rows)
        before, after = self._states.get(branch, []), list[Any]()
        call = self._calls.get(branch, 0)
        share = (float(t.flatten()[0]) if hasattr(t, "flatten") else float(t)) / self.path.t_start
        network = self.network

        @contextmanager
        def cached() -> Iterator[None]:
            with restored(network):
                config = self.cache.config(lambda: 1000.0 * share, x.dtype, self.extra)
                states = _applied(network, config)
                states.put(before)
                yield
                after[:] = states.take()

        pattern = next(_NAMES) if self.cache.target in _BY_SAMPLE else (call, share, rest["step"].n, *self._text())
        try:
            out = self.inner.edited(
                both(edit, cached), x, t, cond, want, key=("diffusers-cache", pattern, key), rows=rows, **rest
            )
        except Unsupported:
            raise
        except _COMPLAINTS as error:
            raise Unsupported(
                f"not supported: {self.cache.target} on {type(network).__name__}: {line(error)}"
            ) from error
        self._states[branch], self._calls[branch] = after, call + 1
        if self.told is not None:
            self.told(after)
        return out

    def _text(self) -> tuple[Hashable, ...]:
        return (self.cache.target, *(str(value) for value in {**self.cache._own(), **self.extra}.items()))


_COMPLAINTS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, AssertionError)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def _branch(cond: Cond, rows: np.ndarray | None) -> Hashable:
    """Names the calls that share a state: the same samples under the same conditions."""
    labels = () if cond.labels is None else tuple(cond.labels.tolist())
    return labels, cond.captions, None if rows is None else tuple(int(i) for i in rows)


@dataclass
class _States:
    """The states of a cache's hooks in a network, in the order of its modules.

    Attributes:
        managers: hold states by the name of a context. holders: hooks that hold their state themselves.
    """

    managers: list[Any]
    holders: list[Any]

    def put(self, states: list[Any]) -> None:
        """Continue from states of an earlier call; without any, at the beginning."""
        from diffusers.hooks.hooks import CacheContext

        for manager in self.managers:
            manager.set_context(CacheContext("call"))
        for state, holder in zip(states, [*self.managers, *self.holders], strict=False):
            if holder in self.managers:
                holder._state_cache = {name: _copied(value) for name, value in state.items()}
            else:
                holder.state = _copied(state)

    def take(self) -> list[Any]:
        """What the states are now."""
        return [*(dict(manager._state_cache) for manager in self.managers), *(hook.state for hook in self.holders)]


def _copied(state: Any) -> Any:
    """A state that can go on without changing this one: tensors are shared, nobody writes into them."""
    found = copy.copy(state)
    for name, value in vars(found).items():
        if isinstance(value, dict | list):
            setattr(found, name, copy.copy(value))
    return found


def _applied(network: nn.Module, config: Any) -> _States:
    """Hook a network.

    Raises:
        Unsupported: the library finds nothing to hook.
    """
    import diffusers.hooks as hooks
    from diffusers.hooks.hooks import StateManager

    lacking = f"not supported: needs blocks that {type(config).__name__.removesuffix('Config')} knows"
    nothing = Unsupported(f"{lacking}; {type(network).__name__} has none")
    with quiet():  # as CacheMixin.enable_cache does, which not every network inherits
        try:
            getattr(hooks, _APPLY[type(config).__name__])(network, config)
        except IndexError as error:  # it takes the first of no blocks
            raise nothing from error
    managers: dict[int, Any] = {}
    holders = []
    inside = False  # FasterCache always hooks the network itself, and alone that saves nothing
    for module in network.modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            inside |= module is not network
            found = [value for value in vars(hook).values() if isinstance(value, StateManager)]
            managers |= {id(manager): manager for manager in found}
            if not found and hasattr(hook, "state"):
                holders.append(hook)
    if not inside:
        raise nothing
    return _States(list(managers.values()), holders)


def _ratios(states: list[Any]) -> list[float]:
    """What MagCache's calibration has noted so far."""
    return [float(one) for held in states for state in held.values() for one in state.calibration_ratios]


@lru_cache(maxsize=16)
def _fields(target: str) -> frozenset[str]:
    """Names of a cache's settings; empty where the installed library has no such cache."""
    import dataclasses

    import diffusers.hooks as hooks

    config = getattr(hooks, _CONFIGS[target], None)
    return frozenset() if config is None else frozenset(field.name for field in dataclasses.fields(config))


@lru_cache(maxsize=16)
def _reason(target: str) -> str:
    """Why a cache runs on none of the networks known here; empty when it runs on one."""
    import diffusers.hooks as hooks

    if not hasattr(hooks, _CONFIGS[target]):
        return "not in the installed diffusers"
    complaints = {kind: complaint(target, kind) for kind in KINDS}
    if not all(complaints.values()):
        return ""
    return "; ".join(f"{kind}: {text}" for kind, text in complaints.items())


@lru_cache(maxsize=64)
def complaint(target: str, kind: str) -> str:
    """What goes wrong when a cache is tried on a small network of a class for a few steps; empty when nothing does."""
    network = tiny(kind)
    extra = {"mag_ratios": [1.0] * _PROBES, "num_inference_steps": _PROBES} if target in _CALIBRATED else {}
    states: list[Any] = []
    cache = DiffusersCache(target, threshold=1.0 if target in _BY_SAMPLE else None)  # eager to skip
    plain = _work(network, lambda: [run_tiny(network, i) for i in range(_PROBES)])

    def probe() -> None:
        nonlocal states
        for i in range(_PROBES):
            with restored(network):
                held = _applied(network, cache.config(partial(probe_time, i), None, extra))
                held.put(states)
                run_tiny(network, i)
                states = held.take()

    try:
        with quiet():
            done = _work(network, probe)
    except Unsupported as error:
        return str(error).removeprefix("not supported: ")
    except _COMPLAINTS as error:
        return line(error)
    return "" if done < plain else f"skips nothing in {_PROBES} steps"


def _work(network: nn.Module, call: Callable[[], object]) -> int:
    """How many Linear layers a call runs."""
    from torch.nn import Linear

    ran: list[int] = []
    handles = [
        module.register_forward_hook(lambda *_: ran.append(1))
        for module in network.modules()
        if isinstance(module, Linear)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return len(ran)
