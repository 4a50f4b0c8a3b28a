"""Any scheduler class of the diffusers library (https://github.com/huggingface/diffusers) as a solver."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evalbench.errors import Unsupported, line, unknown
from evalbench.interfaces import Cond, Denoiser, Solver, Step, Want
from evalbench.paths import EDM, Flow, Path, VPDiscrete, VPLinear
from evalbench.registry import register

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

_IPNDM = "IPNDMScheduler"
PathKind = Literal["vp", "flow", "edm"]
_STEP_ARGUMENTS = ("model_output", "timestep", "sample")
_PREDICTIONS: dict[str, Want] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_CONFIG = ("solver_order", "algorithm_type", "solver_type", "timestep_spacing", "final_sigmas_type")
_PROBE_NFE = 20
_FLOW = ("FlowMatch", "LTXEulerAncestralRF")  # classes on t = sigma that have no setting to tell it by

# Classes that are no samplers of a given network on a given path under given noise, whatever their signatures.
_UNUSABLE = {
    "DDIMInverseScheduler": "runs from data to noise",
    "DPMSolverMultistepInverseScheduler": "runs from data to noise",
    "DPMSolverSDEScheduler": "draws its noise from torchsde, not from the run's source",
    "CosineDPMSolverMultistepScheduler": "draws its noise from torchsde, not from the run's source",
}


@register("diffusers:*")
@dataclass(frozen=True)
class DiffusersScheduler(Solver):
    """A scheduler class of diffusers by name, as its pipelines run it: `diffusers:EulerDiscreteScheduler`.

    The scheduler is built from the suite's path: on VP paths its betas are the path's, entry i at t = (i + 1) / N
    (N = 1000, or the size of the table), fractional time steps in between; on flow paths t = sigma, on the edm path
    its own sigma range is set; IPNDMScheduler walks its own VP path, matched by log-SNR. Time steps, order and the
    last step are the scheduler's own, so path.t_end, path.final and the suite's grid are not read. It starts from
    x_T / sigma(t_start) times its `init_noise_sigma`. Random numbers come from our source, one named draw after
    another: chunks stay paired, step counts do not. The number of inference steps is the largest whose dry run spends
    at most the budget. LCM and TCD classes run, but mean something only for networks that were distilled for them.

    Attributes:
        target: the class's name.
        prediction: what the scheduler is told the network predicts, on VP paths; conversions are exact.
        solver_order, algorithm_type, solver_type, timestep_spacing, final_sigmas_type, use_karras_sigmas: the
            scheduler's own settings of these names; 0, empty and false leave its defaults.
    """

    target: str
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    solver_order: int = 0
    algorithm_type: str = ""
    solver_type: str = ""
    timestep_spacing: str = ""
    final_sigmas_type: str = ""
    use_karras_sigmas: bool = False

    def __post_init__(self) -> None:
        if self.target not in _class_names():
            raise unknown("diffusers scheduler", self.target, _class_names())
        known = _arguments(self.target)
        for name in self._own_settings():
            if known and name not in known:
                own = known.intersection((*_CONFIG, "use_karras_sigmas"))
                raise unknown("setting", name, own, where=f"diffusers:{self.target}")

    @classmethod
    def members(cls) -> list[tuple[str, str]]:
        """Every scheduler class of the installed diffusers, with the reason it cannot be used, empty when it can."""
        return [(name, _reason(name)) for name in _class_names()]

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        path = denoiser.path
        steps, calls = _steps_for(self, path, nfe, x_T.ndim)
        bridge = self._bridge(path)

        def evaluate(x: torch.Tensor, t: float, want: Want, i: int, t_next: float) -> torch.Tensor:
            return denoiser(x, t, cond, want, step=Step(i, calls, t, t_next, x_T))

        with _driven(bridge.scheduler, noise.normal):
            bridge.scheduler.set_timesteps(steps)
            return bridge.run(x_T / float(path.sigma(path.t_start)), evaluate)

    def _own_settings(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in _CONFIG if getattr(self, name)}
        return {**given, "use_karras_sigmas": True} if self.use_karras_sigmas else given

    def _bridge(self, path: Path) -> _Bridge:
        """A fresh scheduler on the path.

        Raises:
            Unsupported: the class cannot run, or not on this kind of path.
        """
        kind = _kind(path)
        possible = _path_kinds(self.target)
        if kind not in possible:
            reason = _signature_reason(self.target) or f"runs on {' and '.join(possible)} paths, not on {kind}"
            raise Unsupported(f"diffusers:{self.target} {reason}")
        if kind == "vp" and path.t_start != 1.0:
            raise Unsupported(f"diffusers:{self.target} needs a path with t_start = 1, got {path.t_start}")
        config = {**_config(self.target, kind, path, self.prediction), **self._own_settings()}
        try:
            with _without_deprecations():
                scheduler = _class(self.target)(**config)
        except Exception as error:  # any refusal of the library is the reason that the row shows
            raise Unsupported(f"diffusers:{self.target} cannot be built: {line(error)}") from error
        return _Bridge(scheduler, path, kind, _PREDICTIONS[self.prediction])


@dataclass
class _Bridge:
    """A scheduler, and the translation between its coordinates and the path's."""

    scheduler: Any
    path: Path
    kind: PathKind
    want: Want

    def run(self, unit: torch.Tensor, evaluate: Callable[..., torch.Tensor]) -> torch.Tensor:
        """diffusers' own loop from unit normals; `evaluate(x, t, want, call, t_next)` is the network."""
        x = unit * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        timesteps = list(self.scheduler.timesteps)
        times = [self._time(timestep) for timestep in timesteps]
        for i, timestep in enumerate(timesteps):
            t_next = times[i + 1] if i + 1 < len(times) else 0.0

            def at(x: torch.Tensor, want: Want, i: int = i, t_next: float = t_next) -> torch.Tensor:
                return evaluate(x, times[i], want, i, t_next)

            out = self._output(x, timestep, at)
            x = self.scheduler.step(out, timestep, x, return_dict=False)[0].to(unit.dtype)
        return x

    def _time(self, timestep: Any) -> float:
        if self._is_ipndm():  # its time steps are the angles of alpha = cos(pi t / 2), sigma = sin(pi t / 2)
            t = float(self.path.t_of_lambda(-np.log(np.tan(0.5 * np.pi * float(timestep)))))
        elif self.kind == "edm":
            t = float(np.exp(4.0 * float(timestep)))  # its time steps are log(sigma) / 4
        elif self.kind == "flow":
            t = float(timestep) / self.scheduler.config.num_train_timesteps
        else:
            t = (float(timestep) + 1.0) / self.scheduler.config.num_train_timesteps
        return min(t, self.path.t_start)

    def _output(self, x: torch.Tensor, timestep: Any, evaluate: Callable[..., torch.Tensor]) -> torch.Tensor:
        """What the scheduler takes for the network's output at its state x."""
        scheduler = self.scheduler
        if self.kind == "edm":
            # denoised = c_skip x + c_out output, solved for the output; x is in the path's coordinates
            scheduler.scale_model_input(x, timestep)
            sigma = scheduler.sigmas[scheduler.step_index]
            one = x.new_ones(())
            c_skip = float(scheduler.precondition_outputs(one, 0 * one, sigma))
            c_out = float(scheduler.precondition_outputs(0 * one, one, sigma))
            output: torch.Tensor = (evaluate(x, "x0") - c_skip * x) / c_out
            return output
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, timestep).to(x.dtype)
        return evaluate(x, self._wanted())

    def _wanted(self) -> Want:
        if self._is_ipndm():
            return "v"
        return "velocity" if self.kind == "flow" else self.want

    def _is_ipndm(self) -> bool:
        return type(self.scheduler).__name__ == _IPNDM


