"""The files of a report: their numbers are the records', their text is escaped, their bytes are stable."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from report.synthetic import METHODS, NOTE, failed, make_records, make_suite, quality, write_run

from evalbench.errors import UserError
from evalbench.report import build_report
from evalbench.report.content import full_table
from evalbench.report.view import blocks
from evalbench.spec import Record
from evalbench.store import Store

HOSTILE = "evil(x=<script>document.title='owned'</script>|`*&amp;\")"
Make = Callable[..., Store]


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the rows of every table, of a page whose tags close in order."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    store = write_run(tmp_path_factory.mktemp("report") / "run", make_records())
    return build_report(store, store.folder / "report")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    suite = make_suite(summary="</style><script>document.title='owned'</script> & more")
    found = [quality(HOSTILE, 5, 3.0), quality("ddim", 5, 4.0), failed("ddim", 10, "error", "<img src=x onerror=1>|y")]
    store = write_run(tmp_path_factory.mktemp("hostile") / "run", found, suite)
    return build_report(store, store.folder / "report")


def test_every_file_is_there(paths: dict[str, Path]) -> None:
    assert {"table", "timings", "md", "html", "figure:quality-nfe", "figure:quality-latency", "grid:samples"} <= set(
        paths
    )
    assert all(path.stat().st_size > 100 for path in paths.values())
    for name in ("quality-nfe", "quality-latency", "metrics-nfe", "latency-nfe", "breakdown"):
        for kind in ("pdf", "csv"):
            assert (paths["figure:quality-nfe"].parent / f"{name}.{kind}").is_file()
    assert paths["table"].parent == paths["html"].parent.parent


def test_an_unknown_format_names_the_known_ones(make_store: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown format 'htm'; did you mean 'html'\?"):
        build_report(make_store([]), tmp_path, ("htm",))


def test_only_what_was_asked_for_is_written(make_store: Make, records: list[Record]) -> None:
    store = make_store(records)
    assert set(build_report(store, store.folder / "report", ("csv",))) == {"table", "timings"}
    assert not (store.folder / "report").exists()


@pytest.mark.parametrize("found", [[], [failed("ddim", 5, "error", "boom")], [quality("ddim", 5, 1.0, metrics={})]])
def test_a_run_without_numbers_has_a_report(make_store: Make, found: list[Record]) -> None:
    store = make_store(found)
    paths = build_report(store, store.folder / "report")
    Page(paths["html"].read_text())
    assert not any(name.startswith("figure") for name in paths)
    if found and found[0].failure:
        assert "boom" in paths["md"].read_text()
        assert "boom" in paths["html"].read_text()


def test_the_same_records_give_the_same_bytes(make_store: Make, records: list[Record]) -> None:
    def digest(store: Store) -> dict[str, bytes]:
        build_report(store, store.folder / "report")
        files = (f for f in store.folder.rglob("*") if f.suffix in (".png", ".pdf", ".csv", ".md"))
        return {str(f.relative_to(store.folder)): f.read_bytes() for f in files if "chunks" not in f.parts}

    first, second = digest(make_store(records, "a")), digest(make_store(records[::-1], "b"))
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert different == []


# --- numbers --------------------------------------------------------------------------------------------------------


def primary_rows(rows: list[list[str]]) -> Iterator[tuple[str, int, str]]:
    """(method, NFE, text) of a methods x NFE table."""
    budgets = [int(name.removeprefix("NFE ")) for name in rows[0][1:]]
    for row in rows[1:]:
        for nfe, text in zip(budgets, row[1:], strict=True):
            yield row[0], nfe, text


def check_primary(rows: list[list[str]]) -> None:
    cells = {(method, nfe): text for method, nfe, text in primary_rows(rows)}
    for method, (values, _) in METHODS.items():
        for nfe, fd in zip((5, 10, 20), values, strict=True):
            if (method, nfe) != ("heun", 5):
                text = re.sub(r" ?≈?(#[\d–]+)?$", "", cells[method, nfe])  # ranks and "cannot tell"
                value, half = text.rstrip("†").split(" ± ")
                assert float(value) == pytest.approx(fd, abs=0.05 * (0.03 * fd + 0.02))
                assert float(half) == pytest.approx(0.03 * fd + 0.02, rel=0.05)
                assert text.endswith("†") == (method == "ddim")
    assert cells["heun", 5] == "error"
    assert cells["faster-diffusion(keys=uniform:4)", 10] == "not supported"
    assert cells["floor at N = 4096", 5] == "0.420 ± 0.013"


def md_rows(text: str, heading: str) -> list[list[str]]:
    lines = text.split(heading)[1].split("\n\n")[1].strip().split("\n")
    cells = [[c.strip().strip("`*") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells[0], *cells[2:]]


def test_markdown_has_the_numbers_of_the_records(paths: dict[str, Path]) -> None:
    text = paths["md"].read_text()
    check_primary(md_rows(text, "**fd@fashion64 ↓, guidance 1, N = 4096**"))
    assert f"† {NOTE}" in text
    assert "**4.90 ± 0.17**" in text  # the best of its column
    assert "budget 5, spent 6" in text
    assert "not supported: needs split" in text
    assert "ab" * 32 in text
    assert "generation.noise: philox" in text
    where = "cpu x86\\_64 AVX512, 1 thread, batch 64, eager,float32"
    timings = md_rows(text, f"**Latency of whole sampling calls on {where}**")
    assert timings[1][:3] == ["ddim", "5", "0.766"]


def test_markdown_links_files_that_exist(paths: dict[str, Path]) -> None:
    links = re.findall(r"\]\(([^)]+)\)", paths["md"].read_text())
    assert len(links) == 6
    assert all((paths["md"].parent / link).is_file() for link in links)


def test_html_has_the_numbers_of_the_records(paths: dict[str, Path]) -> None:
    page = Page(paths["html"].read_text())
    check_primary(page.tables[0])
    text = paths["html"].read_text()
    assert "budget 5, spent 6" in text
    assert "not supported: needs split" in text
    assert "second line" not in text
    assert "/secret/path" not in text


def test_every_seed_is_averaged_and_every_guidance_has_its_table(make_store: Make) -> None:
    found = [r for g in (1.0, 3.0) for s in (0, 1) for r in make_records(guidance=g, seed=s)]
    store = make_store(found)
    text = build_report(store, store.folder / "report")["md"].read_text()
    for guidance in (1, 3):
        check = md_rows(text, f"**fd@fashion64 ↓, guidance {guidance}, N = 4096, mean of seeds 0, 1**")
        assert ("unipc", 20, "0.550 ± 0.026") in list(primary_rows(check))


def test_bits_bytes_and_bit_operations_stand_in_the_table_where_a_network_is_quantised(make_store: Make) -> None:
    footprint = {"weight_bits": 8.5, "activation_bits": 8.0, "weight_bytes": 2.5e6, "bops": 7.8e9}
    plain, rounded = quality("ddim", 10, 2.0), quality("ddim+ptq4dm", 10, 2.2, footprint=footprint)
    store = make_store([plain, rounded])
    page = Page(build_report(store, store.folder / "report", ("html",))["html"].read_text())
    table = next(found for found in page.tables if "BOPs" in found[0])
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    columns = ("weight bits", "activation bits", "weight MB", "BOPs", "status")
    assert [rows["ddim+ptq4dm"][name] for name in columns] == ["8.5", "8", "2.5", "7.8 G", "ok"]
    assert [rows["ddim"][name] for name in columns] == [*"––––", "ok"]
    assert "BOPs" not in full_table(blocks([plain], make_suite())[0]).header


def test_numbers_of_different_n_never_share_a_table(make_store: Make) -> None:
    store = make_store([quality("ddim", 10, 2.0), quality("heun", 10, 1.0, samples=1024)])
    page = Page(build_report(store, store.folder / "report")["html"].read_text())
    methods = [{row[0] for row in table[1:]} for table in page.tables[:2]]
    assert methods == [{"ddim", "floor at N = 4096"}, {"heun", "floor at N = 1024"}]


# --- safety ---------------------------------------------------------------------------------------------------------


def test_text_from_outside_is_inert_in_html(hostile: dict[str, Path]) -> None:
    text = hostile["html"].read_text()
    page = Page(text)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [s.get("id") for s in scripts] == ["chart-data", None, None]
    assert "<script>document.title" not in text
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert any(row and row[0] == HOSTILE for table in page.tables for row in table)


def test_text_from_outside_is_inert_in_markdown(hostile: dict[str, Path]) -> None:
    text = hostile["md"].read_text()
    assert "<script" not in text
    assert "<img" not in text
    rows = md_rows(text, "**fd@fashion64 ↓, guidance 1, N = 4096**")
    assert {len(row) for row in rows} == {3}


def test_html_needs_nothing_from_elsewhere(paths: dict[str, Path]) -> None:
    page = Page(paths["html"].read_text())
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/png;base64,", "#")), (tag, name)
        assert tag != "link"
    assert "@import" not in paths["html"].read_text()
    assert "url(" not in paths["html"].read_text()


def test_html_can_be_read_without_eyes_and_mouse(paths: dict[str, Path]) -> None:
    page = Page(paths["html"].read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5 + len(METHODS) * 3 - 1  # figures, and strips of every ok cell
    assert all(len(image["alt"] or "") > 20 for image in images)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") == len(page.tables)


def test_no_word_that_claims_belong_to(paths: dict[str, Path]) -> None:
    for name in ("md", "html"):
        assert not re.search(r"reproduced|contradicted", paths[name].read_text(), re.IGNORECASE)
