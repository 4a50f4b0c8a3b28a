"""The one rounding rule, and samples that no score is computed from."""

from __future__ import annotations

import re

import pytest
import torch

from evalbench.errors import BadSamples
from evalbench.metrics.images import check_images, to_uint8


def truncated(x):
    """The bug of pitfall P13: truncation instead of rounding, wrap-around instead of clipping."""
    return ((x + 1) * 127.5).to(torch.int64).to(torch.uint8)


def grey_levels():
    return (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()


def test_every_grey_level_survives():
    assert to_uint8(grey_levels()).tolist() == list(range(256))


@pytest.mark.parametrize("nudge", [-0.49, 0.49])
def test_rounds_to_the_nearest(nudge):
    x = grey_levels() + nudge / 127.5
    assert to_uint8(x).tolist() == list(range(256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clips(dtype):
    assert to_uint8(torch.tensor([-9, -1.01, 1.01, 9], dtype=dtype)).tolist() == [0, 0, 255, 255]


def test_truncation_would_be_caught():
    assert truncated(grey_levels() - 0.3 / 127.5).tolist() != list(range(256))
    assert truncated(torch.tensor([1.1])).tolist() != [255]


@pytest.fixture
def samples():
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_good_samples_pass(samples):
    check_images(to_uint8(samples), samples, shape=(3, 4, 4))
    check_images(to_uint8(samples))


def test_samples_that_round_to_one_image_are_no_duplicates(samples):
    samples[1] = samples[0] + 1e-6
    images = to_uint8(samples)
    images[1] = images[0]
    check_images(images, samples)
    with pytest.raises(BadSamples, match=r"^2 of 6 samples are duplicates of each other \(samples 0, 1\)$"):
        check_images(images)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[2, 0, 0].fill_(torch.nan), "1 of 6 samples hold NaN or infinity (samples 42)"),
        (lambda x: x[3:5, 0, 0, 0].fill_(torch.inf), "2 of 6 samples hold NaN or infinity (samples 43, 44)"),
        (lambda x: x[4].fill_(0.3), "1 of 6 images are constant (samples 44)"),
        (lambda x: x[1].fill_(-2), "1 of 6 images are constant (samples 41)"),
        (lambda x: x[5].copy_(x[0]), "2 of 6 samples are duplicates of each other (samples 40, 45)"),
        (
            lambda x: x[1].mul_(255),
            "1 of 6 samples are out of range: root mean square above 3, where images lie in [-1, 1] (samples 41)",
        ),
    ],
)
def test_bad_samples_are_errors_that_name_them(samples, spoil, message):
    spoil(samples)
    with pytest.raises(BadSamples, match=f"^{re.escape(message)}$"):
        check_images(to_uint8(samples), samples, decoded=samples, ids=range(40, 46))


def test_overshoot_is_no_other_range(samples):
    samples[0, 0, 0] = 5.0
    samples[1] *= 2
    check_images(to_uint8(samples), samples, decoded=samples)


def test_long_lists_of_ids_are_cut(samples):
    many = samples.repeat(5, 1, 1, 1)
    with pytest.raises(BadSamples, match=r"\(samples 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(22 more\)\)$"):
        check_images(to_uint8(many), many)


def test_wrong_sizes_are_errors(samples):
    images = to_uint8(samples)
    with pytest.raises(BadSamples, match=r"^images have size \(3, 4, 4\), expected \(1, 4, 4\) \(samples 0, 1, 2, "):
        check_images(images, shape=(1, 4, 4))
    with pytest.raises(BadSamples, match=r"^5 samples were made into 6 images$"):
        check_images(images, samples[:5])
    check_images(images, samples[:, :, :2])  # latents have another size than the images they become
    with pytest.raises(BadSamples, match=r"^images are torch.float32, expected torch.uint8"):
        check_images(samples)
