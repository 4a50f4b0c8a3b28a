"""The guiders of diffusers by name: `diffusers-guider:AutoGuidance(layers=[2],guidance_scale=2)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evalbench.errors import Unsupported, UserError, line, unknown
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Step, Time, Want, Wrap
from evalbench.registry import register

from ._network import KINDS, quiet, restored, run_tiny, tiny

if TYPE_CHECKING:
    import numpy as np
    import torch

_SETTINGS = (
    "guidance_scale",
    "guidance_rescale",
    "use_original_formulation",
    "start",
    "stop",
    "dropout",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
    "perturbed_guidance_scale",
    "perturbed_guidance_start",
    "perturbed_guidance_stop",
    "seg_guidance_scale",
    "adaptive_projected_guidance_momentum",
    "adaptive_projected_guidance_rescale",
    "eta",
    "alpha",
    "zero_init_steps",
)
_UNUSABLE = {"LTX2Guidance": "guides video and sound together, by predictions that other models do not make"}
_CONFIGS = {"AutoGuidance": "auto_guidance_config", "SkipLayerGuidance": "skip_layer_config"}
_COMPLAINTS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, ImportError)


@register("diffusers-guider:*")
@dataclass(frozen=True)
class DiffusersGuider(Wrap):
    """A guider of diffusers by name, as its modular pipelines run it: `diffusers-guider:ClassifierFreeGuidance`.

    It replaces the suite's guidance. The guider says which predictions it needs at a step (conditional,
    unconditional, with some blocks skipped or perturbed), each is one evaluation of the network, and its own formula
    combines them in the network's native prediction. It stands inside caches and quantisation, which see every
    evaluation. Guidance is on between `start` and `stop` of the solver's steps. Guiders that skip or perturb blocks
    need `layers`, indices into the network's `transformer_blocks`; a UNet has no such list at its top. `dropout` other
    than 1 draws random numbers of the library's own and is refused. Settings have the library's names; None leaves its
    defaults, whose `guidance_scale` is 7.5 for most: give it.

    Attributes:
        target: the class's name. layers: which blocks are skipped or perturbed.
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, dropout, skip_layer_guidance_scale,
            skip_layer_guidance_start, skip_layer_guidance_stop, perturbed_guidance_scale, perturbed_guidance_start,
            perturbed_guidance_stop, seg_guidance_scale, adaptive_projected_guidance_momentum,
            adaptive_projected_guidance_rescale, eta, alpha, zero_init_steps: the library's own settings.
    """

    requires = frozenset({"network", "labels"})
    guides = True

    target: str
    layers: tuple[int, ...] = ()
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    use_original_formulation: bool | None = None
    start: float | None = None
    stop: float | None = None
    dropout: float | None = None
    skip_layer_guidance_scale: float | None = None
    skip_layer_guidance_start: float | None = None
    skip_layer_guidance_stop: float | None = None
    perturbed_guidance_scale: float | None = None
    perturbed_guidance_start: float | None = None
    perturbed_guidance_stop: float | None = None
    seg_guidance_scale: float | None = None
    adaptive_projected_guidance_momentum: float | None = None
    adaptive_projected_guidance_rescale: float | None = None
    eta: float | None = None
    alpha: float | None = None
    zero_init_steps: int | None = None

    def __post_init__(self) -> None:
        if self.target not in _names():
            raise unknown("diffusers guider", self.target, _names())
        layers = {"layers"} if _layers_argument(self.target) else set()
        known = _arguments(self.target).intersection(_SETTINGS) | layers
        for name in [*self._own(), *(["layers"] if self.layers else [])]:
            if name not in known:
                raise unknown("setting", name, known, where=f"diffusers-guider:{self.target}")
        if self.dropout not in (None, 1.0):
            raise UserError(
                f"diffusers-guider:{self.target}: dropout must be 1, got {self.dropout}: "
                "others draw random numbers that no seed of a run names"
            )
        if _layers_argument(self.target) and not self.layers:
            raise UserError(f"diffusers-guider:{self.target} needs layers, such as layers=[1]")
        if self.layers and min(self.layers) < 0:
            raise UserError(f"diffusers-guider:{self.target}: layers must be at least 0, got {min(self.layers)}")

    def check(self, nfe: int, blocks: int) -> None:
        if blocks and self.layers and max(self.layers) >= blocks:
            raise UserError(
                f"diffusers-guider:{self.target}: layers={list(self.layers)}: the network has {blocks} blocks; "
                f"give layers in 0..{blocks - 1}"
            )

    @classmethod
    def members(cls) -> list[tuple[str, str]]:
        """Every guider of the installed diffusers, with the reason it cannot be used, empty when it can."""
        return [(name, _reason(name)) for name in _names()]

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        return _Guided(denoiser, self)

    def guider(self) -> Any:
        """A fresh guider, with no history.

        Raises:
            Unsupported: the library refuses to build it.
        """
        import diffusers
        from diffusers.hooks.layer_skip import LayerSkipConfig

        given = self._own()
        given.pop("dropout", None)  # 1 is what blocks are skipped with
        if self.target in _CONFIGS:  # whose shorter setting for layers makes a list of numbers that the hooks refuse
            given[_CONFIGS[self.target]] = [LayerSkipConfig(indices=list(self.layers), fqn="auto")]
        elif self.layers:
            given[_layers_argument(self.target)] = list(self.layers)
        try:
            with quiet():
                return getattr(diffusers.guiders, self.target)(**given)
        except _COMPLAINTS as error:
            raise Unsupported(f"not supported: diffusers-guider:{self.target}: {line(error)}") from error

    def _own(self) -> dict[str, Any]:
        return {name: value for name in _SETTINGS if (value := getattr(self, name)) is not None}


class _Guided(DenoiserWrap):
    """The guided field of an inner denoiser; one guider for one trajectory after another."""

    def __init__(self, inner: Denoiser, method: DiffusersGuider) -> None:
        super().__init__(inner)
        self.method = method
        self.guider = method.guider()

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
        import torch

        from evalbench.predictions import convert

        name = f"diffusers-guider:{self.method.target}"
        if step is None:
            raise Unsupported(f"not supported: {name} needs a solver that says its steps")
        native = self.native
        time = torch.as_tensor(1000.0 * step.t / self.path.t_start)
        try:
            self.guider.set_state(step.i, step.n, time)
            with quiet():
                batches = self.guider.prepare_inputs({"condition": (cond, cond.null())})
            for i, batch in enumerate(batches):
                key = ("diffusers-guider", self.method.target, self.method.layers, batch.__guidance_identifier__)
                edit = self._edit(i)
                if not self._edits(i):  # a plain call, counted as one
                    batch.noise_pred = self.inner(x, t, batch.condition, native, step=step, rows=rows)
                else:
                    batch.noise_pred = self.inner.edited(
                        edit, x, t, batch.condition, native, key=key, step=step, rows=rows
                    )
                self.guider._count_prepared = i + 1
            out: torch.Tensor = self.guider(batches).pred
        except Unsupported:
            raise
        except _COMPLAINTS as error:
            network = type(self.network).__name__
            raise Unsupported(f"not supported: {name} on {network}: {line(error)}") from error
        return convert(out.to(x.dtype), x, self.path, t, native, want)

    def _edits(self, i: int) -> bool:
        """Whether the guider hooks the network for its i-th prediction of a step."""
        with self._edit(i)():
            return any("_diffusers_hook" in vars(module) for module in self.network.modules())

    def _edit(self, i: int) -> Any:
        @contextmanager
        def prepared() -> Iterator[None]:
            with restored(self.network):
                self.guider._count_prepared = i
                with quiet():
                    self.guider.prepare_models(self.network)
                yield

        return prepared


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    import diffusers.guiders as guiders
    from diffusers.guiders.guider_utils import BaseGuidance

    classes = inspect.getmembers(guiders, inspect.isclass)
    return tuple(n for n, cls in classes if issubclass(cls, BaseGuidance) and cls is not BaseGuidance)


@lru_cache(maxsize=64)
def _arguments(name: str) -> frozenset[str]:
    import diffusers

    return frozenset(inspect.signature(getattr(diffusers.guiders, name)).parameters)


def _layers_argument(name: str) -> str:
    """The setting of a guider that names blocks; empty when it has none."""
    return next((argument for argument in sorted(_arguments(name)) if argument.endswith("_layers")), "")


@lru_cache(maxsize=64)
def _reason(name: str) -> str:
    """Why a guider runs on none of the networks known here; empty when it runs on one."""
    if name in _UNUSABLE:
        return _UNUSABLE[name]
    complaints = {kind: complaint(name, kind) for kind in KINDS}
    if not all(complaints.values()):
        return ""
    found = set(complaints.values())
    return found.pop() if len(found) == 1 else "; ".join(f"{kind}: {text}" for kind, text in complaints.items())


@lru_cache(maxsize=64)
def complaint(name: str, kind: str) -> str:
    """What goes wrong when a guider is tried on a small network of a class at three steps; empty when nothing does."""
    import torch

    network = tiny(kind)
    try:
        guider = DiffusersGuider(name, (1,) if _layers_argument(name) else ()).guider()
        for step in range(3):
            guider.set_state(step, 10, torch.tensor(999.0 - step))
            batches = guider.prepare_inputs({"condition": (torch.zeros(2), torch.ones(2))})
            for i, batch in enumerate(batches):
                guider._count_prepared = i
                with restored(network), quiet():
                    guider.prepare_models(network)
                    batch.noise_pred = run_tiny(network, step + i)
            if not bool(torch.isfinite(guider(batches).pred).all()):
                return "returns values that are not finite"
    except Unsupported as error:
        return str(error).removeprefix(f"not supported: diffusers-guider:{name}: ")
    except _COMPLAINTS as error:
        return line(error)
    return ""
