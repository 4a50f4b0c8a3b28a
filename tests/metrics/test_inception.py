"""FID's recipes against the tools they are named after, with one set of seeded random weights for all.

Deviations are in units of the features' RMS.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import _inception_weights
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evalbench import score, weights
from evalbench.errors import UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics import inception
from evalbench.metrics.fid import inception_score
from evalbench.metrics.frechet import Gaussian, frechet_distance, moments
from evalbench.metrics.kernel import mmd2
from evalbench.metrics.resize import matrix, resize
from evalbench.registry import build_extractor, build_metric, extractor_fingerprint, get
from evalbench.score import score_images

RECIPES = ("clean", "pytorch", "tf1")
SIZES = ((32, 32), (37, 37), (64, 64), (299, 299), (512, 512), (45, 80))
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TorchScript and the tools compared with
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    _inception_weights.install(folder)
    return folder


@pytest.fixture
def installed(cache, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(cache))
    monkeypatch.setattr(weights, "KNOWN", _inception_weights.pinned(cache))
    monkeypatch.setattr(inception, "BATCH", 2)  # time: short batches are filled
    return cache


def pictures(n, size, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, channels), dtype=np.uint8)


def batch(images):
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return SampleBatch(planes / 127.5 - 1, planes, Cond(), SimpleNamespace(name="stand-in"))


def theirs(recipe, images, cache, tmp_path):
    """Features (B, 2048) by the recipe's own tool."""
    if recipe == "clean":
        from cleanfid.fid import get_folder_features

        layers = torch.jit.load(cache / "weights" / "inception-2015-12-05.pt").layers
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
        network = lambda x: layers((x - 128) / 128)  # noqa: E731 - the scaling of its InceptionV3W
        return get_folder_features(str(tmp_path), network, num_workers=0, device=torch.device("cpu"), verbose=False)
    if recipe == "pytorch":
        network = _inception_weights.pytorch_fid_network()
        with torch.no_grad():
            found = network(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)[0]
        return found.flatten(1).numpy()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = str(cache / "weights" / "pt_inception-2015-12-05-6726825d.pth")
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    return network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()


