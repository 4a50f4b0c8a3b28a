"""`evalbench suite fetch`: local archives in place of downloads, and what is said when something is not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evalbench import fetching, weights
from evalbench.conventions import real_images
from evalbench.errors import UserError
from evalbench.fetching import fetch_suite, read_cifar10
from evalbench.spec import load_suite
from evalbench.suite_references import images_file

ROWS = {"cifar10-train": 10, "cifar10-test": 2}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive in the layout of the npm package, and an empty cache."""
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetching, "_CIFAR_ROWS", ROWS)
    folder = tmp_path / "package"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        Image.fromarray(rng.integers(0, 256, (2, 1024, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(list(range(10))))
    (folder / "test_lables.json").write_text("[3, 4]")
    return folder


def test_rows_of_the_archive_are_images(archive):
    images, labels = read_cifar10(archive, "cifar10-train")
    assert images.shape == (10, 32, 32, 3)
    assert labels.tolist() == list(range(10))
    third = np.asarray(Image.open(archive / "data_batch_2.png"))[0].reshape(32, 32, 3)
    assert np.array_equal(images[2], third)


def test_a_fetch_keeps_what_it_got_and_names_what_is_lacking(archive):
    lines: list[str] = []
    with pytest.raises(UserError, match="hf download google/ddpm-cifar10-32") as caught:
        lines.extend(fetch_suite("cifar10", archive))
    assert "\n" not in str(caught.value)
    with np.load(images_file("cifar10-test")) as found:
        assert found["arr_0"].shape == (2, 32, 32, 3)
        assert found["arr_1"].tolist() == [3, 4]
    assert images_file("cifar10-train").with_name("cifar10-train.npz.sha256").is_file()
    assert not list(images_file("cifar10-test").parent.glob(".*"))  # nothing half-written
    before = images_file("cifar10-test").stat().st_mtime_ns
    with pytest.raises(UserError):
        list(fetch_suite("cifar10", archive))
    assert images_file("cifar10-test").stat().st_mtime_ns == before  # and nothing fetched twice
    images_file("cifar10-test").write_bytes(b"other")
    with pytest.raises(UserError, match="has SHA-256"):
        list(fetch_suite("cifar10", archive))


def test_a_missing_split_is_one_line(archive):
    (archive / "test_batch.png").unlink()
    with pytest.raises(UserError, match="lacks the split cifar10-test"):
        list(fetch_suite("cifar10", archive))


def test_licence_and_source_come_first(archive, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = fetch_suite("geneval")
    assert "djghosh13/geneval" in next(fetched)
    with pytest.raises(UserError, match=r"geneval_evaluation_metadata\.jsonl .*stable-diffusion-xl-base"):
        list(fetched)


def test_a_latent_file_is_copied_and_checked(archive, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = weights.cache() / "noise" / "latents.pt"
    with pytest.raises(UserError, match=r"noise not found; put latents\.pt of mlcommons/inference"):
        list(fetch_suite("coco2014-mlperf", archive))
    (archive / "latents.pt").write_bytes(b"another file")
    with pytest.raises(UserError, match=r"latents\.pt has SHA-256"):
        list(fetch_suite("coco2014-mlperf", archive))
    assert target.read_bytes() == b"another file"


def test_fetched_images_serve_the_check_of_conventions(archive):
    suite = load_suite("cifar10")
    assert real_images(suite) is None
    with pytest.raises(UserError):  # the model is lacking, the images are not
        list(fetch_suite("cifar10", archive))
    pixels, labels = real_images(suite)
    images, classes = read_cifar10(archive, "cifar10-train")
    assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert labels.tolist() == classes.tolist()
