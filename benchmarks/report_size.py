"""The report of 10,000 records: seconds, memory, and the size of report.html; in a browser, how long a sort takes.

Made-up numbers, 100 methods at 20 budgets and 5 guidance scales, written as a run folder; `evalbench report` in a
process of its own. Needs no samples. The browser's part is left out where chromium or selenium is missing.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from evalbench.spec import Cell, MetricValue, Record, content_id, load_suite
from evalbench.store import open_run

METHODS, BUDGETS, SCALES = 100, 20, 5
SECONDS, MEGABYTES, PAGE, REACTION = 20.0, 500.0, 10.0, 1.0
SORT = """
const done = arguments[0], begun = performance.now();
const tables = [...document.querySelectorAll("table.sortable")].sort((a, b) => b.rows.length - a.rows.length);
tables[0].querySelector("th button").click();
requestAnimationFrame(() => setTimeout(() => done((performance.now() - begun) / 1e3)));
"""
FILTER = """
const done = arguments[0], begun = performance.now();
document.forms[0].text.value = "method-07";
document.forms[0].dispatchEvent(new Event("input"));
const wait = () => document.getElementById("count").textContent.startsWith("1000 ")
  ? done((performance.now() - begun) / 1e3) : requestAnimationFrame(wait);
wait();
"""


def write(folder: Path) -> None:
    """A run folder of 10,000 ok records."""
    suite = load_suite("fashion-mixture")
    names = suite.metrics.names
    lines = []
    for m in range(METHODS):
        for g in range(SCALES):
            for b in range(BUDGETS):
                nfe, guidance = 2 * b + 4, 1.0 + 0.5 * g
                cell = Cell(
                    suite=suite.name,
                    suite_version=suite.version,
                    generation="f" * 16,
                    method=f"method-{m:03d}(order=2)",
                    settings=content_id(m),
                    nfe=nfe,
                    guidance=guidance,
                )
                base = (3 + m / 10 + g) * math.exp(-nfe / (9 + m / 20)) + 0.8
                facts = {"samples": 4096, "guidance": guidance, "generation": {"noise": "philox"}}
                lines.append(
                    Record(
                        kind="quality",
                        status="ok",
                        cell=cell,
                        samples=4096,
                        protocol=content_id(facts),
                        protocol_facts=facts,
                        metrics={
                            name: MetricValue(
                                value=base * (i + 1),
                                n=4096,
                                se=0.03 * base,
                                low=0.94 * base,
                                high=1.06 * base,
                                unit="u",
                            )
                            for i, name in enumerate(names)
                        },
                        counts={
                            "nfe": nfe,
                            "depth": nfe,
                            "cost": nfe * (1 + m % 2),
                            "flops": 1e9 * nfe,
                            "evals.base": nfe,
                        },
                        environment={"device": "cpu", "threads": 1, "class": "c"},
                    ).to_json()
                )
    with open_run(folder, suite, {}):
        (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_browser(page: Path, profile: Path) -> dict[str, float]:
    """Seconds until the page stands, until a sort and a filter are drawn; empty without a browser."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver and find_spec("selenium")):
        print("no browser: chromium, chromedriver or selenium is missing")
        return {}
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"):
        options.add_argument(flag)
    for flag in ("--disable-background-networking", "--disable-component-update", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    browser = Chrome(options=options, service=Service(driver))
    try:
        begun = time.perf_counter()
        browser.get(page.as_uri())
        opened = time.perf_counter() - begun
        return {
            "open_s": opened,
            "sort_s": browser.execute_async_script(SORT),
            "filter_s": browser.execute_async_script(FILTER),
        }
    finally:
        browser.quit()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        write(run)
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "evalbench", "report", str(run)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        megabytes, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
        page = run / "report" / "report.html"
        size = page.stat().st_size / 1e6
        found = in_browser(page, Path(name) / "profile")
    records = METHODS * BUDGETS * SCALES
    print(f"{records} records: {seconds:.1f} s ({cpu:.1f} s of CPU), {megabytes:.0f} MB, page {size:.1f} MB")
    print(", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    slow = max((found[key] for key in ("sort_s", "filter_s") if key in found), default=0.0)
    shares = (seconds / SECONDS, megabytes / MEGABYTES, size / PAGE, slow / REACTION)
    result = {
        "name": "report_size",
        "value": round(max(shares), 3),
        "unit": "largest share of 20 s, 500 MB, 10 MB, 1 s",
    }
    print(json.dumps(result | {"goal": 1.0, "holds": max(shares) <= 1.0}))


if __name__ == "__main__":
    main()
