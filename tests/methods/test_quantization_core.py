"""The fake-quantisation core on modules alone: levels, ranges, replacement, learned rounding, and what is reported."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evalbench import registry
from evalbench.errors import UserError

tfmq = sys.modules[registry.get("method", "tfmq").__module__]  # nobody imports a method by its name
core = sys.modules[tfmq.built.__module__]

W4A8 = (core.Bits(4, 8),)


class Small(nn.Module):
    """A convolution, then a linear layer on its channels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))
        return out


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    return Small().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def plans(network: Small, bits: tuple[Any, ...]) -> dict[str, Any]:
    return {name: core.LayerPlan(bits, "token") for name in core.layers(network)}


@pytest.mark.parametrize("text", ["3.5", 3.5, "w3.5a8", "w1a8", "w9a8", "w8", "", "w8a0", "8"])
def test_bits_that_are_none_are_refused_in_one_line(text: object) -> None:
    with pytest.raises(UserError, match=r"^ptq4dm: bits must be whole, .* as in bits=w4a8, got") as raised:
        core.Bits.parse("ptq4dm", text)
    assert "\n" not in str(raised.value)


def test_levels_by_hand() -> None:
    # two bits over [-1, 2]: steps of 1, zero is a level; what lies outside is clipped
    x = torch.tensor([-5.0, -1.0, -0.4, 0.0, 0.6, 1.4, 2.0, 9.0])
    found = core.fake(x, torch.tensor(-1.0), torch.tensor(2.0), 2)
    assert found.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_value_inside_the_range_moves_by_half_a_step_at_most(bits: int) -> None:
    x = torch.linspace(-0.7, 1.9, 1001, dtype=torch.float64)
    lo, hi = x.min(), x.max()
    step = float(hi - lo) / (2**bits - 1)
    found = core.fake(x, lo, hi, bits)
    assert len(found.unique()) <= 2**bits
    # the zero point is rounded too, which moves the ends by up to half a step more
    assert float((found - x).abs().max()) <= step * (1 + 1e-9)
    assert float((found - x).abs()[100:-100].max()) <= 0.5 * step * (1 + 1e-9) or bits == 2


def test_a_shrunk_range_has_less_error_than_min_max_when_there_is_an_outlier() -> None:
    rows = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    rows[:, :2] = torch.tensor([12.0, -12.0])

    def error(measure: str) -> torch.Tensor:
        lo, hi = core.fitted(rows, 4, measure).unbind(1)  # type: ignore[arg-type]
        return (core.fake(rows, lo[:, None], hi[:, None], 4) - rows).abs().pow(2.4).mean(1)

    assert bool((error("mse") < 0.5 * error("minmax")).all())
    for other in ("l1", "cosine", "kl"):
        assert bool((error("mse") <= error(other)).all()), "mse is least in its own measure"


def test_unquantised_bits_compute_what_the_network_computes(network: Small, x: torch.Tensor) -> None:
    exact = network(x)
    static = {
        name: core.LayerPlan(
            (core.Bits(core.FULL, core.FULL),), "static", ranges=np.zeros((1, 1, 2)), balance=np.full((1, c), 3.0)
        )
        for name, c in (("conv", 4), ("linear", 6))
    }
    for chosen in (plans(network, (core.Bits(core.FULL, core.FULL),)), static):
        with core.replaced(network, core.built(network, chosen)):
            assert isinstance(network.conv, core.FakeQuant)
            assert torch.equal(network(x), exact)


