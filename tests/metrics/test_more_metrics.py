"""DINOv2, CMMD, Vendi, copies, class by class, PSNR, SSIM, LPIPS: closed forms and second implementations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics import image_pairs
from evalbench.metrics.cmmd import kernel_means
from evalbench.metrics.diversity import nearest_ratio, vendi_score
from evalbench.metrics.kernel import mmd2
from evalbench.registry import build_extractor, build_metric
from evalbench.score import score_images

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
]


def pictures(n=6, size=(32, 32), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, channels), dtype=np.uint8)


def batch(images):
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return SampleBatch(planes / 127.5 - 1, planes, Cond(), SimpleNamespace(name="stand-in"))


def value(metric_id, parts, reference=None):
    metric = build_metric(metric_id)
    half = {name: array[:17] for name, array in parts.items()}, {name: array[17:] for name, array in parts.items()}
    return metric.compute(metric.merge(metric.update(half[0]), metric.update(half[1])), reference)


# --- CMMD -----------------------------------------------------------------------------------------------------------


def test_cmmd_is_its_formula_and_its_bias_is_known():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(50, 5)) + 1
    k = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)  # noqa: E731
    found = value("cmmd@identity", {"identity": x}, {"features": y})
    assert found.value == pytest.approx(1000 * (k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()), rel=1e-9)
    unbiased = (k(x, x).sum() - 60) / (60 * 59) + (k(y, y).sum() - 50) / (50 * 49) - 2 * k(x, y).mean()
    assert found.value - found.bias == pytest.approx(1000 * unbiased, rel=1e-9)
    assert kernel_means(x, y) == pytest.approx(k(x, y).mean(axis=1))
    assert value("cmmd@identity", {"identity": x}, {"features": x}).value == pytest.approx(0, abs=1e-9)


def test_cmmd_standard_error_is_the_spread_over_draws():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(400, 4)) * 8
    draws = [
        value("cmmd@identity", {"identity": rng.normal(size=(100, 4)) * 8 + 4}, {"features": y}) for _ in range(60)
    ]
    spread = np.std([found.value for found in draws], ddof=1)
    assert np.mean([found.se for found in draws]) == pytest.approx(spread, rel=0.3)  # 60 draws: 9 % one sigma


# --- diversity and copies -------------------------------------------------------------------------------------------


def test_vendi_counts_what_is_different():
    kinds = np.eye(7).repeat(5, axis=0)
    assert vendi_score(kinds) == pytest.approx(7)
    assert vendi_score(np.ones((9, 3))) == pytest.approx(1)
    x = np.random.default_rng(0).normal(size=(40, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / 40)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(x) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    assert vendi_score(x[:4]) == pytest.approx(vendi_score(np.pad(x[:4], ((0, 0), (0, 9)))))  # fewer samples than dims
    found = value("vendi@identity", {"identity": x})
    assert found.low < found.value < found.high
    with pytest.raises(UserError, match="has no direction"):
        value("vendi@identity", {"identity": np.zeros((40, 3))})


def test_copies_are_found_and_near_images_are_not():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(500, 20))
    fresh, copies = rng.normal(size=(30, 20)), train[:10] + 0.01 * rng.normal(size=(10, 20))
    found = value("memorised@identity", {"identity": np.concatenate([fresh, copies])}, {"features": train})
    assert found.value == 10 / 40
    assert found.note == "10 of 40 samples look like copies"
    ratios = nearest_ratio(np.zeros((1, 1)), np.array([[1.0], [4.0], [-9.0]]))
    assert ratios == pytest.approx([0.25])


def test_kid_per_class_sees_swapped_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    y, x = (rng.normal(size=(80, 3)) + 3 * labels[:, None] for _ in range(2))
    reference = {"features": y, "labels": labels}
    right = value("kid-per-class@identity", {"identity": x, "labels": labels}, reference)
    swapped = value("kid-per-class@identity", {"identity": x, "labels": 1 - labels}, reference)
    assert value("kid@identity", {"identity": x}, reference).value < 1  # the whole set looks right
    assert abs(right.value) < 4 * right.se
    assert swapped.value > 20
    expected = np.mean([mmd2(x[labels == k], y[labels == k]).value for k in (0, 1)])
    assert right.value == pytest.approx(expected)
    assert right.note.startswith("worst class ")
    with pytest.raises(UserError, match="reference make --labels"):
        value("kid-per-class@identity", {"identity": x, "labels": labels}, {"features": y})
    with pytest.raises(UserError, match="class 5 has 80 and 0"):
        value("kid-per-class@identity", {"identity": x, "labels": np.full(80, 5)}, reference)


# --- pairs ----------------------------------------------------------------------------------------------------------


def noisy(images, seed=1):
    noise = np.random.default_rng(seed).normal(0, 20, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_equal_torchmetrics(channels):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a = pictures(5, (24, 30), channels)
    b = noisy(a)
    result = score_images(list(a), reference=None, metrics=["psnr", "ssim"], baseline=list(b))
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2).double() for images in (a, b))
    psnr = [float(peak_signal_noise_ratio(i[None], j[None], data_range=255.0)) for i, j in zip(x, y, strict=True)]
    assert result["psnr"].value == pytest.approx(np.mean(psnr), rel=1e-6)
    _, maps = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    ssim = float(maps[..., 5:-5, 5:-5].mean())  # it also counts borders, reflected; Wang et al. do not
    assert result["ssim"].value == pytest.approx(ssim, abs=1e-6)
    same = score_images(list(a), reference=None, metrics=["psnr", "ssim"], baseline=list(a))
    assert (same["psnr"].value, same["ssim"].value) == (pytest.approx(100), pytest.approx(1))


def test_pairs_are_matched_by_name(tmp_path):
    a = pictures(4)
    folders = {}
    for name, ids in (("a", "abcd"), ("b", "abcd"), ("c", "abce"), ("d", "abc")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for i, image in zip(ids, a, strict=False):
            Image.fromarray(image).save(folders[name] / f"{i}.{'bmp' if name == 'b' else 'png'}")
    ask = lambda x, y: score_images(folders[x], reference=None, metrics=["psnr"], baseline=folders[y])  # noqa: E731
    assert ask("a", "b")["psnr"].value == pytest.approx(100)  # suffixes do not count
    with pytest.raises(UserError, match="does not pair with the images: d, e; pairs are matched by id"):
        ask("a", "c")
    with pytest.raises(UserError, match="does not pair"):
        ask("a", "d")
    with pytest.raises(UserError, match="metric 'psnr' compares pairs; give --baseline"):
        score_images(folders["a"], reference=None, metrics=["psnr"])


def test_paired_difference_and_win_rate_of_scores():
    """Against the same numbers by hand; a baseline against itself wins nothing."""
    images = list(pictures(40, (32, 32), 1))
    other = list(noisy(np.stack(images)))
    ask = {"reference": None, "metrics": ["accuracy@fashion-classifier"], "labels": [i % 10 for i in range(40)]}
    (pair,) = score_images(images, baseline=other, **ask).pairs
    alone = [score_images(x, **ask)["accuracy@fashion-classifier"].value for x in (images, other)]
    assert pair.difference.value == pytest.approx(alone[0] - alone[1])
    assert 0 <= pair.win_rate.low <= pair.win_rate.value <= pair.win_rate.high <= 1
    (tie,) = score_images(images, baseline=images, **ask).pairs
    assert (tie.difference.value, tie.win_rate.value) == (0, 0.5)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_equals_the_package(net, tmp_path, monkeypatch):
    """The package loads its trunk from torchvision's file; ours comes from the folder of weights."""
    import lpips
    import torchvision

    torch.manual_seed(0)
    kind = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[net]
    state = kind(weights=None).state_dict()
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    file = tmp_path / "weights" / image_pairs.trunk(net).file
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    module = "alexnet" if net == "alex" else "squeezenet1_1"
    monkeypatch.setattr(lpips.pretrained_networks.tv, module, lambda **options: _with_state(kind(weights=None), state))
    theirs = lpips.LPIPS(net=net, verbose=False)
    image_pairs.lpips_network.cache_clear()
    a = pictures(5, (64, 64))
    b = noisy(a)
    found = score_images(list(a), reference=None, metrics=[f"lpips@{net}"], baseline=list(b))[f"lpips@{net}"]
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in (a, b))
    with torch.no_grad():
        expected = theirs(x, y).mean()
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    assert found.value > 0
    image_pairs.lpips_network.cache_clear()


