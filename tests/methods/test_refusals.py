"""What users meet when a method cannot do what they typed: one line and exit 2, or a row that says what is needed.

Over every kind of method that reaches into a network; settings are refused before anything runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import request, run_serial, small_suite

from evalbench import cli, registry
from evalbench.report.frames import cells_frame

# (suite, method, the setting that is wrong, what to give instead); blocks and keys are those of the suite at NFE 5
REFUSED = [
    ("fashion-dit", "ddim+faster-diffusion(keys=0/7)", "key 7", "give keys in 0..4"),
    ("fashion-dit", "ddim+faster-diffusion(keys=often)", "keys=often", "write uniform:K"),
    ("fashion-dit", "ddim+faster-diffusion(at=99)", "at=99", "give at most"),
    ("fashion-dit", "ddim+interval-cache(blocks=2-99)", "block 99", "give blocks in 0.."),
    ("fashion-dit", "ddim+interval-cache(every=0)", "every", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+harmonica(batch=0)", "batch", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+layer-skip(blocks=99)", "block 99", "give blocks in 0.."),
    ("fashion-dit", "ddim+deediff(images=0)", "images", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+deediff(depth=0.01)", "depth=0.01", "give at least"),
    ("fashion-dit", "diffusers:DDIMScheduler(solver_order=2)", "'solver_order'", "known: timestep_spacing"),
    ("fashion-dit", "ddim+ptq4dm(bits=3.5)", "bits", "as in bits=w4a8, got 3.5"),
    ("fashion-dit", "ddim+ptq4dm(samples=0)", "samples", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+vidit-q(bits=w3.5a8)", "bits", "as in bits=w4a8, got w3.5a8"),
    ("fashion-dit", "ddim+vidit-q(samples=0)", "samples", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+vidit-q(ranges=0)", "ranges", "must be at least 1, got 0"),
    ("fashion-sd", "ddim+tfmq(bits=3.5)", "bits", "as in bits=w4a8, got 3.5"),
    ("fashion-sd", "ddim+tfmq-cache(samples=0)", "samples", "must be at least 1, got 0"),
    ("fashion-dit", "ddim+quant:torchao(config=int3.5)", "config 'int3.5'", "known: float8dq"),
    ("fashion-dit", "ddim+t-stitch(r=1.5)", "r must", "must be in 0..1, got 1.5"),
    ("fashion-dit", "ddim+t-stitch(r=0.8,then=medium:0.5)", "then=medium:0.5", "give smaller shares"),
    ("fashion-dit", "ddim+bottleneck(low=1)", "low", "must be below 1"),
    ("fashion-dit", "ddim+mmd-ddm(batch=0)", "batch", "must be at least 2, got 0"),
    ("fashion-dit", "diversity-distill(batch=0)", "batch", "must be at least 2, got 0"),
    ("fashion-dit", "autodiffusion(samples=0)", "samples", "must be at least 2, got 0"),
    ("fashion-dit", "autodiffusion(layers=0.001)", "layers=0.001", "give at least"),
    ("fashion-dit", "ddim+cfg(scale=much)", "scale=much", "should be a valid number"),
    ("fashion-dit", "ddim+cfg-interval(low=2,high=1)", "low=2", "needs 0 <= low < high"),
    ("fashion-dit", "ddim+diffusers-cache:PAB(threshold=1)", "'threshold'", "known: cross_attention_block_skip_range"),
    ("fashion-dit", "ddim+diffusers-guider:AutoGuidance(alpha=1)", "'alpha'", "known: dropout, "),
    ("fashion-dit", "ddim+diffusers-guider:AutoGuidance(layers=[99])", "layers=[99]", "give layers in 0.."),
    ("fashion-dit", "ddim+diffusers-guider:AutoGuidance", "layers", "such as layers=[1]"),
]
# suite -> method -> what the model of the suite has not
LACKING = {
    "gmm-smooth": {
        "faster-diffusion": "split",
        "interval-cache": "blocks",
        "harmonica": "blocks",
        "ptq4dm": "network",
        "vidit-q": "network",
        "tfmq": "network, time features",
        "tfmq-cache": "network, time features",
        "quant:torchao": "network",
        "deediff": "blocks, exits",
        "t-stitch": "role small",
        "bottleneck": "network",
        "layer-skip": "blocks",
        "mmd-ddm": "network",
        "autoguidance": "role small",
        "diffusers-cache:PAB": "network",
        "diffusers-guider:ClassifierFreeGuidance": "network",
    },
    "gmm-64-pair": {"cfg(scale=2)": "labels", "cfg-interval": "labels"},
}
SOLVERS = {"diversity-distill": "network", "autodiffusion(layers=0.5)": "blocks"}


@pytest.mark.parametrize(("suite", "method", "setting", "remedy"), REFUSED)
def test_a_setting_that_cannot_be_is_one_line_and_exit_2(
    suite: str,
    method: str,
    setting: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evalbench", "run", suite, "--methods", method, "--nfe", "5", "--plan"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 2, said
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    part = method.removeprefix("ddim+").partition("(")[0]
    assert part in line, "which method"
    assert setting in line, "which setting"
    assert remedy in line, "what to type instead"
    assert said.out == ""
    assert not list(tmp_path.iterdir()), "nothing ran"


@pytest.mark.parametrize("suite", LACKING)
def test_a_model_without_the_hook_is_a_row_that_says_what_is_needed(suite: str, tmp_path: Path) -> None:
    needs = {f"ddim+{part}": lacking for part, lacking in LACKING[suite].items()}
    needs |= SOLVERS if suite == "gmm-smooth" else {}
    small = small_suite(suite)
    records, _ = run_serial(request(small, ["ddim", *needs], metrics=()), tmp_path)
    frame = cells_frame(records, small).set_index("method")
    assert frame.loc["ddim", "status"] == "ok", "the others stop nobody"
    rows = frame.drop("ddim")
    expected = {registry.build_method(method).text: f"not supported: needs {what}" for method, what in needs.items()}
    assert dict(rows["error"]) == expected
    assert set(rows["status"]) == {"unsupported"}
