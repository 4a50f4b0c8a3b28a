"""evalbench bisect: the search, and a repository in which one commit changes a solver by one percent."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from evalbench.bisect import Cells, Judgement, bisect_command, commits_between, search
from evalbench.errors import EvalbenchError, UserError

CELLS = Cells(methods=("verdict-euler",), nfe=(5,), plugins=("solver.py",))
SOLVER = '''
from itertools import pairwise
from evalbench.engine import Plan, PlannedSolver, linear_step
from evalbench.registry import register

@register("verdict-euler")
class VerdictEuler(PlannedSolver):
    """First-order exponential integrator on x0."""
    grid = ""

    def plan(self, path, times):
        plan = Plan("x0")
        x = plan.x_T
        for s, t in pairwise(times):
            a, b = linear_step(path, s, t, "x0")
            x = plan.update({x: a}, {plan.evaluate(x, s, t): FACTOR * b})
        return plan.finish(x)
'''


@pytest.mark.parametrize("first_bad", range(8))
def test_search_finds_every_commit_in_few_steps(first_bad: int) -> None:
    commits = [f"c{k}" for k in range(8)]
    found = search(commits, lambda c: "bad" if int(c[1:]) >= first_bad else "good")
    assert found.suspects == (f"c{first_bad}",)
    assert len(found.judged) <= 3


@pytest.mark.parametrize("first_bad", range(5))
def test_commits_that_cannot_run_are_passed_over_and_stay_suspect(first_bad: int) -> None:
    def judge(commit: str) -> Judgement:
        k = int(commit[1:])
        return "skipped" if k in (1, 2) else "bad" if k >= first_bad else "good"

    found = search([f"c{k}" for k in range(5)], judge)
    assert f"c{first_bad}" in found.suspects
    assert found.suspects == ((f"c{first_bad}",) if first_bad in (0, 4) else ("c1", "c2", "c3"))


@pytest.fixture
def repository(tmp_path: Path) -> Callable[[list[str]], Path]:
    """A repository with one commit per text of solver.py, tagged c0, c1, ..."""

    def make(texts: list[str]) -> Path:
        folder = tmp_path / "project"
        folder.mkdir()

        def git(*arguments: str) -> None:
            who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

        git("init", "-q")
        for k, text in enumerate(texts):
            (folder / "solver.py").write_text(text)
            git("add", ".")
            git("commit", "-q", "--allow-empty", "-m", f"commit {k}")
            git("tag", f"c{k}")
        return folder

    return make


def solver(factor: str) -> str:
    return SOLVER.replace("FACTOR", factor)


@pytest.mark.slow
def test_the_commit_that_changed_a_coefficient_is_found(
    repository: Callable[[list[str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [solver("1.0"), solver("(1 + 1e-9)"), "raise SystemExit(3)", solver("1.01"), solver("1.01") + "# more\n"]
    folder = repository(texts)
    (folder / "solver.py").write_text("work in progress")
    assert bisect_command("c0", "c4", CELLS, folder) == 0
    printed = capsys.readouterr().out
    assert "good    " in printed
    assert "commit 1: same to rounding" in printed
    assert "commit 2: cannot run" in printed
    assert "one of these changed:" in printed  # the one that cannot run, or the one after it
    assert printed.index("  ", printed.index("one of these")) < printed.index("commit 3", printed.index("one of these"))
    assert "commit 4" not in printed[printed.index("one of these") :]
    assert (folder / "solver.py").read_text() == "work in progress"
    trees = subprocess.run(["git", "worktree", "list"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert len(trees.splitlines()) == 1


def test_one_commit_is_named_where_all_can_run(
    repository: Callable[[list[str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository([solver("1.0"), solver("0.99"), solver("0.99")])
    assert bisect_command("c0", "c2", CELLS, folder) == 0
    assert "first changed: " in (printed := capsys.readouterr().out)
    assert "commit 1\n" in printed


@pytest.mark.slow
def test_runs_that_cannot_be_bisected_are_one_line(repository: Callable[[list[str]], Path]) -> None:
    folder = repository([solver("1.0"), solver("1.0") + "# same\n", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="c1 makes the samples of c0"):
        bisect_command("c0", "c1", CELLS, folder)
    with pytest.raises(EvalbenchError, match="c2 cannot be compared with c0"):
        bisect_command("c0", "c2", CELLS, folder)


def test_what_cannot_be_bisected_is_one_line(repository: Callable[[list[str]], Path], tmp_path: Path) -> None:
    folder = repository([solver("1.0"), solver("1.0") + "# same\n", "raise SystemExit(3)"])
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: bisect_command("c2", "c2", CELLS, folder), "is not an earlier commit"),
        (lambda: commits_between(folder, "c1", "c0"), "'c1' is not an earlier commit than 'c0'"),
        (lambda: commits_between(folder, "c0", "nobody"), "git rev-parse"),
        (lambda: bisect_command("a", "b", CELLS, tmp_path), "not a git repository"),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
