"""Figures of papers: their size, their fonts, their bytes, and that nothing is printed over anything else."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image
from report.synthetic import make_records, make_suite, quality, value, write_run

from evalbench.errors import UserError
from evalbench.report.paper import FIGURES, OF_RUNS, Choice, Pool, figure
from evalbench.report.styles import COLOURS, LINES, MARKERS, PAPERS, Style, ink, look, settings
from evalbench.spec import Record
from evalbench.store import Store

SCALES = (1.0, 1.5, 3.0)
AGAINST = "precision@fashion64"
CHOICE = Choice(against=AGAINST)


def ledger(folder: Path) -> Path:
    """Three claims: one observed, one undecided, an equality that does not hold."""
    claim = {"direction": "lower", "effect": 0.5, "suite": "gmm", "metric": "fd", "level": "E", "author": "paper"}
    base = {"samples": 64, "date": "2026-01-01", "claim": claim | {"text": "less"}}
    rows = [
        base | {"id": "a/1", "word": "observed here", "effect": -0.6, "low": -0.7, "high": -0.5},
        base | {"id": "a/2", "word": "undecided here", "effect": -0.1, "low": -1.4, "high": 0.2},
        base | {"id": "b/1", "word": "nothing to say", "effect": None, "low": None, "high": None},
        base
        | {"id": "c/1", "word": "fails", "effect": 3.0, "low": 2.0, "high": 4.0}
        | {"claim": claim | {"text": "same", "direction": "equal", "effect": 1e-7, "level": "M"}},
    ]
    file = folder / "claims.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [record for scale in SCALES for record in make_records(guidance=scale)]
    return write_run(tmp_path_factory.mktemp("paper") / "run", found).folder


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger(tmp_path_factory.mktemp("ledger"))


def inputs(name: str, run: Path, claims: Path) -> list[Path]:
    return [claims if name == "claims" else run]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_as_wide_as_the_column_and_its_bytes_repeat(
    name: str, run: Path, claims: Path, tmp_path: Path
) -> None:
    found = [figure(name, inputs(name, run, claims), tmp_path / d, style="icml", choice=CHOICE) for d in "ab"]
    for kind in ("pdf", "png", "csv"):
        first, second = (getattr(drawn, kind).read_bytes() for drawn in found)
        assert first == second, kind
    pdf = found[0].pdf.read_bytes()
    (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert float(box[0]) == pytest.approx(3.25 * 72, abs=0.01)
    assert float(box[1]) < 9 * 72
    assert b"CreationDate" not in pdf
    with Image.open(found[0].png) as image:
        assert image.size[0] == 975
    with found[0].csv.open() as stream:
        assert len(list(csv.DictReader(stream))) >= 4
    assert len(found[0].alt) > 60
    assert found[0].caption.endswith(".")


@pytest.mark.skipif(shutil.which("pdffonts") is None, reason="needs pdffonts: apt-get install poppler-utils")
@pytest.mark.parametrize("name", ["nfe", "claims"])
def test_fonts_are_embedded_and_not_type_3(name: str, run: Path, claims: Path, tmp_path: Path) -> None:
    drawn = figure(name, inputs(name, run, claims), tmp_path, choice=CHOICE)
    done = subprocess.run(["pdffonts", str(drawn.pdf)], capture_output=True, text=True, check=True)
    fonts = done.stdout.splitlines()[2:]
    assert fonts
    for line in fonts:
        assert "CID TrueType" in line
        assert re.search(r"Identity-H\s+yes", line)  # the column `emb`


# --- what a reader sees ---------------------------------------------------------------------------------------------


def drawn(name: str, run: Path, claims: Path, style: Style, width: str) -> Figure:
    from evalbench.report.paper import _claims

    sheet = _claims([claims]) if name == "claims" else OF_RUNS[name](Pool([run], CHOICE))
    with matplotlib.rc_context(settings(style)):
        found = sheet.draw(style, style.inches(width))
        found.draw_without_rendering()
        return found


def shown_texts(found: Figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text with its box, in pixels; an annotation without its thread."""
    held = [t for t in found.findobj(Text) if t.get_visible() and t.get_text().strip()]
    both = [axis for axes in found.axes for axis in (axes.xaxis, axes.yaxis)]
    # ticks beyond the limits of an axis are objects too, but are not drawn
    drawn_ticks = {id(label) for axis in both for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
    ticks = {id(label) for axis in both for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)}
    off = {id(t) for axes in found.axes if not axes.axison for t in axes.findobj(Text)}
    kept = [t for t in held if (id(t) not in ticks or id(t) in drawn_ticks) and id(t) not in off]
    return [(t.get_text(), Text.get_window_extent(t).extents) for t in kept]


