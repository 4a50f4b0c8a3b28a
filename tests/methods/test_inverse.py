"""RED-diff and DPS: against literal second formulations, closed forms on one Gaussian, and the exact posterior."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.models.gmm_inverse import InverseMixture
from evalbench.noise import NoiseSource
from evalbench.paths import grid, make_path
from evalbench.runner import make_cell
from evalbench.spec import load_suite

torch.set_num_threads(1)
METHODS = ("red-diff", "red-diff(sigma_x0=0.1)", "red-diff(weight=clipped)", "dps", "dps(eta=0)")
WEIGHTS = {
    "linear": lambda r: r,
    "sqrt": lambda r: r**0.5,
    "square": lambda r: r * r,
    "log": lambda r: np.log(1 + r),
    "clipped": lambda r: min(r, 1.0),
    "const": lambda r: 1.0,
}


@lru_cache
def model_of(**options: object) -> InverseMixture:
    model = InverseMixture(**options)  # type: ignore[arg-type]
    model.to(torch.float64, torch.device("cpu"))
    return model


def draw(text: str, nfe: int, batch: int = 24, kind: str = "vp-linear", start: float = 0.0, **options: object):
    """Samples of a method on `gmm-inverse`, the field they came through, and their conditions."""
    path_options = options.pop("path", {})
    model = model_of(**options)
    path = make_path(kind, **path_options)
    field = Field(NetworkDoor(model, path, "time"), ledger := Ledger(batch, nfe))
    field.inner.ledger = ledger
    labels = torch.arange(batch) % model.classes if model.classes else None
    cond = Cond(labels, None, model.measure(range(batch), 0))
    noise = NoiseSource(0, range(batch), field.shape, dtype=torch.float64)
    x_T = model.start(noise, path) + start
    with torch.no_grad():
        return registry.build_method(text).solver.sample(field, x_T, cond, nfe, noise), field, cond


# --- RED-diff -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("sigma_x0", [0.0, 0.2])
def test_red_diff_is_torch_adam_on_the_paper_loss(weight: str, sigma_x0: float) -> None:
    """The loss as it is written, differentiated by torch, minimised by torch.optim.Adam."""
    text = f"red-diff(lr=0.07,lam=0.4,v=0.8,weight={weight},sigma_x0={sigma_x0})"
    found, field, cond = draw(text, 12, degradation="blur")
    model, path = field.inner.model, field.path
    noise = NoiseSource(0, range(24), (8,), dtype=torch.float64)
    mu = model.operator.pinv(cond.measured).requires_grad_()
    adam = torch.optim.Adam([mu], lr=0.07, betas=(0.9, 0.99))
    for i, t in enumerate(grid(path, "time", 12)[:-1]):
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        x0 = mu + sigma_x0 * noise.normal("red-diff x0", i)
        eps = noise.normal("red-diff", i)
        x_t = (alpha * x0 + sigma * eps).detach()
        eps_hat = (x_t - alpha * model.predict(x_t, t, alpha, sigma, cond.labels)) / sigma
        data = 0.5 * ((cond.measured - model.operator(x0)) ** 2).mean(1)
        regulariser = ((eps_hat - eps) * x0).mean(1)
        loss = (0.8 * data + 0.4 * WEIGHTS[weight](sigma / alpha) * regulariser).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found, mu.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("degradation", ["mask", "blur", "random"])
def test_red_diff_on_one_gaussian_ends_at_the_ridge_solution(degradation: str) -> None:
    """x0_hat is linear there: at a fixed noise level the mean gradient vanishes at a ridge estimate.

    v / M H^T (H mu - y) + lambda / D (mu - m0) sigma^2 / (alpha^2 s^2 + sigma^2) = 0, the posterior mean for a prior
    variance that lambda sets.
    """
    options = {"components": 1, "classes": 0, "std": 0.8, "offset": 0.5, "measurements": 3, "degradation": degradation}
    path = {"t_start": 0.4, "t_end": 0.3999}
    found, field, cond = draw("red-diff(lr=0.01)", 900, 96, path=path, **options)
    model, t = field.inner.model, 0.4
    alpha, sigma = float(field.path.alpha(t)), float(field.path.sigma(t))
    pull = 0.25 / 8 * sigma**2 / (alpha**2 * 0.64 + sigma**2)
    H, m0 = model.operator.matrix, model.means[0]
    left = H.T @ H / 4 + pull * torch.eye(8, dtype=H.dtype)
    ridge = torch.linalg.solve(left, (cond.measured[:3] @ H / 4 + pull * m0).T).T  # (3, D)
    mean = found.unflatten(0, (32, 3)).mean(0)
    assert (ridge - m0).abs().max() > 0.5
    torch.testing.assert_close(mean, ridge, rtol=0, atol=0.03)


def test_without_regulariser_red_diff_keeps_the_pseudo_inverse() -> None:
    found, field, cond = draw("red-diff(lam=0)", 5)
    torch.testing.assert_close(found, field.operator.pinv(cond.measured))


def test_red_diff_does_not_read_its_start() -> None:
    assert torch.equal(draw("red-diff", 6)[0], draw("red-diff", 6, start=3.0)[0])


# --- DPS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vp-linear", "edm", "flow"])
@pytest.mark.parametrize(("eta", "plain"), [(1, "ddpm"), (0, "ddim"), (0.4, "ddim(eta=0.4)")])
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_dps_without_steps_on_the_data_is_the_plain_sampler(kind: str, eta: float, plain: str, final: str) -> None:
    guided, *_ = draw(f"dps(zeta=0,eta={eta})", 9, kind=kind, path={"final": final})
    torch.testing.assert_close(guided, draw(plain, 9, kind=kind, path={"final": final})[0])


def test_dps_steps_along_the_gradient_of_the_residual() -> None:
    """One step against central differences of |y - H x0_hat(x)|."""
    zeta, h = 0.6, 1e-5
    guided, field, cond = draw(f"dps(zeta={zeta},eta=0)", 1, degradation="random")
    plain, *_ = draw("ddim", 1, degradation="random")
    model, path = field.inner.model, field.path
    x = model.start(NoiseSource(0, range(24), (8,), dtype=torch.float64), path)

    def residual(x: torch.Tensor) -> torch.Tensor:
        alpha, sigma = float(path.alpha(path.t_start)), float(path.sigma(path.t_start))
        x0 = model.predict(x, path.t_start, alpha, sigma, cond.labels)
        return (cond.measured - model.operator(x0)).norm(dim=1)

    basis = torch.eye(8, dtype=torch.float64) * h
    slope = torch.stack([(residual(x + e) - residual(x - e)) / (2 * h) for e in basis], 1)
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close((plain - guided) / zeta, slope, rtol=1e-4, atol=1e-7)


def test_dps_on_one_gaussian_moves_what_was_measured_and_nothing_else() -> None:
    """Coordinates are independent there, so the posterior of those that the mask hides is their prior: ddpm's samples.

    With little measurement noise the exact posterior of the others is y itself.
    """
    options = {"components": 1, "classes": 0, "std": 0.8, "noise": 0.01, "measurements": 4}
    guided, _, cond = draw("dps(zeta=0.3)", 200, **options)
    plain, *_ = draw("ddpm", 200, **options)
    torch.testing.assert_close(guided[:, 4:], plain[:, 4:])
    before, after = ((x[:, :4] - cond.measured).square().mean().sqrt() for x in (plain, guided))
    assert before > 0.8
    assert after < 0.1


def test_dps_counts_one_backward_pass_for_each_evaluation() -> None:
    _, field, _ = draw("dps", 7)
    for counts in (field.ledger.nfe, field.ledger.backward, field.ledger.evals["base"]):
        np.testing.assert_array_equal(counts, 7)
    _, field, _ = draw("red-diff", 7)
    np.testing.assert_array_equal(field.ledger.nfe, 7)
    assert not field.ledger.backward.any()


# --- both, against the exact posterior ------------------------------------------------------------------------------


def score(text: str, metric_id: str, nfe: int, **options: object):
    x, field, cond = draw(text, nfe, 96, **options)
    metric = registry.build_metric(metric_id)
    extractor = registry.build_extractor("posterior")
    rows = extractor(SampleBatch(x, None, cond, field.inner.model)).numpy()
    return metric.compute(metric.update({"posterior": rows}), None)


def test_red_diff_seeks_the_mode_where_there_is_one() -> None:
    """One mode per class: a higher SNR than DPS and too little spread, as the catalogue says of the method."""
    options = {"components": 3, "std": 0.3, "measurements": 24, "seed": 1}
    red = {name: score("red-diff", f"{name}@posterior", 60, **options) for name in ("recovery-snr", "posterior-spread")}
    dps = {name: score("dps", f"{name}@posterior", 60, **options) for name in ("recovery-snr", "posterior-spread")}
    assert red["recovery-snr"].low > dps["recovery-snr"].high  # type: ignore[operator]
    assert red["posterior-spread"].high < 0.5  # type: ignore[operator]
    assert red["posterior-spread"].high < dps["posterior-spread"].low  # type: ignore[operator]


def test_both_use_the_measurement() -> None:
    """Far nearer to y than the unconditional model's samples."""
    options = {"components": 12, "std": 0.3, "measurements": 24, "seed": 1}
    plain = score("ddpm", "consistency@posterior", 60, **options).value
    for text in ("red-diff", "dps"):
        assert score(text, "consistency@posterior", 60, **options).value < plain / 5


