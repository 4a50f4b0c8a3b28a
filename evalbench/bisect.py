"""`evalbench bisect GOOD BAD`: the first commit whose samples differ, by the fast gate, in a git worktree of its own.

The checkout that it is called from is never touched. Each commit runs the same cells with its own code in a process of
its own, and its first samples are held against those of GOOD: the same, or same to rounding, is good; changed is bad; a
commit that cannot run is passed over, as `git bisect skip` does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from evalbench.compare import FastComparison, fast_compare
from evalbench.errors import EvalbenchError, UserError

Judgement: TypeAlias = Literal["good", "bad", "skipped"]
_FOLDERS = {"methods": "methods", "suites": "suites", "results/published": "published_tables"}  # of evalbench itself


@dataclass(frozen=True)
class Found:
    """What a search says.

    Attributes:
        suspects: commits of which one is the first bad one, oldest first; a single one unless some were skipped.
        judged: commits that were tried, in the order of trial.
    """

    suspects: tuple[str, ...]
    judged: tuple[tuple[str, Judgement], ...]


def search(commits: Sequence[str], judge: Callable[[str], Judgement]) -> Found:
    """Bisect: commits from the first after GOOD to BAD, oldest first; the last is known to be bad."""
    judged: list[tuple[str, Judgement]] = []
    good, bad, skipped = -1, len(commits) - 1, set[int]()
    while True:
        open_ = [k for k in range(good + 1, bad) if k not in skipped]
        if not open_:
            return Found(tuple(commits[good + 1 : bad + 1]), tuple(judged))
        middle = min(open_, key=lambda k: (abs(2 * k - (good + bad)), k))
        found = judge(commits[middle])
        judged.append((commits[middle], found))
        if found == "skipped":
            skipped.add(middle)
        elif found == "good":
            good = middle
        else:
            bad = middle


@dataclass(frozen=True)
class Cells:
    """What every commit runs, see `evalbench.run`; empty is the suite's own."""

    suite: str = "gmm-smooth"
    methods: tuple[str, ...] = ()
    nfe: tuple[int, ...] = ()
    samples: int = 64
    plugins: tuple[str, ...] = ()

    def program(self, out: Path) -> str:
        """What a commit's Python runs: no report, plug-in paths relative to the commit's own files."""
        options = {
            "samples": self.samples,
            "methods": list(self.methods) or None,
            "nfe": list(self.nfe) or None,
            "plugins": list(self.plugins),
            "allow_small_n": True,
            "serial": True,
        }
        return f"import evalbench; evalbench.run({self.suite!r}, {str(out)!r}, **{options!r})"


