"""Every standard suite end to end, offline: prompts, text encoder, guidance, network, decoder, metrics.

Networks are tiny random pipelines of the suite's class, saved by diffusers; N is small, all else is the suite's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import CountingExecutor
from tiny_pipelines import saved

from evalbench import api, catalogue, runner
from evalbench.errors import UserError
from evalbench.metrics.common import CLUSTER
from evalbench.plan import make_plan
from evalbench.reference_files import make_command
from evalbench.runner import Request
from evalbench.spec import Prompts, Suite, load_suite, noise_file, suite_names
from evalbench.store import Store

# Suites and the class of the model that they name.
CLASSES = {
    "cifar10": "ddim",
    "imagenet64": "consistency",
    "imagenet256": "dit",
    "imagenet512": "dit",
    "lsun-bedroom": "ldm",
    "lsun-church": "ldm",
    "celebahq256": "ddim",
    "ffhq64": "ddim",
    "coco30k": "stable_diffusion",
    "coco2014-mlperf": "stable_diffusion_xl",
    "coco2017-5k": "stable_diffusion",
    "partiprompts": "pixart_sigma",
    "drawbench": "stable_diffusion_3",
    "geneval": "stable_diffusion_xl",
    "dpg-bench": "flux",
}
KID = "kid@efficientnet-lite0-96"
LONG = "a dog " * 100


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: small prompt files, real images of noise, their reference, and tiny models."""
    found = tmp_path_factory.mktemp("cache")
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    (found / "images").mkdir()
    np.savez(found / "images" / "tiny.npz", arr_0=images)
    (found / "references").mkdir()
    make_command(
        str(found / "images" / "tiny.npz"), "efficientnet-lite0-96", found / "references" / "tiny.safetensors", 64
    )
    return found


def small(name: str, cache: Path) -> Suite:
    """The suite with a tiny model, four prompts and a reference of noise."""
    suite = load_suite(name)
    kind = CLASSES[name]
    folder = saved(kind, cache / "models")
    if kind == "ddim":
        folder = bounded(folder)
    options = {"folder": str(folder)} | ({"size": 8} if kind == "flux" else {})
    conditions = suite.conditions
    if conditions.prompts is not None:
        conditions = conditions.model_copy(update={"prompts": few(conditions.prompts, cache)})
    if kind == "consistency":
        conditions = conditions.model_copy(update={"classes": 4})
    noise = None
    if noise_file(suite.sampling.noise):  # latents of the tiny network
        noise = "file:tiny.npy@unverified"
        (cache / "noise").mkdir(exist_ok=True)
        np.save(cache / "noise" / "tiny.npy", np.random.default_rng(1).standard_normal((4, 4, 8, 8)))
    reference = load_suite("fashion-sd").references["fashion64"]
    reference = reference.model_copy(update={"file": "cache:references/tiny.safetensors", "sha256": "unverified"})
    return suite.model_copy(
        update={
            "model": suite.model.model_copy(update={"options": options}),
            "conditions": conditions,
            "references": {"efficientnet-lite0-96": reference},
            "image": (3, 8, 8) if kind in ("ddim", "consistency") else (3, 16, 16),
        }
    ).override(samples=4, batch=4, noise=noise)


def bounded(folder: Path) -> Path:
    """The pipeline as one that predicts x0: what a random network predicts as eps leads out of the range of images."""
    copy = folder.with_name(f"{folder.name}-x0")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    return copy


def few(prompts: Prompts, cache: Path) -> Prompts:
    """A file of the same format with two prompts, one of them too long for any encoder."""
    texts = ["a red cube", LONG]
    columns = [prompts.id or "id", prompts.text or "text", prompts.category or "category"]
    rows = [(str(i), text, "any") for i, text in enumerate(texts)]
    separator = {"csv": ","}.get(prompts.format, "\t")
    content = {
        "lines": "\n".join(texts),
        "pairs": "\n".join(f"{i}\t{text}" for i, text, _ in rows),
        "jsonl": "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows),
        "coco": json.dumps({"annotations": [{"image_id": i, "id": i, "caption": t} for i, t in enumerate(texts)]}),
    }.get(prompts.format, "\n".join(separator.join(row) for row in [columns, *rows]))
    file = cache / "prompts" / f"few-{prompts.file}"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content, "utf-8")
    digest = hashlib.sha256(content.encode()).hexdigest()
    return prompts.model_copy(update={"file": file.name, "sha256": digest, "rows": 2})


