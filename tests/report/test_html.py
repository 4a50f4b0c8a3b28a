"""report.html in a real browser: sort, filter, hover, keys, slider, dark mode, a phone, print, no scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from report.browser import axe, forget, look, needs_browser, requests, start
from report.synthetic import N, failed, make_images, make_records, make_suite, quality, write_run

from evalbench.errors import UserError
from evalbench.report import build_report
from evalbench.report.build import build
from evalbench.spec import Chunk, Record

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

HOSTILE = "<script>alert(1)</script>"
LONG = "a-very-long-method-name(" + "option=value," * 12 + ")"
pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    found = start(tmp_path_factory.mktemp("profile"))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two guidance scales, a cache with its baseline, what was prepared, scores by class, a long name."""
    records = make_records() + make_records(guidance=3.0)
    cached = quality("ddim+cache", 10, 9.5)
    prepared = quality(LONG, 10, 1.2, bill={"evals.base": 4096.0, "cost": 4096.0, "seconds": 3.0})
    store = write_run(tmp_path_factory.mktemp("page") / "run", [*records, cached, prepared])
    store.write_chunk(Chunk(cached.cell.id, 0, 16), {"images": 255 - make_images("ddim", 10)}, {})
    return build_report(store, store.folder / "report")["html"]


def js(browser: Chrome, script: str) -> Any:
    return browser.execute_script(script)


