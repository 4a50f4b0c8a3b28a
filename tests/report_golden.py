"""The report whose files are kept under tests/golden/; `python tests/report_golden.py` writes them again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from report.synthetic import make_records, quality, write_run

from evalbench.report import build_report

FOLDER = Path(__file__).parent / "golden"
HOSTILE = "<script>alert(1)</script>"
FILES = {"md": "report.md", "latex": "report.tex", "table": "table.csv", "timings": "timings.csv"}


def texts(folder: Path, *, backwards: bool = False) -> dict[str, str]:
    """The files of the synthetic run, one of whose methods has a hostile name, by their name under tests/golden/."""
    found = [*make_records(), *make_records(guidance=3.0), quality(HOSTILE, 10, 2.0)]
    store = write_run(folder, found[::-1] if backwards else found)
    manifest = store.manifest() | {"created": "2026-01-01T00:00:00+00:00", "evalbench": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    paths = build_report(store, folder / "report", ("md", "latex", "csv"))
    return {name: paths[key].read_text("utf-8") for key, name in FILES.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for name, text in texts(Path(made) / "run").items():
            (FOLDER / name).write_text(text, encoding="utf-8")
