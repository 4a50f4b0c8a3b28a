"""PPAP: its oracle is classifier-free guidance, its classifiers are trained where they are used."""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalbench import preparation, registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import convert
from evalbench.engine import linear_step
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Artifact, Cond, Denoiser, SampleBatch
from evalbench.noise import NoiseSource
from evalbench.paths import grid, make_path
from evalbench.registry import Chain
from evalbench.runner import make_cell
from evalbench.spec import load_suite

torch.set_num_threads(1)
MODULE: Any = sys.modules[registry.get("method", "ppap").__module__]
QUICK = "iterations=60,generated=256"
B = 96


@lru_cache
def setup(suite: str = "gmm-smooth") -> sampling.Setup:
    return sampling.build(load_suite(suite).override(batch=B))


@lru_cache
def artifacts(text: str, suite: str = "gmm-smooth") -> tuple[Artifact | None, ...]:
    cell = make_cell(setup(suite).suite, text, 10, 1.0, 0)
    return preparation.prepare(setup(suite), registry.build_method(text), cell).artifacts


def chain(wrap: str, suite: str = "gmm-smooth") -> Chain:
    text = f"ddim+{wrap}"
    return registry.build_method(text).equipped(artifacts(text, suite))


def cond(suite: str = "gmm-smooth") -> Cond:
    return sampling.conditions(setup(suite).suite, setup(suite).model, range(B), torch.device("cpu"))


def field(wrap: str, suite: str = "gmm-smooth") -> tuple[Denoiser, Ledger]:
    made, door = chain(wrap, suite), setup(suite).door
    door.ledger = ledger = Ledger(B)  # after preparing, which writes into ledgers of its own
    return made.wraps[0].wrap(door), ledger


def sample(wrap: str, nfe: int = 8, suite: str = "gmm-smooth") -> tuple[torch.Tensor, Ledger]:
    made = chain(wrap, suite) if wrap else registry.build_method("ddim")
    ledger, cell = Ledger(B, nfe), make_cell(setup(suite).suite, made.text, nfe, 1.0, 0)
    return sampling.sample(setup(suite), made, cell, range(B), cond(suite), ledger), ledger


# --- the oracle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["gmm-smooth", "gmm-smooth-edm", "gmm-smooth-flow"])
def test_the_exact_classifier_makes_the_conditional_model(suite: str) -> None:
    torch.testing.assert_close(sample("ppap(classifier=exact)", suite=suite)[0], sample("", suite=suite)[0])


def test_the_exact_classifier_is_classifier_free_guidance() -> None:
    torch.testing.assert_close(sample("ppap(classifier=exact,scale=2.5)")[0], sample("cfg(scale=2.5)")[0])


def test_the_exact_gradient_is_that_of_the_class_posterior() -> None:
    """-sigma grad log p(y | x_t), by autograd from the mixture's own responsibilities."""
    model, path, t = setup().model, setup().path, 0.3
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    x = torch.randn(B, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shares = model.responsibilities(x, alpha, sigma).unflatten(1, (2, 3)).sum(1)
    labels = cond().labels
    assert labels is not None
    (slope,) = torch.autograd.grad(shares.log()[torch.arange(B), labels].sum(), x)
    guided, _ = field("ppap(classifier=exact)")
    plain, _ = field("ppap(scale=0,classifier=exact)")
    x = x.detach()
    torch.testing.assert_close(guided(x, t, cond(), "eps") - plain(x, t, cond(), "eps"), -sigma * slope)


# --- the classifiers ------------------------------------------------------------------------------------------------


def layers(*lead: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = ((7, 5), (7,), (3, 7), (3,))
    return MODULE.Layers(*(torch.from_numpy(rng.standard_normal((*lead, *shape))) for shape in shapes))


def test_the_gradient_written_out_is_that_of_autograd() -> None:
    classifier, labels = layers(), torch.tensor([0, 1, 2, 2])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    score = torch.log_softmax(classifier.logits(x), -1)[torch.arange(4), labels].sum()
    (slope,) = torch.autograd.grad(score, x)
    torch.testing.assert_close(classifier.log_gradient(x.detach(), labels), slope)


def test_every_row_has_its_classifier_and_the_null_label_none() -> None:
    stacked, x = layers(4), torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, -1, 2, 1])
    together = stacked.log_gradient(x, labels)
    assert not together[1].any()
    for i in range(4):
        alone = MODULE.Layers(*(tensor[i] for tensor in stacked))
        torch.testing.assert_close(alone.log_gradient(x[i : i + 1], labels[i : i + 1]), together[i : i + 1])


