"""Networks in diffusers' layout: sampled as its own pipelines sample them, and refused when they are not right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond, Step
from evalbench.models.pipelines import DiffusersPipeline, Folder, schedule, weights_digest
from evalbench.paths import Flow, VPDiscrete
from evalbench.sampling import Setup, conditions, images_of, sample, setup_of, wrapped
from evalbench.spec import Cell, content_id, load_suite

LATENT = ("fashion-sd", "fashion-flow", "fashion-flow-2rf")
ZOO = ("fashion-dit", *LATENT)
INDICES = range(4)
ABSENT = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))  # of SD3


@cache
def setup(name: str) -> Setup:
    return setup_of(load_suite(name), {})


def ours(name: str, method: str, nfe: int, guidance: float) -> torch.Tensor:
    """Decoded images in [-1, 1], before rounding."""
    made, chain = setup(name), registry.build_method(method)
    suite = made.suite
    facts = {"suite": name, "suite_version": suite.version, "generation": content_id(suite.generation())}
    cell = Cell(**facts, method=chain.text, settings="", nfe=nfe, guidance=guidance)
    cond = conditions(suite, made.model, INDICES, made.device)
    x = sample(made, chain, cell, INDICES, cond, Ledger(len(INDICES), budget=nfe))
    with torch.no_grad():
        return made.model.decode(x)


def start(name: str) -> torch.Tensor:
    """The unit normals that our samples start from."""
    from evalbench.noise import NoiseSource

    return NoiseSource(0, INDICES, setup(name).model.shape).start()


def prompts(name: str) -> list[str]:
    return [setup(name).model.caption(i) for i in INDICES]


def folder(name: str) -> Path:
    return setup(name).model._folder.path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_of_fashion_sd_are_those_of_the_stable_diffusion_pipeline(guidance):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    found = ours("fashion-sd", "diffusers:DDIMScheduler(timestep_spacing=trailing)", 10, guidance)
    pipeline = StableDiffusionPipeline.from_pretrained(folder("fashion-sd"), dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts("fashion-sd"),
        latents=start("fashion-sd"),
        guidance_scale=guidance,
        num_inference_steps=10,
        output_type="pt",
    ).images
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["fashion-flow", "fashion-flow-2rf"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_of_the_flows_are_those_of_the_stable_diffusion_3_pipeline(name, guidance):
    from diffusers import StableDiffusion3Pipeline

    found = ours(name, "diffusers:FlowMatchEulerDiscreteScheduler", 10, guidance)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder(name), dtype=torch.float32, **ABSENT)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts(name),
        latents=start(name),
        guidance_scale=guidance,
        num_inference_steps=10,
        max_sequence_length=0,
        output_type="pt",
    ).images
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), theirs, atol=1e-3, rtol=0)


def test_samples_of_fashion_dit_are_those_of_a_plain_loop_over_its_scheduler():
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    found = ours("fashion-dit", "diffusers:DDIMScheduler(prediction=v_prediction)", 5, 1.0)
    network = DiTTransformer2DModel.from_pretrained(folder("fashion-dit") / "transformer", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(folder("fashion-dit") / "scheduler")
    scheduler.set_timesteps(5)
    x, labels = start("fashion-dit"), torch.tensor(list(INDICES))
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network.eval()(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(found, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ZOO)
def test_a_row_depends_on_no_other_and_the_null_condition_is_another(name):
    made = setup(name)
    x = torch.randn(3, *made.model.shape, generator=torch.Generator().manual_seed(3))
    cond = conditions(made.suite, made.model, range(3), made.device)
    made.door.ledger = Ledger(3)
    with torch.no_grad():
        together = made.door(x, 0.4, cond)
        made.door.ledger = Ledger(1)
        alone = made.door(x[1:2], 0.4, cond.rows(torch.tensor([1])))
        made.door.ledger = Ledger(3)
        free = made.door(x, 0.4, cond.null())
        per_row = made.door(x, torch.full((3,), 0.4), cond)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, per_row, atol=1e-5, rtol=1e-5)
    assert float((together - free).abs().max()) > 1e-2


def test_a_network_denoises_the_data_it_was_trained_on():
    """At small noise the error of x0 is below the noise: path, prediction type and time convention are right."""
    for name in ZOO:
        made = setup(name)
        cond = conditions(made.suite, made.model, range(20), made.device)
        x_0 = made.model.data(range(20), cond.labels, seed=5)
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(4))
        made.door.ledger = Ledger(20)
        errors = []
        for t in (0.2, 0.6):
            alpha, sigma = float(made.path.alpha(t)), float(made.path.sigma(t))
            with torch.no_grad():
                found = made.door(alpha * x_0 + sigma * noise, t, cond)
            errors.append(float(((found - x_0) ** 2).mean().sqrt()))
            assert errors[-1] < 0.75 * sigma / alpha, (name, t)
        assert errors[0] < errors[1]


def test_the_large_transformer_takes_halved_images_at_the_cost_of_their_tokens():
    made = setup("fashion-dit")
    ledger = made.door.ledger = Ledger(2)
    cond = Cond(torch.tensor([0, 1]))
    with torch.no_grad():
        found = made.door(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), 0.5, cond)
    assert found.shape == (2, 1, 16, 16)
    assert 0.15 < float(ledger.cost[0]) < 0.5  # a quarter of the tokens, and what does not depend on their number


def test_the_small_transformer_costs_less_than_a_fifth_of_the_large_one():
    made = setup("fashion-dit")
    ledger = made.door.ledger = Ledger(2)
    x, cond = torch.zeros(2, 1, 32, 32), Cond(torch.tensor([0, 1]))
    with torch.no_grad():
        made.door.role("small")(x, 0.5, cond)
    assert float(ledger.cost[0]) < 0.2


@pytest.mark.parametrize("name", LATENT)
def test_latents_have_unit_scale_and_decode_to_what_was_encoded(name):
    model = setup(name).model
    labels = torch.arange(10).repeat(4)
    latents = model.data(range(40), labels, seed=1)
    assert latents.shape == (40, 4, 8, 8)
    assert 0.7 < float(latents.std()) < 1.3
    with torch.no_grad():
        again = model.encode(model.decode(latents))
    assert float((again - latents).pow(2).mean().sqrt()) < 0.5
    assert images_of(model, latents).dtype == torch.uint8


def test_data_is_a_function_of_seed_index_and_label():
    model = setup("fashion-dit").model
    one = model.data([5, 6], torch.tensor([3, 4]), seed=2)
    torch.testing.assert_close(one[1:], model.data([6], torch.tensor([4]), seed=2), rtol=0, atol=0)
    assert not torch.equal(one, model.data([5, 6], torch.tensor([3, 4]), seed=3))
    with pytest.raises(Unsupported, match="labels"):
        model.data([0], None, seed=0)


def test_held_out_images_are_of_their_class_and_each_at_most_once():
    model = setup("fashion-dit").model
    images = model.held_out(np.repeat(np.arange(10), 30), seed=3)
    assert len(np.unique(images.reshape(300, -1), axis=0)) == 300
    with pytest.raises(UserError, match="1001 images of class 2"):
        model.held_out(np.full(1001, 2), seed=0)


def test_gradients_reach_the_state():
    made = setup("fashion-sd")
    made.door.ledger = Ledger(2)
    cond = conditions(made.suite, made.model, range(2), made.device)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.enable_grad():
        out = made.door(x, 0.5, cond)
        slope = made.door.gradient(out.square().sum(), x)
    assert slope.shape == x.shape
    assert bool(torch.isfinite(slope).all())
    assert float(slope.abs().max()) > 0


def test_guidance_is_the_extrapolation_of_two_calls():
    made = setup("fashion-sd")
    cond = conditions(made.suite, made.model, range(2), made.device)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made.door.ledger = Ledger(2)
    chain = registry.build_method("ddim")
    with torch.no_grad():
        guided = wrapped(made.door, chain, 3.0)(x, 0.5, cond, "eps", step=Step(0, 1, 0.5, 0.4))
        given, free = made.door(x, 0.5, cond, "eps"), made.door(x, 0.5, cond.null(), "eps")
    torch.testing.assert_close(guided, free + 3.0 * (given - free), atol=1e-5, rtol=1e-5)


# --- folders --------------------------------------------------------------------------------------------------------


def test_path_and_prediction_come_from_the_scheduler():
    path, native, steps = schedule(Folder(folder("fashion-sd")))
    assert isinstance(path, VPDiscrete)
    assert (native, steps, len(path.alphas_cumprod)) == ("eps", 1000, 1000)
    assert schedule(Folder(folder("fashion-dit")))[1] == "v"
    path, native, _ = schedule(Folder(folder("fashion-flow")))
    assert isinstance(path, Flow)
    assert native == "velocity"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the small transformer's folder, to spoil."""
    small = load_suite("fashion-dit").roles["small"].options["folder"]
    return Path(shutil.copytree(Folder.find(small).path, tmp_path / "model"))


