"""A real Chromium for the tests of pages: headless, its console and its requests on record."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), "")
MISSING = [name for name in ("selenium", "axe_core_python") if find_spec(name) is None]
if not CHROMIUM:
    MISSING.append("chromium (apt-get install chromium)")
if not shutil.which("chromedriver"):
    MISSING.append("chromedriver (apt-get install chromium-driver)")
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def start(profile: Path) -> Chrome:
    """A browser with an empty profile."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


def look(
    browser: Chrome, page: Path, *, width: int = 1200, dark: bool = False, media: str = "", script: bool = True
) -> None:
    """Open a page on a screen of that width."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    forget(browser)
    browser.get(page.as_uri())


def forget(browser: Chrome) -> None:
    """Empty the records of console and network."""
    browser.get_log("browser")
    browser.get_log("performance")


def requests(browser: Chrome) -> list[str]:
    """URLs asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def axe(browser: Chrome) -> list[dict[str, Any]]:
    """What axe-core finds serious or critical: id, impact, and the first place."""
    import axe_core_python

    source = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(source)
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then((r) => done(r.violations));")
    return [
        {"id": v["id"], "impact": v["impact"], "where": v["nodes"][0]["html"]}
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
