"""Where x_T comes from: EDM's and diffusers' generators, files of latents; and nothing else changes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import request, run_serial, small_suite
from tiny_pipelines import saved

from evalbench import registry, starts
from evalbench.cost.ledger import Ledger
from evalbench.errors import UserError
from evalbench.noise import NoiseSource
from evalbench.plan import make_cell, make_plan
from evalbench.sampling import conditions, sample, setup_of
from evalbench.spec import ModelSpec, NoiseFile, Prompts, Suite, load_suite
from evalbench.store import Store

SHAPE = (3, 4, 4)
GENERATORS = ("edm", "diffusers-cpu")
ANY = "unverified"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of latents of an empty cache."""
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path / "cache"))
    found = tmp_path / "cache" / "noise"
    found.mkdir(parents=True)
    return found


def normals(count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Latents of a file; of no generator's."""
    found = np.random.default_rng(8).standard_normal((count, *shape)).astype(np.float32)
    return torch.from_numpy(found)


# --- generators -----------------------------------------------------------------------------------------------------


def by_hand(seed: int, count: int) -> np.ndarray:
    """torch's normal numbers of a seed: 24 bits of the Mersenne Twister, Box and Muller in blocks of 16."""
    raw = np.random.RandomState(seed)._bit_generator.random_raw(count)
    a, b = np.moveaxis(((raw & 0xFFFFFF) / 2**24).reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - a))
    return np.stack([radius * np.cos(2 * math.pi * b), radius * np.sin(2 * math.pi * b)], axis=1).reshape(SHAPE)


@pytest.mark.parametrize(
    ("run_seed", "sample_index", "generator_seed"),
    [(0, 0, 0), (0, 49_999, 49_999), (1, 0, 50_000), (2, 7, 100_007), (85_900, 0, 85_900 * 50_000 - 2**32)],
)
def test_edm_seeds_a_generator_by_the_number_of_the_sample(run_seed, sample_index, generator_seed):
    found = starts.edm(run_seed, sample_index, SHAPE)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_hand(generator_seed, 48), atol=1e-5)


def test_diffusers_noise_is_that_of_randn_tensor():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator(device="cpu").manual_seed(3 + i) for i in range(5)]
    theirs = randn_tensor((5, *SHAPE), generator=generators, device=torch.device("cpu"), dtype=torch.float32)
    source = NoiseSource(3, range(5), SHAPE, origin=starts.origin_of("diffusers-cpu", SHAPE))
    assert torch.equal(source.start(), theirs)


def tiny(name: str, kind: str, tmp_path: Path, noise: str) -> Suite:
    """A standard suite with a random pipeline in its place."""
    suite = load_suite(name)
    model = ModelSpec(loader="diffusers", options={"folder": str(saved(kind, tmp_path / "models"))})
    return suite.model_copy(update={"model": model, "image": (), "references": {}}).override(noise=noise)


def with_prompts(suite: Suite, tmp_path: Path, texts: list[str]) -> Suite:
    text = "\n".join(texts)
    file = tmp_path / "cache" / "prompts" / "some.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    facts = {"file": file.name, "sha256": digest, "source": "a test", "licence": "none", "format": "lines"}
    changed = suite.conditions.model_copy(update={"prompts": Prompts(**facts, rows=len(texts))})
    return suite.model_copy(update={"conditions": changed})


def images(suite: Suite, method: str, nfe: int, n: int, seed: int) -> torch.Tensor:
    """Decoded samples in [0, 1], as pipelines give them."""
    setup, chain = setup_of(suite, {}), registry.build_method(method)
    cell = make_cell(suite, method, nfe, 1.0, seed)
    x = sample(setup, chain, cell, range(n), conditions(suite, setup.model, range(n), setup.device), Ledger(n, nfe))
    with torch.no_grad():
        return (setup.model.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "ddim"), ("coco30k", "stable_diffusion")])
def test_a_pipeline_with_a_list_of_generators_makes_the_same_images(name, kind, tmp_path):
    import diffusers

    suite, texts = tiny(name, kind, tmp_path, "diffusers-cpu"), ["a red cube", "two dogs"]
    generators = [torch.Generator(device="cpu").manual_seed(11 + i) for i in range(2)]
    options = {"num_inference_steps": 3, "generator": generators, "output_type": "np"}
    if kind == "stable_diffusion":
        suite = with_prompts(suite, tmp_path, texts)
        options |= {"prompt": texts, "guidance_scale": 1.0, "height": 16, "width": 16}
    else:
        options |= {"batch_size": 2}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved(kind, tmp_path / "models"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(pipeline(**options).images).permute(0, 3, 1, 2)
    assert theirs.std() > 0.01  # an image that shows nothing equals any other
    ours = images(suite, "diffusers:DDIMScheduler(timestep_spacing=trailing)", 3, 2, 11)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


# --- files ----------------------------------------------------------------------------------------------------------


def write(path: Path, latents: torch.Tensor) -> NoiseFile:
    """A file of latents by its ending."""
    writers: dict[str, Callable[[], object]] = {
        ".npy": lambda: np.save(path, latents.numpy()),
        ".npz": lambda: np.savez(path, latents=latents.numpy()),
        ".pt": lambda: torch.save(latents, path),
        ".safetensors": lambda: save_file({"latents": latents}, path),
    }
    writers[path.suffix]()
    return NoiseFile(path.name, ANY)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt", "a.safetensors"])
def test_every_kind_of_file_gives_its_latents(name, folder):
    latents = normals(3)
    assert torch.equal(starts.read_latents(write(folder / name, latents), SHAPE), latents)
    origin = starts.origin_of(f"file:{name}@unverified", SHAPE)
    source = NoiseSource(5, [2, 0], SHAPE, torch.float64, origin=origin)
    assert torch.equal(source.start(), latents[[2, 0]].double())


@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE)])
def test_one_latent_is_that_of_every_sample(shape, folder):
    write(folder / "one.pt", normals(1).reshape(shape))
    origin = starts.origin_of("file:one.pt@unverified", SHAPE)
    found = NoiseSource(0, [0, 7, 4999], SHAPE, origin=origin).start()
    assert torch.equal(found, normals(1).expand(3, *SHAPE))


