"""Every network class samples as the pipeline of diffusers that it comes from: random pipelines, saved by diffusers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import pipeline, saved

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import NetworkDoor
from evalbench.errors import Unsupported, UserError
from evalbench.interfaces import Cond
from evalbench.models.pipelines import DiffusersPipeline
from evalbench.sampling import wrapped

TEXTS = ("a red cube, left of a ball", "Two dogs.")
STEPS = 3
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def loaded(name: str, folders: Path, **options: Any) -> DiffusersPipeline:
    model = DiffusersPipeline(str(saved(name, folders)), **options)
    model.to(torch.float32, torch.device("cpu"))
    return model


def start(model: DiffusersPipeline) -> torch.Tensor:
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(5))


def guided(model: DiffusersPipeline, guidance: float) -> Any:
    assert model.path is not None
    door = NetworkDoor(model, model.path, "time")
    door.ledger = Ledger(2)
    return wrapped(door, registry.build_method("ddim"), guidance)


def by_scheduler(model: DiffusersPipeline, name: str, x: torch.Tensor, cond: Cond, guidance: float) -> torch.Tensor:
    """Decoded images: our guided field and decoder, the pipeline's own DDIM steps."""
    scheduler, field = pipeline(name).scheduler, guided(model, guidance)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for step in scheduler.timesteps:
            eps = field(x, (float(step) + 1) / 1000, cond, "eps")
            x = scheduler.step(eps, step, x).prev_sample
        return model.decode(x)


def by_flow(
    model: DiffusersPipeline, sigmas: list[float], x: torch.Tensor, cond: Cond, guidance: float
) -> torch.Tensor:
    """Decoded images: Euler steps along the given noise levels."""
    field = guided(model, guidance)
    with torch.no_grad():
        for s, t in pairwise(sigmas):
            x = x + (t - s) * field(x, min(s, model.path.t_start), cond, "velocity")
        return model.decode(x)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Images in [-1, 1] against a pipeline's in [0, 1]."""
    assert theirs.std() > 0.01  # an image that shows nothing equals any other
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "ldm"])
def test_unconditional_networks_sample_as_their_pipelines(name, folders, monkeypatch):
    model = loaded(name, folders)
    x = start(model)
    kind = type(pipeline(name))
    monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, **__: x.clone())  # they take no latents
    theirs = pipeline(name)(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    assert_same(by_scheduler(model, name, x, Cond(), 1.0), torch.from_numpy(theirs).permute(0, 3, 1, 2))
    assert "labels" not in model.provides


def test_consistency_models_map_noise_as_their_pipeline(folders, monkeypatch):
    model = loaded("consistency", folders)
    x, labels = start(model), [1, 3]
    theirs = pipeline("consistency")(
        batch_size=2, class_labels=labels, latents=x, num_inference_steps=1, output_type="np"
    ).images
    field, cond = guided(model, 1.0), Cond(torch.tensor(labels))
    with torch.no_grad():
        ours = field(80.0 * x, 80.0, cond)
    assert_same(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))
    # two steps, Algorithm 1 of the paper: the second from its noise level, with given noise
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *_, **__: noise)
    theirs = pipeline("consistency")(
        batch_size=2, class_labels=labels, latents=x, num_inference_steps=None, timesteps=[22, 0], output_type="np"
    ).images
    sigmas = pipeline("consistency").scheduler.sigmas.tolist()
    with torch.no_grad():
        x = field(80.0 * x * sigmas[0] / 80.0, sigmas[0], cond)
        again = x + noise * (sigmas[1] ** 2 - 0.002**2) ** 0.5
        ours = field(again, sigmas[1], cond)
    assert_same(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))
    with pytest.raises(Unsupported, match="null label"):
        model.given(Cond(torch.tensor([-1])))


