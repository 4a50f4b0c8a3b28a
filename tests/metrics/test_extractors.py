"""Extractors: the same numbers in any company, eval mode, no TF32, clear refusals. Networks are stand-ins."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import evalbench.models
from evalbench.errors import BadSamples, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics import extractors
from evalbench.registry import build_extractor, get, names

MODEL = SimpleNamespace(name="stand-in")
CAPTIONS = ("a shoe", "a shirt", "a bag")


class Features(nn.Module):
    """Conv, dropout and a linear map; looks at what is set while it runs."""

    def __init__(self, out: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(out)
        )
        self.eval()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
        self.train()
        self.batches: list[int] = []
        self.tf32: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        if hasattr(self, "batches"):
            self.batches.append(len(images))
            self.tf32 |= {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        return self.body(images / 255)


class TinyClip(nn.Module):
    """Like open_clip's: train mode, encode_*(normalize=), visual.preprocess_cfg."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.visual = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.Dropout(0.5))
        self.visual.preprocess_cfg = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
        self.table = nn.Embedding(50, 16)
        self.visual(torch.zeros(1, 3, 8, 8))

    def encode_image(self, pixels, normalize=False):
        self.pixels = pixels
        return nn.functional.normalize(self.visual(pixels), dim=-1) if normalize else self.visual(pixels)

    def encode_text(self, tokens, normalize=False):
        vectors = self.table(tokens).sum(1)
        return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def tokenizer(texts):
    return torch.tensor([[len(text) % 50, sum(map(ord, text)) % 50] for text in texts])


@pytest.fixture
def nets(monkeypatch):
    module = ModuleType("evalbench.models.nets")
    module.load_fashion64 = lambda: Features(64)
    module.load_fashion_classifier = lambda: Features(10)
    module.load_efficientnet_lite0 = lambda: Features(1280)
    module.load_tiny_clip = lambda: (TinyClip(), tokenizer)
    module.weights_sha256 = lambda name: f"digest-of-{name}"
    monkeypatch.setitem(sys.modules, "evalbench.models.nets", module)
    monkeypatch.setattr(evalbench.models, "nets", module, raising=False)
    return module


def batch(n=150, **changes):
    rng = np.random.default_rng(2)
    images = torch.from_numpy(rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))
    cond = Cond(torch.arange(n) % 10, tuple(CAPTIONS[i % 3] for i in range(n)))
    given = {"x": images / 127.5 - 1, "images": images, "cond": cond, "model": MODEL}
    return SampleBatch(**{**given, **changes})


def part(whole, rows):
    cond = Cond(whole.cond.labels[rows], tuple(np.array(whole.cond.captions)[rows]))
    return SampleBatch(whole.x[rows], whole.images[rows], cond, MODEL)


NETWORKS = ("efficientnet-lite0-96", "fashion-classifier", "fashion64", "tiny-fashion")
SHAPES = {"efficientnet-lite0-96": (150, 1280), "fashion-classifier": (150,), "fashion64": (150, 64)}


def test_registered():
    assert set(names("extractor")) >= {*NETWORKS, "identity", "pixels", "gmm-mode"}


def test_identity_and_pixels():
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
    whole = batch(2, x=x, images=None)
    same, half = build_extractor("identity")(whole), build_extractor("pixels")(whole)
    assert torch.equal(same, x.reshape(2, 48))
    assert (half.dtype, half.shape) == (torch.float16, (2, 48))
    assert ((half.double() - same).abs() <= 2.0**-11 * same.abs()).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_features_do_not_depend_on_their_company(nets, name):
    """Bit for bit: alone, in another batch, at another place (pitfall P8)."""
    whole, extract = batch(), build_extractor(name)
    features = extract(whole)
    assert features.shape == SHAPES.get(name, (150,))
    for rows in ([3], list(range(60, 130)), [149, 0, 77]):
        assert torch.equal(extract(part(whole, rows)), features[rows])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_in_eval_mode(nets, name):
    """Dropout would make two calls differ (pitfall P31)."""
    whole, extract = batch(), build_extractor(name)
    assert torch.equal(extract(whole), extract(whole))
    model = extract._model if name == "tiny-fashion" else extract._network
    assert not any(module.training for module in model.modules())


def test_networks_run_on_one_batch_size_without_tf32(nets):
    torch.backends.cudnn.allow_tf32 = True
    try:
        extract = build_extractor("fashion64")
        features = extract(batch())
        assert torch.backends.cudnn.allow_tf32  # restored
    finally:
        torch.backends.cudnn.allow_tf32 = False
    assert extract._network.batches == [64, 64, 64]
    assert extract._network.tf32 == {False}
    assert not features.requires_grad
    assert features.dtype == torch.float32


