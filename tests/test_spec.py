"""Suites are facts: unknown keys, ranges, inheritance, hashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalbench import catalogue, worker
from evalbench.errors import UserError
from evalbench.spec import chunks_of, content_id, load_suite, suite_names

MINIMAL = """
name = "mine"
version = 1
summary = "A test."
[model]
loader = "gmm"
[path]
kind = "edm"
[sampling]
samples = 8
batch = 4
chunk = 4
[metrics]
names = ["fd@identity"]
primary = "fd@identity"
"""


def _suite(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", suite_names())
def test_built_in_suites_load_and_say_what_they_are(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.summary.endswith(".")
    if lacking := catalogue.suite_missing(suite):  # weights, prompts or images of somebody else
        assert "type: " in lacking
    else:
        worker.check_suite(suite)


def test_extends_merges_table_by_table() -> None:
    base, sharp = load_suite("gmm-smooth"), load_suite("gmm-sharp")
    assert sharp.model.options == base.model.options | {"std": 0.15}
    assert sharp.metrics == base.metrics


def test_extends_replaces_a_floor_of_the_same_metric_size_and_kind() -> None:
    def floors(name: str) -> dict[tuple[str, int, str], float]:
        return {(f.metric, f.samples, f.what): f.value for f in load_suite(name).floors}

    base, flow = floors("fashion-sd"), floors("fashion-flow")
    own = ("fd_to_converged@fashion64", 1024, "floor")  # to samples of its own network
    assert set(base) == set(flow)
    assert [key for key in base if base[key] != flow[key]] == [own]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('loader = "gmm"', 'loaders = "gmm"', "unknown key 'model.loaders'.*did you mean 'model.loader'"),
        ('name = "mine"', 'nam = "mine"', "nam"),
        ("samples = 8", "samples = 0", r"sampling.samples = 0: input should be greater than 0"),
        ("samples = 8", "", "key 'sampling.samples' is missing"),
        (
            "samples = 8",
            'samples = 8\nnoise = "philx"',
            "unknown noise 'philx'; did you mean 'philox'.* diffusers-cpu, edm",
        ),
        ("samples = 8", 'samples = 8\nnoise = "diffusers"', "did you mean 'diffusers-cpu'"),
        ("samples = 8", 'samples = 8\nnoise = "file:x.pt"', "write file:NAME@SHA256 or file:NAME@unverified"),
        ("samples = 8", 'samples = 8\nnoise = "file:../x.pt@unverified"', "write file:NAME@SHA256"),
        ("samples = 8", 'samples = 8\nnoise = "file:x.pkl@unverified"', r"\.npy, \.npz, \.pt or \.safetensors"),
        ("version = 1", "version = 1\nschema = 7", "schema 7, this evalbench reads 1"),
        ('name = "mine"', 'name = "../mine"', "may hold letters"),
        ('primary = "fd@identity"', 'primary = "fd@x"', "unknown primary metric 'fd@x'"),
        ('primary = "fd@identity"', 'primary = "fd@identity"\ngating = ["fd@x"]', "unknown gating metric 'fd@x'"),
        ("[model]", "[model", "not valid TOML"),
    ],
)
def test_a_bad_suite_file_gives_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_suite(_suite(tmp_path, MINIMAL.replace(old, new)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "noise", ["philox", "edm", "diffusers-cpu", "file:x.y-2.npz@unverified", f"file:x.pt@{'0a' * 32}"]
)
def test_noise_is_a_fact_of_the_suite(tmp_path: Path, noise: str) -> None:
    plain = load_suite(_suite(tmp_path, MINIMAL))
    suite = load_suite(_suite(tmp_path, MINIMAL.replace("samples = 8", f'samples = 8\nnoise = "{noise}"')))
    assert suite.sampling.noise == noise
    assert (suite.id == plain.id) == (noise == "philox")
    assert (content_id(suite.generation()) == content_id(plain.generation())) == (noise == "philox")


def test_a_suite_of_philox_keeps_its_id(tmp_path: Path) -> None:
    # as before there was any other noise: run folders and baselines stay valid
    suite = load_suite(_suite(tmp_path, MINIMAL))
    assert (suite.id, content_id(suite.generation())) == ("26467d8e0df3c659", "2145423fc1e6cd52")


def test_unknown_suites_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown suite 'gmm-smoth'; did you mean 'gmm-smooth'"):
        load_suite("gmm-smoth")
    with pytest.raises(UserError, match="not found"):
        load_suite(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ('{ file = "stats.safetensors", sha256 = "00" }', "has SHA-256 .* the suite says 00"),
        ('{ file = "nowhere.safetensors", sha256 = "00" }', "which does not exist"),
    ],
)
def test_reference_files_are_checked_before_sampling(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "stats.safetensors").write_bytes(b"x")
    suite = load_suite(_suite(tmp_path, MINIMAL + f"[references]\nidentity = {reference}\n"))
    with pytest.raises(UserError, match=message):
        worker.check_suite(suite)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('loader = "gmm"', 'loader = "gmn"', "unknown model 'gmn'; did you mean 'gmm'"),
        ('loader = "gmm"', 'loader = "gmm"\noptions = { dims = 3 }', "unknown setting 'dims'.*did you mean 'dim'"),
        ('kind = "edm"', 'kind = "edn"', "unknown path 'edn'; did you mean 'edm'"),
        ('[path]\nkind = "edm"', "", r"needs a \[path\]"),
        ("[sampling]", '[conditions]\nlabels = "cyclic"\nclasses = 50\n[sampling]', "conditions.classes = 50"),
    ],
)
def test_a_suite_is_checked_against_its_model(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        worker.check_suite(load_suite(_suite(tmp_path, MINIMAL.replace(old, new))))


def test_overrides_are_checked() -> None:
    suite = load_suite("gmm-smooth")
    assert suite.override(samples=7, batch=None).sampling.samples == 7
    with pytest.raises(UserError, match=r"command line: samples = 0"):
        suite.override(samples=0)


@given(samples=st.integers(1, 500), size=st.integers(1, 80))
def test_chunks_cover_every_sample_once(samples: int, size: int) -> None:
    chunks = chunks_of("c", samples, size)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(samples))
    assert all(chunk.stop - chunk.start == size for chunk in chunks[:-1])


def test_content_ids_do_not_depend_on_key_order() -> None:
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1}) != content_id({"a": 1, "b": 3})
