"""UniDiffuser on the joint mixture, where every marginal and conditional is exact."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Denoiser, Model, Step, Time
from evalbench.models.gmm import GaussianMixture
from evalbench.models.joint import JointMixture
from evalbench.noise import NoiseSource
from evalbench.paths import EDM, Flow, Path, VPLinear
from evalbench.runner import make_cell
from evalbench.spec import load_suite

OPTIONS = load_suite("gmm-joint").model.options
MODEL = JointMixture(**OPTIONS)
IMAGE, TEXT = slice(0, 4), slice(4, 8)
PATHS = [VPLinear(), EDM(), Flow()]
STD = 0.5


@dataclass
class Dedicated(Model):
    """A conditional model of one modality: row i knows the weights of its own condition, and nothing else."""

    weights: torch.Tensor  # (B, K)
    means: torch.Tensor  # (K, D)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = (self.means.shape[1],)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        variance = alpha**2 * STD**2 + sigma**2
        offsets = x[:, None] - alpha * self.means
        weights = torch.softmax(torch.log(self.weights) - 0.5 * (offsets**2).sum(-1) / variance, 1)
        each = self.means + alpha * STD**2 / variance * offsets
        return (weights[..., None] * each).sum(1)


class Shifted(NoiseSource):
    """The start that the joint model's sample has in one modality."""

    def __init__(self, whole: NoiseSource, where: slice) -> None:
        super().__init__(whole.seed, whole.samples, (where.stop - where.start,), dtype=torch.float64)
        self._whole, self._where = whole, where

    def start(self) -> torch.Tensor:
        return self._whole.start()[:, self._where]


def noise(n: int) -> NoiseSource:
    return NoiseSource(0, range(n), (8,), dtype=torch.float64)


def door(model: Model, path: Path, n: int, nfe: int) -> tuple[NetworkDoor, Ledger]:
    inner, ledger = NetworkDoor(model, path, "logsnr"), Ledger(n, nfe)
    inner.ledger = ledger
    return inner, ledger


def run(method: str, nfe: int, measured: torch.Tensor, path: Path = PATHS[0]) -> tuple[torch.Tensor, Ledger]:
    """Samples (B, 8) of the joint model, given `measured`."""
    chain, n = registry.build_method(method), len(measured)
    inner, ledger = door(MODEL, path, n, nfe)
    field_ = Field(sampling.wrapped(inner, chain, 1.0), ledger)
    source = noise(n)
    x = chain.sampler.sample(field_, MODEL.start(source, path), Cond(measured=measured), nfe, source)
    return x, ledger


def dedicated(solver: str, nfe: int, given: torch.Tensor, wanted: str, path: Path) -> torch.Tensor:
    """The same of a conditional model, from the same noise."""
    n, where = len(given), MODEL.modalities[wanted]
    model = Dedicated(*MODEL.conditional(wanted, given))
    inner, ledger = door(model, path, n, nfe)
    source = Shifted(noise(n), where)
    return registry.build_method(solver).solver.sample(
        Field(inner, ledger), model.start(source, path), Cond(), nfe, source
    )


# --- the entry's claim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver(order=3)", "unipc"])
@pytest.mark.parametrize(
    ("task", "wanted", "where"), [("image-given-text", "image", IMAGE), ("text-given-image", "text", TEXT)]
)
def test_a_conditional_of_the_joint_model_is_a_dedicated_models(
    path: Path, solver: str, task: str, wanted: str, where: slice
) -> None:
    """Sample by sample, from the same noise."""
    given = MODEL.measure(range(16), 1)
    x, _ = run(f"{solver}+unidiffuser(task={task})", 9, given, path)
    expected = dedicated(solver, 9, given, wanted, path)
    torch.testing.assert_close(x[:, where], expected, rtol=1e-8, atol=1e-8)