def request(suite: Suite, guidance: tuple[float, ...]) -> Request:
    metrics = tuple(dict.fromkeys((KID, *suite.metrics.names)))
    wanted = tuple(metric for metric in metrics if not metric.startswith("fd@efficient"))  # needs more than four
    nfe = (1,) if suite.name == "imagenet64" else (2,)
    return Request(suite, ("ddim",), nfe, guidance, (0,), wanted, allow_small_n=True, save_samples=True)


def test_every_standard_suite_is_here():
    assert set(CLASSES) <= set(suite_names())


@pytest.mark.parametrize("name", CLASSES)
def test_the_whole_path_runs_offline(name, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = small(name, cache)
    scales = suite.sampling.guidance_grid[-1:] if len(suite.sampling.guidance_grid) > 1 else ()
    (record, *more) = runner.run(request(suite, (1.0, *scales)), tmp_path, CountingExecutor)
    for each in (record, *more):
        assert each.status == "ok", each.failure
        assert np.isfinite(each.metrics[KID].value)
    if more:  # a sweep: guidance costs a second row and gives other samples
        assert more[0].counts["evals.base"] == 2 * record.counts["evals.base"]
        assert more[0].metrics[KID].value != record.metrics[KID].value
    absent = {metric for metric in suite.metrics.names if metric.startswith(("fid@", "clip@", "fd@dino"))}
    assert absent <= set(record.missing)  # shown as missing, never replaced
    if suite.conditions.prompts is not None:
        assert record.counts["prompts_cut"] == 0.5  # of two prompts one is too long
        store = Store(tmp_path)  # and the chunks say which samples share one, for intervals and verdicts
        (chunk,) = store.present_chunks(record.cell.id)
        assert store.read_chunk(chunk)[CLUSTER].tolist() == [0, 1, 0, 1]
    else:
        assert "prompts_cut" not in record.counts


# --- what does not fit ----------------------------------------------------------------------------------------------


def refused(suite: Suite, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_plan(request(suite, (1.0,)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_does_not_fit_a_suite_is_refused_in_one_line(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(cache))
    text, labelled = small("coco30k", cache), small("imagenet256", cache)
    refused(text.model_copy(update={"model": labelled.model}), "reads no texts")
    refused(text.model_copy(update={"image": (3, 512, 512)}), "images of 3x512x512, but the model makes 3x16x16")
    wrong = labelled.conditions.model_copy(update={"classes": 2000})
    refused(labelled.model_copy(update={"conditions": wrong}), "has 1000 classes")
    missing = text.references["efficientnet-lite0-96"].model_copy(
        update={"file": "cache:references/absent.safetensors"}
    )
    refused(
        text.model_copy(update={"references": {"efficientnet-lite0-96": missing}}),
        "evalbench reference make .*coco2014",
    )
    pinned = missing.model_copy(update={"file": "cache:references/tiny.safetensors", "sha256": "0" * 64})
    refused(text.model_copy(update={"references": {"efficientnet-lite0-96": pinned}}), "SHA-256")
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    refused(text, "prompts not found")


def test_a_reference_that_changes_after_its_first_use_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    (tmp_path / "references").mkdir()
    file = tmp_path / "references" / "tiny.safetensors"
    file.write_bytes((cache / "references" / "tiny.safetensors").read_bytes())
    suite = small("cifar10", cache)
    make_plan(request(suite, (1.0,)))
    file.write_bytes(file.read_bytes() + b"x")
    refused(suite, "has SHA-256")


def test_doctor_says_what_a_suite_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert catalogue.suite_missing(load_suite("fashion-sd")) == ""
    lacking = catalogue.suite_missing(load_suite("geneval"))
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in lacking
    assert "geneval_evaluation_metadata.jsonl" in lacking
    assert "reference make" in catalogue.suite_missing(load_suite("cifar10"))


def test_a_suite_by_name_runs_with_a_model_of_ones_own(cache):
    made = api.make_request("imagenet256", model=str(saved("dit", cache / "models")))
    assert made.suite.model.options == {"folder": str(saved("dit", cache / "models"))}
    refused(made.suite, "images of 3x256x256, but the model makes 3x16x16")
