"""Features of joint samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalbench.errors import UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.models.gmm import GaussianMixture
from evalbench.models.joint import JointMixture
from evalbench.registry import build_extractor

MODEL = JointMixture(image=3, text=2, components=4, image_std=0.05, text_std=0.05, seed=1)


def extract(name: str, x: torch.Tensor, model: object = MODEL) -> torch.Tensor:
    return build_extractor(name)(SampleBatch(x, None, Cond(), model))  # type: ignore[arg-type]


def test_parts_are_the_modalities() -> None:
    x = torch.arange(10.0).reshape(2, 5)
    assert extract("image-part", x).tolist() == [[0, 1, 2], [5, 6, 7]]
    assert extract("text-part", x).tolist() == [[3, 4], [8, 9]]


def test_agreement_is_of_the_components() -> None:
    """Narrow components: a draw agrees with itself, and not with the text of another component."""
    x = MODEL.means.clone()
    assert extract("gmm-agreement", x).tolist() == [1, 1, 1, 1]
    x[:2, 3:] = MODEL.means[[1, 0], 3:]
    agreement = extract("gmm-agreement", x)
    assert agreement.dtype == torch.float64
    assert agreement.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["image-part", "text-part", "gmm-agreement"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"features '{name}' need a joint model, and 'gmm' is none"):
        extract(name, torch.from_numpy(np.zeros((2, 8))), GaussianMixture())