class Evil:
    def __reduce__(self):
        return print, ("code that runs",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (normals(2, (3, 4, 5)), "holds 2x3x4x5, the model starts from 3x4x4"),
        (torch.zeros(0, *SHAPE), "holds 0x3x4x4"),
        (torch.ones(2, *SHAPE, dtype=torch.int64), "no finite floating-point numbers"),
        (torch.full(SHAPE, math.nan), "no finite floating-point numbers"),
        ({"a": normals(1), "b": normals(1)}, "no single array of latents"),
        (Evil(), "no single array of latents"),
        (b"not what its name says", "no single array of latents"),
    ],
)
def test_a_file_that_is_no_latents_is_one_line(content, says, folder, capsys):
    path = folder / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=says) as caught:
        starts.read_latents(NoiseFile("x.pt", ANY), SHAPE)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def gmm(noise: str, **facts: int) -> Suite:
    return small_suite(noise=noise, samples=8, batch=4, chunk=4, **facts)


def test_a_run_checks_its_file_before_the_first_sample(folder):
    def refused(suite: Suite, says: str) -> None:
        with pytest.raises(UserError, match=says) as caught:
            make_plan(request(suite, ["ddim"]))
        assert "\n" not in str(caught.value)

    refused(gmm("file:x.npy@unverified"), rf"noise not found; put x\.npy .*into {folder}, or set noise = 'philox'")
    write(folder / "x.npy", normals(8, (8,)))
    digest = hashlib.sha256((folder / "x.npy").read_bytes()).hexdigest()
    refused(gmm(f"file:x.npy@{'0' * 64}"), f"has SHA-256 {digest}, expected 000")
    make_plan(request(gmm(f"file:x.npy@{digest}"), ["ddim"]))
    make_plan(request(gmm("file:x.npy@unverified"), ["ddim"]))
    write(folder / "x.npy", normals(9, (8,)))
    refused(gmm("file:x.npy@unverified"), "has SHA-256")  # another than at its first use
    write(folder / "few.npy", normals(5, (8,)))
    refused(gmm("file:few.npy@unverified"), "holds 5 latents for 8 samples.*--samples 5")
    write(folder / "one.npy", normals(1, (8,)))
    refused(gmm("file:one.npy@unverified"), "one latent for all of 8 samples, which have 3 conditions.*--samples 3")
    write(folder / "wide.npy", normals(8, (9,)))
    refused(gmm("file:wide.npy@unverified"), "holds 8x9, the model starts from 8")


def test_a_model_that_starts_from_no_gaussian_has_no_noise_to_replay():
    suite = small_suite("tokens-markov", noise="edm")
    with pytest.raises(UserError, match=r"'tokens-markov': model '.*' starts from no normal numbers"):
        make_plan(request(suite, ["radd"], metrics=()))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [*GENERATORS, "file:x.npy@unverified"])
def test_chunks_and_their_order_change_nothing(noise, folder, tmp_path):
    write(folder / "x.npy", normals(8, (8,)))
    found = []
    for chunk in (4, 8):
        store, suite = tmp_path / f"run-{chunk}", gmm(noise).override(chunk=chunk)
        (record,), _ = run_serial(request(suite, ["sde"], metrics=("fd@identity",)), store)
        assert record.status == "ok", record.failure
        chunks = sorted(Store(store).present_chunks(record.cell.id), reverse=True)
        assert len(chunks) == 8 // chunk
        rows = {one.start: Store(store).read_chunk(one)["identity"] for one in chunks}
        found.append(np.concatenate([rows[start] for start in sorted(rows)]))
    assert np.array_equal(*found)


