"""What verdicts find: planted bugs, harmless refactorings, the smallest effect at several N, and what pairing is worth.

30 mutants (24 of solvers, grids, caches, labels, dtypes and noise, 6 of metrics) and 10 refactorings, on the exact
mixture `gmm-smooth` at NFE 10 and N = 1,000. A mutant of a solver is found by the verdict (better or worse than the
original) or by the fast gate (changed); a mutant of a metric by its oracle. `--truth` computes the true differences
from 20,000 samples and stores them in `verdicts_truth.json`; a verdict that contradicts one of them is the wrong way
round. The value is the number of mutants found.

    python benchmarks/verdicts.py [--truth]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from _mutants import HARMLESS, METRIC_MUTANTS, METRIC_ORIGINALS, MUTANTS, NFE, Mutant, register

from evalbench import runner
from evalbench.compare import Comparison, Effect, compare_runs
from evalbench.compare.fast import sameness
from evalbench.compare.pairs import statistic_of
from evalbench.compare.runs import Run, key_of
from evalbench.runner import Request, SerialExecutor
from evalbench.spec import load_suite
from evalbench.store import Store

TRUTH = Path(__file__).with_name("verdicts_truth.json")
N, LARGE = 1_000, 20_000
METRICS = ("paired-median@identity", "fd@identity")
GOAL, PAIRING_GOAL = 27, 100


def make_run(folder: Path, samples: int, methods: list[str], nfe: tuple[int, ...] = (NFE,)) -> Path:
    """A run of these methods; the fine solution is computed once."""
    suite = load_suite("gmm-smooth").override(samples=samples, batch=500, chunk=500)
    solution = suite.solution.model_copy(update={"nfe": 128})
    request = Request(
        suite=suite.model_copy(update={"solution": solution}),
        methods=tuple(methods),
        nfe=nfe,
        guidance=(1.0,),
        seeds=(0,),
        metrics=METRICS,
        allow_small_n=True,
    )
    runner.run(request, folder, SerialExecutor)
    return folder


def bases() -> list[str]:
    """Solvers that were changed."""
    return sorted({mutant.base for mutant in (*MUTANTS, *HARMLESS)})


def judged(folder: Path, mutant: Mutant) -> Comparison:
    """The mutant against its original."""
    return compare_runs(folder, folder, base_method=mutant.base, new_method=register(mutant))


def gate(folder: Path, mutant: Mutant) -> str:
    """The fast gate's word."""
    run = Run(Store(folder))
    records = {key_of(r.cell).method: r for r in run.records}
    return sameness((run, run), records[mutant.base], records[register(mutant)]).word


def all_effects(found: Comparison) -> list[Effect]:
    """Of the primary metric and of the others."""
    (verdict,) = found.verdicts
    return [e for e in (verdict.effect, *verdict.descriptive) if e is not None]


def write_truth() -> None:
    """Differences of all mutants at large N, with their standard errors."""
    with tempfile.TemporaryDirectory() as made:
        run = make_run(Path(made) / "run", LARGE, [*bases(), *map(register, MUTANTS)])
        truth = {
            mutant.method: {e.metric: [e.difference, e.se] for e in all_effects(judged(run, mutant))}
            for mutant in MUTANTS
        }
    TRUTH.write_text(json.dumps({"samples": LARGE, "differences": truth}, indent=1) + "\n")


def bugs(folder: Path) -> tuple[int, int]:
    """Mutants found, and verdicts the wrong way round; prints a line for each mutant."""
    truth = json.loads(TRUTH.read_text())["differences"]
    found = wrong = 0
    for mutant in MUTANTS:
        (verdict,) = judged(folder, mutant).verdicts
        difference, se = truth[mutant.method][verdict.metric]
        word, same = verdict.word, gate(folder, mutant)
        turned = word in ("better", "worse") and abs(difference) > 3 * se and (difference > 0) != (word == "worse")
        checks = [f"verdict: {word}"] * (word in ("better", "worse")) + [f"fast gate: {same}"] * (same == "changed")
        found, wrong = found + bool(checks), wrong + turned
        print(f"{mutant.kind:<9}{mutant.name:<36}{mutant.base:<14}{', '.join(checks) or 'NOT FOUND'}"
              f"{'  WRONG WAY ROUND' if turned else ''}")  # fmt: skip
    for name, (check, passes) in METRIC_MUTANTS.items():
        missed = passes()
        found += not missed
        print(f"{'metric':<9}{name:<50}{'NOT FOUND' if missed else f'oracle: {check}'}")
    return found, wrong


