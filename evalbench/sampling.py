"""A suite's model on this process's device, and samples of a method from it: one batch, no files, no scheduling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from evalbench import environment, outside, registry, warm
from evalbench.cost.breakdown import Stopwatch, span
from evalbench.cost.budget import BudgetUnit, nfe_of_budget, rows_per_evaluation
from evalbench.cost.ledger import Ledger
from evalbench.cost.variants import Variant
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import BadSamples, Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Model, Outside
from evalbench.metrics.images import to_uint8
from evalbench.noise import NoiseSource
from evalbench.paths import Path as NoisePath
from evalbench.paths import grid, make_path
from evalbench.prompts import read_prompts
from evalbench.registry import Chain
from evalbench.spec import Cell, ModelSpec, Suite
from evalbench.starts import origin_of

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
MEASUREMENTS = 0  # the seed of an inverse problem's measurements: the same problem in every cell


@dataclass
class Setup:
    """A suite's model on this process's device, ready to sample."""

    suite: Suite
    model: Model
    path: NoisePath
    door: NetworkDoor
    device: torch.device
    dtype: torch.dtype


def setup_of(suite: Suite, plugins: Mapping[str, str], variant: Variant | None = None) -> Setup:
    """The model of a suite, kept loaded in this process within its limit; see `build`."""
    registry.load_plugins(plugins)
    key = suite.model_dump_json(include={"name", "version", "model", "roles", "path", "sampling"})
    kept = warm.kept.get(("model", key, variant.text if variant else ""), lambda: build(suite, variant))
    return replace(kept, suite=suite)  # another suite of that model may ask for other conditions or metrics


def build(suite: Suite, variant: Variant | None = None) -> Setup:
    """The model of a suite with its weights, in the process's deterministic settings.

    Args:
        variant: how networks are executed, those of all roles; None is `default_variant`. The state of the solver
            keeps the suite's dtype.

    Raises:
        Unsupported: this device cannot run the variant.
    """
    environment.prepare_process()
    device, dtype = environment.pick_device(), _DTYPES[suite.sampling.dtype]
    if variant == default_variant(suite):
        variant = None
    model = _model(suite.model, dtype, device, variant)
    roles = {name: _model(facts, dtype, device, variant) for name, facts in suite.roles.items()}
    path = noise_path(suite, model)
    door = NetworkDoor(model, path, suite.sampling.grid, roles=roles)
    return Setup(suite, model, path, door, device, dtype)


def default_variant(suite: Suite) -> Variant:
    """How quality runs execute a network: eager, in the suite's dtype."""
    return Variant(dtype=suite.sampling.dtype)


def _model(facts: ModelSpec, dtype: torch.dtype, device: torch.device, variant: Variant | None) -> Model:
    model = registry.build_model(facts.loader, facts.options)
    if variant is not None:
        return variant.apply(model, device)
    model.to(dtype, device)
    return model


def noise_path(suite: Suite, model: Model) -> NoisePath:
    """The path of a suite: its own, or the model's."""
    path = make_path(suite.path.kind, **suite.path.options) if suite.path else model.path
    if path is None:
        raise UserError(f"suite '{suite.name}' needs a [path]: model '{suite.model.loader}' has none of its own")
    return path


def nfe_of(suite: Suite, method: str, unit: BudgetUnit, budget: int, guidance: float) -> int:
    """Evaluations that a budget in another unit allows a method on a suite; nothing is evaluated for it.

    Raises:
        UserError: the budget does not say how many evaluations this method may spend.
    """
    model = registry.build_model(suite.model.loader, suite.model.options)
    path, chain = noise_path(suite, model), registry.build_method(method)
    door = NetworkDoor(model, path, suite.sampling.grid)
    try:
        times = grid(path, suite.sampling.grid, max(budget, 1))[:-1]
        rows = rows_per_evaluation(lambda probe: wrapped(probe, chain, guidance), door, times)
        return nfe_of_budget(unit, budget, chain.solver, path, rows)
    except Unsupported as error:
        raise UserError(f"--budget-unit {unit}, {method}: {error}") from None


