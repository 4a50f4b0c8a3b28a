"""What every registered method must keep, asked of the registry: budgets, guidance, and bits that depend on the
sample alone. (Orders and agreement with diffusers are in tests/methods/.)
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import twins
from support import small_suite

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported
from evalbench.interfaces import Artifact, Modifier, Solver, Wrap
from evalbench.preparation import prepare
from evalbench.registry import Chain
from evalbench.runner import make_cell
from evalbench.spec import Suite, load_suite

BUDGETS = range(1, 21)
FEW = (1, 2, 3, 8, 20)  # of what is trained or calibrated for each budget on a network
# Settings that change what a method computes or spends, beside the defaults of every registered one.
VARIANTS = [
    "ddim(eta=0.7)",
    "heun(S_churn=2)",
    "dpm-solver(order=2)",
    "dpm-solver(order=3,algorithm=multistep)",
    "dpm-solver++(order=3)",
    "dpm-solver++(order=3,d2=taylor)",
    "dpm-solver++(algorithm=singlestep)",
    "dpm-solver++(algorithm=sde)",
    "dpm-solver++(lower_order_final=false)",
    "unipc(order=3)",
    "unipc(variant=bh1)",
    "deis(space=rho)",
    "ipndm(variable_step=true)",
    "diffusers:DDIMScheduler",
    "diffusers:DPMSolverMultistepScheduler",
    "diffusers:EulerAncestralDiscreteScheduler",
    "radd(cache=false)",
    "radd(update=euler)",
    "any-order(order=left-to-right)",
    "ddim+unidiffuser(task=image)",
    "heun+unidiffuser(task=text-given-image,scale=2)",
    "ddpm+best-of-n(n=1)",
    "rbf(interpolant=vp)",
    "svdd(interpolant=vp,grid=)",
    "dpm-solver+++faster-diffusion(keys=uniform:3,parallel=true)",
    "ddim+deediff(policy=random,images=4,iterations=1)",
]
SUITES = ["gmm-smooth", "gmm-smooth-edm", "gmm-smooth-flow"]
# Where a method runs that needs what the models of SUITES do not have, by what it needs.
ELSEWHERE = {
    "blocks": "twin-dit",
    "network": "twin-dit",
    "split": "twin-dit",
    "modalities": "gmm-joint",
    "operator": "gmm-inverse",
    "reward": "gmm-reward-flow",
    "role small": "gmm-64-pair",
    "tokens": "tokens-markov",
}
# A capability that only one of the twins has.
ONLY = {"time features": "twin-sd"}
# What is trained or calibrated, for less.
LESS = {
    "mmd-ddm": "mmd-ddm(iterations=1,batch=2)",
    "diversity-distill": "diversity-distill(iterations=1,batch=2)",
    "ptq4dm": "ptq4dm(samples=2,steps=2)",
    "vidit-q": "vidit-q(samples=2,steps=2)",
    "tfmq": "tfmq(samples=2,steps=2,tiar=1,adaround=false)",
    "tfmq-cache": "tfmq-cache(samples=2,adaround=false)",
}


def _methods() -> list[str]:
    plain = [name for name in registry.names("method") if not name.endswith(":*")]
    solvers = [LESS.get(name, name) for name in plain if issubclass(registry.get("method", name), Solver)]
    around = [name for name in plain if issubclass(registry.get("method", name), Wrap | Modifier)]
    others = [f"ddim+{LESS.get(name, name)}" for name in around]
    return [*solvers, *others, *VARIANTS]


def _suites(method: str) -> list[str]:
    requires = registry.build_method(method).requires
    if only := [ONLY[need] for need in sorted(requires & ONLY.keys())]:
        return only
    needs = requires & ELSEWHERE.keys()
    return [ELSEWHERE[need] for need in sorted(needs)] or SUITES


def _pairs() -> list[tuple[str, str]]:
    return [(suite, method) for method in _methods() for suite in _suites(method)]


@lru_cache
def _setup(suite_name: str) -> sampling.Setup:
    if suite_name == "twin-dit":  # a network with an inside; small and of random weights
        return twins.setup("dit", "dit-small")
    if suite_name == "twin-sd":
        return twins.setup("sd")
    return sampling.build(small_suite(suite_name))


def _sample(
    suite: str, method: str, nfe: int, indices: list[int], guidance: float = 1.0, classes: bool = True
) -> tuple[torch.Tensor, Ledger]:
    setup = _setup(suite)
    cell = make_cell(setup.suite, method, nfe, guidance, seed=3)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    ledger = Ledger(len(indices), budget=nfe)
    return sampling.sample(setup, _chain(suite, method, nfe, guidance), cell, indices, cond, ledger), ledger


def _chain(suite: str, method: str, nfe: int, guidance: float) -> Chain:
    """A method with what it prepares."""
    chain = registry.build_method(method)
    per_nfe = nfe if chain.prepares == "per-nfe" else max(BUDGETS)
    return chain.equipped(_artifacts(suite, method, per_nfe, guidance)) if chain.prepares else chain


@lru_cache
def _artifacts(suite: str, method: str, nfe: int, guidance: float) -> tuple[Artifact | None, ...]:
    setup = _setup(suite)
    return prepare(setup, registry.build_method(method), make_cell(setup.suite, method, nfe, guidance, 3)).artifacts


@pytest.mark.parametrize(("suite", "method"), _pairs())
def test_every_budget_is_kept_or_clearly_refused(suite: str, method: str) -> None:
    spent, refused = {}, []
    budgets = FEW if suite.startswith("twin-") and registry.build_method(method).prepares == "per-nfe" else BUDGETS
    for nfe in budgets:
        try:
            x, ledger = _sample(suite, method, nfe, [0, 1, 2])
        except Unsupported as refusal:
            refused.append(str(refusal))
            continue
        assert torch.isfinite(x).all(), f"NFE {nfe}"
        assert 0 < ledger.nfe.max() <= nfe
        spent[nfe] = ledger.nfe.max()
    assert all(reason.strip() for reason in refused), "a refusal says why"
    if not method.startswith("diffusers:"):
        assert set(spent) == set(budgets), "methods of our own take any budget"
        assert spent[20] >= 19, "a budget is used"


@pytest.mark.parametrize("method", [method for method in _methods() if _suites(method) != SUITES])
def test_a_model_that_lacks_what_a_method_needs_is_refused(method: str) -> None:
    with pytest.raises(Unsupported, match="not supported: needs "):
        _sample("gmm-smooth", method, 8, [0, 1, 2])


@pytest.mark.parametrize("method", _methods())
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_doubles_the_rows_and_changes_the_samples(method: str, scale: float) -> None:
    suite = _suites(method)[0]
    plain, _ = _sample(suite, method, 8, [0, 1, 2])
    guides = registry.build_method(method).guidance  # a method that guides itself replaces the suite's guidance
    if "labels" not in _setup(suite).model.provides and not guides:
        with pytest.raises(Unsupported, match="needs labels"):
            _sample(suite, method, 8, [0, 1, 2], guidance=scale)
        return
    guided, ledger = _sample(suite, method, 8, [0, 1, 2], guidance=scale)
    assert torch.isfinite(guided).all()
    if guides:
        assert torch.equal(plain, guided)
        return
    np.testing.assert_array_equal(ledger.evals["base"], 2 * ledger.nfe)
    assert not torch.allclose(plain, guided)


@pytest.mark.parametrize("method", _methods())
def test_a_sample_has_the_same_bits_at_any_place_in_the_batch(method: str) -> None:
    indices = list(range(12))
    shuffled = [7, 3, 11, 0, 5, 9, 1, 8, 2, 10, 4, 6]
    suite = _suites(method)[0]
    straight, _ = _sample(suite, method, 9, indices)
    moved, _ = _sample(suite, method, 9, shuffled)
    assert torch.equal(straight[shuffled], moved)


@pytest.mark.parametrize("method", _methods())
def test_another_batch_size_changes_rounding_only(method: str) -> None:
    suite = _suites(method)[0]
    together, _ = _sample(suite, method, 9, list(range(12)))
    alone, _ = _sample(suite, method, 9, [7])
    torch.testing.assert_close(together[7:8], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "heun", "dpm-solver++", "unipc", "ddpm"])
def test_another_batch_size_on_the_image_model_changes_rounding_only(method: str) -> None:
    made = []
    for batch in (64, 16):
        suite = load_suite("fashion-mixture").override(batch=batch)
        setup = sampling.build(suite)
        cond = sampling.conditions(suite, setup.model, range(batch), setup.device)
        cell = make_cell(suite, method, 10, 1.0, 0)
        made.append(sampling.sample(setup, registry.build_method(method), cell, range(batch), cond, Ledger(batch, 10)))
    assert (made[0][:16] - made[1]).norm() <= 1e-5 * made[1].norm()


@pytest.mark.parametrize("method", ["ddim", "heun", "dpm-solver++", "unipc", "ddpm"])
def test_bits_on_the_image_model_do_not_depend_on_the_place(method: str) -> None:
    suite: Suite = load_suite("fashion-mixture").override(batch=64)
    setup = sampling.build(suite)
    chain, cell = registry.build_method(method), make_cell(suite, method, 5, 1.0, 0)
    indices, order = np.arange(64), np.random.Generator(np.random.Philox(key=1)).permutation(64)

    def samples(which: np.ndarray) -> torch.Tensor:
        cond = sampling.conditions(suite, setup.model, which.tolist(), setup.device)
        return sampling.sample(setup, chain, cell, which.tolist(), cond, Ledger(64, 5))

    assert torch.equal(samples(indices)[order], samples(order))


@pytest.mark.parametrize(
    "method", [m for m in _methods() if "eta=" in m or m in ("ddpm", "dpm-solver++(algorithm=sde)")]
)
def test_seeds_are_different_samples_and_one_seed_the_same(method: str) -> None:
    setup = _setup("gmm-smooth")
    cond = sampling.conditions(setup.suite, setup.model, [0, 1], setup.device)

    def run(seed: int) -> torch.Tensor:
        cell = make_cell(setup.suite, method, 6, 1.0, seed)
        return sampling.sample(setup, registry.build_method(method), cell, [0, 1], cond, Ledger(2, 6))

    assert torch.equal(run(0), run(0))
    assert not torch.allclose(run(0), run(1))


# --- every usable diffusers scheduler ------------------------------------------------------------------------------


def _schedulers() -> list[str]:
    family = registry.get("method", "diffusers:DDIMScheduler")
    return [f"diffusers:{name}" for name, reason in family.members() if not reason]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_every_usable_scheduler_keeps_its_budget_and_its_bits() -> None:
    indices, shuffled = list(range(6)), [4, 2, 0, 5, 1, 3]
    refused = {}
    for method in _schedulers():
        used = 0
        for nfe in BUDGETS:
            for suite in SUITES:
                try:
                    x, ledger = _sample(suite, method, nfe, indices)
                except Unsupported as refusal:
                    refused[method, suite, nfe] = str(refusal)
                    continue
                assert torch.isfinite(x).all(), (method, suite, nfe)
                assert ledger.nfe.max() <= nfe, (method, suite, nfe)
                moved, _ = _sample(suite, method, nfe, shuffled)
                assert torch.equal(x[shuffled], moved), (method, suite, nfe)
                used += 1
        assert used >= 5, f"{method} runs at {used} of 60 budgets: it is not usable"  # PNDM starts at 13
    assert all(reason.strip() for reason in refused.values())