def test_leaving_puts_back_the_very_modules_and_bits(network: Small, x: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    conv, exact = network.conv, network(x)
    with core.replaced(network, core.built(network, plans(network, W4A8))):
        assert not torch.equal(network(x), exact)
        assert set(network.state_dict()) < set(before)  # what stands in has no state of its own
    assert network.conv is conv
    assert torch.equal(network(x), exact)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_error_inside_puts_them_back_too(network: Small) -> None:
    conv = network.conv
    with pytest.raises(RuntimeError), core.replaced(network, core.built(network, plans(network, W4A8))):
        raise RuntimeError
    assert network.conv is conv


def test_dynamic_rounding_of_a_sample_does_not_depend_on_its_neighbours(network: Small, x: torch.Tensor) -> None:
    x = x * torch.tensor([1.0, 50.0, 0.01]).reshape(3, 1, 1, 1)
    with core.replaced(network, core.built(network, plans(network, (core.Bits(8, 4),)))):
        together = network(x)
        alone = torch.cat([network(row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_balancing_changes_nothing_but_the_rounding(network: Small, x: torch.Tensor) -> None:
    tokens = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    tokens[..., 0] *= 100.0
    network.linear.weight[:, 0] /= 100.0  # a loud channel with small weights, as networks have them
    exact = network.linear(tokens)
    s = np.array([[100.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    fine = core.FakeQuant(network.linear, core.LayerPlan((core.Bits(16, 16),), "token", balance=s))(tokens)
    torch.testing.assert_close(fine, exact, rtol=1e-3, atol=5e-2)

    def error(balance: np.ndarray | None) -> float:
        plan = core.LayerPlan((core.Bits(core.FULL, 4),), "token", balance=balance)
        return float((core.FakeQuant(network.linear, plan)(tokens) - exact).square().mean())

    assert error(s) < 0.5 * error(None), "one loud channel takes the levels of all others"


def test_parts_of_a_concatenation_have_their_own_levels() -> None:
    weight = torch.cat([torch.full((2, 3), 0.01), torch.full((2, 3), 1.0)], dim=1) * torch.tensor([1.0, -0.5, 0.3] * 2)
    together = core.round_weight(weight, core.LayerPlan(W4A8, "static"), 4)
    apart = core.round_weight(weight, core.LayerPlan(W4A8, "static", split=3), 4)
    assert float(together[:, :3].abs().max()) == 0.0  # under half a step of the loud part
    torch.testing.assert_close(apart[:, :3] * 100, apart[:, 3:], rtol=1e-4, atol=1e-6)


def test_static_ranges_are_those_of_the_time_group_or_of_its_neighbour(network: Small, x: torch.Tensor) -> None:
    observer = core.Observer(network, ["conv"])
    with observer.watching():
        for group, scale in ((0, 1.0), (2, 10.0)):
            observer.group = group
            network(scale * x)
    found = core.static_ranges(observer.seen["conv"], 4, [core.Bits(8, 8)] * 4, "minmax")
    assert found.shape == (4, 1, 2)
    np.testing.assert_allclose(found[0, 0], [float(x.min()), float(x.max())], rtol=1e-6)
    np.testing.assert_allclose(found[2], 10 * found[0], rtol=1e-6)
    np.testing.assert_array_equal(found[3], found[2])


def test_learned_rounding_is_up_or_down_and_keeps_outputs_better_than_the_nearest(network: Small) -> None:
    torch.manual_seed(3)
    mixing = torch.randn(6, 6)
    inputs = torch.randn(256, 6) @ mixing  # correlated: errors of one column can undo those of another
    plan = core.LayerPlan((core.Bits(3, core.FULL),), "static")
    up = core.adaround(network.linear, plan, 3, inputs, 400, np.random.default_rng(0))
    weight, exact = network.linear.weight, network.linear(inputs)
    learned = core.round_weight(weight, plan, 3, torch.as_tensor(up, dtype=weight.dtype))
    nearest = core.round_weight(weight, plan, 3)
    lo, hi = core.fitted(weight, 3, "minmax").unbind(1)
    assert float(((learned - weight).abs() / ((hi - lo) / 7)[:, None]).max()) <= 1.5  # 1, and half for the zero point

    def error(rounded: torch.Tensor) -> float:
        return float((core.applied(network.linear, inputs, rounded) - exact).square().mean())

    assert error(learned) < error(nearest)


def test_bits_bytes_and_bit_operations_by_hand(network: Small, x: torch.Tensor) -> None:
    observer = core.Observer(network, list(core.layers(network)))
    with observer.watching():
        network(x)
    macs = {name: seen.macs for name, seen in observer.seen.items()}
    assert macs == {"conv": 8 * 8 * 6 * 4 * 9, "linear": 8 * 8 * 5 * 6}
    found = core.footprint(network, {"conv": core.LayerPlan(W4A8, "token")}, macs)
    parameters = 6 * 4 * 9 + 6 + 5 * 6 + 5
    bits = 4 * 6 * 4 * 9 + 32 * (6 + 5 * 6 + 5)
    assert found["weight_bits"] == bits / parameters
    assert found["weight_bytes"] == (bits + 6 * (32 + 4)) / 8
    assert found["weight_bytes_full"] == 4 * parameters
    both = sum(macs.values())
    assert found["activation_bits"] == (8 * macs["conv"] + 32 * macs["linear"]) / both
    assert found["bops"] == 4 * 8 * macs["conv"] + 32 * 32 * macs["linear"]
    assert found["bops_full"] == 32 * 32 * both


@pytest.mark.parametrize("split", [0, 3])
@pytest.mark.parametrize("balanced", [False, True])
def test_fitted_levels_round_as_the_search_does(split: int, balanced: bool, network: Small) -> None:
    balance = np.linspace(0.5, 2.0, 8).reshape(2, 4) if balanced else None
    bits = (core.Bits(4, 8), core.Bits(3, 8))
    plan = core.LayerPlan(bits, "token", measure="mse", split=split, balance=balance)
    levels = core.FakeQuant(network.conv, plan).fitted_levels()
    known = core.FakeQuant(network.conv, replace(plan, levels=levels))
    for group in range(2):
        searched = core.FakeQuant(network.conv, plan).rounded_weight(group)
        assert torch.equal(known.rounded_weight(group), searched)
    assert not torch.equal(known.rounded_weight(0), known.rounded_weight(1))
