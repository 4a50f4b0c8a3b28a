"""What is installed is what lies in the checkout: wheel, wheel in a foreign folder, editable install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = {
    "evalbench": "evalbench",
    "methods": "evalbench/methods",
    "suites": "evalbench/suites",
    "results/published": "evalbench/published_tables",
}
NOT_INSTALLED = {"__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache", ".ipynb_checkpoints"}


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Run a command and return what it prints; fail with all it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}"
    return done.stdout


def files_on_disk() -> dict[str, Path]:
    """Every file of the three folders, by its place in the wheel."""
    return {
        str(PurePosixPath(place, path.relative_to(ROOT / folder).as_posix())): path
        for folder, place in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
        and not NOT_INSTALLED & set(path.parts)
        and not path.name.startswith(".")
        and path.suffix != ".pyc"
    }


def packages_on_disk() -> set[str]:
    """Every folder with an __init__.py, by its dotted name."""
    return {
        str(PurePosixPath(place).parent).replace("/", ".")
        for place in files_on_disk()
        if place.endswith("/__init__.py")
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that nothing is built or dropped in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=checkout)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("target")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
    )
    return target


def test_every_package_is_listed():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_wheel_holds_every_file_of_the_folders(wheel: Path):
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    on_disk = set(files_on_disk())
    assert {"evalbench/__init__.py", "evalbench/methods/solvers/__init__.py"} <= on_disk
    assert sorted(on_disk - in_wheel) == [], "not in the wheel: name it in package-data"
    assert sorted(in_wheel - on_disk) == [], "in the wheel but not in the checkout"


def test_wheel_has_nothing_generic_on_top(wheel: Path):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"evalbench", f"evalbench-{PYPROJECT['project']['version']}.dist-info"}
    run("check-wheel-contents", wheel, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_wheel_carries_the_licences(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)


def test_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path):
    code = """
import evalbench, evalbench.methods, evalbench.methods.solvers, evalbench.suites
for module in (evalbench, evalbench.methods, evalbench.methods.solvers, evalbench.suites):
    print(module.__file__)
print(evalbench.__version__)
"""
    *places, version = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert [Path(place).is_relative_to(installed) for place in places] == [True] * 4
    assert version == PYPROJECT["project"]["version"]


def test_editable_install_sees_a_new_method_file(checkout: Path, tmp_path: Path):
    build = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=checkout)
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    (checkout / "methods" / "solvers" / "dropped_in.py").write_text("ANSWER = 42\n", "utf-8")
    code = f"""
import site; site.addsitedir({str(site)!r})
from evalbench.methods.solvers import dropped_in
print(dropped_in.ANSWER, dropped_in.__file__)
"""
    # -S: without the .pth files of this environment, where evalbench is installed from the real checkout
    libraries = sysconfig.get_paths()["purelib"]
    answer, place = run(
        sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=f"{site}{os.pathsep}{libraries}"
    ).split()
    assert answer == "42"
    assert Path(place).is_relative_to(checkout)


def test_console_script_is_declared_and_versions_agree(tmp_path: Path):
    assert PYPROJECT["project"]["scripts"] == {"evalbench": "evalbench.cli:main"}
    version = run(sys.executable, "-c", "import evalbench; print(evalbench.__version__)", cwd=tmp_path)
    assert version.strip() == PYPROJECT["project"]["version"]


def canonical(requirement: str) -> str:
    """`clean-fid`, `Clean_FID>=0.1` and `clean.fid[x]` are one name."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_constraints_pin_every_direct_dependency_and_no_host():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {canonical(name) for name in wanted} - {canonical(pin) for pin in pins} == set()
