"""Published numbers: the format, what ours say beside them, and that reports call them published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report.synthetic import N, make_suite, quality, write_run

from evalbench import registry
from evalbench.errors import UserError
from evalbench.published import Published, folder, published, tables
from evalbench.report import build_report

TABLE = """
schema = 1
paper = "A & B <2025>"
source = "its README"
[[tables]]
id = "t"
table = "FID by NFE"
suite = "fashion-synthetic"
model = "their network"
metric = "fd@fashion64"
baseline = "DDIM"
{facts}
[[tables.rows]]
method = "DDIM"
arm = "ddim"
values = {{ 5 = 28.0, 10 = 9.0 }}
[[tables.rows]]
method = "UniPC-2"
arm = "unipc"
values = {{ 10 = 1.45, unstated = 1.0 }}
"""


def write(place: Path, facts: str = "", name: str = "paper.toml") -> tuple[Published, ...]:
    place.mkdir(exist_ok=True)
    (place / name).write_text(TABLE.format(facts=facts))
    return published(where=place)


def one(numbers: tuple[Published, ...], method: str = "UniPC-2", nfe: int | None = 10) -> Published:
    (found,) = (n for n in numbers if (n.row.method, n.nfe) == (method, nfe))
    return found


BAND = "band = { relative = 0.04, absolute = 0.1, absolute_below = 4.0 }"


@pytest.mark.parametrize(
    ("facts", "ours", "more", "text", "within"),
    [
        (BAND, 1.47, {"half": 0.03}, "published 1.45, ours 1.47 ± 0.03, within 4 %", True),
        (BAND, 1.54, {}, "published 1.45, ours 1.54, within 0.1", True),
        (BAND, 1.56, {}, "published 1.45, ours 1.56, 7.6 % above: outside 0.1", False),
        ("", 1.16, {}, "published 1.45, ours 1.16, 20 % below", None),
        ("samples = 50000", 1.45, {"samples": 2048}, "not compared: N = 50,000 there, 2,048 here", None),
        ("statistic = 'minimum'\nruns = 3", 1.45, {}, "(minimum of 3 runs), ours 1.45; not compared: a minimum", None),
        (f"statistic = 'minimum'\nruns = 3\n{BAND}", 1.45, {"runs": 3}, "ours 1.45, within 4 %", True),
        ("statistic = 'minimum'", 1.45, {"runs": 3}, "a minimum of an unstated number of runs there", None),
    ],
)
def test_a_measurement_beside_a_published_number(
    tmp_path: Path, facts: str, ours: float, more: dict[str, Any], text: str, within: bool | None
) -> None:
    found = one(write(tmp_path, facts)).beside(ours, **more)
    assert text in found.text
    assert found.text.startswith("published 1.45")
    assert found.within is within


def test_absolute_room_ends_where_the_band_says(tmp_path: Path) -> None:
    number = one(write(tmp_path, BAND), "DDIM", 10)
    assert number.beside(9.3).within
    assert number.beside(9.37).within is False


def test_a_window_has_two_sides() -> None:
    (clip,) = (n for n in published("coco2014-mlperf") if n.name.startswith("CLIP"))
    assert [clip.beside(x).within for x in (31.6, 31.7, 31.9)] == [False, True, False]


def test_baseline_is_that_of_the_same_nfe(tmp_path: Path) -> None:
    numbers = write(tmp_path)
    assert one(numbers).baseline == ("DDIM", 9.0)
    assert one(numbers, nfe=None).baseline is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("paper =", "papre =", "unknown key 'papre'"),
        ("model = ", "modle = ", "unknown key 'tables.0.modle'"),
        ("schema = 1", "schema = 2", "schema 2, this evalbench reads 1"),
        ("{ 5 = 28.0,", "{ five = 28.0,", "keys are NFE, or unstated"),
        ('baseline = "DDIM"', 'baseline = "DDPM"', "baseline 'DDPM' is none of its rows"),
        ("values = { 5 = 28.0, 10 = 9.0 }", "", "has values or a window"),
        ("schema = 1", "schema = ", "cannot be read"),
    ],
)
def test_what_is_not_of_the_format_is_one_line(tmp_path: Path, before: str, after: str, message: str) -> None:
    text = TABLE.format(facts="")
    assert before in text
    (tmp_path / "x.toml").write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=message) as caught:
        published(where=tmp_path)
    assert "\n" not in str(caught.value)


def test_one_id_stands_once(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"'t' stands in paper\.toml and in twice\.toml"):
        write(tmp_path, name="twice.toml")


def test_what_evalbench_brings_along_is_read_and_its_arms_are_methods() -> None:
    assert len(list(folder().glob("*.toml"))) > 5
    arms = {n.row.arm for n in published() if n.row.arm}
    assert {"ddim", "unipc(order=3)"} <= arms
    assert [registry.build_method(arm).text for arm in sorted(arms)] == sorted(arms)
    assert tables()["diff-sampler-cifar10"].samples == 50_000
    assert one(published("cifar10"), "iPNDM-4").value == 2.77


def test_reports_show_them_as_published_with_their_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "published"
    write(place, f"samples = {N}\n{BAND}")
    monkeypatch.setattr("evalbench.published.folder", lambda: place)
    store = write_run(tmp_path / "run", [quality("ddim", 10, 8.9), quality("unipc", 10, 2.0), quality("heun", 10, 6)])
    paths = build_report(store, tmp_path / "run" / "report", ("md", "html"))
    page = paths["md"].read_text("utf-8")
    assert "## Published numbers (from papers, not measured here)" in page
    assert "published 9, ours 8.9" in page
    assert "within 4 %" in page
    assert "outside 0.1" in page
    assert "DDIM: 9" in page
    assert "A &amp; B &lt;2025&gt;: its README" in page
    html = paths["html"].read_text("utf-8")
    assert "published 9, ours 8.9" in html
    assert "<2025>" not in html


def test_a_run_without_published_numbers_has_no_such_section(tmp_path: Path) -> None:
    assert not published(make_suite().name)
    store = write_run(tmp_path / "run", [quality("ddim", 10, 8.9)])
    paths = build_report(store, tmp_path / "run" / "report", ("md",))
    assert "ublished" not in paths["md"].read_text("utf-8")


def test_a_paper_that_states_minima_is_held_against_the_minimum_of_as_many_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "published"
    write(place, f"samples = {N}\nstatistic = 'minimum'\nruns = 2\n{BAND}")
    monkeypatch.setattr("evalbench.published.folder", lambda: place)
    found = [quality("ddim", 10, value, seed=seed) for seed, value in enumerate((9.2, 8.8, 1.0))]
    store = write_run(tmp_path / "run", found)
    paths = build_report(store, tmp_path / "run" / "report", ("md",))
    assert "(minimum of 2 runs), ours 8.8, within 4 %" in paths["md"].read_text("utf-8")
