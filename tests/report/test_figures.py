"""Figures and grids: what is drawn, and the files they become."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from report.synthetic import failed, make_images, make_records, quality

from evalbench.report.drawing import Chart, draw
from evalbench.report.figures import draw_all, latency_chart, nfe_chart
from evalbench.report.frames import timings_frame
from evalbench.report.grids import sample_grid
from evalbench.report.styles import REPORT
from evalbench.report.view import blocks
from evalbench.spec import Record, Suite

PRIMARY = "fd@fashion64"


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def drawn(chart: Chart) -> Figure:
    return draw(chart, REPORT, REPORT.column)


def test_lines_run_over_measured_evaluations(records: list[Record], suite: Suite) -> None:
    chart = nfe_chart(blocks(records, suite), [PRIMARY])
    heun = chart.points[chart.points["method"] == "heun"]
    assert list(heun["nfe"]) == [10, 20]
    assert list(heun["x"]) == [9, 19]
    assert "faster-diffusion(keys=uniform:4)" not in set(chart.points["method"])


def test_axes_bands_and_floor(records: list[Record], suite: Suite) -> None:
    (axes,) = drawn(nfe_chart(blocks(records, suite), [PRIMARY])).axes
    assert axes.get_yscale() == axes.get_xscale() == "log"
    heights = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [(h.min(), h.max()) for h in heights if h.max() > 29] == [pytest.approx((2.017, 29.272))]  # ddim's
    assert len(heights) == 4
    assert axes.get_ylim()[0] < 0.42
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"floor 0.42 at N = 4096", "ddim", "heun", "dpm-solver++(order=2)", "unipc"}


def test_values_within_a_decade_have_a_linear_axis(suite: Suite) -> None:
    found = blocks([quality("ddim", 5, 0.9), quality("ddim", 10, 0.5)], suite)
    assert drawn(nfe_chart(found, [PRIMARY])).axes[0].get_yscale() == "linear"


def name_boxes(figure: Figure, methods: set[str]) -> list[Bbox]:
    """Where the names at the lines' ends are, without the threads to the lines."""
    figure.draw_without_rendering()
    return [
        Text.get_window_extent(t) for a in figure.axes for t in a.texts if t.get_text().replace("\n", "") in methods
    ]


def test_names_of_lines_that_end_together_are_moved_apart(suite: Suite) -> None:
    found = [quality(f"method-{i}", nfe, 1 + i / 100) for i in range(9) for nfe in (5, 10)]
    figure = drawn(nfe_chart(blocks(found, suite), [PRIMARY]))
    boxes = name_boxes(figure, {f"method-{i}" for i in range(9)})
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert next(text.get_text() for text in figure.axes[0].texts) == "floor 0.42 at N = 4096"


def test_more_names_than_fit_go_to_a_legend(suite: Suite) -> None:
    found = [quality(f"method-{i:02d}", nfe, 1 + i / 100) for i in range(40) for nfe in (5, 10)]
    figure = drawn(nfe_chart(blocks(found, suite), [PRIMARY]))
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 40
    assert [text.get_text() for text in figure.axes[0].texts] == ["floor 0.42 at N = 4096"]


def test_the_floor_of_another_n_is_not_drawn(suite: Suite) -> None:
    chart = nfe_chart(blocks([quality("ddim", 5, 1.0, samples=2048)], suite), [PRIMARY])
    assert chart.floors == {}


def test_latency_has_bars_both_ways(records: list[Record], suite: Suite) -> None:
    chart = latency_chart(blocks(records, suite), timings_frame(records), PRIMARY)
    assert len(chart.points) == 11
    assert (chart.points["x_low"] < chart.points["x"]).all()
    assert (chart.points["x_high"] > chart.points["x"]).all()
    ddim = chart.points[(chart.points["method"] == "ddim") & (chart.points["nfe"] == 10)].iloc[0]
    assert ddim["x"] == pytest.approx(94.0 / 64)


def test_every_guidance_and_every_metric_has_a_panel(suite: Suite, tmp_path: Path) -> None:
    found = blocks([r for g in (1.0, 3.0) for r in make_records(guidance=g)], suite)
    assert len(nfe_chart(found, [PRIMARY]).panels) == 2
    drawn = {figure.name: figure for figure in draw_all(found, timings_frame([]), PRIMARY, tmp_path)}
    assert set(drawn) == {"quality-nfe", "metrics-nfe"}
    assert drawn["metrics-nfe"].wide
    assert "(guidance 1, N = 4096)" in drawn["metrics-nfe"].caption


def test_files_hold_fonts_and_points_and_no_dates(records: list[Record], suite: Suite, tmp_path: Path) -> None:
    first, *_ = draw_all(blocks(records, suite), timings_frame(records), PRIMARY, tmp_path)
    pdf = first.pdf.read_bytes()
    assert b"/Type3" not in pdf.replace(b" ", b"")
    assert b"/FontFile2" in pdf
    assert b"CreationDate" not in pdf
    assert opened(first.png).info.get("Software") is None
    with first.csv.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 11
    assert {"28.4", "0.55"} <= {row["y"] for row in rows}


def test_a_grid_shows_the_same_samples_in_every_row(records: list[Record], suite: Suite, tmp_path: Path) -> None:
    (block,) = blocks(records, suite)
    pictures = {r.cell.id: make_images(r.cell.method, r.cell.nfe) for r in records if r.status == "ok"}
    path = sample_grid(pictures.get, block, tmp_path / "grid.png")
    assert path is not None
    pixels = np.asarray(opened(path).convert("L"))
    sample = make_images("ddim", 5)[3, 0].repeat(3, axis=0).repeat(3, axis=1)
    left = pixels.shape[1] - 8 - 10 * (84 + 4) + 3 * (84 + 4)
    assert np.array_equal(pixels[26 : 26 + 84, left : left + 84], sample)


@pytest.mark.parametrize("shape", [(4, 3, 80, 80), (12, 3, 8, 8), (1, 1, 28, 28)])
def test_grids_of_any_size(shape: tuple[int, ...], suite: Suite, tmp_path: Path) -> None:
    (block,) = blocks([quality("a-long-name+another(part=1)+a-third-part", 5, 1.0)], suite)
    pictures = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = sample_grid(lambda _: pictures, block, tmp_path / "grid.png")
    assert path is not None
    assert opened(path).size[0] > shape[3] * min(shape[0], 10)


def test_no_images_no_grid(suite: Suite, tmp_path: Path) -> None:
    (block,) = blocks([quality("ddim", 5, 1.0), failed("heun", 5, "error", "boom")], suite)
    assert sample_grid(lambda _: None, block, tmp_path / "grid.png") is None
    assert not (tmp_path / "grid.png").exists()
