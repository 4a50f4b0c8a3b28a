"""Any module as an extractor: what goes in, what may come out, and that its numbers say which module it was."""

from __future__ import annotations

import json
from types import SimpleNamespace

import _inception_weights
import numpy as np
import pytest
import torch
from torch import nn

from evalbench.cli import app
from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics import modules
from evalbench.metrics.kernel import mmd2
from evalbench.metrics.modules import load_modules, use_module
from evalbench.registry import build_extractor, extractor_fingerprint, get
from evalbench.score import score_images


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(modules, "_given", {})


class Means(nn.Module):
    """Mean and spread of each channel; keeps what it was given."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        flat = self.scale * x.float().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)


def pictures(n=12, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 9, 7, channels), dtype=np.uint8)


def batch(images):
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return SampleBatch(planes / 127.5 - 1, planes, Cond(), SimpleNamespace(name="stand-in"))


@pytest.mark.parametrize(
    ("inputs", "convert"),
    [("uint8", lambda x: x), ("unit", lambda x: x.float() / 255), ("signed", lambda x: x / 127.5 - 1.0)],
)
def test_inputs(inputs, convert):
    module, images = Means().train(), pictures()
    found = build_extractor(use_module("means", module, inputs))(batch(images))
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(module.seen[0][:12], convert(planes))
    assert module.seen[0].dtype == (torch.uint8 if inputs == "uint8" else torch.float32)
    assert len(module.seen[0]) == 64
    assert not module.training
    assert (found - Means()(convert(planes))).abs().max() < 1e-4


def test_grey_images_have_three_channels():
    grey = pictures(channels=1)
    extract = build_extractor(use_module("means", Means()))
    assert torch.equal(extract(batch(grey)), extract(batch(np.repeat(grey, 3, axis=3))))


def test_the_fingerprint_says_which_module():
    prints = []
    for module, inputs in ((Means(), "unit"), (Means(), "unit"), (Means(2.0), "unit"), (Means(), "signed")):
        prints.append(extractor_fingerprint(use_module("m", module, inputs)))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert prints[0].startswith("module:m/1 unit, Means sha256:")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torch_fidelitys_extractor_is_the_recipe_of_that_name(tmp_path, monkeypatch):
    """It takes uint8 and returns a tuple, as modules for torchmetrics do."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from evalbench import weights
    from evalbench.metrics import inception

    _inception_weights.install(tmp_path)
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "KNOWN", _inception_weights.pinned(tmp_path))
    for module in (inception, modules):
        monkeypatch.setattr(module, "BATCH", 2)
    file = str(tmp_path / "weights" / "pt_inception-2015-12-05-6726825d.pth")
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    images = batch(pictures(2))
    found = build_extractor(use_module("fidelity", theirs))(images)
    expected = build_extractor("inception:tf1")(images)
    assert (found - expected).abs().max() < 1e-4 * expected.square().mean().sqrt()


def test_scores_of_a_module():
    real, made = list(pictures(40, seed=1)), list(pictures(40, seed=2))
    name = use_module("means", Means())
    result = score_images(made, reference=real, metrics=[f"fd@{name}", f"kid@{name}"])
    assert result[f"fd@{name}"].n == 40
    assert result.protocol["features"][name] == extractor_fingerprint(name)


class Bad(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: "text", "returned a str; return a tensor"),
        (lambda x: (x, x), "returned a tuple of 2; return a tensor"),
        (lambda x: x[:3], r"64 images gave a tensor \(3, 3, 9, 7\)"),
        (lambda x: x.float().mean(), r"64 images gave a tensor \(\)"),
    ],
)
def test_other_outputs_are_errors(output, message):
    with pytest.raises(EvalbenchError, match=message):
        build_extractor(use_module("bad", Bad(output)))(batch(pictures()))


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: {"features": (x,)}])
def test_one_tensor_in_a_container_counts(wrap):
    extract = build_extractor(use_module("wrapped", Bad(lambda x: wrap(x.float().mean((2, 3))))))
    assert extract(batch(pictures())).shape == (12, 3)


def test_names_and_kinds_are_checked():
    with pytest.raises(UserError, match=r"module 'm' is a function; give a torch\.nn\.Module"):
        use_module("m", pictures)
    with pytest.raises(UserError, match=r"unknown inputs of a module 'units'.* did you mean 'unit'"):
        use_module("m", Means(), "units")
    with pytest.raises(UserError, match="module name 'a:b' must be letters"):
        use_module("a:b", Means())
    assert "give --module m=FILE.py:OBJECT" in get("extractor", "module:m").missing()
    with pytest.raises(UserError, match=r"features 'module:m': give --module m=FILE\.py:OBJECT"):
        score_images(list(pictures()), reference=list(pictures(seed=1)), metrics=["kid@module:m"])


# --- the command line -----------------------------------------------------------------------------------------------

SOURCE = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)

def make():
    return Net()

net, number = Net(), 3

def broken():
    raise KeyError("w")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "net.py").write_text(SOURCE)
    traced = torch.jit.script(nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1)))
    torch.jit.save(traced, str(tmp_path / "net.pt"))
    np.savez(tmp_path / "a.npz", arr_0=pictures(30))
    np.savez(tmp_path / "b.npz", arr_0=pictures(30, seed=1))
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("target", ["net.py:make:unit", "net.py:net:unit", "net.pt:unit"])
def test_score_and_reference_from_the_command_line(file, target, capsys):
    word = ["--module", f"net={file}/{target}"]
    reference = str(file / "r.safetensors")
    make = ["reference", "make", f"{file}/b.npz", "--features", "module:net", "--out", reference, *word]
    app(make, standalone_mode=False)
    capsys.readouterr()
    common = ["score", f"{file}/a.npz", "--metrics", "kid@module:net", "--json", *word]
    app([*common, "--reference", reference], standalone_mode=False)
    by_file = json.loads(capsys.readouterr().out)
    app([*common, "--reference", f"{file}/b.npz"], standalone_mode=False)
    by_images = json.loads(capsys.readouterr().out)
    assert by_file["scores"] == by_images["scores"]
    x, y = (np.load(file / name)["arr_0"].mean(axis=(1, 2)) / 255 for name in ("a.npz", "b.npz"))
    assert by_file["scores"][0]["value"] == pytest.approx(mmd2(x, y).value, rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("net", "--module 'net': write NAME=FILE.py:OBJECT, or NAME=FILE.pt of TorchScript"),
        ("net={tmp}/net.py", "--module 'net={tmp}/net.py': write NAME=FILE.py:OBJECT"),
        ("net={tmp}/net.py:net:half", "--module 'net={tmp}/net.py:net:half': inputs are one of uint8, unit, signed"),
        ("net={tmp}/no.py:net", "plug-in file '{tmp}/no.py' not found"),
        ("net={tmp}/net.py:mat", "unknown object 'mat' in {tmp}/net.py;"),
        ("net={tmp}/net.py:number", "module 'net' is a int; give a torch.nn.Module"),
        ("net={tmp}/net.py:broken", "{tmp}/net.py: broken() raised KeyError: 'w'"),
        ("net={tmp}/a.npz", "'{tmp}/a.npz' is no TorchScript file: "),
        ("net={tmp}/no.pt", "'{tmp}/no.pt' is no TorchScript file: "),
    ],
)
def test_bad_words_are_one_line(file, word, message):
    with pytest.raises(UserError) as caught:
        load_modules([word.replace("{tmp}", str(file))])
    assert str(caught.value).startswith(message.replace("{tmp}", str(file)))
    assert "\n" not in str(caught.value)