def deviation(recipe, images, cache, tmp_path):
    found = build_extractor(f"inception:{recipe}")(batch(images)).numpy()
    expected = theirs(recipe, images, cache, tmp_path)
    return np.abs(found - expected).max() / np.sqrt((expected**2).mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_features_equal_the_tool_of_that_name(recipe, installed, tmp_path):
    assert deviation(recipe, pictures(2, (45, 80)), installed, tmp_path) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_features_equal_the_tool_of_that_name_at_every_size(recipe, size, installed, tmp_path):
    assert deviation(recipe, pictures(16, size), installed, tmp_path) < 1e-4


def test_recipes_differ_and_adm_is_tf1(installed):
    images = batch(pictures(2, (37, 37)))
    clean, pytorch, tf1, adm = (build_extractor(f"inception:{name}")(images) for name in (*RECIPES, "adm"))
    rms = tf1.square().mean().sqrt()
    assert torch.equal(adm, tf1)
    for a, b in ((clean, pytorch), (clean, tf1), (pytorch, tf1)):
        assert (a - b).abs().max() > 1e-2 * rms


def test_other_outputs_and_float64(installed):
    """Logits are torch-fidelity's; the spatial features are a slice of a hooked layer; float64 agrees with float32."""
    images = pictures(2, (37, 37))
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = str(installed / "weights" / "pt_inception-2015-12-05-6726825d.pth")
    network = FeatureExtractorInceptionV3("inception", ["logits_unbiased"], feature_extractor_weights_path=file)
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    logits = build_extractor("inception:tf1:logits")(batch(images))
    assert (logits - expected).abs().max() < 1e-4 * expected.square().mean().sqrt()
    spatial = build_extractor("inception:adm:spatial")(batch(images)).reshape(2, 17, 17, 7)
    assert (spatial - seen[0].permute(0, 2, 3, 1)[..., :7]).abs().max() < 1e-4 * seen[0].square().mean().sqrt()
    single, double = (build_extractor(f"inception:tf1{word}")(batch(images)) for word in ("", ":float64"))
    assert 0 < (single - double).abs().max() < 1e-4 * double.square().mean().sqrt()


def test_grey_images_count_as_colour(installed):
    grey = pictures(2, (32, 32), 1)
    extract = build_extractor("inception:clean")
    assert torch.equal(extract(batch(grey)), extract(batch(np.repeat(grey, 3, axis=3))))


def test_outputs_of_one_recipe_cost_one_pass(installed, monkeypatch):
    images, calls = batch(pictures(2, (32, 32))), []
    extractors = [build_extractor(f"inception:adm{word}") for word in ("", ":spatial", ":logits")]
    monkeypatch.setattr(inception, "inputs", lambda x, *rest, f=inception.inputs: calls.append(1) or f(x, *rest))
    assert [tuple(extract(images).shape) for extract in extractors] == [(2, 2048), (2, 2023), (2, 1008)]
    assert calls == [1]


# --- resizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, (640, 480), (33, 640)])
def test_bicubic_is_pillows(size):
    """Bit for bit in float64, and within 1e-4 grey levels in float32."""
    image = pictures(1, size)[0, :, :, 0]
    expected = np.asarray(Image.fromarray(image.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
    x = torch.from_numpy(image)[None, None]
    assert np.array_equal(resize(x, (299, 299), "pil-bicubic", torch.float64)[0, 0].numpy(), expected)
    assert np.abs(resize(x, (299, 299), "pil-bicubic")[0, 0].numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_two_tap_filters(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    # one channel: for three PyTorch takes another kernel, which differs from this one by up to 1e-3
    x = torch.from_numpy(pictures(1, size, 1)).permute(0, 3, 1, 2).float()
    half = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert (resize(x, (299, 299), "torch-bilinear") - half).abs().max() <= 1e-4
    first = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert (resize(x, (299, 299), "tf1-bilinear") - first).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["pil-bicubic", "torch-bilinear", "tf1-bilinear"])
def test_resizing_keeps_constants(kind):
    assert matrix(kind, 37, 299).sum(axis=1) == pytest.approx(np.ones(299), abs=1e-12)
    with pytest.raises(UserError, match="unknown resizing 'pil-cubic'"):
        matrix("pil-cubic", 2, 3)


# --- names and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "file", "digest"),
    [
        ("fid@clean", "inception-2015-12-05.pt", "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"),
        (
            "fid@pytorch",
            "pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd",
        ),
        (
            "sfid@adm",
            "pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49",
        ),
        (
            "is@tf1",
            "pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb",
        ),
    ],
)
def test_absent_weights_name_file_digest_and_folder(metric, file, digest, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        score_images(list(pictures(4, (32, 32))), reference=list(pictures(4, (32, 32), seed=1)), metrics=[metric])
    for word in (file, digest, str(tmp_path / "weights"), "evalbench weights inception-"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "inception-2015-12-05.pt").write_bytes(b"torchvision's")
    with pytest.raises(UserError, match=r"has SHA-256 .* expected f58cb9b6"):
        build_extractor("inception:clean")


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        ("fid@fashion64", "unknown recipe of 'fid' 'fashion64'.*no FID: write fd@fashion64"),
        ("fid", "no FID: write fd@FEATURES"),
        ("kid@inception:cleen", "did you mean 'clean'"),
        ("sfid@clean", "unknown output of inception:clean 'spatial'"),
    ],
)
def test_only_the_original_network_gives_a_fid(metric, line):
    with pytest.raises(UserError, match=line):
        build_metric(metric)


def test_the_protocol_is_in_the_fingerprint(installed):
    prints = [extractor_fingerprint(f"inception:{name}") for name in (*RECIPES, "adm", "adm:spatial", "tf1:float64")]
    assert len(set(prints)) == 6
    assert re.fullmatch(
        r"inception:clean/1 uint8, pil-bicubic 299 clipped, \(x - 128\) / 128, sha256:[0-9a-f]{64} "
        r"pool float32 batch 2",
        prints[0],
    )
    assert get("extractor", "inception:clean").missing() == ""


# --- distances ------------------------------------------------------------------------------------------------------


def test_scores_without_a_covariance(installed):
    """From images to values; adm is marked as an unverified port."""
    real, made = (list(pictures(24, (32, 32), seed=seed)) for seed in (1, 2))
    result = score_images(made, reference=real, metrics=["is@adm", "kid@inception:adm"])
    assert all("unverified port" in score.value.note for score in result.scores)
    features = [build_extractor("inception:adm")(batch(np.stack(images))).numpy() for images in (made, real)]
    assert result["kid@inception:adm"].value == pytest.approx(
        mmd2(*(x.astype(float) for x in features)).value, rel=1e-9
    )


@pytest.mark.slow
def test_scores_by_recipe(installed):
    real, made = (list(pictures(24, (32, 32), seed=seed)) for seed in (1, 2))
    result = score_images(made, reference=real, metrics=["fid@adm", "sfid@adm"], allow_small_n=True)
    assert all("unverified port" in score.value.note for score in result.scores)
    features = [build_extractor("inception:adm")(batch(np.stack(images))).numpy() for images in (made, real)]
    a, b = (moments(x).gaussian() for x in features)
    assert result["fid@adm"].value == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_an_adm_npz_with_images_and_statistics(installed, tmp_path):
    """Frechet distances refer to its statistics, pooled or spatial, and kernel distances to its images."""
    real, made = pictures(4, (32, 32)), list(pictures(4, (32, 32), seed=1))
    rng = np.random.default_rng(2)
    stats = {"mu": rng.random(2048), "sigma": np.eye(2048), "mu_s": rng.random(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", arr_0=real, **stats)
    metrics, extract = ["fid@adm", "sfid@adm", "kid@inception:adm"], build_extractor("inception:adm")
    wanted = [build_metric(metric) for metric in metrics]
    extractors = {"inception:adm": extract, "inception:adm:spatial": build_extractor("inception:adm:spatial")}
    found = score._references(tmp_path / "adm.npz", wanted, extractors)
    assert np.array_equal(found["inception:adm"].arrays["mean"], stats["mu"])
    assert np.array_equal(found["inception:adm:spatial"].arrays["mean"], stats["mu_s"])
    assert found["inception:adm:spatial"].notes == ("provenance unknown",)
    assert np.array_equal(found["inception:adm"].arrays["features"], extract(batch(real)).numpy())
    np.savez(tmp_path / "stats.npz", **stats)
    both = score._references(tmp_path / "stats.npz", wanted[:2], extractors)
    assert np.array_equal(both["inception:adm:spatial"].arrays["mean"], stats["mu_s"])
    assert np.array_equal(both["inception:adm"].arrays["mean"], stats["mu"])
    with pytest.raises(UserError, match="needs single samples"):
        score_images(made, reference=tmp_path / "stats.npz", metrics=["kid@inception:adm"])


def test_inception_score_is_torch_fidelitys():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(0).normal(0, 3, (500, 40))
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)
    even = np.log(np.eye(8).repeat(5, axis=0) + 1e-300)
    assert inception_score(even) == pytest.approx(8)  # eight sure classes, equally often
    assert inception_score(np.zeros((10, 8))) == pytest.approx(1)


@pytest.mark.slow
def test_distances_equal_the_tools_on_shared_features():
    """3,000 x 2,048 features: pytorch-fid, clean-fid and torch-fidelity, to 1e-5."""
    from cleanfid.fid import frechet_distance as clean
    from pytorch_fid.fid_score import calculate_frechet_distance as pytorch
    from torch_fidelity.metric_fid import fid_statistics_to_metric as fidelity

    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2048, 2048)) / 45
    sets = [rng.normal(size=(3000, 2048)) @ mixing + shift for shift in (0, 0.02)]
    a, b = (moments(x).gaussian() for x in sets)
    found = frechet_distance(a, b)
    numpy = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in sets]
    assert found == pytest.approx(pytorch(*numpy[0], *numpy[1]), rel=1e-5)
    assert found == pytest.approx(clean(*numpy[0], *numpy[1]), rel=1e-5)
    stats = [{"mu": mean, "sigma": cov} for mean, cov in numpy]
    assert found == pytest.approx(fidelity(*stats, verbose=False)["frechet_inception_distance"], rel=1e-5)
    assert isinstance(a, Gaussian)