@pytest.mark.parametrize(("style", "width"), [("neurips", "column"), ("icml", "column"), ("cvpr", "text")])
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_clipped_or_printed_over_another(name: str, style: str, width: str, run: Path, claims: Path) -> None:
    found = drawn(name, run, claims, PAPERS[style], width)
    texts = shown_texts(found)
    assert len(texts) > 4
    for text, (x0, y0, x1, y1) in texts:
        beyond = max(found.bbox.x0 - x0, x1 - found.bbox.x1, found.bbox.y0 - y0, y1 - found.bbox.y1)
        assert beyond < 1, f"'{text}' leaves the page by {beyond} pixels"
    for (first, a), (second, b) in combinations(texts, 2):
        apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
        assert apart, f"'{first}' is printed over '{second}'"
    sizes = {t.get_fontsize() for t in found.findobj(Text) if t.get_text().strip()}
    assert min(sizes) >= 6


def test_every_line_is_named_at_its_end(run: Path, claims: Path) -> None:
    (axes,) = drawn("nfe", run, claims, PAPERS["icml"], "column").axes[:1]
    names = {t.get_text().replace("\n", ""): t for t in axes.texts if isinstance(t, Annotation) and t.arrow_patch}
    assert set(names) == {"ddim", "heun", "dpm-solver++(order=2)", "unipc"}
    assert names["ddim"].xy == (20, pytest.approx(2.1))
    assert names["ddim"].get_color() == ink(0)


