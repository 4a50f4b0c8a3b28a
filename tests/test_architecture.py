"""The arrows of the design: who may import whom.

Each rule is a function from sources to complaints, so that each is first seen to complain about a source that
breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The arrows as drawn; what a component reaches through several arrows it may also import directly.
# A component that has no row here (commands such as quickstart) is free, but no row points to it.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "spec": {"errors"},
    "paths": {"spec"},
    "noise": {"spec"},
    "starts": {"noise", "prompts"},
    "stats": {"spec"},
    "environment": {"spec"},
    "cost.ledger": {"spec"},
    "cost.flops": {"spec"},
    "cost.clock": {"spec"},
    "cost.breakdown": {"cost.clock"},
    "cost.ratio": {"stats"},
    "cost.speedup": {"cost.ratio"},
    "models.nets": {"errors"},
    "models.inception": {"errors"},
    "weights": {"durable"},
    "interfaces": {"paths", "noise"},
    "predictions": {"interfaces"},
    "registry": {"interfaces"},
    "engine": {"registry"},
    "denoiser": {"registry", "predictions", "cost.ledger", "cost.flops", "cost.breakdown"},
    "cost": {"denoiser", "stats", "environment", "cost.speedup"},
    "models": {"registry", "denoiser", "models.nets", "weights"},
    # scripts that make what suites refer to; nothing imports them
    "models.references": {"plan", "store", "models.nets"},
    "metrics": {"registry", "stats", "weights", "models.nets", "models.inception"},
    "images_in": {"interfaces"},
    "sample_plan": {"images_in"},
    "reference_files": {"metrics", "images_in"},
    "score": {"reference_files", "sample_plan"},
    "durable": {"errors"},
    "leases": {"errors"},
    "observer": {"errors"},
    "progress": {"errors"},
    "status": {"observer", "progress", "store"},
    "store": {"spec", "durable"},
    "reduce": {"metrics", "store", "stats"},
    "suite_references": {"spec", "weights"},
    "prompts": {"spec", "weights"},
    "conventions": {"sampling", "images_in", "suite_references"},
    "compare": {
        "stats",
        "store",
        "metrics",
        "suite_references",
        "report",
        "cost.ratio",
    },  # the paired statistics; the rendering
    "bisect": {"compare"},  # commits run in processes of their own
    "looks": {"metrics", "stats"},
    "sequential": {"looks", "compare", "runner"},
    "published": {"spec"},
    "report": {"store", "stats", "cost.speedup", "published"},
    "outside": {"images_in"},
    "warm": {"environment", "cost"},
    "sampling": {"warm", "models", "engine", "cost", "environment", "metrics", "prompts", "starts", "outside"},
    "preparation": {"sampling", "metrics"},
    "beside": {"errors"},
    "worker": {"preparation", "suite_references", "beside"},
    "timing": {"sampling", "metrics"},
    "failures": {"worker"},
    "execution": {"failures", "timing"},
    "cluster": {"execution"},
    "shards": {"failures", "leases"},
    "plan": {"worker", "timing", "reduce", "conventions"},
    "artifacts": {"worker", "store"},
    "claim_words": {"stats", "interfaces"},
    "claims": {"claim_words", "runner", "report"},  # report: the rendering
    "upkeep": {"store", "report"},
    "runner": {"beside", "cluster", "plan", "shards", "reduce", "store", "artifacts", "observer", "status"},
    "bundle": {"runner", "upkeep"},
}
# Components of their own inside a package that stands higher or lower.
LEAVES = {
    "cost.ledger",
    "cost.flops",
    "cost.clock",
    "cost.breakdown",
    "cost.ratio",
    "cost.speedup",
    "models.nets",
    "models.inception",
    "models.references",
}
# The command line chooses the executor and hands it to the runner; it computes nothing itself.
CLI_MAY_NOT = {"worker", "denoiser", "engine"}
METHODS_MAY = {"interfaces", "paths", "predictions", "engine", "registry", "noise", "errors", "weights"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
HEAVY = ("torch", "ray", "pandas", "matplotlib", "diffusers", "transformers", "torchmetrics", "scipy")


@dataclass(frozen=True)
class Source:
    """One file as a module of the installed package."""

    module: str
    where: str
    tree: ast.Module
    is_package: bool = False

    @classmethod
    def of(cls, module: str, text: str, *, is_package: bool = False) -> Source:
        return cls(module, f"<{module}>", ast.parse(text), is_package)


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from evalbench import spec` is `evalbench.spec`."""

    target: str
    line: int
    level: int
    typing_only: bool


