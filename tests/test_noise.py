"""Counter-based noise: a function of (seed, sample, use, step) alone; one Brownian path per sample."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalbench.noise import NoiseSource, Philox


def _source(samples: list[int], seed: int = 0, size: int = 3) -> NoiseSource:
    return NoiseSource(seed, samples, (size,), torch.float64)


@given(
    seed=st.integers(0, 2**63),
    sample=st.integers(0, 2**40),
    use=st.integers(0, 2**33),
    step=st.integers(0, 2**20),
)
def test_the_reused_generator_equals_a_fresh_one(seed: int, sample: int, use: int, step: int) -> None:
    reused = Philox()
    reused.normal(1, 2, 3, 4, 5)  # leaves a half-used buffer behind
    key, counter = np.array([seed, sample], dtype=np.uint64), np.array([0, 0, use, step], dtype=np.uint64)
    fresh = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(7)
    np.testing.assert_array_equal(reused.normal(seed, sample, use, step, 7), fresh)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together, alone = _source([4, 7, 9]), _source([9])
    for draw in (NoiseSource.start, lambda s: s.normal("churn", 3), lambda s: s.increment(0.1, 0.35)):
        torch.testing.assert_close(draw(together)[2], draw(alone)[0], rtol=0, atol=0)


def test_order_of_draws_does_not_matter() -> None:
    a, b = _source([0, 1]), _source([0, 1])
    first = a.start(), a.increment(0.0, 0.5), a.normal("x", 1)
    second = b.normal("x", 1), b.increment(0.0, 0.5), b.start()
    for one, other in zip(first, reversed(second), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_uses_steps_and_seeds_are_different_numbers() -> None:
    source = _source([0])
    draws = [source.start(), source.normal("a"), source.normal("b"), source.normal("a", 1), _source([0], 1).start()]
    values = {tuple(draw.flatten().tolist()) for draw in draws}
    assert len(values) == len(draws)


@settings(max_examples=30)
@given(cuts=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4, unique=True))
def test_brownian_increments_add_up(cuts: list[float]) -> None:
    source = _source([5])
    times = sorted({0.0, 1.0, *cuts})
    pieces = [(b - a) ** 0.5 * source.increment(a, b) for a, b in pairwise(times)]
    torch.testing.assert_close(sum(pieces), source.increment(0.0, 1.0), rtol=1e-9, atol=1e-9)


def test_brownian_increments_are_unit_normal_and_independent() -> None:
    source = _source(list(range(4000)), size=2)
    a, b = source.increment(0.2, 0.33), source.increment(0.33, 0.7)
    for draw in (a, b):
        assert abs(draw.mean()) < 4 / 8000**0.5
        assert abs(draw.var() - 1) < 4 * (2 / 8000) ** 0.5
    assert abs((a * b).mean()) < 4 / 8000**0.5


def test_times_outside_the_path_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        _source([0]).increment(0.5, 1.5)
    with pytest.raises(ValueError, match="two different times"):
        _source([0]).increment(0.5, 0.5)
