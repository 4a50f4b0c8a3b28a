"""CLIP scores and learned rewards on random networks: the published weights are not to be had offline.

A small CLIP takes the place of ViT-B-32:openai in the folder of weights, so that the whole path is the published one's.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from evalbench.errors import BadSamples, UserError
from evalbench.interfaces import Cond, SampleBatch
from evalbench.metrics import preferences
from evalbench.metrics.clip import ClipId
from evalbench.metrics.extractors import captions_of
from evalbench.registry import build_extractor, build_metric, extractor_fingerprint
from evalbench.score import score_images

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CAPTIONS = ("a red cube", "two blue spheres on a table", "a photo of a dog", "a red cube")
ID = "ViT-B-32:openai"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A random CLIP where the published one belongs, as `hf download` would put it."""
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    folder = tmp_path / "weights" / "open_clip" / "ViT-B-32--openai"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**MODEL, "vision_cfg": dict(MODEL["vision_cfg"]), "text_cfg": dict(MODEL["text_cfg"])})
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    return model.eval()


def pictures(n=4, size=(40, 50), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, channels), dtype=np.uint8)


def batch(images, captions=CAPTIONS):
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return SampleBatch(planes / 127.5 - 1, planes, Cond(None, captions), SimpleNamespace(name="stand-in"))


def preprocess():
    settings = open_clip.transform.PreprocessCfg(**PREPROCESS, size=32)
    return open_clip.transform.image_transform_v2(settings, is_train=False)