def one(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element("css selector", selector)


def until(check: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def choose(browser: Chrome, select: WebElement | str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(one(browser, select) if isinstance(select, str) else select).select_by_value(value)


SORT = """
const table = [...document.querySelectorAll("table.sortable")].find((t) => t.tHead.textContent.includes("precision"));
const heading = [...table.tHead.rows[0].cells].find((c) => c.textContent.includes("kd@"));
const button = heading.querySelector("button");
const key = (cell) => cell.dataset.v ?? (parseFloat(cell.textContent) || null);
const column = () => [...table.tBodies[0].rows].map((row) => key(row.cells[heading.cellIndex]));
const result = {focusable: button.tabIndex >= 0, before: heading.getAttribute("aria-sort")};
const cost = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent.startsWith("cost"));
const costs = [...table.tBodies[0].rows].map((r) => r.cells[cost].textContent);
result.cost = costs.filter((text) => text !== "–").map(Number);
button.click();
result.up = [heading.getAttribute("aria-sort"), column()];
button.click();
result.down = [heading.getAttribute("aria-sort"), column()];
table.tHead.rows[0].cells[0].querySelector("button").click();
result.names = [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
result.marks = table.querySelectorAll("th[aria-sort]").length;
result.foot = table.tFoot.textContent.includes("floor");
return result;
"""


def test_tables_stand_by_cost_and_sort_by_value_with_missing_ones_last(browser: Chrome, page: Path) -> None:
    look(browser, page)
    result = js(browser, SORT)
    assert result["focusable"]
    assert result["before"] is None
    assert result["cost"] == sorted(result["cost"])
    for name, direction, sign in (("up", "ascending", 1), ("down", "descending", -1)):
        mark, column = result[name]
        values = [float(v) for v in column if v is not None]
        assert mark == direction
        assert [sign * v for v in values] == sorted(sign * v for v in values)
        assert len(values) == 13
        assert column[len(values) :] == [None, None]
    assert [name.lower() for name in result["names"]] == sorted(name.lower() for name in result["names"])
    assert result["marks"] == 1
    assert result["foot"]


def shown(browser: Chrome, column: int, table: int = 0) -> list[str]:
    """Texts of a column of a table with a status."""
    script = """
    const last = (table) => table.tHead.rows[0].lastElementChild.textContent;
    const full = [...document.querySelectorAll("table")].filter((table) => last(table) === "status");
    return [...full[arguments[1]].tBodies[0].rows].map((r) => r.cells[arguments[0]].textContent);"""
    return list(browser.execute_script(script, column, table))


def test_filters_reach_tables_and_charts(browser: Chrome, page: Path) -> None:
    look(browser, page)
    all_rows = one(browser, "#count").text
    assert all_rows == "28 of 28 rows"
    one(browser, "#filters [name=text]").send_keys("DDIM")
    until(lambda: one(browser, "#count").text != all_rows)
    assert set(shown(browser, 0)) == {"ddim", "ddim+cache"}
    until(lambda: one(browser, "#cost-chart .legend").text.split() == ["A", "ddim", "B", "ddim+cache"])
    choose(browser, "#filters [name=nfe]", "10")
    until(lambda: set(shown(browser, 1)) == {"10"})
    heads = [h.text for h in browser.find_elements("css selector", "table.primary th[scope=col]") if h.is_displayed()]
    assert set(heads) == {"method", "NFE 10"}
    js(browser, "document.forms[0].reset()")
    choose(browser, "#filters [name=status]", "error")
    until(lambda: shown(browser, 0) == ["heun"])
    assert one(browser, "#count").text == "2 of 28 rows"


def test_hovering_and_arrow_keys_read_points_out(browser: Chrome, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    look(browser, page)
    plot, readout = one(browser, "#cost-chart .plot"), one(browser, "#cost-chart .readout")
    js(browser, "document.querySelector('#cost-chart').scrollIntoView()")
    before = readout.text
    ActionChains(browser).move_to_element(one(browser, "#cost-chart .u-over")).perform()
    until(lambda: readout.text != before)
    assert "at NFE" in readout.text
    assert "fd@fashion64" in readout.text
    plot.send_keys(Keys.ARROW_RIGHT)
    first = readout.text
    assert "cost (forwards per sample) 10" in first  # the cheapest: 5 evaluations of 2
    plot.send_keys(Keys.ARROW_RIGHT)
    assert readout.text != first
    for box in browser.find_elements("css selector", "#cost-chart .legend input"):
        box.click()
    assert "Nothing to draw" in plot.text


def test_the_chart_offers_metrics_costs_and_the_trade_off(browser: Chrome, page: Path) -> None:
    look(browser, page)
    canvas = "return document.querySelector('#cost-chart canvas').toDataURL()"
    pictures = {js(browser, canvas)}
    block, quality_of, cost = browser.find_elements("css selector", "#cost-chart select")
    for select, value in ((quality_of, "3"), (cost, "ms"), (block, "1")):
        choose(browser, select, value)
        pictures.add(js(browser, canvas))
    assert len(pictures) >= 3  # both guidance scales have the same made-up numbers
    assert "guidance 3" in (one(browser, "#cost-chart .plot").get_attribute("aria-label") or "")
    assert one(browser, "#tradeoff-chart canvas").is_displayed()


def test_the_slider_moves_all_methods_to_an_nfe(browser: Chrome, page: Path) -> None:
    from selenium.webdriver import Keys

    look(browser, page)
    slider = one(browser, ".slides input[type=range]")
    label = js(browser, "return document.querySelector('.slides input').labels[0].textContent")
    assert label.startswith("NFE")
    visible = """
    const frames = [...document.querySelector(".slides").querySelectorAll(".frame")];
    return frames.filter((frame) => !frame.hidden).map((frame) => frame.dataset.nfe);"""
    assert js(browser, visible).count("20") == 4
    slider.send_keys(Keys.ARROW_LEFT)
    assert set(js(browser, visible)) == {"10"}
    assert one(browser, ".slides output").text == "10"
    assert slider.get_attribute("aria-valuetext") == "NFE 10"
    slider.send_keys(Keys.ARROW_LEFT)
    assert sorted(set(js(browser, visible))) == ["5", "none"]  # no samples of an error


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (360, False), (360, True)])
def test_axe_finds_nothing_serious(browser: Chrome, page: Path, width: int, dark: bool) -> None:
    look(browser, page, width=width, dark=dark)
    assert axe(browser) == []
    if width == 1200 and not dark:  # it would have
        js(browser, "document.body.append(document.createElement('img'))")
        assert [found["id"] for found in axe(browser)] == ["image-alt"]


def test_dark_mode_is_dark_and_print_is_not(browser: Chrome, page: Path) -> None:
    def lightness() -> int:
        colour = js(browser, "return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) // 3

    look(browser, page, dark=True)
    assert lightness() < 60
    look(browser, page, dark=True, media="print")
    assert lightness() == 255
    assert not one(browser, "#filters").is_displayed()


def test_a_phone_needs_no_sideways_scrolling(browser: Chrome, page: Path) -> None:
    look(browser, page, width=360)
    assert LONG in browser.page_source
    assert js(browser, "return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert js(browser, "return document.querySelector('#cost-chart canvas').clientWidth") <= 360


def test_ranks_stand_below_their_values(browser: Chrome, page: Path) -> None:
    look(browser, page)
    found = js(
        browser,
        """return [...document.querySelectorAll("table.primary td small")].map((small) =>
        [small.getBoundingClientRect().top, small.previousSibling.getBoundingClientRect().bottom]);""",
    )
    assert len(found) == 2 * 11 + 2
    assert all(top >= bottom - 2 for top, bottom in found)


def test_no_console_message_and_no_request(browser: Chrome, page: Path) -> None:
    look(browser, page)
    js(browser, SORT.replace("return result", ""))
    one(browser, "#filters [name=text]").send_keys("unipc")
    one(browser, ".slides input").send_keys("5")
    until(lambda: one(browser, "#count").text.startswith("6 of"))
    assert browser.get_log("browser") == []
    assert {url.split(":")[0] for url in requests(browser)} <= {"file", "data"}
    js(browser, "console.error('seen'); fetch('http://localhost:9/').catch(() => 0)")  # the records do record
    messages = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "seen" in messages
    assert "Content Security Policy" in messages
    forget(browser)


def test_without_scripts_everything_is_readable(browser: Chrome, page: Path) -> None:
    look(browser, page, script=False)
    tables = browser.find_elements("css selector", "table")
    assert all(table.is_displayed() for table in tables)
    strips = browser.find_elements("css selector", ".slides .frame:not(.none)")
    assert len(strips) == 2 * 11 + 1
    assert all(strip.is_displayed() for strip in strips)
    assert one(browser, "details.still img").is_displayed()
    assert not any(node.is_displayed() for node in browser.find_elements("css selector", ".needs-script"))
    look(browser, page)


def test_a_script_in_a_name_does_nothing(browser: Chrome, tmp_path: Path) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    found: list[Record] = [quality(f"{HOSTILE}+x", 5, 3.0), quality(HOSTILE, 5, 4.0)]
    found += [failed(HOSTILE, 10, "error", "<img src=x onerror=alert(1)>|y")]
    store = write_run(tmp_path / "run", found, make_suite(summary=f"</style></script>{HOSTILE}"))
    for record in found[:2]:
        store.write_chunk(Chunk(record.cell.id, 0, 4), {"images": np.zeros((4, 1, 8, 8), np.uint8)}, {})
    suite = make_suite(summary=f"</style></script>{HOSTILE}").model_copy(update={"name": HOSTILE})
    paths = build(store, suite, tmp_path / "report", ("md", "html"))
    look(browser, paths["html"])
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert one(browser, "h1").text == HOSTILE
    assert HOSTILE in one(browser, "#cost-chart .legend").text
    assert HOSTILE in one(browser, "table.primary").text
    assert browser.get_log("browser") == []
    text = paths["md"].read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_suite_of_such_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="letters, digits"):
        make_suite(name=HOSTILE)


def test_long_tables_show_a_part_and_more_on_demand(browser: Chrome, tmp_path: Path) -> None:
    found = [quality(f"m{i:03d}", 5, 1.0 + i, samples=N) for i in range(250)]
    store = write_run(tmp_path / "run", found)
    paths = build(store, make_suite(), tmp_path / "report", ("html",))
    look(browser, paths["html"])
    assert len(shown(browser, 0)) == 200
    more = [b for b in browser.find_elements("css selector", "button.more") if b.is_displayed()]
    assert "50 rows" in more[0].text
    for button in more:
        browser.execute_script("arguments[0].click()", button)
    assert len(shown(browser, 0)) == 250
    one(browser, "#filters [name=text]").send_keys("m249")
    until(lambda: shown(browser, 0) == ["m249"])