def test_the_gradient_can_be_differentiated() -> None:
    classifier, labels = layers(), torch.tensor([0, 1])
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: classifier.log_gradient(x, labels), (x,))


def test_a_low_rank_expert_starts_as_the_clean_classifier() -> None:
    clean = layers()
    free, build = MODULE._low_rank(clean, np.random.default_rng(0))
    for found, was in zip(build(), clean, strict=True):
        assert torch.equal(found.detach(), was)
    assert sum(tensor.numel() for tensor in free) > 0
    build().logits(torch.ones(1, 5, dtype=torch.float64))[0, 0].backward()
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in free)


def test_the_clean_classifier_knows_clean_data() -> None:
    """Bayes accuracy on sharp modes is 1."""
    (_, made) = artifacts("ddim+ppap(experts=0,iterations=300)", "gmm-sharp")
    assert made is not None
    clean = MODULE.Layers(*(torch.from_numpy(made.arrays[name][0]) for name in MODULE.Layers._fields))
    labels = cond("gmm-sharp").labels
    x = setup("gmm-sharp").model.data(range(B), labels, 5)
    assert (clean.logits(x).argmax(1) == labels).double().mean() > 0.97


# --- the field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["gmm-smooth", "gmm-smooth-edm", "gmm-smooth-flow"])
def test_every_prediction_is_moved_alike(suite: str) -> None:
    guided, _ = field(f"ppap({QUICK},scale=1.7)", suite)
    x = setup(suite).model.start(NoiseSource(0, range(B), (8,), torch.float64), setup(suite).path)
    t = 0.4 * setup(suite).path.t_start
    eps = guided(x, t, cond(suite), "eps")
    for want in ("x0", "v", "velocity", "score"):
        found = convert(guided(x, t, cond(suite), want), x, guided.path, t, want, "eps")  # type: ignore[arg-type]
        torch.testing.assert_close(found, eps)


def test_times_of_their_own_pick_experts_of_their_own() -> None:
    guided, _ = field(f"ppap({QUICK})")
    x = torch.randn(B, 8, dtype=torch.float64)
    t = torch.linspace(0.02, 1.0, B, dtype=torch.float64)
    together = guided(x, t, cond(), "eps")
    for i in (0, B // 2, B - 1):
        whole = guided(x, float(t[i]), cond(), "eps")
        torch.testing.assert_close(together[i], whole[i])
    with pytest.raises(Unsupported, match="one time per sample"):
        guided(x, t[:, None].expand(B, 8), cond(), "eps")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    u=st.floats(0, 1),
    experts=st.integers(1, 9),
    ranges=st.sampled_from(["time", "logsnr"]),
    kind=st.sampled_from(["vp-linear", "edm", "flow"]),
)
def test_an_expert_serves_the_times_it_was_trained_on(u: float, experts: int, ranges: str, kind: str) -> None:
    method, path = MODULE.PPAP(experts=experts, ranges=ranges), make_path(kind)
    share = u * experts
    if abs(share - round(share)) < 1e-6:
        return
    assert method.expert_of(path, method._times(path, u)) == int(share)
    assert method.expert_of(path, path.t_start) == 0
    assert method.expert_of(path, path.t_end) == experts - 1


def test_scale_zero_is_the_unconditional_model() -> None:
    assert torch.equal(sample(f"ppap({QUICK},scale=0)")[0], sample("cfg(scale=0)")[0])


def test_what_it_costs() -> None:
    """One network row and one classifier row per evaluation, no gradient through the network."""
    _, ledger = sample(f"ppap({QUICK})", 8)
    np.testing.assert_array_equal(ledger.nfe, 8)
    np.testing.assert_array_equal(ledger.evals["base"], 8)
    np.testing.assert_array_equal(ledger.aux["classifier"], 8)
    assert not ledger.backward.any()


def test_generated_samples_are_on_the_bill() -> None:
    text = f"ddim+ppap({QUICK})"
    for wrap, evaluations in ((text, 25 * 256), ("ddim+ppap(classifier=exact)", 0)):
        cell = make_cell(setup().suite, wrap, 10, 1.0, 0)
        bill = preparation.prepare(setup(), registry.build_method(wrap), cell).bill
        assert bill["nfe"] == evaluations