def sources(*folders: str) -> list[Source]:
    """Every Python file under the folders, named as it is installed."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[0] in ("methods", "suites"):
                parts.insert(0, "evalbench")
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found.append(Source(module, str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8")), is_package))
    return found


def imports(source: Source) -> Iterator[Import]:
    """Every import anywhere in the file, inside functions too."""
    guarded = {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, 0, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                package = parts if source.is_package else parts[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, node.level, id(node) in guarded)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield Import(name, node.lineno, 0, False)


def component(module: str) -> str | None:
    """`evalbench.metrics.frechet` is of `metrics`; a leaf is its own; the package itself is None."""
    parts = module.split(".")
    if parts[0] != "evalbench" or len(parts) == 1:
        return None
    leaf = ".".join(parts[1:3])
    return leaf if leaf in LEAVES else parts[1]


def reach(name: str) -> set[str]:
    """Everything below a component."""
    below: set[str] = set()
    todo = [name]
    while todo:
        for target in ARROWS[todo.pop()] - below:
            below.add(target)
            todo.append(target)
    return below | {"errors", "__version__"}


def upward_imports(files: Iterable[Source]) -> Iterator[str]:
    """Imports against the arrows. Imports for type checkers only are no arrows."""
    for file in files:
        own = component(file.module)
        if own not in ARROWS:
            continue
        allowed = reach(own) | {own}
        for item in imports(file):
            target = component(item.target)
            if target and target not in allowed and not item.typing_only:
                yield f"{file.where}:{item.line}: {own} may not import {item.target}"


def cli_shortcuts(files: Iterable[Source]) -> Iterator[str]:
    """The command line going around the runner."""
    for file in files:
        for item in imports(file):
            if component(file.module) == "cli" and component(item.target) in CLI_MAY_NOT:
                yield f"{file.where}:{item.line}: cli may not import {item.target}, ask the runner"


def ray_outside_cluster(files: Iterable[Source]) -> Iterator[str]:
    """Ray imported anywhere but in cluster."""
    for file in files:
        for item in imports(file):
            if item.target.split(".")[0] == "ray" and component(file.module) != "cluster":
                yield f"{file.where}:{item.line}: only evalbench.cluster imports ray"


def heavy_where_light(files: Iterable[Source]) -> Iterator[str]:
    """Torch in the modules that describe, store and report."""
    light = {"errors", "spec", "registry", "report", "cli"}
    for file in files:
        for item in imports(file):
            if component(file.module) in light and item.target.split(".")[0] in ("torch", "ray"):
                yield f"{file.where}:{item.line}: {file.module} may not import {item.target}"


def training_that_runs(files: Iterable[Source]) -> Iterator[str]:
    """Training scripts that import ray or the command line."""
    for file in files:
        if not file.module.startswith(("evalbench.models.zoo", "evalbench.models.references")):
            continue
        for item in imports(file):
            if item.target.split(".")[0] == "ray" or component(item.target) in ("cli", "runner", "cluster"):
                yield f"{file.where}:{item.line}: a training script may not import {item.target}"


def methods_beyond_the_interface(files: Iterable[Source]) -> Iterator[str]:
    """Methods that import more of evalbench than is offered to them, or another family."""
    for file in files:
        parts = file.module.split(".")
        if parts[:2] != ["evalbench", "methods"] or len(parts) < 3:
            continue
        family = ".".join(parts[:3])
        for item in imports(file):
            if item.level:
                if not f"{item.target}.".startswith(f"{family}."):
                    yield f"{file.where}:{item.line}: relative imports stay inside {family}"
            elif item.target.split(".")[0] == "evalbench" and component(item.target) not in METHODS_MAY:
                yield f"{file.where}:{item.line}: a method may not import {item.target}"


def methods_by_name(files: Iterable[Source]) -> Iterator[str]:
    """Code that imports a method instead of asking the registry."""
    for file in files:
        if file.module.startswith("evalbench.methods"):
            continue
        for item in imports(file):
            whole = item.target == "evalbench.methods" and file.module == "evalbench.registry"
            if f"{item.target}.".startswith(("evalbench.methods.", "methods.")) and not whole:
                yield f"{file.where}:{item.line}: ask the registry instead of importing {item.target}"


def unsafe_loads(files: Iterable[Source]) -> Iterator[str]:
    """Files that could run code when they are opened."""
    for file in files:
        for item in imports(file):
            if item.target.split(".")[0] in PICKLES:
                yield f"{file.where}:{item.line}: no {item.target.split('.')[0]}"
            if item.target == "torch.load":
                yield f"{file.where}:{item.line}: write torch.load(..., weights_only=True)"
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                safe = given.get("weights_only")
                if not (isinstance(safe, ast.Constant) and safe.value is True):
                    yield f"{file.where}:{node.lineno}: torch.load without weights_only=True"
            if "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
                yield f"{file.where}:{node.lineno}: allow_pickle"


PACKAGE = ("evalbench", "methods", "suites")
# rule, folders it is held in, a module and a source that break it, and the same module doing right
RULES = [
    pytest.param(
        upward_imports,
        PACKAGE,
        ("evalbench.spec", "def f():\n    from evalbench.store import Store\n"),
        ("evalbench.store", "from evalbench.spec import Suite\n"),
        id="arrows",
    ),
    pytest.param(
        upward_imports,
        PACKAGE,
        ("evalbench.metrics.frechet", "from ..worker import run\n"),
        ("evalbench.metrics.frechet", "from .base import x\nfrom ..interfaces import Metric\n"),
        id="arrows-relative",
    ),
    pytest.param(
        upward_imports,
        PACKAGE,
        ("evalbench.denoiser", "from evalbench.cost import latency\n"),
        (
            "evalbench.denoiser",
            "from evalbench.cost.ledger import Ledger\nfrom evalbench.cost import flops\n",
        ),
        id="arrows-denoiser-ledger",
    ),
    pytest.param(
        upward_imports,
        PACKAGE,
        ("evalbench.report.html", "from evalbench import runner\n"),
        ("evalbench.report.html", "from evalbench import spec\n"),
        id="arrows-report",
    ),
    pytest.param(
        cli_shortcuts,
        PACKAGE,
        ("evalbench.cli", "from evalbench.worker import run\n"),
        ("evalbench.cli", "from evalbench.runner import run\n"),
        id="cli",
    ),
    pytest.param(
        ray_outside_cluster,
        (*PACKAGE, "benchmarks"),
        ("evalbench.runner", "def f():\n    import ray.util\n"),
        ("evalbench.cluster", "import ray\n"),
        id="ray",
    ),
    pytest.param(
        heavy_where_light,
        PACKAGE,
        ("evalbench.report.figures", "def f():\n    import torch.nn as nn\n"),
        ("evalbench.report.figures", "import pandas\n"),
        id="light",
    ),
    pytest.param(
        training_that_runs,
        PACKAGE,
        ("evalbench.models.zoo.train", "from evalbench.cli import main\n"),
        ("evalbench.models.zoo.train", "import torch\n"),
        id="training",
    ),
    pytest.param(
        methods_beyond_the_interface,
        PACKAGE,
        ("evalbench.methods.solvers.heun", "from evalbench.denoiser import Denoiser\n"),
        ("evalbench.methods.solvers.heun", "from evalbench.engine import step\nimport torch\n"),
        id="methods",
    ),
    pytest.param(
        methods_beyond_the_interface,
        PACKAGE,
        ("evalbench.methods.solvers.heun", "from ..guidance.cfg import cfg\n"),
        ("evalbench.methods.solvers.heun", "from .ddim import rule\nfrom . import ddim\n"),
        id="methods-family",
    ),
    pytest.param(
        methods_by_name,
        (*PACKAGE, "benchmarks", "tests"),
        ("evalbench.quickstart", "from evalbench.methods.solvers.ddim import ddim\n"),
        ("evalbench.registry", "import evalbench.methods\n"),
        id="by-name",
    ),
    pytest.param(
        methods_by_name,
        (*PACKAGE, "benchmarks", "tests"),
        ("tests.test_x", "import importlib\nimportlib.import_module('evalbench.methods.solvers')\n"),
        ("tests.test_x", "from evalbench.registry import methods\n"),
        id="by-name-string",
    ),
    pytest.param(
        unsafe_loads,
        (*PACKAGE, "benchmarks"),
        ("evalbench.store", "import torch\ntorch.load('x', weights_only=False)\n"),
        ("evalbench.store", "import torch\ntorch.load('x', weights_only=True)\n"),
        id="torch-load",
    ),
    pytest.param(
        unsafe_loads,
        (*PACKAGE, "benchmarks"),
        ("evalbench.store", "from pickle import loads\n"),
        ("evalbench.store", "from json import loads\n"),
        id="pickle",
    ),
    pytest.param(
        unsafe_loads,
        (*PACKAGE, "benchmarks"),
        ("evalbench.store", "import numpy as np\nnp.load('x', allow_pickle=True)\n"),
        ("evalbench.store", "import numpy as np\nnp.load('x', allow_pickle=False)\n"),
        id="numpy-pickle",
    ),
]


@pytest.mark.parametrize(("rule", "folders", "wrong", "right"), RULES)
def test_rule_complains_about_a_breach_only(rule, folders, wrong, right):
    assert len(list(rule([Source.of(*wrong)]))) == 1  # a silent rule holds nothing
    assert list(rule([Source.of(*right)])) == []


@pytest.mark.parametrize(
    ("rule", "folders"), sorted({param.values[:2] for param in RULES}, key=lambda pair: pair[0].__name__)
)
def test_project_keeps_the_rule(rule, folders):
    complaints = list(rule(sources(*folders)))
    assert not complaints, "\n".join(["", *complaints])


def test_files_are_found_under_their_installed_names():
    modules = {source.module for source in sources(*PACKAGE)}
    assert {"evalbench", "evalbench.spec", "evalbench.methods.solvers", "evalbench.suites"} <= modules


def test_type_checking_imports_are_no_arrows():
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from evalbench.engine import Engine\n"
    assert list(upward_imports([Source.of("evalbench.interfaces", guarded)])) == []
    always = guarded.replace("TYPE_CHECKING:", "True:")
    assert len(list(upward_imports([Source.of("evalbench.interfaces", always)]))) == 1


def test_arrows_have_no_cycle():
    assert [name for name in ARROWS if name in reach(name) - {"errors"}] == []
    assert {target for targets in ARROWS.values() for target in targets} <= set(ARROWS)


def loaded_by(statement: str) -> set[str]:
    """The heavy libraries that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_heavy_libraries_are_noticed():
    assert "pandas" in loaded_by("import pandas")


@pytest.mark.parametrize(
    "module", ["evalbench", "evalbench.cli", "evalbench.registry", "evalbench.spec", "evalbench.compare"]
)
def test_starts_without_heavy_libraries(module):
    assert loaded_by(f"import {module}") == set()