class Worktree:
    """A git worktree of its own, and run folders of the commits that ran in it."""

    def __init__(self, repository: Path, place: Path, cells: Cells) -> None:
        self.repository, self.place, self.cells = repository, place, cells
        self.tree = place / "tree"

    def run(self, commit: str) -> Path | None:
        """The run folder of a commit; None when it cannot run, its output in `COMMIT.log`."""
        out = self.place / "runs" / commit
        if (out / "records.jsonl").is_file():
            return out
        git(self.tree, "checkout", "--quiet", "--force", "--detach", commit)
        command = [sys.executable, "-c", self.cells.program(out)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(self._code())}
        done = subprocess.run(command, cwd=self.tree, env=environ, capture_output=True, text=True, check=False)
        (self.place / f"{commit}.log").write_text(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        return out if done.returncode == 0 and (out / "records.jsonl").is_file() else None

    def _code(self) -> list[str]:
        """Where Python finds the commit's code: the tree, and evalbench's own folders as they are installed."""
        before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        package = self.tree / "evalbench"
        if not (package / "__init__.py").is_file():
            return [str(self.tree), *before]
        linked = Path(tempfile.mkdtemp(dir=self.place)) / "evalbench"
        linked.mkdir()
        links = {entry.name: entry for entry in package.iterdir()}
        links |= {name: self.tree / folder for folder, name in _FOLDERS.items() if (self.tree / folder).is_dir()}
        for name, target in links.items():
            (linked / name).symlink_to(target)
        return [str(linked.parent), *before]


@contextlib.contextmanager
def worktree(repository: Path, cells: Cells, first: str) -> Iterator[Worktree]:
    """A worktree at a commit, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="evalbench-bisect-") as made:
        found = Worktree(repository, Path(made), cells)
        git(repository, "worktree", "add", "--quiet", "--detach", str(found.tree), first)
        try:
            yield found
        finally:
            git(repository, "worktree", "remove", "--force", str(found.tree))


def git(folder: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        UserError: git says no; with its first line.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git is not installed; bisect needs it") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["failed"]
        raise UserError(f"git {arguments[0]}: {said[0]}")
    return done.stdout.strip()


def commits_between(repository: Path, good: str, bad: str) -> tuple[str, list[str]]:
    """GOOD as a hash, and the commits after it up to BAD along first parents, oldest first.

    Raises:
        UserError: not a repository, no such commit, GOOD is no ancestor of BAD.
    """
    start, end = (git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") for name in (good, bad))
    if git(repository, "merge-base", start, end) != start or start == end:
        raise UserError(f"'{good}' is not an earlier commit than '{bad}' of one branch; give the good one first")
    return start, git(repository, "rev-list", "--first-parent", "--reverse", f"{start}..{end}").splitlines()


def bisect_command(good: str, bad: str, cells: Cells, repository: Path | None = None) -> int:
    """Print every commit that was tried and the first that changed; the exit code.

    Args:
        repository: a folder inside it; the current one.

    Raises:
        UserError: see `commits_between`; BAD has the samples of GOOD. EvalbenchError: GOOD or BAD cannot run.
    """
    root = Path(git(repository or Path.cwd(), "rev-parse", "--show-toplevel"))
    start, commits = commits_between(root, good, bad)
    with worktree(root, cells, start) as tree:
        base = tree.run(start)
        if base is None:
            raise EvalbenchError(f"{good} cannot run: {_last_line(tree, start)}")

        def judge(commit: str) -> Judgement:
            return _judge(tree, base, commit)

        last = judge(commits[-1])
        if last == "skipped":
            raise EvalbenchError(f"{bad} cannot be compared with {good}: {_last_line(tree, commits[-1])}")
        if last == "good":
            raise UserError(f"{bad} makes the samples of {good}; nothing changed that these cells see")
        found = search(commits, judge)
    print(f"first changed: {_named(root, found.suspects[-1])}" if len(found.suspects) == 1 else "one of these changed:")
    for commit in found.suspects if len(found.suspects) > 1 else ():
        print(f"  {_named(root, commit)}")
    print("next: evalbench compare says whether the change is better or worse")
    return 0


def _judge(tree: Worktree, base: Path, commit: str) -> Judgement:
    out = tree.run(commit)
    gate = None if out is None else fast_compare(base, out)
    judged, said = _judgement(gate)
    print(f"{judged:<8}{_named(tree.repository, commit)}: {said}", flush=True)
    return judged


def _judgement(gate: FastComparison | None) -> tuple[Judgement, str]:
    """Of the fast gate: changed in one cell is bad, the same in all is good, anything else cannot be told."""
    if gate is None:
        return "skipped", "cannot run"
    words = {cell.word for cell in gate.cells}
    if "changed" in words:
        changed = [cell.cell for cell in gate.cells if cell.word == "changed"]
        return "bad", f"changed in {len(changed)} of {len(gate.cells)} cells, first {changed[0]}"
    if words and words <= {"bit-identical", "same to rounding"}:
        return "good", ", ".join(sorted(words))
    reasons = [cell.reason for cell in gate.cells if cell.word == "not comparable"]
    return "skipped", reasons[0] if reasons else "no cell in common"


def _named(repository: Path, commit: str) -> str:
    return git(repository, "log", "-1", "--format=%h %s", commit)


def _last_line(tree: Worktree, commit: str) -> str:
    file = tree.place / f"{commit}.log"
    lines = file.read_text().strip().splitlines() if file.is_file() else []
    return lines[-1] if lines else "no reason recorded"