@pytest.mark.parametrize("noise", [*GENERATORS, "file:x.npy@unverified"])
def test_nothing_but_x_T_comes_from_there(noise, folder):
    write(folder / "x.npy", normals(8, SHAPE))
    plain = NoiseSource(4, range(3), SHAPE)
    other = NoiseSource(4, range(3), SHAPE, origin=starts.origin_of(noise, SHAPE))
    assert not torch.equal(plain.start(), other.start())
    assert torch.equal(other.candidate(0).start(), other.start())
    assert torch.equal(other.at([2, 1]).start(), other.start()[[2, 1]])
    for draw in (
        lambda source: source.normal("churn", 2),
        lambda source: source.uniform("choice"),
        lambda source: source.increment(0.2, 0.7),
        lambda source: source.candidate(1).start(),
        lambda source: source.at([1, 0]).normal("churn"),
    ):
        assert torch.equal(draw(plain), draw(other))


def test_methods_stay_paired():
    # from the same x_T, one step of either solver is the same
    suite = gmm("edm")
    setup = setup_of(suite, {})
    cond = conditions(suite, setup.model, range(4), setup.device)
    cells = [make_cell(suite, method, 1, 1.0, 0) for method in ("ddim", "dpm-solver++")]
    a, b = (sample(setup, registry.build_method(c.method), c, range(4), cond, Ledger(4, 1)) for c in cells)
    assert torch.allclose(a, b)


def test_a_file_without_a_digest_is_known_by_its_content(folder, tmp_path):
    write(folder / "x.npy", normals(8, (8,)))
    digest = hashlib.sha256((folder / "x.npy").read_bytes()).hexdigest()
    (record,), _ = run_serial(request(gmm("file:x.npy@unverified"), ["ddim"]), tmp_path / "run")
    (known,) = make_plan(request(gmm(f"file:x.npy@{digest}"), ["ddim"])).cells
    assert record.cell == known
    assert record.protocol_facts["generation"]["sampling"]["noise"] == f"file:x.npy@{digest}"
    assert record.protocol_facts["starts"] == {"file": "x.npy", "sha256": digest}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["suite"]["sampling"]["noise"] == f"file:x.npy@{digest}"
    again, executor = run_serial(request(gmm("file:x.npy@unverified"), ["ddim"]), tmp_path / "run")
    assert (again, executor.jobs) == ([record], [])


def test_records_say_where_generators_drew_and_those_of_philox_stay_as_they_were(tmp_path):
    (edm,), _ = run_serial(request(gmm("edm"), ["ddim"]), tmp_path / "edm")
    (plain,), _ = run_serial(request(gmm("philox"), ["ddim"]), tmp_path / "philox")
    assert edm.protocol_facts["starts"] == {"device": "cpu", "dtype": "float32"}
    assert "starts" not in plain.protocol_facts
    assert edm.cell.id != plain.cell.id
    assert edm.protocol != plain.protocol


@pytest.mark.parametrize(
    ("noise", "seeds", "says"),
    [
        ("diffusers-cpu", (0, 1), "--seeds 0,1: with noise 'diffusers-cpu' these runs share their starts.* 8 apart"),
        ("diffusers-cpu", (8, 0), ""),
        ("edm", (0, 1, 2), ""),
        ("philox", (0, 1), ""),
        ("file:x.npy@unverified", (0, 100), "share their starts; give one seed"),
        ("file:x.npy@unverified", (3,), ""),
    ],
)
def test_seeds_whose_samples_would_be_the_same_are_refused(noise, seeds, says, folder):
    write(folder / "x.npy", normals(8, (8,)))
    wanted = request(gmm(noise), ["ddim"], seeds=seeds)
    if not says:
        assert len(make_plan(wanted).cells) == len(seeds)
        return
    with pytest.raises(UserError, match=says):
        make_plan(wanted)


def test_edm_gives_a_run_fifty_thousand_seeds():
    sampling = load_suite("cifar10").override(samples=50_001, noise="edm").sampling
    with pytest.raises(UserError, match="2 apart"):
        starts.check_seeds(sampling, (0, 1))
    starts.check_seeds(sampling, (0, 2))


def test_prompts_that_stand_twice_may_give_one_image_twice(folder, tmp_path):
    write(folder / "one.pt", normals(1, (4, 8, 8)))
    suite = tiny("coco30k", "stable_diffusion", tmp_path, "file:one.pt@unverified")
    suite = with_prompts(suite, tmp_path, ["a red cube", "two dogs", "a red cube", "a red cube"])
    suite = suite.override(samples=4, batch=2, chunk=2)
    assert starts.repeats(suite, (4, 8, 8), range(4)) == [False, False, True, True]
    assert not any(starts.repeats(suite.override(noise="edm"), (4, 8, 8), range(4)))
    wanted = request(suite, ["ddim"], (2,), metrics=(), save_samples=True)
    (record,), _ = run_serial(wanted, tmp_path / "run")
    assert record.status == "ok", record.failure
    store = Store(tmp_path / "run")
    first, second = (store.read_chunk(one)["images"] for one in sorted(store.present_chunks(record.cell.id)))
    assert np.array_equal(second[0], first[0])
    assert np.array_equal(second[1], first[0])
    with pytest.raises(UserError, match="one latent for all of 5 samples, which have 4 conditions"):
        make_plan(request(suite.override(samples=5), ["ddim"], (2,), metrics=()))
