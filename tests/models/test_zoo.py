"""The embedded networks: their files, cards and training scripts."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from evalbench.models.data import fashion_test
from evalbench.models.pipelines import Folder, weights_digest
from evalbench.models.zoo import generative, train_fashion_dit
from evalbench.models.zoo.captions import CONTEXT, captions, clip_tokenizer, token_table
from evalbench.spec import load_suite, suite_names

ZOO = generative.ZOO
SUITES = [name for name in suite_names() if load_suite(name).model.loader == "fashion-zoo"]
DATA = Path(os.environ.get("EVALBENCH_DATA", "/usr/share/datasets/fashion-mnist"))
SMALL = train_fashion_dit.SIZES["small"]


def test_the_networks_have_suites():
    assert SUITES == ["fashion-dit", "fashion-flow", "fashion-flow-2rf", "fashion-sd"]


def test_weights_are_as_small_as_promised():
    sizes = [file.stat().st_size for file in ZOO.rglob("*.safetensors")]
    assert max(sizes) <= 8e6
    assert sum(sizes) <= 40e6


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_names_the_weights_that_ship_and_their_card_says_how_good_they_are(name):
    options = load_suite(name).model.options
    folder = Folder.find(options["folder"]).path
    assert weights_digest(folder) == options["sha256"]
    card = json.loads((folder / "card.json").read_text())
    assert card["sha256"] == options["sha256"]
    assert {"data", "what", "parameters", "recipe", "seconds", "machine", "torch", "loss_curve", "quality"} <= set(card)
    assert card["quality"]["accuracy@fashion-classifier"]["value"] > 0.85
    assert {"value", "floor", "n"} <= set(card["quality"]["fd@fashion64"])
    assert (folder / "samples.png").stat().st_size > 5000


# --- training -------------------------------------------------------------------------------------------------------


def short_run(data: tuple[torch.Tensor, torch.Tensor], folder: Path, stop: int = 50) -> generative.Training:
    """A run of 50 steps of the small transformer, or its first `stop` steps."""
    torch.manual_seed(SMALL.recipe.seed)
    recipe = SMALL.recipe
    model = train_fashion_dit.network(SMALL)
    training = generative.Training(
        model,
        lambda g, _: train_fashion_dit.seen(data, recipe, g, low=False),
        partial(train_fashion_dit.v_loss, model),
        recipe,
        folder,
    )
    training.run(save_every=stop, until=stop)
    return training


def images() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = fashion_test()
    return torch.from_numpy(images).float() / 127.5 - 1.0, torch.from_numpy(labels)


def test_training_again_from_the_same_seed_gives_the_same_losses_and_a_stopped_run_goes_on(tmp_path):
    data = images()
    first, again = short_run(data, tmp_path / "a"), short_run(data, tmp_path / "b")
    assert len(first.curve) == 1
    assert first.losses == pytest.approx(again.losses, abs=1e-6)
    assert first.losses[-1] < first.losses[0]
    short_run(data, tmp_path / "c", stop=20)
    resumed = short_run(data, tmp_path / "c")
    assert resumed.losses == pytest.approx(first.losses, abs=1e-6)
    for ours, theirs in zip(first.average, resumed.average, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(tmp_path):
    data = images()
    training = short_run(data, tmp_path, stop=2)
    other = generative.Recipe(**(vars(training.recipe) | {"batch": 8}))
    with pytest.raises(SystemExit, match="another recipe"):
        generative.Training(training.network, training.draw, training.loss, other, tmp_path).run()


def test_retraining_on_the_real_data_starts_on_the_curve_of_the_card(tmp_path):
    if not (DATA / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("needs the Fashion-MNIST training files; set EVALBENCH_DATA")
    card = json.loads((ZOO / SMALL.name / "card.json").read_text())
    found = short_run(generative.train_images(str(DATA)), tmp_path)
    assert found.curve[0] == pytest.approx(card["loss_curve"][0], abs=1e-3)  # another machine rounds otherwise


# --- captions -------------------------------------------------------------------------------------------------------


def test_every_caption_fits_the_context_and_every_word_is_one_token():
    tokenizer = clip_tokenizer(CONTEXT)
    for text in (text for of_class in captions() for text in of_class):
        tokens = tokenizer(text).input_ids
        words = text.replace("-", " - ").split()
        assert len(tokens) == len(words) + 2 <= CONTEXT
    table = token_table(tokenizer)
    assert table.shape == (11, 10, CONTEXT)
    assert len(set(map(tuple, table[10].tolist()))) == 1  # the empty text, whatever the template
