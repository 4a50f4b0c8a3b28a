"""bottleneck: stages, times and the cost of a call at half the resolution."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import twins
from methods_inside import B, ByHand, draw

from evalbench import registry
from evalbench.errors import Unsupported, UserError


def part(settings: str = "") -> Any:
    return registry.build_method(f"ddim+bottleneck{settings}").modifiers[0]


def test_the_steps_of_the_stages_add_up_and_their_times_fall() -> None:
    for n in range(1, 40):
        stages, times = part().stages(n), part().times(1.0, n)
        assert sum(steps for steps, _ in stages) == n
        assert [len(each) for each in times] == [steps for steps, _ in stages]
        assert not stages[-1][1], "the last stage is at full resolution"
        assert all(0 < t <= 1 for each in times for t in each)
        assert all((np.diff(each) < 0).all() for each in times)
        assert all(a[-1] >= b[0] / 1.2 for a, b in pairwise(times))
    assert part().stages(20) == [(4, False), (10, True), (6, False)]


def test_without_stages_shift_or_noise_it_is_the_solver_on_an_even_grid() -> None:
    for solver in ("ddim", "dpm-solver++(order=2)"):
        whole, _ = draw(f"{solver}+bottleneck(first=0.0,low=0.0)", 6)
        times = (*(1.0 - j / 6 for j in range(6)), 0.0)
        made = registry.build_method(solver).solver
        setup = twins.setup("dit")
        from evalbench import sampling
        from evalbench.cost.ledger import Ledger
        from evalbench.engine import execute
        from evalbench.noise import NoiseSource

        noise = NoiseSource(0, range(B), setup.model.shape, setup.dtype)
        setup.door.ledger = Ledger(B)
        cond = sampling.conditions(setup.suite, setup.model, range(B), setup.device)
        start = setup.model.start(noise, setup.path)
        with torch.no_grad():
            times = tuple(setup.path.t_start * t for t in times)
            expected = execute(made.plan(setup.path, times), setup.door, start, cond, noise)  # type: ignore[attr-defined]
        torch.testing.assert_close(whole, expected)


def test_a_call_at_half_the_resolution_costs_what_it_computes() -> None:
    x, ledger = draw("ddim+bottleneck", 10)
    assert x.shape[1:] == twins.setup("dit").model.shape
    assert ledger.nfe[0] == ledger.evals["base"][0] == 10
    size = twins.setup("dit").model.shape[-1]
    whole, half = ByHand.of("dit").whole, ByHand.of("dit", size // 2).whole
    assert ledger.base_flops == whole
    assert ledger.flops[0] == 5 * whole + 5 * half
    assert ledger.cost[0] == pytest.approx(5 + 5 * half / whole)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++(order=2)", "unipc"])
def test_it_composes_with_solvers_that_are_plans(solver: str) -> None:
    x, ledger = draw(f"{solver}+bottleneck", 9)
    assert torch.isfinite(x).all()
    assert ledger.nfe[0] <= 9
    assert ledger.cost[0] < ledger.nfe[0]


def test_noise_put_back_matters_and_other_solvers_are_refused() -> None:
    assert not torch.allclose(draw("ddim+bottleneck", 9)[0], draw("ddim+bottleneck(renoise=1.0)", 9)[0])
    with pytest.raises(Unsupported, match="needs a solver that is a plan"):
        draw("diffusers:DDIMScheduler+bottleneck", 9)
    for settings in ("(first=0.6,low=0.4)", "(renoise=0.5)", "(shift=0.5)"):
        with pytest.raises(UserError, match=r"^bottleneck: "):
            part(settings)


def test_pooled_noise_is_unit_noise() -> None:
    module = __import__(registry.get("method", "bottleneck").__module__, fromlist=["_pooled"])
    pooled = module._pooled(torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert float(pooled.var()) == pytest.approx(1.0, abs=0.02)
    assert abs(float((pooled[..., ::2] * pooled[..., 1::2]).mean())) < 0.02