@lru_cache(maxsize=256)
def _steps_for(solver: DiffusersScheduler, path: Path, nfe: int, ndim: int) -> tuple[int, int]:
    """(inference steps, evaluations) of the largest dry run within the budget.

    Raises:
        Unsupported: no number of steps spends at most `nfe`, with the scheduler's reason where it gave one.
    """
    import torch

    x = torch.zeros((2,) * ndim)
    failure, least = "", 0
    probe = solver._bridge(path).scheduler
    for steps in range(nfe, 0, -1):
        calls = 0

        def count(x: torch.Tensor, *_: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        try:
            with _driven(probe, lambda *_: torch.zeros_like(x)):
                probe.set_timesteps(steps)
                if len(probe.timesteps) > nfe:  # one call each, so it need not run
                    least = len(probe.timesteps)
                    continue
                bridge = solver._bridge(path)  # fresh: no history of another run
                bridge.scheduler.set_timesteps(steps)
                end = bridge.run(x, count)
        except Exception as error:  # the library's own complaint about this number of steps
            failure = f"with {steps} steps: {line(error)}"
            continue
        if end.shape != x.shape or not bool(torch.isfinite(end).all()):
            failure = f"with {steps} steps: returns {tuple(end.shape)} with values that are not finite"
        elif 0 < calls <= nfe:
            return steps, calls
    reason = f"{least} is the least it spends" if least else failure
    raise Unsupported(f"diffusers:{solver.target} cannot run in {nfe} evaluations: {reason}")


@contextlib.contextmanager
def _driven(scheduler: Any, normal: Callable[[str, int], torch.Tensor]) -> Iterator[None]:
    """Inside, the k-th `randn_tensor` of the scheduler's module is `normal("diffusers", k)`."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    drawn = 0

    def draw(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> torch.Tensor:
        nonlocal drawn
        values = normal("diffusers", drawn)
        drawn += 1
        if tuple(values.shape) != tuple(shape):
            raise Unsupported(f"{type(scheduler).__name__} draws noise of shape {tuple(shape)}")
        return values if dtype is None else values.to(dtype)

    if original is not None:
        module.randn_tensor = draw  # type: ignore[attr-defined]
    try:
        with _without_deprecations():
            yield
    finally:
        if original is not None:
            module.randn_tensor = original  # type: ignore[attr-defined]


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Deprecation warnings that diffusers' own code causes are not for our users."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


# --- what the library has -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _class_names() -> tuple[str, ...]:
    import diffusers

    return tuple(sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "SchedulerMixin"))


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@lru_cache(maxsize=256)
def _arguments(name: str) -> frozenset[str]:
    """Names of the constructor's settings; empty where the class lacks a library it needs."""
    return frozenset() if _missing_library(name) else frozenset(inspect.signature(_class(name)).parameters)


def _missing_library(name: str) -> str:
    backends = [b for b in getattr(_class(name), "_backends", []) if b != "torch"]
    return f"needs {', '.join(backends)}" if backends else ""


@lru_cache(maxsize=256)
def _signature_reason(name: str) -> str:
    """Why a class cannot be driven by (model_output, timestep, sample); empty when it can."""
    if reason := _UNUSABLE.get(name, "") or _missing_library(name):
        return reason
    step = getattr(_class(name), "step", None)
    if step is None:
        return "has no step(model_output, timestep, sample)"
    arguments = list(inspect.signature(step).parameters.values())[1:]
    required = tuple(a.name for a in arguments if a.default is inspect.Parameter.empty)
    if required != _STEP_ARGUMENTS or not hasattr(_class(name), "set_timesteps"):
        return f"steps with ({', '.join(required)}), not ({', '.join(_STEP_ARGUMENTS)})"
    if not _path_kinds(name):
        return "brings its own noise path: neither betas, flow sigmas nor EDM sigmas can be given"
    return ""


@lru_cache(maxsize=256)
def _path_kinds(name: str) -> tuple[PathKind, ...]:
    """The kinds of path a class can be built on, by the settings it takes."""
    arguments = _arguments(name)
    kinds: list[PathKind] = []
    if name in _UNUSABLE:
        return ()
    if {"trained_betas", "prediction_type"} <= arguments or name == _IPNDM:
        kinds.append("vp")
    if name.startswith(_FLOW) or {"use_flow_sigmas", "trained_betas"} <= arguments:
        kinds.append("flow")
    if {"sigma_min", "sigma_max", "sigma_data", "prediction_type"} <= arguments:
        kinds.append("edm")
    return tuple(kinds)


def _reason(name: str) -> str:
    if reason := _signature_reason(name):
        return reason
    probes: dict[PathKind, Path] = {"vp": VPLinear(), "flow": Flow(), "edm": EDM()}
    reasons = []
    for kind in _path_kinds(name):
        try:
            _steps_for(DiffusersScheduler(name), probes[kind], _PROBE_NFE, 4)
        except Unsupported as error:
            reasons.append(str(error))
        else:
            return ""
    return "; ".join(reasons)


def _kind(path: Path) -> PathKind:
    if isinstance(path, VPLinear | VPDiscrete):
        return "vp"
    if isinstance(path, Flow):
        return "flow"
    if isinstance(path, EDM):
        return "edm"
    raise Unsupported(f"diffusers schedulers run on vp, flow and edm paths, not on {type(path).__name__}")


def _config(name: str, kind: PathKind, path: Path, prediction: str) -> dict[str, Any]:
    """Constructor settings that put the class on the path, without clipping."""
    arguments = _arguments(name)
    config: dict[str, Any] = {}
    if name == _IPNDM:
        return config
    if kind == "vp":
        n = len(path.alphas_cumprod) if isinstance(path, VPDiscrete) else 1000
        alpha_bar = path.alpha(np.arange(n + 1) / n) ** 2
        config = {
            "num_train_timesteps": n,
            "trained_betas": (1.0 - alpha_bar[1:] / alpha_bar[:-1]).tolist(),
            "prediction_type": prediction,
        }
    elif kind == "flow" and "use_flow_sigmas" in arguments:
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    elif kind == "edm":
        config = {"sigma_min": path.t_end, "sigma_max": path.t_start}
    # no clipping, and no shift of the log-SNR on top of the path's (CogVideoX)
    neutral: dict[str, Any] = {"clip_sample": False, "snr_shift_scale": 1.0}
    if name == "DPMSolverSinglestepScheduler":
        neutral["lower_order_final"] = True  # what it turns to at every budget, with a message each time
    return {**config, **{key: value for key, value in neutral.items() if key in arguments}}