def conditions(suite: Suite, model: Model, indices: Sequence[int], device: torch.device) -> Cond:
    """Conditions of global sample indices: a function of the index alone."""
    measured = model.measure(indices, MEASUREMENTS)
    asked = suite.conditions.prompt_of(indices)
    if asked is not None and suite.conditions.prompts is not None:
        prompts = read_prompts(suite.conditions.prompts)
        return Cond(captions=tuple(prompts[k].text for k in asked), measured=measured)
    labels = suite.conditions.plan(indices)
    if labels is None:
        return Cond(measured=measured)
    described = model.is_image and type(model).caption is not Model.caption
    captions = tuple(model.caption(label) for label in labels) if described else None
    return Cond(torch.tensor(labels, dtype=torch.int64, device=device), captions, measured)


def sample(setup: Setup, chain: Chain, cell: Cell, indices: Sequence[int], cond: Cond, ledger: Ledger) -> torch.Tensor:
    """Samples (B, *S) of global indices by a method; every count goes into the ledger.

    Raises:
        Unsupported: the model lacks a capability the method requires.
        BudgetExceeded: the method spent more than the cell's budget.
    """
    noise = _noise(setup, cell, indices)
    setup.door.ledger = ledger
    field = Field(wrapped(setup.door, chain, cell.guidance), ledger)
    x_T = setup.model.start(noise, setup.path)
    with torch.no_grad():
        x = chain.sampler.sample(field, x_T, cond, cell.nfe, noise)
    _check_shape(x, x_T, chain)
    return x


def delivered(setup: Setup, solver: Outside, cell: Cell, indices: range) -> tuple[np.ndarray, Mapping[str, float]]:
    """Images of global indices by a program, uint8 (n, C, H, W), and what is declared of each; see `evalbench.outside`.

    Raises:
        Unsupported: the model makes no images, or the program cannot be told what the suite asks.
    """
    model, name = setup.model, registry.part_name(solver)
    cond = conditions(setup.suite, model, indices, setup.device)
    if not model.is_image or cond.measured is not None:
        raise Unsupported(
            f"not supported: {name} makes images from noise, and suite '{setup.suite.name}' asks for more"
        )
    program = solver.program(cell.nfe, cell.guidance)
    noise = _noise(setup, cell, indices)
    task = outside.Task(
        name=name,
        seed=cell.seed,
        start=indices.start,
        nfe=cell.nfe,
        guidance=cell.guidance,
        noise=model.start(noise, setup.path).cpu().numpy(),
        labels=None if cond.labels is None else cond.labels.tolist(),
        prompts=cond.captions,
        shape=setup.suite.image or model.image_shape,
    )
    return outside.images_of(program, task), program.spends


def _noise(setup: Setup, cell: Cell, indices: Sequence[int]) -> NoiseSource:
    """The random numbers of global indices; x_T is what the suite says."""
    origin = origin_of(setup.suite.sampling.noise, setup.model.shape)
    return NoiseSource(cell.seed, indices, setup.model.shape, setup.dtype, setup.device, origin=origin)


def wrapped(door: Denoiser, chain: Chain, guidance: float, wraps: int | None = None) -> Denoiser:
    """The door inside the suite's guidance (unless a wrap of the method guides itself) and the method's wraps.

    Args:
        wraps: how many of the chain's wraps, the innermost first; None for all.
    """
    lacking = sorted(chain.requires - door.provides)
    denoiser = door
    if guidance != 1.0 and not any(wrap.guides for wrap in chain.wraps):
        guide = registry.build_guidance(guidance)
        lacking = sorted((chain.requires | guide.requires) - door.provides)
        denoiser = guide.wrap(denoiser)
    if lacking:
        raise Unsupported(f"not supported: needs {', '.join(lacking)}")
    for wrap in chain.wraps[:wraps]:
        denoiser = wrap.wrap(denoiser)
    return denoiser


def decoded_of(model: Model, x: torch.Tensor, stopwatch: Stopwatch | None = None) -> torch.Tensor | None:
    """What samples show, float (B, C, H, W), in [-1, 1] but for overshoot; None when the model makes no images."""
    if not model.is_image:
        return None
    with torch.no_grad(), span(stopwatch, "decoder"):
        return model.decode(x)


def images_of(model: Model, x: torch.Tensor, stopwatch: Stopwatch | None = None) -> torch.Tensor | None:
    """Finished images of samples, uint8 (B, C, H, W); None when the model makes none."""
    decoded = decoded_of(model, x, stopwatch)
    return None if decoded is None else to_uint8(decoded)


def _check_shape(x: Any, x_T: torch.Tensor, chain: Chain) -> None:
    if not isinstance(x, torch.Tensor) or x.shape != x_T.shape:
        found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise BadSamples(f"{chain.text} returned {found}, expected a tensor of shape {tuple(x_T.shape)}")