def test_a_conditional_has_the_exact_moments() -> None:
    """4096 images of one text, at 40 steps of third order."""
    n = 4096
    given = MODEL.measure([3], 1).expand(n, -1)
    x, _ = run("unipc(order=3)+unidiffuser", 40, given)
    weights, means = (v.numpy() for v in MODEL.conditional("image", given[:1]))
    mean = weights[0] @ means
    centred = means - mean
    # the path ends at t_end, where alpha is not quite 1 and sigma not quite 0
    alpha, sigma = VPLinear().alpha(1e-3), VPLinear().sigma(1e-3)
    cov = (centred.T * weights[0]) @ centred + STD**2 * np.eye(4)
    cov = alpha**2 * cov + sigma**2 * np.eye(4)
    images = x[:, IMAGE].numpy()
    se = np.sqrt(np.diag(cov) / n)
    assert (np.abs(images.mean(0) - alpha * mean) < 4 * se).all()
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert (np.abs(np.cov(images.T) - cov) < 4 * scale * np.sqrt(2 / n)).all()
    assert np.abs(mean - MODEL.means.numpy().mean(0)[IMAGE]).max() > 10 * se.max()  # the text says something


@pytest.mark.parametrize(("task", "where"), [("image", IMAGE), ("text", TEXT), ("joint", slice(0, 8))])
def test_marginals_and_joint_have_the_exact_moments(task: str, where: slice) -> None:
    n = 4096
    x, _ = run(f"unipc(order=3)+unidiffuser(task={task})", 40, MODEL.measure(range(n), 1))
    samples, means = x[:, where].numpy(), MODEL.means.numpy()[:, where]
    centred = means - means.mean(0)
    cov = centred.T @ centred / len(means) + STD**2 * np.eye(len(centred.T))
    se = np.sqrt(np.diag(cov) / n)
    assert (np.abs(samples.mean(0) - means.mean(0)) < 4 * se).all()
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert (np.abs(np.cov(samples.T) - cov) < 4 * scale * np.sqrt(2 / n)).all()


def test_the_joint_is_the_solver_alone() -> None:
    given = MODEL.measure(range(8), 1)
    assert torch.equal(run("ddim+unidiffuser(task=joint)", 6, given)[0], run("ddim", 6, given)[0])


# --- the modality that does not move --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "is_given"), [("image-given-text,scale=0", 1), ("image-given-text,scale=2", 1), ("image", 0)]
)
def test_the_other_modality_ends_where_the_path_does(task: str, is_given: int) -> None:
    """At what was given, or at 0 where it is not asked for: the exact step from x_T to t_end."""
    given = MODEL.measure(range(8), 1)
    path = PATHS[0]
    x, _ = run(f"ddim+unidiffuser(task={task})", 5, given)
    x_T, t, x0 = MODEL.start(noise(8), path), path.t_end, is_given * given
    eps = (x_T - path.alpha(1.0) * x0) / path.sigma(1.0)
    torch.testing.assert_close(x[:, TEXT], (path.alpha(t) * x0 + path.sigma(t) * eps)[:, TEXT])


def test_only_the_condition_is_read() -> None:
    given = MODEL.measure(range(8), 1)
    other = given.clone()
    other[:, IMAGE] = 7.0
    a, b = (run("ddim+unidiffuser(scale=1)", 5, measured)[0] for measured in (given, other))
    assert torch.equal(a[:, IMAGE], b[:, IMAGE])
    a, b = (run("ddim+unidiffuser(task=image)", 5, measured)[0] for measured in (given, 0 * given))
    assert torch.equal(a, b)


# --- guidance -------------------------------------------------------------------------------------------------------