def _with_state(network, state):
    network.load_state_dict(state)
    return network


def test_lpips_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    images = list(pictures(4))
    with pytest.raises(UserError, match=r"put lpips/alexnet-owt-7be5be79\.pth .* curl -L"):
        score_images(images, reference=None, metrics=["lpips@alex"], baseline=images)
    with pytest.raises(UserError, match="unknown LPIPS network 'resnet'"):
        score_images(images, reference=None, metrics=["lpips@resnet"], baseline=images)


def test_pairs_of_other_sizes_are_refused():
    with pytest.raises(EvalbenchError, match="differ in shape"):
        build_metric("psnr").update({"images": pictures(2), "paired:images": pictures(2, (32, 30))})
    with pytest.raises(UserError, match="at least 11 x 11"):
        build_metric("ssim").update({"images": pictures(2, (9, 9)), "paired:images": pictures(2, (9, 9))})


# --- DINOv2 ---------------------------------------------------------------------------------------------------------


def test_dinov2_is_the_class_token_of_pillows_resize(tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"dinov2-vitb14/model\.safetensors .* hf download facebook/dinov2-base"):
        score_images(list(pictures(4)), reference=list(pictures(4, seed=1)), metrics=["fd@dinov2-vitb14"])
    torch.manual_seed(0)
    network = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224)
    ).eval()
    network.save_pretrained(tmp_path / "weights" / "dinov2-vitb14")
    images = pictures(3, (40, 60))
    found = build_extractor("dinov2-vitb14")(batch(images))
    planes = []
    for image in images:
        channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((224, 224), 3) for c in range(3)]
        planes.append(np.stack([np.asarray(channel).clip(0, 255) for channel in channels]) / 255)
    x = torch.tensor(np.stack(planes), dtype=torch.float32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((x - mean) / std).last_hidden_state[:, 0]
    assert (found - expected).abs().max() < 1e-4 * expected.square().mean().sqrt()