def test_classifier_compares_with_the_label(nets):
    whole, extract = batch(), build_extractor("fashion-classifier")
    seen = extractors.in_batches(extract._network, whole.images).argmax(1)
    right = extract(batch(cond=Cond(seen)))
    assert right.dtype == torch.float64
    assert right.tolist() == [1.0] * 150
    wrong = seen.clone()
    wrong[5] = (seen[5] + 1) % 10
    assert extract(batch(cond=Cond(wrong))).sum() == 149


def test_alignment_is_the_cosine_of_image_and_its_own_caption(nets):
    whole, extract = batch(), build_extractor("tiny-fashion")
    model = extract._model
    cosines = extract(whole)
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)))
        images = model.encode_image((whole.images.expand(-1, 3, -1, -1) / 255 - mean) / std)
        texts = model.encode_text(tokenizer(whole.cond.captions))
    expected = nn.functional.cosine_similarity(images, texts)
    assert cosines.numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert cosines.abs().max() <= 1
    swapped = extract(batch(cond=Cond(None, whole.cond.captions[1:] + whole.cond.captions[:1])))
    assert not torch.allclose(swapped, cosines)


def test_fingerprint_names_the_weights(nets):
    assert build_extractor("fashion64").fingerprint() == "fashion64/1 sha256:digest-of-fashion64 float32 batch 64"
    assert build_extractor("identity").fingerprint() == "identity/1"


def test_missing_weights_say_why(nets):
    assert get("extractor", "fashion64").missing() == ""

    def absent(name):
        raise UserError(f"weights '{name}' not found; run `evalbench doctor`")

    nets.weights_sha256 = absent
    assert get("extractor", "fashion64").missing() == (
        "features 'fashion64': weights 'fashion64' not found; run `evalbench doctor`"
    )
    nets.weights_sha256 = lambda name: Path("/nowhere/fashion64.safetensors").read_bytes()
    assert get("extractor", "fashion64").missing() == (
        "features 'fashion64': /nowhere/fashion64.safetensors is not there; reinstall evalbench"
    )
    assert get("extractor", "identity").missing() == ""


@pytest.mark.parametrize(
    ("name", "changes", "kind", "message"),
    [
        ("fashion64", {"images": None}, UserError, "features 'fashion64' need images, and model 'stand-in' makes none"),
        ("fashion-classifier", {"cond": Cond()}, UserError, "need labels; set"),
        ("fashion-classifier", {"cond": Cond(torch.zeros(149))}, BadSamples, "150 images need 150 labels >= 0"),
        ("fashion-classifier", {"cond": Cond(-torch.ones(150))}, BadSamples, "150 images need 150 labels >= 0"),
        ("tiny-fashion", {"cond": Cond()}, UserError, "need captions"),
        ("tiny-fashion", {"cond": Cond(None, ("a",) * 149)}, BadSamples, "150 images come with 149 captions"),
        ("gmm-mode", {}, UserError, "need a model with exact modes, and 'stand-in' has none"),
    ],
)
def test_refusals(nets, name, changes, kind, message):
    with pytest.raises(kind, match=message):
        build_extractor(name)(batch(**changes))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of imported libraries
def test_the_real_networks(name):
    """With the weights of this project: shapes, company, the digest in the fingerprint."""
    if reason := get("extractor", name).missing():
        pytest.skip(reason)
    extract = build_extractor(name)
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (70, 1, 32, 32), dtype=np.uint8))
    cond = Cond(torch.arange(70) % 10, tuple(CAPTIONS[i % 3] for i in range(70)))
    features = extract(SampleBatch(images / 127.5 - 1, images, cond, MODEL))
    assert features.shape == (70, *SHAPES.get(name, (0,))[1:])
    assert features.isfinite().all()
    few = SampleBatch(images[60:] / 127.5 - 1, images[60:], Cond(cond.labels[60:], cond.captions[60:]), MODEL)
    assert torch.equal(extract(few), features[60:])
    assert re.fullmatch(rf"{name}/\d+ sha256:[0-9a-f]{{64}} float32 batch 64", extract.fingerprint())


def test_names_are_listed_without_torch():
    """`evalbench list metrics` starts fast."""
    import subprocess

    code = "import sys; from evalbench import registry; registry.names('metric'); registry.names('extractor')\n"
    code += "print('torch' in sys.modules, 'scipy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False False"