def alarms(folder: Path) -> int:
    """Refactorings that some check complained about, and oracles that the true metrics fail."""
    count = 0
    for mutant in HARMLESS:
        (verdict,) = judged(folder, mutant).verdicts
        same = gate(folder, mutant)
        raised = verdict.word != "indistinguishable" or same == "changed"
        count += raised
        print(f"harmless {mutant.name:<36}{mutant.base:<14}{verdict.word}, {same}{'  ALARM' if raised else ''}")
    return count + sum(not passes() for passes in METRIC_ORIGINALS.values())


def smallest_effects(folder: Path) -> None:
    """At each N, the smallest true difference that is found with 80 % power, relative to the original's value."""
    for n in (1_000, 5_000, 20_000):
        run = make_run(folder / str(n), n, ["dpm-solver++"], (10, 12))
        records = {r.cell.nfe: r for r in Run(Store(run)).records}
        for metric in METRICS:
            difference = paired_rows(run, metric)
            effect = statistic_of(metric)[1].compute(*difference, reference(run, metric))
            size = (1.959963984540054 + 0.8416212335729143) * effect.se
            value = records[10].metrics[metric].value
            print(f"N = {n:>6}: {metric:<24} 10 against 12 NFE: {size:.3g}, {100 * size / value:.2g} % of {value:.3g}")


def reference(folder: Path, metric: str) -> dict[str, np.ndarray]:
    """What the route of a metric refers to."""
    return Run(Store(folder)).reference("identity") if metric.startswith("fd@") else {}


def paired_rows(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of NFE 10 and 12 for the route of a metric."""
    run = Run(Store(folder))
    records = {r.cell.nfe: r for r in run.records}
    if statistic_of(metric)[1].rows == "errors":
        return run.errors(records[10], "identity"), run.errors(records[12], "identity")
    return tuple(run.rows(records[k].cell.id, records[k].samples, records[k].chunk, "identity") for k in (10, 12))


def pairing(folder: Path) -> float:
    """How many times fewer samples the paired Frechet verdict on 10 against 12 NFE takes at equal power."""
    factors = {}
    for metric in METRICS:
        base, new = paired_rows(folder, metric)
        route = statistic_of(metric)[1]
        shuffled = new[np.random.default_rng(0).permutation(len(new))]
        paired, unpaired = (route.compute(base, other, reference(folder, metric)) for other in (new, shuffled))
        factors[metric] = (unpaired.se / paired.se) ** 2
        print(f"dpm-solver++ at NFE 10 against 12, {metric}: {factors[metric]:.0f} times fewer samples paired")
    return factors["fd@identity"]


def main() -> None:
    """Print everything, the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", action="store_true")
    if parser.parse_args().truth:
        write_truth()
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run = make_run(folder / "run", N, [*bases(), *map(register, (*MUTANTS, *HARMLESS))])
        found, wrong = bugs(run)
        false = alarms(run)
        smallest_effects(folder)
        factor = pairing(folder / "20000")
    total = len(MUTANTS) + len(METRIC_MUTANTS)
    print(f"{found} of {total} mutants found, {wrong} wrong way round, {false} alarms on {len(HARMLESS)} refactorings")
    holds = found >= GOAL and not wrong and not false and factor >= PAIRING_GOAL
    goal = f">= {GOAL} of {total}, 0 wrong, 0 alarms, pairing >= {PAIRING_GOAL}x (here {factor:.0f}x)"
    print(json.dumps({"name": "verdicts", "value": found, "unit": "mutants found", "goal": goal, "holds": holds}))


if __name__ == "__main__":
    main()