# --- the contract, on a suite that has an operator ------------------------------------------------------------------


def sample(method: str, nfe: int, indices: list[int], guidance: float = 1.0) -> tuple[torch.Tensor, Ledger]:
    suite = load_suite("gmm-inverse").override(batch=12)
    setup = sampling.build(suite)
    cond = sampling.conditions(suite, setup.model, indices, setup.device)
    ledger = Ledger(len(indices), budget=nfe)
    cell = make_cell(suite, method, nfe, guidance, seed=3)
    return sampling.sample(setup, registry.build_method(method), cell, indices, cond, ledger), ledger


@pytest.mark.parametrize("method", METHODS)
def test_any_budget_is_spent(method: str) -> None:
    for nfe in (1, 2, 3, 20):
        x, ledger = sample(method, nfe, [0, 1])
        assert torch.isfinite(x).all()
        np.testing.assert_array_equal(ledger.nfe, nfe)


@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_the_company(method: str) -> None:
    order = [7, 3, 11, 0, 5, 9, 1, 8, 2, 10, 4, 6]
    straight, _ = sample(method, 6, list(range(12)))
    assert torch.equal(straight[order], sample(method, 6, order)[0])
    torch.testing.assert_close(sample(method, 6, [7])[0], straight[7:8], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_guidance_reaches_the_prior(method: str) -> None:
    guided, ledger = sample(method, 6, [0, 1, 2], guidance=2.0)
    np.testing.assert_array_equal(ledger.evals["base"], 12)
    assert not torch.allclose(guided, sample(method, 6, [0, 1, 2])[0])


@pytest.mark.parametrize("method", ["red-diff", "dps"])
def test_a_suite_without_operator_is_refused(method: str) -> None:
    suite = load_suite("gmm-smooth")
    setup = sampling.build(suite)
    cond = sampling.conditions(suite, setup.model, [0], setup.device)
    with pytest.raises(Unsupported, match="needs operator"):
        sampling.sample(
            setup, registry.build_method(method), make_cell(suite, method, 5, 1.0, 0), [0], cond, Ledger(1, 5)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red-diff(lr=0)", "lr must be above 0"),
        ("red-diff(lam=-1)", "lam must be at least 0"),
        ("red-diff(v=-1)", "v must be at least 0"),
        ("red-diff(sigma_x0=-1)", "sigma_x0 must be at least 0"),
        ("red-diff(weight=cubic)", "weight"),
        ("red-diff(grid=even)", "unknown grid"),
        ("dps(zeta=-1)", "zeta must be at least 0"),
        ("dps(eta=1.5)", "eta must lie in 0..1"),
        ("dps(grid=even)", "unknown grid"),
    ],
)
def test_wrong_settings(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build_method(text)
