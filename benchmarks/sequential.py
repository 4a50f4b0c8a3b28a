"""Sequential verdicts: errors on the null, and samples spent against the fixed-N paired design.

The fixed design has the N at which a true difference of 0 is found inside the tolerance with 90 % power (tolerance
3.6 standard errors); it finds a difference of one tolerance with 95 %. Effects are 0, half, one and two tolerances.

1. Looks at tenths of N and the confidence sequence after every hundredth, on paired scores (2,000 samples, normal).
2. The Frechet difference at d = 16, N = 128 d, looks of 8 d and more, on the equal-distance null (scales 1 - e, 1 + e)
   with a tolerance that no look reaches, so that every stop is a false direction.

The value is the largest error; it holds with the goals on samples: at most 0.55 at one, 0.25 at two.

    python benchmarks/sequential.py [--repeats 2000]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from _nulls import equally_far

from evalbench.looks import Look, frechet_looks, group_sequential, score_sequence
from evalbench.metrics.differences import ROUTES
from evalbench.metrics.estimate import Difference, from_influence

N, POINTS = 2_000, 3.6
EFFECTS = (0.0, 0.5, 1.0, 2.0)
ERROR, AT_ONE, AT_TWO = 0.05, 0.55, 0.25


def scores(gaps: np.ndarray, tolerance: float) -> dict[str, list[Look]]:
    """Both designs on the same paired differences."""

    def at(n: int) -> Difference:
        return from_influence(float(gaps[:n].mean()), gaps[:n])

    tenths = [N * k // 10 for k in range(1, 11)]
    hundredths = [N * k // 100 for k in range(2, 101)]
    return {
        "looks": group_sequential(at, tenths, tolerance),
        "confidence sequence": score_sequence(gaps, hundredths, tolerance),
    }


def wrong(decision: str, effect: float) -> bool:
    """A direction that is not there; `inside` of what lies beyond."""
    return (
        decision in ("above", "below") if effect == 0 else decision == "below" or (decision == "inside" and effect > 1)
    )


def simulate(repeats: int) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(design, effect) -> errors, decided, share of N spent."""
    tolerance = POINTS / N**0.5
    found: dict[tuple[str, float], list[tuple[bool, bool, float]]] = {}
    for repeat in range(repeats):
        noise = np.random.default_rng([repeat, 1]).standard_normal(N)
        for effect in EFFECTS:
            for design, looks in scores(noise + effect * tolerance, tolerance).items():
                last = looks[-1]
                row = (wrong(last.decision, effect), last.decision != "open", last.n / N)
                found.setdefault((design, effect), []).append(row)
    return {key: tuple(np.mean(rows, axis=0)) for key, rows in found.items()}


def frechet_errors(repeats: int, dims: int = 16, factor: int = 128) -> float:
    """Share of false directions of the Frechet difference over looks."""
    n = factor * dims
    stops = 0
    for shared in (1.0, 0.0):
        case = equally_far("fd", "flat", dims, n, shared)
        for repeat in range(repeats // 2):
            base, new = case.draw(np.random.default_rng([repeat, 2]))

            def at(m: int, base: np.ndarray = base, new: np.ndarray = new, case: object = case) -> Difference:
                return ROUTES["fd"].compute(base[:m], new[:m], case.reference)

            stops += group_sequential(at, frechet_looks(n, dims), 0.0)[-1].decision != "open"
    return stops / (2 * (repeats // 2))


def main() -> None:
    """Print a row per design and effect, the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    rows = simulate(repeats)
    for (design, effect), (error, decided, share) in sorted(rows.items()):
        said = f"errors {100 * error:4.1f} %, decided {100 * decided:5.1f} %, {share:.2f} of the fixed N"
        print(f"{design:<20} effect {effect:g} tolerances: {said}")
    frechet = frechet_errors(repeats)
    print(f"Frechet difference, equal-distance null: {100 * frechet:.1f} % false directions")
    worst = max(frechet, *(error for (_, effect), (error, _, _) in rows.items() if effect == 0))
    one, two = (rows["looks", effect][2] for effect in (1.0, 2.0))
    holds = bool(worst <= ERROR + 2 * (0.0475 / repeats) ** 0.5 and one <= AT_ONE and two <= AT_TWO)
    goal = f"<= {ERROR} (within simulation error); samples {one:.2f} <= {AT_ONE} at one, {two:.2f} <= {AT_TWO} at two"
    line = {"name": "sequential", "value": round(worst, 4), "unit": "largest error on the null", "goal": goal}
    print(json.dumps(line | {"holds": holds}))


if __name__ == "__main__":
    main()