def test_preparing_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    text = f"ddim+ppap({QUICK})"
    cell = make_cell(setup().suite, text, 10, 1.0, 0)

    def arrays(text: str) -> dict[str, np.ndarray]:
        made = preparation.prepare(setup(), registry.build_method(text), cell).artifacts[1]
        assert made is not None
        return dict(made.arrays)

    one, again, other = arrays(text), arrays(text), arrays(f"ddim+ppap({QUICK},seed=1)")
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, array in one.items():
        assert len(array) == 5
        np.testing.assert_array_equal(array, again[name])
        assert not np.allclose(array, other[name])


def test_without_preparation_it_says_so() -> None:
    with pytest.raises(Unsupported, match="nothing prepared"):
        registry.build_method("ddim+ppap").wraps[0].wrap(setup().door)


# --- the catalogue's claim ------------------------------------------------------------------------------------------


def guidance_error(wrap: str, suite: str) -> float:
    """RMS error of eps over DDIM's 25 states of the conditional model, relative to the RMS of the exact guidance."""
    guided, _ = field(wrap, suite)
    door, path, conditions = setup(suite).door, setup(suite).path, cond(suite)
    x = setup(suite).model.start(NoiseSource(0, range(B), (8,), torch.float64), path)
    wrong = size = 0.0
    for s, t in pairwise(grid(path, door.grid, 25)):
        exact = door(x, s, conditions, "eps")
        wrong += float((guided(x, s, conditions, "eps") - exact).square().sum())
        size += float((door(x, s, conditions.null(), "eps") - exact).square().sum())
        a, b = linear_step(path, s, t, "eps")
        x = a * x + b * exact
    return (wrong / size) ** 0.5


def test_five_experts_guide_better_than_one_and_one_better_than_the_clean_classifier() -> None:
    errors = [guidance_error(f"ppap(experts={n},iterations=500)", "gmm-smooth") for n in (5, 1, 0)]
    assert errors[0] < 0.85 * errors[1]
    assert errors[1] < 0.5 * errors[2]


def test_an_expert_knows_its_own_noise_best() -> None:
    """Cross-entropy at the middle of the noisiest and of the cleanest range, by the expert of each."""
    (_, made) = artifacts("ddim+ppap(iterations=500)")
    assert made is not None
    model, path, labels = setup().model, setup().path, cond().labels
    assert labels is not None
    x0, eps = model.data(range(B), labels, 5), NoiseSource(5, range(B), (8,), torch.float64).start()
    loss = np.empty((2, 2))
    for i, t in enumerate((0.9, 0.1)):
        x = float(path.alpha(t)) * x0 + float(path.sigma(t)) * eps
        for j, k in enumerate((0, 4)):
            expert = MODULE.Layers(*(torch.from_numpy(made.arrays[name][k]) for name in MODULE.Layers._fields))
            loss[i, j] = torch.nn.functional.cross_entropy(expert.logits(x), labels)
    assert loss[0, 0] < loss[0, 1]
    assert loss[1, 1] < loss[1, 0]


def test_a_guided_sample_has_its_class() -> None:
    """Against the unconditional model, whose samples have the label's class in a third of the cases."""
    extract = registry.build_extractor("gmm-class")

    def accuracy(wrap: str) -> float:
        x, _ = sample(wrap, 25, "gmm-sharp")
        return float(extract(SampleBatch(x, None, cond("gmm-sharp"), setup("gmm-sharp").model)).mean())

    assert accuracy("ppap(classifier=exact)") > 0.95
    assert accuracy("ppap(iterations=300)") > accuracy("cfg(scale=0)") + 0.2


@pytest.mark.parametrize("teacher", ["clean", "labels"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_other_ways_to_train(teacher: str, adapter: str) -> None:
    x, _ = sample(f"ppap({QUICK},teacher={teacher},adapter={adapter},ranges=logsnr)")
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts=-1", "experts must be at least 0"),
        ("classifier=other", "classifier"),
        ("teacher=other", "teacher"),
        ("adapter=other", "adapter"),
        ("ranges=other", "ranges"),
        ("temperature=0", "temperature must be above 0"),
        ("lr=0", "lr must be above 0"),
        ("hidden=0", "hidden must be at least 1"),
        ("generated=0", "generated must be at least 1"),
        ("iterations=0", "iterations must be at least 1"),
    ],
)
def test_wrong_settings(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build_method(f"ddim+ppap({text})")
