"""Make the pages and pictures that are measured or listed, never written by hand.

    python docs/make.py lists                 docs/methods.md and docs/suites.md from the registry
    python docs/make.py claims                docs/claims.md and the README's table from results/claims.json
    python docs/make.py baselines             the README's table of the embedded networks from results/baselines/
    python docs/make.py pictures RUN          docs/images/ from a run folder (`make quickstart` leaves one)
    python docs/make.py gallery RUN           docs/images/gallery/ from a timed run of images at three scales
    python docs/make.py pandas                docs/pandas.md: its blocks are run, what they print stands below them

tests/test_docs.py fails when the lists or what docs/pandas.md prints are not current.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from evalbench import catalogue, registry
from evalbench.report import claims as claim_tables
from evalbench.spec import load_suite, suite_names

DOCS = Path(__file__).parent
PICTURES = {"quality-nfe.png": "quickstart-nfe.png", "samples.png": "quickstart-samples.png"}
BASELINES = ("<!-- baselines:begin -->", "<!-- baselines:end -->")
HEAD = "<!-- made by `python docs/make.py lists`; edit the docstrings instead -->\n"


def methods_page() -> str:
    """Every method with its docstring, and the diffusers schedulers with what keeps the others out."""
    names = [name for name in registry.names("method") if not name.endswith(":*")]
    lines = [HEAD, "# Methods\n"]
    for name in names:
        lines += [f"## `{name}`\n", "```text", inspect.getdoc(registry.get("method", name)) or "", "```\n"]
    lines += ["## `diffusers:CLASS`\n"]
    family = registry.get("method", "diffusers:DDIMScheduler")
    lines += ["```text", inspect.getdoc(family) or "", "```\n", "| class | runs here |", "|---|---|"]
    rows = [row for row in catalogue.rows("methods") if row["name"].startswith("diffusers:")]
    lines += [f"| `{row['name'].partition(':')[2]}` | {'yes' if row['available'] else row['reason']} |" for row in rows]
    return "\n".join(lines) + "\n"


def suites_page() -> str:
    """Every suite: what it is, its size, its metrics."""
    lines = [HEAD, "# Suites\n", "| suite | what | N | NFE | grid | primary metric |", "|---|---|--:|---|---|---|"]
    for name in suite_names():
        suite = load_suite(name)
        s = suite.sampling
        nfe = ", ".join(map(str, s.nfe))
        lines.append(f"| `{name}` | {suite.summary} | {s.samples} | {nfe} | {s.grid} | `{suite.metrics.primary}` |")
    return "\n".join(lines) + "\n"


PAGES = {"methods.md": methods_page, "suites.md": suites_page}


def write_claims() -> None:
    """docs/claims.md and the README's table, from the ledger."""
    rows = claim_tables.read_ledger(DOCS.parent / "results" / "claims.json")
    (DOCS / "claims.md").write_text(claim_tables.page(rows), encoding="utf-8")
    readme = DOCS.parent / "README.md"
    readme.write_text(claim_tables.insert(readme.read_text("utf-8"), rows), encoding="utf-8")


def baselines_table() -> str:
    """Distance to the images and, in brackets, to the network's own converged samples: method by budget, per suite."""
    frames = {
        f.parent.name: pd.read_csv(f) for f in sorted((DOCS.parent / "results" / "baselines").glob("*/table.csv"))
    }
    budgets = sorted({int(nfe) for frame in frames.values() for nfe in frame["nfe"]})
    lines = [
        "| suite | method | " + " | ".join(f"{nfe} NFE" for nfe in budgets) + " |",
        "|---|---|" + "--:|" * len(budgets),
    ]
    for suite, frame in frames.items():
        for method, rows in frame.groupby("method", sort=False):
            cells = {int(row["nfe"]): _distances(row) for _, row in rows.iterrows()}
            shown = " | ".join(cells.get(nfe, "") for nfe in budgets)
            lines.append(f"| `{suite}` | `{method}` | {shown} |")
    return "\n".join(lines)


def _distances(row: pd.Series[Any]) -> str:
    converged = row.get("fd_to_converged@fashion64")
    more = "" if converged is None or pd.isna(converged) else f" ({converged:.1f})"
    return f"{row['fd@fashion64']:.1f}{more}"


def write_baselines() -> None:
    """The README's table of the embedded networks."""
    readme = DOCS.parent / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BASELINES[0])
    _, _, after = rest.partition(BASELINES[1])
    content = f"{before}{BASELINES[0]}\n{baselines_table()}\n{BASELINES[1]}{after}"
    readme.write_text(content, encoding="utf-8")


def run_page(text: str) -> str:
    """A page whose ```python blocks were run one after the other, each with what it printed in the ```text below."""
    scope: dict[str, Any] = {}

    def run_block(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block["code"], scope)
        return f"```python\n{block['code']}```\n\n```text\n{printed.getvalue()}```\n"

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return re.sub(r"```python\n(?P<code>.*?)```\n\n```text\n.*?```\n", run_block, text, flags=re.DOTALL)


def draw_gallery(run: Path) -> None:
    """Every figure of `evalbench figure` at a column of ICML, for the README; of what is drawn the PNG is kept."""
    from evalbench.report.paper import FIGURES, Choice, figure

    target = DOCS / "images" / "gallery"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in FIGURES:
            # one guidance scale, but where scales are what is shown
            choice = Choice() if name == "tradeoff" else Choice(guidance=(1.0,))
            wide = "text" if name in ("claims", "grid") else "column"
            runs = [DOCS.parent / "results" / "claims.json"] if name == "claims" else [run]
            drawn = figure(name, runs, folder, style="icml", width=wide, choice=choice)
            shutil.copyfile(drawn.png, target / f"{name}.png")


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lists", "claims", "baselines", "pictures", "gallery", "pandas"])
    parser.add_argument("run", nargs="?", type=Path, help="run folder, for pictures and gallery")
    parser.add_argument("--to", type=Path, default=DOCS, help="where the lists and the page go")
    args = parser.parse_args()
    if args.what == "claims":
        write_claims()
        return
    if args.what == "baselines":
        write_baselines()
        return
    if args.what == "pandas":
        page = run_page((DOCS / "pandas.md").read_text("utf-8"))
        (args.to / "pandas.md").write_text(page, encoding="utf-8")
        return
    if args.what == "lists":
        for name, page in PAGES.items():
            (args.to / name).write_text(page(), encoding="utf-8")
        return
    if args.run is None:
        parser.error(f"{args.what} needs a run folder")
    if args.what == "gallery":
        draw_gallery(args.run)
        return
    for source, target in PICTURES.items():
        shutil.copyfile(args.run / "report" / "figures" / source, DOCS / "images" / target)


if __name__ == "__main__":
    main()
