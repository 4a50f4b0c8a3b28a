"""t-stitch: which model makes which step, counted by role; and the catalogue's facts on an exact pair."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.models.gmm import GaussianMixture
from evalbench.models.moments import MomentMatched
from evalbench.runner import make_cell
from evalbench.spec import load_suite

N = 1024
DDIM = "ddim(grid=time)"


@lru_cache
def _setup() -> sampling.Setup:
    return sampling.build(load_suite("gmm-64-pair").override(batch=N))


@lru_cache
def _draw(method: str, nfe: int = 50) -> tuple[torch.Tensor, Ledger]:
    setup = _setup()
    cond, ledger = sampling.conditions(setup.suite, setup.model, range(N), setup.device), Ledger(N, nfe)
    cell = make_cell(setup.suite, method, nfe, 1.0, 0)
    return sampling.sample(setup, registry.build_method(method), cell, range(N), cond, ledger), ledger


def _excess(x: torch.Tensor) -> float:
    """Mean squared distance to the nearest mode, in units of that of exact draws."""
    metric = registry.build_metric("mode-distance@gmm-mode-distance")
    extract = registry.build_extractor("gmm-mode-distance")
    scores = extract(SampleBatch(x, None, Cond(), _setup().model)).numpy()
    return metric.compute(metric.update({"gmm-mode-distance": scores}), None).value


def _frechet(x: torch.Tensor) -> float:
    exact = _setup().model.reference("identity")
    return frechet_distance(moments(x.numpy()).gaussian(), Gaussian(exact["mean"], exact["cov"]))


@pytest.mark.parametrize(("r", "n", "small"), [(0.4, 10, 4), (0.39, 10, 3), (0.0, 10, 0), (1.0, 7, 7), (0.5, 5, 2)])
@pytest.mark.parametrize("reverse", ["false", "true"])
def test_the_small_model_makes_the_floor_of_r_n_steps(r: float, n: int, small: int, reverse: str) -> None:
    _, ledger = _draw(f"{DDIM}+t-stitch(r={r},reverse={reverse})", n)
    assert (ledger.evals.get("small", np.zeros(N)) == small).all()
    assert (ledger.evals.get("base", np.zeros(N)) == n - small).all()
    assert (ledger.nfe == n).all()


def test_the_order_of_the_models_by_hand() -> None:
    setup = _setup()
    setup.door.ledger = Ledger(2)
    x = setup.model.start(sampling.NoiseSource(0, range(2), (64,), torch.float64), setup.path)
    cond = Cond()
    times = np.linspace(1.0, 1e-3, 6)
    roles = ["small", "small", "base", "base", "base"]
    for role, s, t in zip(roles, times[:-1], times[1:], strict=True):
        eps = setup.door.role(role)(x, float(s), cond, "eps")
        alpha_s, sigma_s, alpha_t, sigma_t = (float(f(u)) for u in (s, t) for f in (setup.path.alpha, setup.path.sigma))
        x = alpha_t * (x - sigma_s * eps) / alpha_s + sigma_t * eps
    torch.testing.assert_close(_draw(f"{DDIM}+t-stitch(r=0.4)", 5)[0][:2], x)


def test_both_ends_are_one_model_alone() -> None:
    assert torch.equal(_draw(f"{DDIM}+t-stitch(r=0.0)")[0], _draw(DDIM)[0])
    small = _draw(f"{DDIM}+t-stitch(r=1.0)")[0]
    assert torch.equal(small, _draw(f"{DDIM}+t-stitch(r=1.0,reverse=true)")[0])
    assert not torch.allclose(small, _draw(DDIM)[0])


def test_forty_percent_of_the_steps_cost_nothing_here_and_the_reversed_order_leaves_the_modes() -> None:
    """Catalogue A, section 7: Frechet 0.0482 to 0.0499 at r = 0.4, 0.101 at 0.6; reversed, samples leave the modes."""
    plain, stitched, late = (_draw(f"{DDIM}+t-stitch(r={r})")[0] for r in (0.0, 0.4, 0.6))
    reverse = _draw(f"{DDIM}+t-stitch(r=0.4,reverse=true)")[0]
    assert _frechet(stitched) == pytest.approx(_frechet(plain), rel=0.1)
    assert _frechet(late) > _frechet(stitched)
    assert _excess(plain) < 1.0, "50 uniform steps leave the modes a little too narrow"
    assert _excess(stitched) == pytest.approx(_excess(plain), abs=0.05)
    assert _excess(reverse) > 1.3


def test_a_frechet_distance_is_nearly_blind_to_the_small_model_and_the_mode_distance_is_not() -> None:
    small = _draw(f"{DDIM}+t-stitch(r=1.0)")[0]
    assert _frechet(small) < 2 * _frechet(_draw(DDIM)[0]) + 0.2
    assert _excess(small) > 1.5


def test_a_suite_without_a_small_model_is_not_supported() -> None:
    setup = sampling.build(load_suite("gmm-smooth").override(batch=4))
    chain = registry.build_method("ddim+t-stitch")
    with pytest.raises(Unsupported, match="needs role small"):
        sampling.wrapped(setup.door, chain, 1.0)


@pytest.mark.parametrize("r", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(r: float) -> None:
    with pytest.raises(UserError, match=r"t-stitch: r must be in 0\.\.1"):
        registry.build_method(f"ddim+t-stitch(r={r})")


def test_guidance_goes_into_whichever_model_is_active() -> None:
    setup = sampling.build(load_suite("gmm-smooth").override(batch=4))
    door = sampling.NetworkDoor(setup.model, setup.path, "time", roles={"small": setup.model})
    door.ledger = Ledger(4)
    cond = sampling.conditions(setup.suite, setup.model, range(4), setup.device)
    guided = registry.build_guidance(2.0).wrap(door)
    x = setup.model.start(sampling.NoiseSource(0, range(4), (8,), torch.float64), setup.path)
    torch.testing.assert_close(guided.role("small")(x, 0.5, cond), guided(x, 0.5, cond))
    assert (door.ledger.evals["small"] == 2).all()
    assert (door.ledger.evals["base"] == 2).all()


def test_the_small_model_is_the_exact_denoiser_of_its_gaussian() -> None:
    model = MomentMatched(dim=5, components=4, std=0.3)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = 0.8, 0.6
    exact = GaussianMixture(dim=5, components=4, std=0.3, classes=0).reference("identity")
    mean, cov = exact["mean"], exact["cov"]
    gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(5))
    expected = mean + (x.numpy() - alpha * mean) @ gain.T
    np.testing.assert_allclose(model.predict(x, 0.5, alpha, sigma, None).numpy(), expected, rtol=1e-10)


def test_several_models_follow_each_other_by_cumulative_shares() -> None:
    setup = sampling.build(load_suite("gmm-smooth").override(batch=2))
    roles = {"small": setup.model, "medium": setup.model}
    door = sampling.NetworkDoor(setup.model, setup.path, "time", roles=roles)
    door.ledger = Ledger(2)
    chain = registry.build_method("ddim+t-stitch(r=0.2,then=medium:0.3)")
    assert chain.requires == {"role small", "role medium"}
    x = setup.model.start(sampling.NoiseSource(0, range(2), (8,), torch.float64), setup.path)
    chain.solver.sample(chain.wraps[0].wrap(door), x, Cond(torch.zeros(2, dtype=torch.int64)), 10, None)
    counts = {role: rows[0] for role, rows in door.ledger.evals.items()}
    assert counts == {"small": 2, "medium": 3, "base": 5}


@pytest.mark.parametrize("then", ["medium", "medium:x", "medium:1.5", ":0.2", "medium:0.9"])
def test_shares_that_mean_nothing_are_refused(then: str) -> None:
    with pytest.raises(UserError, match="t-stitch: ") as error:
        registry.build_method(f"ddim+t-stitch(r=0.4,then={then})")
    assert "\n" not in str(error.value)