def test_a_changed_weight_is_refused_in_one_line(copied):
    digest = weights_digest(copied)
    assert digest == load_suite("fashion-dit").roles["small"].options["sha256"]
    DiffusersPipeline(str(copied), digest).check()
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="restore the files or correct the suite") as caught:
        DiffusersPipeline(str(copied), digest).check()
    assert "\n" not in str(caught.value)


def test_a_run_with_changed_weights_exits_2_before_anything_runs(copied, tmp_path):
    suite = tmp_path / "changed.toml"
    suite.write_text(f'extends = "fashion-dit"\n[model]\noptions = {{ folder = "{copied}" }}\n')
    (copied / "transformer" / "extra.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "evalbench", "run", str(suite), "--serial", "--out", str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "the suite says" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: shutil.rmtree(f / "transformer"), "neither unet"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "cannot read"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "cannot read"),
        (lambda f: (f / "transformer" / "config.json").write_text("{}"), "names no class"),
        (lambda f: _change(f / "transformer" / "config.json", _class_name="Transformer3DModel"), "network class"),
        (lambda f: _change(f / "scheduler" / "scheduler_config.json", prediction_type="flow"), "prediction_type"),
    ],
)
def test_a_folder_that_is_not_right_says_what_is_wrong(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message) as caught:
        DiffusersPipeline(str(copied))
    assert "\n" not in str(caught.value)


def _change(file: Path, **facts: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_texts_are_needed_where_a_network_reads_them():
    model = setup("fashion-sd").model
    with pytest.raises(Unsupported, match="needs texts"):
        model.given(Cond(torch.tensor([0])))
    with pytest.raises(Unsupported, match="needs labels"):
        setup("fashion-dit").model.given(Cond(captions=("a bag",)))