def prediction(method: str, x: torch.Tensor, measured: torch.Tensor, want: str = "x0", **where: object) -> torch.Tensor:
    chain = registry.build_method(f"ddim+{method}")
    inner, _ = door(MODEL, PATHS[0], len(noise(6).samples), 9)
    denoiser: Denoiser = sampling.wrapped(inner, chain, 1.0)
    step = Step(0, 5, 0.6, 0.4, noise(6).start())
    return denoiser(x, where.pop("t", 0.6), Cond(measured=measured), want, step=step, **where)  # type: ignore[arg-type]


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
@pytest.mark.parametrize("want", ["x0", "eps", "v", "score", "velocity"])
def test_guidance_is_a_line_through_both_branches(scale: float, want: str) -> None:
    given = MODEL.measure(range(6), 1)
    conditional = prediction("unidiffuser", X, given, want)[:, IMAGE]
    unconditional = prediction("unidiffuser(task=image)", X, given, want)[:, IMAGE]
    guided = prediction(f"unidiffuser(scale={scale})", X, given, want)[:, IMAGE]
    torch.testing.assert_close(guided, conditional + scale * (conditional - unconditional), rtol=1e-9, atol=1e-9)


def test_guidance_costs_a_row_and_no_evaluation() -> None:
    given = MODEL.measure(range(4), 1)
    for scale, rows in ((0, 1), (1.5, 2)):
        _, ledger = run(f"heun+unidiffuser(scale={scale})", 12, given)
        assert 11 <= ledger.nfe.max() <= 12
        np.testing.assert_array_equal(ledger.evals["base"], rows * ledger.nfe)


def test_guidance_makes_the_modalities_agree() -> None:
    given = MODEL.measure(range(1024), 1)
    shares = []
    for scale in (0, 2):
        x, _ = run(f"unipc+unidiffuser(scale={scale})", 20, given)
        best = [MODEL.responsibilities(v, elements=where).argmax(1) for v, where in ((x, IMAGE), (given, TEXT))]
        shares.append(float((best[0] == best[1]).double().mean()))
    assert shares[1] > shares[0] + 0.1


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["unidiffuser(scale=1)", "unidiffuser(task=text)"])
def test_rows_and_times_per_row(method: str) -> None:
    given, rows = MODEL.measure(range(6), 1), np.array([4, 1])
    whole = prediction(method, X, given, "eps")
    part = prediction(method, X[rows], given[rows], "eps", rows=rows)
    torch.testing.assert_close(part, whole[rows])
    per_row = prediction(method, X, given, "eps", t=torch.full((6,), 0.6, dtype=torch.float64))
    torch.testing.assert_close(per_row, whole)


def test_settings() -> None:
    with pytest.raises(UserError, match="'task=sound'"):
        registry.build_method("ddim+unidiffuser(task=sound)")
    with pytest.raises(UserError, match="scale needs a task with a condition, not 'image'"):
        registry.build_method("ddim+unidiffuser(task=image,scale=2)")


def test_what_a_call_needs() -> None:
    with pytest.raises(Unsupported, match="the suite measures none"):
        prediction("unidiffuser", X, None)  # type: ignore[arg-type]
    chain = registry.build_method("ddim+unidiffuser(task=image)")
    denoiser = sampling.wrapped(NetworkDoor(MODEL, PATHS[0], "logsnr"), chain, 1.0)
    with pytest.raises(Unsupported, match="says which noise it started from"):
        denoiser(X, 0.5, Cond())
    with pytest.raises(Unsupported, match="not supported: needs modalities"):
        sampling.wrapped(NetworkDoor(GaussianMixture(), PATHS[0], "logsnr"), chain, 1.0)


def test_the_suite_gives_its_conditions() -> None:
    setup = sampling.build(load_suite("gmm-joint"))
    method = "ddim+unidiffuser"
    cond = sampling.conditions(setup.suite, setup.model, [5, 2], setup.device)
    assert cond.measured is not None
    cell = make_cell(setup.suite, method, 10, 1.0, 0)
    x = sampling.sample(setup, registry.build_method(method), cell, [5, 2], cond, Ledger(2, 10))
    torch.testing.assert_close(x[:, TEXT], cond.measured[:, TEXT], rtol=0, atol=0.05)
