"""MMD-DDM and diversity distillation: the loss, the gradient through all steps, the bill, the hand-over."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import twins

from evalbench import registry, sampling
from evalbench.cost.ledger import Ledger
from evalbench.errors import UserError
from evalbench.preparation import Prepared, prepare
from evalbench.runner import make_cell

train = sys.modules[registry.get("method", "mmd-ddm").__module__].train  # nobody imports a method by its name
mmd2 = sys.modules[train.__module__].mmd2

MMD = "ddim+mmd-ddm(iterations=2,batch=4,rate=0.001)"
HYBRID = "diversity-distill(steps=3,iterations=1,batch=4,rate=0.01)"


def made(method: str, nfe: int) -> Prepared:
    setup = twins.setup("dit")
    return prepare(setup, registry.build_method(method), make_cell(setup.suite, method, nfe, 1.0, 0))


def sampled(method: str, nfe: int, prepared: Prepared | None = None) -> tuple[torch.Tensor, Ledger]:
    setup = twins.setup("dit")
    chain = registry.build_method(method)
    if prepared is not None:
        chain = chain.equipped(prepared.artifacts)
    indices = [0, 1]
    ledger = Ledger(2, budget=nfe)
    cond = sampling.conditions(setup.suite, setup.model, indices, setup.device)
    cell = make_cell(setup.suite, method, nfe, 1.0, 0)
    return sampling.sample(setup, chain, cell, indices, cond, ledger), ledger


def test_the_loss_is_unbiased_and_tells_sets_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 40, 5, generator=generator, dtype=torch.float64)
    same = torch.stack([mmd2(draw[:20], draw[20:]) for draw in x])
    assert abs(float(same.mean())) < 4 * float(same.std()) / 20
    assert bool((same < 0).any()), "a biased estimate is never below zero"
    assert float(mmd2(x[0, :20], x[0, 20:] + 2.0)) > float(same.max())


def test_training_changes_the_samples_but_not_the_network_and_is_billed() -> None:
    network = twins.setup("dit").door.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain, _ = sampled("ddim", 3)
    prepared = made(MMD, 3)
    assert prepared.bill["nfe"] == 2 * 4 * 3  # iterations, batch, steps
    assert prepared.bill["aux.training"] == 2 * 4
    assert prepared.bill["flops"] > 2 * prepared.bill["cost"]
    tuned, ledger = sampled(MMD, 3, prepared)
    assert not torch.equal(tuned, plain)
    assert ledger.cost.tolist() == pytest.approx([3.0, 3.0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(sampled("ddim", 3)[0], plain)


@pytest.mark.slow
def test_every_weight_gets_a_gradient_through_all_steps() -> None:
    prepared = made("ddim+mmd-ddm(iterations=1,batch=4,rate=0.001)", 2)
    network = twins.setup("dit").door.network
    artifact = prepared.artifacts[1]
    assert artifact is not None
    moved = [
        name for name, value in network.named_parameters() if not np.array_equal(artifact.arrays[name], value.numpy())
    ]
    # the keys' bias shifts all scores of a query alike, which softmax does not see
    still = {name for name, _ in network.named_parameters()} - set(moved)
    assert all(name.endswith("to_k.bias") for name in still), still


@pytest.mark.slow
def test_training_lowers_its_loss_on_its_own_features() -> None:
    prepared = made("ddim+mmd-ddm(iterations=12,batch=16,rate=0.003,features=identity)", 2)
    artifact = prepared.artifacts[1]
    assert artifact is not None
    losses = artifact.facts["losses"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.slow
def test_the_hybrid_is_the_base_first_and_the_student_then() -> None:
    prepared = made(HYBRID, 5)
    found, ledger = sampled(HYBRID, 5, prepared)
    assert ledger.nfe.tolist() == [5.0, 5.0]
    alone, spent = sampled(HYBRID[:-1] + ",hybrid=false)", 5, prepared)
    assert spent.nfe.tolist() == [3.0, 3.0]
    short, _ = sampled(HYBRID, 3, prepared)  # base on the first interval of the student's own grid
    assert not torch.equal(found, alone)
    assert not torch.equal(short, alone)
    untuned = Prepared((type(prepared.artifacts[0])(),), {})  # a student that is the base itself
    torch.testing.assert_close(sampled(HYBRID, 3, untuned)[0], sampled(HYBRID[:-1] + ",hybrid=false)", 3, untuned)[0])


@pytest.mark.parametrize(
    "method", ["ddim+mmd-ddm(iterations=0)", "ddim+mmd-ddm(batch=1)", "diversity-distill(steps=1)"]
)
def test_a_training_that_is_none_is_one_line(method: str) -> None:
    with pytest.raises(UserError, match="must be at least"):
        registry.build_method(method)
