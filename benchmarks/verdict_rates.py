"""How often a verdict is wrong: false alarms on exact nulls, coverage, and what a plug-in difference would have said.

Each line is a pair of samplers whose true difference is known, repeated. The value is the largest share of false alarms
among the nulls with N >= 8 d; it holds when that is at most 7 %. `--full` adds d = 256, which takes some minutes.

"""

from __future__ import annotations

import argparse
import json

from _nulls import Case, Rates, equally_far, plug_in_better, rates, shrunk, twins

GOAL = 0.07


def nulls(full: bool) -> list[tuple[int, Case]]:
    """(N / d, case) of pairs at exactly equal distance."""
    found = []
    for factor in (4, 8, 16):
        shapes = [("flat", 64), ("power-law", 256)] if full and factor <= 8 else [("flat", 64)]
        for kind, dims in shapes:
            found += [(factor, equally_far("fd", kind, dims, factor * dims, shared)) for shared in (1.0, 0.0)]
        for dims in (4, 16):
            found += [
                (factor, twins("fd", dims, factor * dims, shared, shift)) for shared in (0.0, 0.9) for shift in (0, 0.4)
            ]
    for n in (256, 640):
        found += [(n // 64, equally_far("kid", "flat", 64, n, shared)) for shared in (1.0, 0.0)]
    found += [(16, twins("kid", 4, 64, 0.9, shift)) for shift in (0, 0.4)]
    return found


def line(case: Case, found: Rates) -> str:
    """One row of the table."""
    return (
        f"{case.name:<72} misses {100 * found.missed:4.1f} %  better {100 * found.better:4.1f} %  "
        f"worse {100 * found.worse:4.1f} %"
    )


def main() -> None:
    """Print a row per case, then the largest share of false alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    wanted = nulls(args.full)
    worst = 0.0
    for factor, case in wanted:
        found = rates(case, args.repeats)
        worst = max(worst, found.missed if factor >= 8 else 0.0)
        print(line(case, found), flush=True)
    for dims, n in ((64, 256), (64, 512)) + (((256, 1024), (256, 2048)) if args.full else ()):
        case, repeats = shrunk(dims, n), max(20, args.repeats // (1 if dims < 100 else 8))
        says = plug_in_better(case, repeats)
        print(f"{line(case, rates(case, repeats))}  (plug-in: better {100 * says:.0f} %)", flush=True)
    print(f"{args.repeats} repetitions: a share of 5 % has a simulation error of {(0.0475 / args.repeats) ** 0.5:.1%}")
    verdict = {"value": round(worst, 4), "unit": "share of false alarms, N >= 8 d", "goal": f"<= {GOAL}"}
    print(json.dumps({"name": "verdict-rates", **verdict, "holds": worst <= GOAL}))


if __name__ == "__main__":
    main()