def test_methods_differ_in_more_than_colour() -> None:
    looks = {(MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i in range(45)}
    assert len(looks) == 45
    assert look(0)["marker"] != look(len(COLOURS))["marker"]


def test_widths_are_those_of_the_style_files() -> None:
    assert PAPERS["neurips"].column == PAPERS["neurips"].text == 5.5
    assert PAPERS["icml"].column == pytest.approx((6.75 - 0.25) / 2)
    assert PAPERS["cvpr"].column == pytest.approx((6.875 - 0.3125) / 2)


# --- what is shown --------------------------------------------------------------------------------------------------


def rows(name: str, runs: list[Path], folder: Path, **choice: object) -> list[dict[str, str]]:
    made = figure(name, runs, folder, choice=Choice(**choice))  # type: ignore[arg-type]
    with made.csv.open() as stream:
        return list(csv.DictReader(stream))


def test_guidance_metric_and_axis_are_chosen(run: Path, tmp_path: Path) -> None:
    found = rows("pareto", [run], tmp_path, metric=AGAINST, axis="flops", guidance=(1.5,))
    assert {row["guidance"] for row in found} == {"1.5"}
    assert {row["metric"] for row in found} == {AGAINST}
    ddim = next(row for row in found if row["method"] == "ddim" and row["nfe"] == "10")
    assert float(ddim["x"]) == 1.3e10
    assert len(ddim["protocol"]) == 16


def test_a_trade_off_joins_guidance_scales_at_the_largest_budget(run: Path, tmp_path: Path) -> None:
    found = rows("tradeoff", [run], tmp_path, against=AGAINST)
    assert {row["nfe"] for row in found} == {"20"}
    assert [row["guidance"] for row in found if row["method"] == "ddim"] == ["1", "1.5", "3"]
    assert {row["against"] for row in found} == {AGAINST}


def test_a_grid_names_the_samples_it_shows(run: Path, tmp_path: Path) -> None:
    found = rows("grid", [run], tmp_path, nfe=(5, 20))
    assert {(row["method"], row["nfe"]) for row in found} == {
        *(("ddim", "5"), ("ddim", "20"), ("dpm-solver++(order=2)", "5"), ("dpm-solver++(order=2)", "20")),
        *(("heun", "20"), ("unipc", "5"), ("unipc", "20")),
    }
    assert len({row["sha256"] for row in found}) > 30


def test_of_a_cell_in_two_runs_the_last_one_counts(tmp_path: Path) -> None:
    old, new = quality("ddim", 5, 3.0), quality("ddim", 5, 2.0)
    runs = [write_run(tmp_path / n, [r, quality("heun", 5, 4.0)]).folder for n, r in (("a", old), ("b", new))]
    found = {row["method"]: row["y"] for row in rows("nfe", runs, tmp_path / "out")}
    assert found == {"ddim": "2", "heun": "4"}


def test_runs_of_two_suites_have_a_panel_each(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [quality("ddim", 5, 3.0)]).folder
    other = quality("ddim", 5, 2.0)
    other = other.model_copy(update={"cell": other.cell.model_copy(update={"suite": "second"})})
    second = write_run(tmp_path / "b", [other], make_suite(name="second")).folder
    found = rows("nfe", [first, second], tmp_path / "out")
    assert {(row["suite"], row["y"]) for row in found} == {("fashion-synthetic", "3"), ("second", "2")}
    assert len({row["panel"] for row in found}) == 2


def test_claims_are_ratios_on_a_log_axis(claims: Path, tmp_path: Path) -> None:
    found = {row["claim"]: row for row in rows("claims", [claims], tmp_path)}
    assert (found["a/1"]["ratio"], found["a/1"]["ratio_low"], found["a/1"]["claimed_high"]) == ("0.4", "0.3", "0.5")
    assert found["b/1"]["ratio"] == ""
    assert float(found["c/1"]["claimed_low"]) < 1 < float(found["c/1"]["claimed_high"])


def check_error(name: str, runs: list[Path], match: str, folder: Path, **more: object) -> None:
    with pytest.raises(UserError, match=match):
        figure(name, runs, folder / "none", **more)  # type: ignore[arg-type]
    assert not (folder / "none").exists()


def test_what_cannot_be_drawn_says_what_to_type(run: Path, make_store: Callable[..., Store], tmp_path: Path) -> None:
    bare = make_store([quality("ddim", 5, 1.0, metrics={"other": value(1.0, half=0.1)})]).folder
    check_error("nfo", [run], "unknown figure 'nfo'; did you mean 'nfe'", tmp_path)
    check_error("nfe", [], "evalbench figure nfe results/runs/SUITE", tmp_path)
    check_error("nfe", [tmp_path], "not a run folder", tmp_path)
    check_error("nfe", [run], "unknown style 'icmk'; did you mean 'icml'", tmp_path, style="icmk")
    check_error("nfe", [run], "unknown width 'page'", tmp_path, width="page")
    check_error("nfe", [run], "unknown metric 'fd@fashion'", tmp_path, choice=Choice(metric="fd@fashion"))
    check_error("nfe", [run], "--guidance 2: the runs have 1, 1.5, 3", tmp_path, choice=Choice(guidance=(2.0,)))
    check_error("pareto", [run], "unknown axis 'flop'; did you mean 'flops'", tmp_path, choice=Choice(axis="flop"))
    check_error("tradeoff", [run], "name the other metric with --against; known: kd@fashion64", tmp_path)
    check_error("latency", [bare], "no run was timed; evalbench run SUITE", tmp_path)
    check_error("breakdown", [bare], "no run was timed", tmp_path)
    check_error("grid", [make_store([quality("odd", 5, 1.0)], "odd").folder], "no cell has images", tmp_path)
    check_error("claims", [tmp_path / "x.json"], "evalbench claims --run --ledger", tmp_path)


def test_the_command_prints_files_and_caption(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from evalbench.cli import app

    app(["figure", "nfe", str(run), "--out", str(tmp_path), "--guidance", "1,3"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [str(tmp_path / f"nfe.{kind}") for kind in ("pdf", "png", "csv")]
    assert lines[3].startswith("caption: fd@fashion64 over network evaluations; suite fashion-synthetic v1; N = 4096")
    assert "guidance 1 and 3" in lines[3]


def test_records_in_another_order_give_the_same_bytes(records: list[Record], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / n, found).folder for n, found in (("a", records), ("b", records[::-1]))]
    files = [figure("nfe", [folder], folder / "out", style="cvpr") for folder in folders]
    for kind in ("pdf", "png", "csv"):
        first, second = (getattr(drawn, kind).read_bytes() for drawn in files)
        assert first == second, kind
