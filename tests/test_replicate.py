"""Replication kits: every dry run completes, bands are judged as a paper reports, figures stand where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from evalbench.errors import UserError
from evalbench.replicate import kit_names, load_kit, replicate

ADAPTERS = sorted((Path(__file__).resolve().parent.parent / "examples" / "adapters").glob("*.py"))


def test_the_kits_are_those_of_the_page():
    assert kit_names() == ["adm-evaluator", "diff-sampler-cifar10", "dit-xl-256", "edm-cifar10", "mlperf-sdxl"]


@pytest.mark.parametrize("name", kit_names())
def test_a_dry_run_walks_every_cell(name):
    kit = load_kit(name)
    lines = list(replicate(name, dry_run=True))
    done = [line for line in lines if line.startswith("dry run:")]
    assert all(line.endswith(": ok") for line in done)
    assert len(done) == (len({(cell.method, cell.nfe) for cell in kit.cells}) if kit.suite else 1)
    assert any("replicated so far: 0" in line for line in lines)
    assert lines[-1].startswith("to run it: evalbench")
    assert any("GPU-hours" in line for line in lines) == bool(kit.suite)


def test_a_minimum_is_compared_with_a_minimum():
    kit = load_kit("edm-cifar10")
    (cell,) = kit.cells
    assert cell.window == pytest.approx((1.94, 2.0))
    assert kit.agrees(cell, [2.05, 1.98, 2.1])
    assert not kit.agrees(cell, [2.05, 2.04, 2.1])
    assert not kit.agrees(cell, [1.97])  # one run is no minimum of three
    table = load_kit("diff-sampler-cifar10")
    tenth = next(cell for cell in table.cells if (cell.method, cell.nfe) == ("ipndm(order=4)", 10))
    assert table.agrees(tenth, [2.85])
    assert not table.agrees(tenth, [2.9])


def test_a_window_has_two_sides_and_nothing_published_is_judged_by_nobody():
    kit = load_kit("mlperf-sdxl")
    fid, clip = kit.cells
    assert kit.agrees(fid, [23.5])
    assert not kit.agrees(fid, [23.957])  # an FP8 pipeline that drifted just out
    assert not kit.agrees(clip, [31.9])
    assert load_kit("dit-xl-256").agrees(load_kit("dit-xl-256").cells[0], [2.0]) is None


def test_an_unknown_kit_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'edm-cifar10'"):
        load_kit("edm-cifar")


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.stem)
def test_an_adapter_has_at_most_twenty_lines(file):
    text = file.read_text("utf-8")
    tree = ast.parse(text)
    documented = [tree.body[0], *(node.body[0] for node in tree.body if isinstance(node, ast.FunctionDef))]
    words = {line for node in documented for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    code = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in words]
    assert len(code) <= 20
    assert "use_clone(clone)" in text
    if "pickle.load" in text:
        assert text.index("require_trust(checkpoint)") < text.index("pickle.load(")
