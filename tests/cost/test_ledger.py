"""The ledger against counts made by hand: solvers, guidance, caches, several models, early exit, auxiliary networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from exact_model import COND, exact, solver
from torch import nn

from evalbench import registry, worker
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.errors import BudgetExceeded
from evalbench.interfaces import Cond, Denoiser, DenoiserWrap, Model, Step, Time, Want
from evalbench.noise import NoiseSource
from evalbench.paths import VPLinear

BATCH = 4


@dataclass
class Stack(Model):
    """A network of `depth` square layers of `width`, each 2 width^2 FLOPs a row."""

    width: int = 8
    depth: int = 10
    layers: list[nn.Linear] = field(init=False)
    native = "x0"
    num_classes = 3
    provides = frozenset({"labels"})

    def __post_init__(self) -> None:
        self.shape = (8,)
        self.layers = [nn.Linear(self.width, self.width, bias=False) for _ in range(self.depth)]

    @property
    def flops(self) -> int:
        return 2 * self.width**2 * self.depth

    def run(self, x: torch.Tensor, layers: int) -> torch.Tensor:
        hidden = x.repeat(1, -(-self.width // x.shape[1]))[:, : self.width]
        for layer in self.layers[:layers]:
            hidden = torch.tanh(layer(hidden))
        return torch.zeros_like(x) + hidden[:, : x.shape[1]].mean(1, keepdim=True)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        return self.run(x, self.depth)


def doors(batch: int = BATCH, **options: Any) -> tuple[NetworkDoor, Ledger]:
    """A base door and the ledger it writes."""
    door, ledger = NetworkDoor(Stack(**options), VPLinear(), "logsnr"), Ledger(batch)
    door.ledger = ledger
    return door, ledger


def run(text: str, nfe: int, wrap: Callable[[Denoiser], Denoiser], door: NetworkDoor) -> None:
    """A solver on a wrapped door."""
    outer = Field(wrap(door), door.ledger)
    noise = NoiseSource(0, range(BATCH), door.shape, torch.float32)
    with torch.no_grad():
        solver(text).sample(outer, noise.start(), Cond(torch.zeros(BATCH, dtype=torch.int64)), nfe, noise)


def everyone(value: float) -> np.ndarray:
    return np.full(BATCH, float(value))


# --- solvers and guidance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "budget", "spent"),
    [("ddim", 7, 7), ("heun", 9, 4 * 2 + 1), ("heun", 10, 5 * 2), ("dpm-solver++", 6, 6)],
)
def test_solvers(text: str, budget: int, spent: int) -> None:
    door, ledger = doors()
    run(text, budget, lambda d: d, door)
    np.testing.assert_array_equal(ledger.nfe, everyone(spent))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(spent))
    np.testing.assert_array_equal(ledger.cost, everyone(spent))
    np.testing.assert_array_equal(ledger.flops, everyone(spent * door.model.flops))
    assert ledger.depth == spent
    assert not ledger.backward.any()
    assert not ledger.aux


def test_guidance_doubles_rows() -> None:
    door, ledger = doors()
    run("ddim", 5, registry.build_guidance(2.0).wrap, door)
    np.testing.assert_array_equal(ledger.nfe, everyone(5))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(10))
    np.testing.assert_array_equal(ledger.cost, everyone(10))
    assert ledger.depth == 5


class Interval(DenoiserWrap):
    """Guidance on steps first..last, the conditional model elsewhere."""

    def __init__(self, inner: Denoiser, first: int, last: int) -> None:
        super().__init__(inner)
        self.first, self.last = first, last
        self.on, self.off = (registry.build_guidance(scale).wrap(inner) for scale in (2.0, 1.0))

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
        assert step is not None
        guided = self.on if self.first <= step.i <= self.last else self.off
        return guided(x, t, cond, want, step=step, rows=rows)


def test_guidance_outside_its_interval_costs_one_row() -> None:
    door, ledger = doors()
    run("ddim", 10, lambda d: Interval(d, 3, 6), door)
    np.testing.assert_array_equal(ledger.nfe, everyone(10))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(4 * 2 + 6))
    np.testing.assert_array_equal(ledger.cost, everyone(4 * 2 + 6))


# --- calls that cost a part -----------------------------------------------------------------------------------------


class Cache(DenoiserWrap):
    """Every k-th step runs the whole network; others its first `shallow` layers, or what costs a stated share."""

    def __init__(self, inner: Denoiser, every: int, shallow: int, fraction: float | None) -> None:
        super().__init__(inner)
        self.every, self.shallow, self.fraction = every, shallow, fraction

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
        assert step is not None
        if step.i % self.every == 0:
            return self.inner(x, t, cond, want, step=step, rows=rows)
        door = self.inner
        return door.partial(
            lambda: door.model.run(x, self.shallow), x, t, cond, want, key=self.shallow, fraction=self.fraction
        )


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_a_cache_costs_what_it_ran(fraction: float | None) -> None:
    door, ledger = doors()
    run("ddim", 10, lambda d: Cache(d, 3, shallow=3, fraction=fraction), door)
    full, cached = 4, 6  # steps 0, 3, 6, 9
    np.testing.assert_array_equal(ledger.nfe, everyone(10))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(10))
    np.testing.assert_allclose(ledger.cost, everyone(full + cached * 0.3), rtol=1e-15)
    np.testing.assert_allclose(ledger.flops, everyone((full + cached * 0.3) * door.model.flops), rtol=1e-15)


@dataclass
class TwoLevels(Model):
    """A UNet of 8 x 8 images: one convolution at full size down and up, two deep ones at half size between them."""

    native = "eps"
    shape = (3, 8, 8)
    # 2 FLOPs for each of 9 c_in weights, output channel and pixel
    shallow = 2 * 9 * (3 * 4 + (4 + 4) * 3) * 64
    deep = 2 * 9 * (4 * 8 + 8 * 4) * 16

    def __post_init__(self) -> None:
        widths = {"enter": (3, 4), "down": (4, 8), "up": (8, 4), "leave": (8, 3)}
        self.layers = {name: nn.Conv2d(*width, 3, padding=1, bias=False) for name, width in widths.items()}

    def run_deep(self, skip: torch.Tensor) -> torch.Tensor:
        low = self.layers["up"](self.layers["down"](nn.functional.avg_pool2d(skip, 2)))
        return nn.functional.interpolate(low, scale_factor=2.0)

    def run(self, x: torch.Tensor, deep: torch.Tensor | None) -> torch.Tensor:
        skip = self.layers["enter"](x)
        deep = self.run_deep(skip) if deep is None else deep
        return torch.tanh(self.layers["leave"](torch.cat([skip, deep], 1)))

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        return self.run(x, None)


class DeepCache(DenoiserWrap):
    """Every k-th step runs the whole UNet; the others take its deep features from then."""

    def __init__(self, inner: NetworkDoor, every: int) -> None:
        super().__init__(inner)
        self.door, self.every = inner, every

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
        assert step is not None
        model: TwoLevels = self.door.model
        if step.i % self.every == 0:
            self.deep = model.run_deep(model.layers["enter"](x))
            return self.door(x, t, cond, want, step=step, rows=rows)
        return self.door.partial(lambda: model.run(x, self.deep), x, t, cond, want, key="shallow")


@pytest.mark.parametrize(("every", "full"), [(1, 10), (2, 5), (5, 2), (10, 1)])
def test_a_unet_cache_costs_its_shallow_path(every: int, full: int) -> None:
    door, ledger = NetworkDoor(TwoLevels(), VPLinear(), "logsnr"), Ledger(BATCH)
    door.ledger = ledger
    run("ddim", 10, lambda d: DeepCache(d, every), door)
    whole, shallow = TwoLevels.shallow + TwoLevels.deep, TwoLevels.shallow
    np.testing.assert_array_equal(ledger.nfe, everyone(10))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(10))
    np.testing.assert_array_equal(ledger.flops, everyone(full * whole + (10 - full) * shallow))
    np.testing.assert_allclose(ledger.cost, everyone(full + (10 - full) * shallow / whole), rtol=1e-15)


def test_the_cost_of_an_exact_model_needs_no_flops() -> None:
    door = exact(VPLinear(), BATCH).inner
    door.model.to(torch.float64, torch.device("cpu"))
    x = torch.randn(BATCH, *door.shape, dtype=torch.float64)
    door(x, 0.5, COND)
    door.partial(lambda: x, x, 0.5, COND, fraction=0.25)
    np.testing.assert_array_equal(door.ledger.cost, everyone(1.25))
    assert np.isnan(door.ledger.flops).all()


def test_rows_that_exit_early_cost_their_own_share() -> None:
    door, ledger = doors()
    x, exits = torch.randn(BATCH, 8), np.array([0.2, 0.5, 1.0, 0.5])
    for _ in range(2):
        door.partial(lambda: door.model.run(x, 10), x, 0.5, COND, fraction=exits)
    np.testing.assert_array_equal(ledger.evals["base"], everyone(2))
    np.testing.assert_array_equal(ledger.cost, [0.4, 1.0, 2.0, 1.0])
    np.testing.assert_array_equal(ledger.flops, 2 * exits * door.model.flops)


def test_half_the_width_of_the_input_is_no_full_call() -> None:
    door, ledger = doors()
    door.model.run = lambda x, layers: nn.functional.linear(x, torch.zeros(x.shape[1], x.shape[1]))
    door(torch.randn(BATCH, 4), 0.5, COND)  # 4^2 against 8^2
    np.testing.assert_array_equal(ledger.cost, everyone(0.25))


def test_samples_that_stop_are_not_charged() -> None:
    door, ledger = doors()
    outer, going = Field(door, ledger), np.arange(BATCH)
    for stops in ([], [1], [0, 3]):
        going = np.setdiff1d(going, stops)
        outer(torch.randn(len(going), 8), 0.5, COND, rows=going)
    np.testing.assert_array_equal(ledger.nfe, [2, 1, 3, 2])
    np.testing.assert_array_equal(ledger.cost, [2, 1, 3, 2])
    np.testing.assert_array_equal(ledger.flops, np.array([2, 1, 3, 2]) * door.model.flops)
    assert ledger.depth == 3


def test_a_budget_holds_on_the_mean_of_samples_that_stop() -> None:
    ledger = Ledger(BATCH, budget=1.5)
    ledger.add_field(None, BATCH)
    ledger.add_field(np.array([0, 1]), 2)
    with pytest.raises(BudgetExceeded, match=r"budget 1.5, spent 1.75"):
        ledger.add_field(np.array([2]), 1)


# --- several networks -----------------------------------------------------------------------------------------------


class Stitch(DenoiserWrap):
    """A small model for the first steps, the base model for the rest."""

    def __init__(self, inner: Denoiser, small: Denoiser, first: int) -> None:
        super().__init__(inner)
        self.small, self.first = small, first

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
        assert step is not None
        chosen = self.small if step.i < self.first else self.inner
        return chosen(x, t, cond, want, step=step, rows=rows)


def test_a_small_model_costs_its_flops_in_units_of_the_base_model() -> None:
    door, ledger = doors(width=16)
    small = NetworkDoor(Stack(width=8, depth=5), VPLinear(), "logsnr", role="small", base=door)
    run("ddim", 10, lambda d: Stitch(d, small, 4), door)
    ratio = (8**2 * 5) / (16**2 * 10)
    np.testing.assert_array_equal(ledger.nfe, everyone(10))
    np.testing.assert_array_equal(ledger.evals["small"], everyone(4))
    np.testing.assert_array_equal(ledger.evals["base"], everyone(6))
    np.testing.assert_array_equal(ledger.cost, everyone(4 * ratio + 6))  # 0.125: exact in binary
    np.testing.assert_array_equal(ledger.flops, everyone(4 * small.model.flops + 6 * door.model.flops))


def test_a_part_of_the_small_model_is_a_share_of_its_own_forward() -> None:
    door, ledger = doors(width=16)
    small = NetworkDoor(Stack(width=8, depth=5), VPLinear(), "logsnr", role="small", base=door)
    x = torch.randn(BATCH, 8)
    small.partial(lambda: x, x, 0.5, COND, fraction=0.5)
    np.testing.assert_array_equal(ledger.cost, everyone(0.5 * 0.125))


def test_the_cost_of_another_model_is_missing_where_flops_are() -> None:
    door, ledger = doors()
    model = Stack()
    model.predict = lambda x, *_: torch.fft.fft(x).real
    NetworkDoor(model, VPLinear(), "logsnr", role="odd", base=door)(torch.randn(BATCH, 8), 0.5, COND)
    assert np.isnan(ledger.cost).all()
    assert np.isnan(ledger.flops).all()
    np.testing.assert_array_equal(ledger.evals["odd"], everyone(1))
    assert ledger.uncounted == {"aten::_fft_r2c"}


def test_doors_share_the_base_doors_ledger() -> None:
    door, _ = doors()
    small = NetworkDoor(Stack(), VPLinear(), "logsnr", role="small", base=door)
    door.ledger = Ledger(7)
    assert small.ledger is door.ledger
    small.ledger = Ledger(8)
    assert door.ledger.batch == 8
    for role, base in (("small", None), ("base", door)):
        with pytest.raises(ValueError, match="every door but the base"):
            NetworkDoor(Stack(), VPLinear(), "logsnr", role=role, base=base)


# --- backward passes and auxiliary networks -------------------------------------------------------------------------


def test_a_backward_pass_costs_as_much_as_it_computes() -> None:
    door, ledger = doors()
    for layer in door.model.layers:
        layer.requires_grad_(False)
    outer = Field(door, ledger)
    with torch.enable_grad():
        x = torch.randn(BATCH, 8, requires_grad=True)
        gradient = outer.gradient(outer(x, 0.5, COND).square().sum(), x)
    assert gradient.shape == x.shape
    assert gradient.abs().sum() > 0
    np.testing.assert_array_equal(ledger.nfe, everyone(1))
    np.testing.assert_array_equal(ledger.backward, everyone(1))
    np.testing.assert_array_equal(ledger.cost, everyone(2))  # the gradient of x W is one product of the same size
    np.testing.assert_array_equal(ledger.flops, everyone(2 * door.model.flops))


def test_a_backward_pass_through_guidance_and_for_some_rows() -> None:
    door, ledger = doors()
    for layer in door.model.layers:
        layer.requires_grad_(False)
    outer, rows = Field(registry.build_guidance(2.0).wrap(door), ledger), np.array([1, 3])
    with torch.enable_grad():
        x = torch.randn(2, 8, requires_grad=True)
        out = outer(x, 0.5, Cond(torch.zeros(2, dtype=torch.int64)), rows=rows)
        outer.gradient(out, x, grad_outputs=torch.ones_like(out), rows=rows)
    np.testing.assert_array_equal(ledger.backward, [0, 1, 0, 1])
    np.testing.assert_array_equal(ledger.cost, [0, 4, 0, 4])


def test_auxiliary_networks_are_rows_and_flops_and_no_cost() -> None:
    ledger = Ledger(BATCH)
    ledger.add_aux("text-encoder", None, BATCH, flops=100.0)
    ledger.add_aux("reward", np.array([0, 0, 2]), 3, flops=np.array([1.0, 2.0, 4.0]))
    ledger.add_aux("reward", np.array([2]), 1, flops=8.0)
    np.testing.assert_array_equal(ledger.aux["text-encoder"], everyone(1))
    np.testing.assert_array_equal(ledger.aux["reward"], [2, 0, 2, 0])
    np.testing.assert_array_equal(ledger.flops, [103, 100, 112, 100])
    np.testing.assert_array_equal(ledger.cost, everyone(0))
    np.testing.assert_array_equal(ledger.nfe, everyone(0))


def test_what_is_not_said_is_missing() -> None:
    ledger = Ledger(2)
    ledger.add_aux("decoder", np.array([0]), 1)
    ledger.add_backward(np.array([1]), 1)
    np.testing.assert_array_equal(np.isnan(ledger.flops), [True, True])
    np.testing.assert_array_equal(np.isnan(ledger.cost), [False, True])


def test_amounts_must_be_one_or_one_per_row() -> None:
    ledger = Ledger(3)
    with pytest.raises(ValueError, match=r"amounts of shape \(2,\) for 3 rows"):
        ledger.add_network("base", None, 3, cost=np.ones(2), flops=1.0)
    with pytest.raises(ValueError, match=r"3 rows, but rows= names 2"):
        ledger.add_network("base", np.array([0, 1]), 3, cost=1.0, flops=1.0)


def test_columns_of_a_chunk() -> None:
    ledger = Ledger(3)
    ledger.add_network("base", None, 3, cost=np.array([1.0, 0.5, 0.25]), flops=8.0)
    plain = worker._counts(ledger)
    assert sorted(plain) == ["count:cost", "count:depth", "count:evals.base", "count:flops", "count:nfe"]
    np.testing.assert_array_equal(plain["count:cost"], [1.0, 0.5, 0.25])
    ledger.add_aux("reward", None, 3, flops=1.0)
    ledger.add_backward(np.array([0]), 1, cost=2.0, flops=16.0)
    more = worker._counts(ledger)
    assert sorted(set(more) - set(plain)) == ["count:aux.reward", "count:backward"]
    np.testing.assert_array_equal(more["count:backward"], [1, 0, 0])
    np.testing.assert_array_equal(more["count:flops"], [25, 9, 9])