class ForTorchmetrics(torch.nn.Module):
    """An open_clip model as torchmetrics asks for one."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.text_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=77))
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

    def get_image_features(self, pixels):
        return self.model.encode_image(pixels)

    def get_text_features(self, tokens, mask):
        return self.model.encode_text(tokens)


def processor(text=None, images=None, **options):
    if images is not None:
        shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return {"pixel_values": torch.stack([preprocess()(image) for image in shown])}
    tokens = open_clip.SimpleTokenizer()(text)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_clip_score_equals_torchmetrics(installed):
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore(model_name_or_path=lambda: (ForTorchmetrics(installed), processor))
    images = pictures()
    metric.update(torch.from_numpy(images).permute(0, 3, 1, 2), list(CAPTIONS))
    expected = float(metric.score / metric.n_samples)  # compute() clips the mean at zero
    names = {f"{i:06d}": caption for i, caption in enumerate(CAPTIONS)}
    metrics = [f"clip@{ID}", f"clip-x100@{ID}", f"clipscore@{ID}", f"clip@{ID}:a-photo-depicts"]
    result = score_images(list(images), reference=None, metrics=metrics, captions=names)
    raw = result[f"clip@{ID}"]
    assert 100 * raw.value == pytest.approx(expected, abs=1e-4)
    assert result[f"clip-x100@{ID}"].value == pytest.approx(expected, abs=1e-4)
    assert result[f"clip-x100@{ID}"].se == pytest.approx(100 * raw.se)
    assert result[f"clip@{ID}:a-photo-depicts"].value != raw.value
    cosines = build_extractor(f"clip-cosine:{ID}")(batch(images))[:, 0].double().numpy()
    assert result[f"clipscore@{ID}"].value == pytest.approx(np.mean(2.5 * np.maximum(cosines, 0)), abs=1e-9)


def test_captions_are_matched_by_id_and_never_by_position(installed):
    images = list(pictures())
    names = {f"{i:06d}": caption for i, caption in enumerate(CAPTIONS)}
    turned = dict(reversed(names.items()))
    scores = [
        score_images(images, reference=None, metrics=[f"clip@{ID}"], captions=given)[f"clip@{ID}"]
        for given in (names, turned)
    ]
    assert scores[0] == scores[1]
    for wrong, line in (
        ({**names, "9": "a"}, "1 captions have no image"),
        (dict(list(names.items())[1:]), "000000 has no caption"),
        (None, "needs the caption of each image; give --captions FILE"),
    ):
        with pytest.raises(UserError, match=line):
            score_images(images, reference=None, metrics=[f"clip@{ID}"], captions=wrong)


def test_long_captions_are_counted(installed):
    captions = (*CAPTIONS[:3], "word " * 76)
    extract = build_extractor(f"clip-cosine:{ID}")
    assert extract(batch(pictures(), captions))[:, 1].tolist() == [0, 0, 0, 1]
    assert extract(batch(pictures(), (*CAPTIONS[:3], "word " * 75)))[:, 1].sum() == 0  # 75 and two marks are 77
    metric = build_metric(f"clip@{ID}")
    value = metric.compute(metric.update({f"clip-cosine:{ID}": extract(batch(pictures(), captions)).numpy()}), None)
    assert value.note == "1 of 4 captions cut to the length the model reads"


def test_eval_mode_company_and_grey(installed):
    extract = build_extractor(f"clip-image:{ID}")
    images = pictures()
    vectors = extract(batch(images))
    assert vectors.square().sum(1).numpy() == pytest.approx(np.ones(4), abs=1e-5)
    assert torch.equal(extract(batch(images[2:3])), vectors[2:3])
    grey = pictures(2, channels=1)
    assert torch.equal(extract(batch(grey)), extract(batch(np.repeat(grey, 3, axis=3))))


def test_fingerprint_and_digest(installed, tmp_path):
    plain, prefixed = (extractor_fingerprint(f"clip-cosine:{ID}{word}") for word in ("", ":a-photo-depicts"))
    assert plain != prefixed
    assert "prefix 'A photo depicts '" in prefixed
    recorded = tmp_path / "weights/open_clip/ViT-B-32--openai/open_clip_model.safetensors.sha256"
    assert recorded.read_text().split()[0] in plain


def test_absent_weights_and_wrong_names(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    why = ClipId.parse(ID).missing()
    assert "put open_clip/ViT-B-32--openai/open_clip_model.safetensors (SHA-256 unverified)" in why
    assert "hf download timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors" in why
    for target, line in (
        ("ViT-B-33:openai", "unknown CLIP model 'ViT-B-33'.*did you mean"),
        ("ViT-B-32:opnai", "unknown weights of CLIP model 'ViT-B-32' 'opnai'.*did you mean 'openai'"),
        ("ViT-B-32:openai:depicts", "unknown prompt prefix"),
    ):
        with pytest.raises(UserError, match=line):
            build_metric(f"clip@{target}")
    with pytest.raises(BadSamples, match="4 images come with 3 captions"):
        captions_of(batch(pictures(), CAPTIONS[:3]), "clip", 4)


# --- rewards --------------------------------------------------------------------------------------------------------


def test_hps_is_the_raw_cosine_of_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "tiny-hps.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(configs)
    torch.manual_seed(1)
    model, _, transform = open_clip.create_model_and_transforms("tiny-hps")
    file = tmp_path / "weights/hpsv2.1/HPS_v2.1_compressed.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, file)
    monkeypatch.setattr(preferences.HPS, "architecture", "tiny-hps")
    images = pictures()
    found = build_extractor("hpsv2.1")(batch(images))
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([transform(Image.fromarray(x)) for x in images]))
        texts = model.encode_text(open_clip.SimpleTokenizer()(list(CAPTIONS)))
    expected = F.cosine_similarity(seen, texts)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    metric = build_metric("reward@hpsv2.1")
    assert metric.compute(metric.update({"hpsv2.1": found.numpy()}), None).note == ""


def test_pickscore_is_the_model_cards(tmp_path, monkeypatch):
    """Scores of a random CLIP by the formula of the model card: exp(logit scale) x cosine."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    folder = tmp_path / "weights/pickscore-v1"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(2)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = {word: i for i, word in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    words |= {"<|startoftext|>": 58, "<|endoftext|>": 59}
    tokenizer = CLIPTokenizer(vocab=words, merges=[])
    size = {"shortest_edge": 32}
    images_of = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(images_of, tokenizer)
    processor.save_pretrained(folder / "processor")
    images = pictures()
    captions = ("red", "blue dog", "cat", "red")
    saved = {path.name for path in (folder / "processor").iterdir()}
    if "preprocessor_config.json" not in saved:  # newer versions keep all in one file
        (folder / "processor" / "preprocessor_config.json").write_text(images_of.to_json_string())
    found = build_extractor("pickscore-v1")(batch(images, captions))
    with torch.no_grad():
        inputs = processor(text=list(captions), images=list(images), padding=True, return_tensors="pt")
        out = model(**inputs)
        expected = (out.logits_per_image).diagonal()
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)