def test_the_latent_transformer_samples_as_its_pipeline(folders, monkeypatch):
    model = loaded("dit", folders)
    x, labels = start(model), torch.tensor([7, 999])
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: x.clone())
    for guidance in (1.0, 4.0):
        theirs = pipeline("dit")(
            labels.tolist(), guidance_scale=guidance, num_inference_steps=STEPS, output_type="pt"
        ).images
        assert_same(by_scheduler(model, "dit", x, Cond(labels), guidance), theirs)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "pixart_alpha", "pixart_sigma"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_networks_that_read_texts_sample_as_their_pipelines(name, guidance, folders):
    model = loaded(name, folders)
    x = start(model)
    more = {"use_resolution_binning": False, "clean_caption": False} if name.startswith("pixart") else {}
    theirs = pipeline(name)(
        list(TEXTS),
        latents=x,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        output_type="pt",
        **more,
    ).images
    assert_same(by_scheduler(model, name, x, Cond(captions=TEXTS), guidance), theirs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stable_diffusion_3_with_t5_samples_as_its_pipeline(guidance, folders):
    model = loaded("stable_diffusion_3", folders)
    x = start(model)
    pipe = pipeline("stable_diffusion_3")
    theirs = pipe(
        list(TEXTS),
        latents=x,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert_same(by_flow(model, pipe.scheduler.sigmas.tolist(), x, Cond(captions=TEXTS), guidance), theirs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flux_samples_as_its_pipeline(guidance, folders):
    model = loaded("flux", folders, size=8, embedded_guidance=2.5)
    x = start(model)
    pipe = pipeline("flux")
    theirs = pipe(
        list(TEXTS),
        negative_prompt=["", ""] if guidance > 1 else None,
        true_cfg_scale=guidance,
        latents=pipe._pack_latents(x, 2, 4, 8, 8),
        guidance_scale=2.5,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert_same(by_flow(model, pipe.scheduler.sigmas.tolist(), x, Cond(captions=TEXTS), guidance), theirs)
    assert loaded("flux", folders).shape == (4, 128, 128)


# --- what stands around them ----------------------------------------------------------------------------------------


def test_texts_that_an_encoder_cuts_are_known(folders):
    long = " ".join(["word"] * 90)
    for name in ("stable_diffusion", "stable_diffusion_xl", "pixart_alpha", "stable_diffusion_3"):
        model = loaded(name, folders)
        assert model.network.cut(long)
        assert not model.network.cut("a bag")
    assert not loaded("dit", folders).network.cut(long)


def test_a_single_file_takes_the_place_of_the_network(folders, tmp_path):
    other = {name: 1.5 * weight for name, weight in pipeline("dit").transformer.state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file({name: weight.contiguous() for name, weight in other.items()}, file)
    model = loaded("dit", folders, weights=str(file))
    for name, weight in model.network.net.state_dict().items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=0)
    with pytest.raises(UserError, match="restore the files"):
        DiffusersPipeline(str(saved("dit", folders)), sha256="0" * 64, weights=str(file)).check()


def test_a_single_file_of_another_network_is_refused(folders, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"strange": torch.zeros(2)}, file)
    for name in ("dit", "stable_diffusion"):
        with pytest.raises(UserError, match="does not hold the weights of") as caught:
            loaded(name, folders, weights=str(file))
        assert "\n" not in str(caught.value)
    (tmp_path / "model.pkl").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="must be safetensors"):
        loaded("dit", folders, weights=str(tmp_path / "model.pkl"))
    with pytest.raises(UserError, match="does not exist"):
        loaded("dit", folders, weights=str(tmp_path / "absent.safetensors"))


def test_a_network_saved_alone_is_loaded_with_the_scheduler_beside_it(tmp_path):
    pipe = pipeline("ddim")
    pipe.unet.save_pretrained(tmp_path)
    pipe.scheduler.save_pretrained(tmp_path)
    model = DiffusersPipeline(str(tmp_path))
    model.to(torch.float32, torch.device("cpu"))
    assert model.shape == (3, 8, 8)
    assert model.network.net.config.sample_size == 8


def test_an_id_is_looked_up_in_the_cache_and_never_downloaded(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="hf download someone/tiny") as caught:
        DiffusersPipeline("someone/tiny")
    assert "\n" not in str(caught.value)
    (tmp_path / "models" / "someone").mkdir(parents=True)
    (tmp_path / "models" / "someone" / "tiny").symlink_to(saved("ddim", folders))
    assert DiffusersPipeline("someone/tiny").shape == (3, 8, 8)


def test_an_unknown_class_names_those_that_are_known(folders, tmp_path):
    pipeline("ddim").save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UNet3DModel"}))
    with pytest.raises(UserError, match="UNet2DModel"):
        DiffusersPipeline(str(tmp_path))
