"""Replication kits: every dry run completes, each number stands in one place, ours are held against it as papers do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evalbench.errors import UserError
from evalbench.plan import make_cell
from evalbench.replicate import Given, Kit, describe, dry_run, judged, kit_names, load_kit, request_of, score
from evalbench.spec import MetricValue, Record, load_suite

ROOT = Path(__file__).resolve().parent.parent
KITS = ["adm-evaluator", "diff-sampler-cifar10", "dit-xl-256", "edm-cifar10", "mlperf-sdxl"]


def test_the_kits_are_those_of_the_readme() -> None:
    assert kit_names() == KITS
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in KITS:
        assert f"`{name}`" in readme


@pytest.mark.parametrize("name", [name for name in KITS if name != "adm-evaluator"])
def test_a_dry_run_walks_every_cell_and_spends_its_budget(name: str) -> None:
    kit = load_kit(name)
    lines = [line for line in dry_run(kit) if "stands in" not in line]
    assert len(lines) == len(kit.cells([4])) > 0
    for line, (method, nfe) in zip(lines, kit.cells([4]), strict=True):
        assert line.startswith(f"dry run: {method} at NFE {nfe}, spent {nfe}, images")
        assert line.endswith(": ok")


def test_a_dry_run_says_what_stands_in_for_a_latent_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path))
    first, cell = dry_run(load_kit("mlperf-sdxl"))
    assert first.startswith(
        "dry run: philox stands in for latents.pt; suite 'coco2014-mlperf': noise not found; put lat"
    )
    assert cell.endswith(": ok")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "latents.pt").touch()
    assert next(dry_run(load_kit("mlperf-sdxl"))).endswith("latents.pt; the file is there")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("edm-cifar10", "noise: edm (drawn on the CPU); the paper's code draws on its GPU"),
        ("diff-sampler-cifar10", "noise: edm (drawn on the CPU); the source's code draws on its GPU"),
        ("mlperf-sdxl", "noise: latents.pt (SHA-256 "),
        ("dit-xl-256", "noise: philox; DiT's own code draws whole batches"),
        ("adm-evaluator", "noise: none: the samples are given"),
    ],
)
def test_a_kit_says_its_noise(name: str, says: str) -> None:
    assert any(says in line for line in describe(load_kit(name)))


def test_the_noise_of_a_kit_is_what_is_run() -> None:
    edm = request_of(load_kit("edm-cifar10"), Given(model=f"{ROOT / 'evalbench' / 'stand_in.py'}:load")).suite
    assert edm.sampling.noise == "edm"
    mlperf = request_of(load_kit("mlperf-sdxl"), Given(nfe=(20,), guidance=(5.0,))).suite
    assert mlperf.sampling.noise == load_suite("coco2014-mlperf").sampling.noise
    assert mlperf.sampling.noise.startswith("file:latents.pt@")


def test_a_kit_of_given_images_reads_its_layout() -> None:
    assert list(dry_run(load_kit("adm-evaluator"))) == [
        "dry run: 4 random images as admnet_guided_upsampled_imagenet256.npz: ok"
    ]


@pytest.mark.parametrize("name", KITS)
def test_a_kit_says_its_protocol_its_cost_and_the_line_to_type(name: str) -> None:
    kit = load_kit(name)
    lines = list(describe(kit))
    assert any("noise: " in line for line in lines)
    assert any("GPU-hours" in line for line in lines) == bool(kit.suite)
    assert len([line for line in lines if "published " in line or "window " in line]) >= len(kit.numbers())
    assert lines[-1].startswith(f"to run it: evalbench replicate {name}")


def test_the_whole_table_of_diff_sampler_is_a_kit() -> None:
    kit = load_kit("diff-sampler-cifar10")
    assert len(kit.cells()) == len(kit.numbers()) > 50
    assert "5,250,000 rows" in "\n".join(describe(load_kit("edm-cifar10")))  # 35 evaluations x 50,000 x 3 seeds


def measured(kit: Kit, metric: str, method: str, nfe: int, values: list[float]) -> list[Record]:
    cells = [make_cell(load_suite(kit.suite), method, nfe, 1.0, seed) for seed in range(len(values))]
    return [
        Record(
            kind="quality",
            status="ok",
            cell=cell,
            samples=50000,
            metrics={metric: MetricValue(value=value, n=50000, unit="", higher_is_better=False)},
        )
        for cell, value in zip(cells, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([2.05, 1.98, 2.1], "ours 1.98, within 0.03"),  # the least of three against the least of three
        ([2.05, 2.04, 2.1], "ours 2.04, 3.6 % above: outside 0.03"),
        ([1.97], "not compared: a minimum of 3 runs there, 1 here"),
    ],
)
def test_a_minimum_is_held_against_a_minimum(values: list[float], says: str) -> None:
    kit = load_kit("edm-cifar10")
    (line,) = judged(kit, measured(kit, "fid@tf1", "heun", 35, values))
    assert line.endswith(says)


def test_a_cell_that_was_not_measured_says_so() -> None:
    kit = load_kit("edm-cifar10")
    (line,) = judged(kit, [])
    assert line.endswith("fid@tf1: no value")


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("edm-cifar10", Given(), "needs --model; type: evalbench replicate edm-cifar10 --model"),
        ("mlperf-sdxl", Given(nfe=(20,)), "needs --guidance; type"),
        ("dit-xl-256", Given(), "needs --nfe; type"),
        ("dit-xl-256", Given(nfe=(10, 20)), "measures one cell: give one --nfe"),
        ("mlperf-sdxl", Given(nfe=(20,), guidance=(5.0, 8.0)), "measures one cell"),
    ],
)
def test_what_a_kit_needs_is_asked_for_in_one_line(name: str, given: Given, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        request_of(load_kit(name), given)
    assert "\n" not in str(raised.value)


def test_a_kit_of_images_asks_for_its_files() -> None:
    with pytest.raises(UserError, match="scores given files; type: evalbench replicate adm-evaluator --images"):
        list(score(load_kit("adm-evaluator"), Given()))


def test_the_protocol_of_the_paper_is_what_is_run(tmp_path: Path) -> None:
    adapter = ROOT / "evalbench" / "stand_in.py"
    request = request_of(load_kit("edm-cifar10"), Given(model=f"{adapter}:load"))
    assert request.suite.path is not None
    assert request.suite.path.options == {"final": "zero"}
    assert (request.suite.sampling.grid, request.suite.sampling.samples) == ("karras", 50000)
    assert (request.methods, request.nfe, request.seeds) == (("heun",), (35,), (0, 1, 2))
    assert request.metrics == ("fid@tf1",)
    assert request.suite.references["inception:tf1"].file == "cache:references/cifar10-train.inception-tf1.safetensors"


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evalbench", "replicate"]
    done = subprocess.run([*command, "edm-cifar10", "--dry-run"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dry run: heun at NFE 35, spent 35" in done.stdout
    for words, says in (
        (["edm-cifar"], "did you mean 'edm-cifar10'"),
        (["edm-cifar10"], "needs --model"),
    ):
        failed = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
        assert failed.returncode == 2
        assert says in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
