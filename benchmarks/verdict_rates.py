"""How often a verdict is wrong: A/A comparisons through every route that `compare` and `--until decided` offer.

Each line is a pair of samplers without a difference, compared 400 times with tolerance 0: the share of false alarms
with its 95 % interval (Wilson), and on which side they lie. Then exact samples against samples with less variance,
which no verdict may call better, with what a difference of plug-in distances says.

The value is the largest share. It holds when no share is above 5 % by more than chance allows among so many lines
(binomial, level 1 % over all lines), those of the quality issue are at most 7 %, and nothing shrunk is better.

    python benchmarks/verdict_rates.py [--full] [--repeats 400] [--routes fd,kid]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from _null_routes import Null, nulls
from _nulls import plug_in_better, rates, shrunk
from scipy.stats import binom

from evalbench.stats import wilson_interval

LEVEL, STRICT, CHANCE = 0.05, 0.07, 0.01


def said(null: Null, repeats: int) -> np.ndarray:
    """What each comparison says, 1, -1 or 0, (repeats,)."""
    return np.array([null.draw(np.random.default_rng([7, repeat])) for repeat in range(repeats)])


def line(null: Null, words: np.ndarray) -> str:
    """One row of the table."""
    alarms, n = int(np.count_nonzero(words)), len(words)
    interval = wilson_interval(alarms, n)
    sides = f"{100 * np.mean(words < 0):.1f} below, {100 * np.mean(words > 0):.1f} above"
    share = f"{100 * alarms / n:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"| `{null.route}` | {null.name} | {share} | {sides} |"


def shrunk_lines(repeats: int, *, full: bool) -> bool:
    """Print how often samples with 10 % less variance are better; whether they never are."""
    never = True
    for dims, n in ((64, 256), (64, 512)) + (((256, 1024), (256, 2048)) if full else ()):
        case, times = shrunk(dims, n), max(20, repeats // (1 if dims < 100 else 8))
        found = rates(case, times)
        never = never and found.better == 0
        plain = plug_in_better(case, times)
        print(
            f"{case.name}: better in {100 * found.better:.1f} % of {times}, by plug-in difference {100 * plain:.0f} %"
        )
    return never


def main() -> None:
    """Print a row per null, the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the Frechet distance at d = 256 too")
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--routes", default="", help="only these, with commas")
    args = parser.parse_args()
    everything = nulls(full=args.full)
    routes = args.routes.split(",") if args.routes else [null.route for null in everything]
    wanted = [null for null in everything if null.route in routes]
    most = int(binom.isf(CHANCE / len(wanted), args.repeats, LEVEL))  # alarms that chance allows
    print("| route | null | false alarms | % on either side |\n|---|---|---|---|")
    worst, fine = 0.0, True
    for null in wanted:
        words = said(null, args.repeats)
        alarms = int(np.count_nonzero(words))
        fine = fine and alarms <= most and not (null.strict and alarms > STRICT * args.repeats)
        worst = max(worst, alarms / args.repeats)
        print(line(null, words), flush=True)
    print(f"{len(wanted)} nulls, {args.repeats} comparisons each; by chance up to {100 * most / args.repeats:.1f} %")
    if "fd" in routes:
        fine = shrunk_lines(args.repeats, full=args.full) and fine
    goal = f"none above {LEVEL} by more than chance; equal distances <= {STRICT}; shrunk never better"
    verdict = {"value": round(worst, 4), "unit": "largest share of false alarms", "goal": goal, "holds": bool(fine)}
    print(json.dumps({"name": "verdict-rates", **verdict}))


if __name__ == "__main__":
    main()
