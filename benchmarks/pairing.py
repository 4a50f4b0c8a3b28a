"""What shared noise is worth: variance of a difference of Frechet distances, unpaired over paired.

An exact mixture in 32 dimensions, Karras grid, N samples a cell. Each repetition draws its own noise and all methods
share it; the unpaired variance is the sum of those of the two methods. The distances are those that verdicts use,
without bias. A change as small as a regression needs so many times fewer samples; two far methods gain little.

    python benchmarks/pairing.py [--repeats 120] [--samples 2000]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.metrics.frechet import Fit, Gaussian, moments, unpack_statistics
from evalbench.metrics.unbiased import unbiased_distance
from evalbench.runner import make_cell
from evalbench.sampling import Setup, conditions, sample, setup_of
from evalbench.spec import Suite, load_suite, parse_suite

GOAL = 100
PAIRS = (
    (("ddim", 5), ("dpm-solver++", 5)),
    (("ddim", 10), ("dpm-solver++", 10)),
    (("dpm-solver++", 10), ("dpm-solver++", 12)),
    (("dpm-solver++", 20), ("dpm-solver++", 25)),
)


def suite_of(dims: int) -> Suite:
    """gmm-smooth in more dimensions."""
    content = load_suite("gmm-smooth").content()
    content["name"] = "pairing"
    content["model"]["options"] |= {"dim": dims, "components": 12}
    content["sampling"]["grid"] = "karras"
    return parse_suite(content, "", where="pairing")


def distance(setup: Setup, target: Gaussian, method: str, nfe: int, samples: int, seed: int) -> float:
    """FD without its bias of a method's samples from the noise of `seed`."""
    indices = range(samples)
    cell = make_cell(setup.suite, method, nfe, 1.0, seed)
    cond = conditions(setup.suite, setup.model, indices, setup.device)
    ledger = Ledger(samples, budget=nfe)
    x = sample(setup, registry.build_method(method), cell, indices, cond, ledger).double().numpy()
    return unbiased_distance(Fit((x,), target, moments(x)))


def main() -> None:
    """Print a factor per pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=120)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup = setup_of(suite_of(32), {})
    target = unpack_statistics(setup.model.reference("identity"))
    arms = dict.fromkeys(arm for pair in PAIRS for arm in pair)
    found = {
        arm: np.array([distance(setup, target, *arm, args.samples, seed) for seed in range(args.repeats)])
        for arm in arms
    }
    factors = {}
    for a, b in PAIRS:
        unpaired = found[a].var(ddof=1) + found[b].var(ddof=1)
        factors[a, b] = float(unpaired / (found[b] - found[a]).var(ddof=1))
        names = " against ".join(f"{method} at NFE {nfe} ({found[method, nfe].mean():.3g})" for method, nfe in (a, b))
        print(f"{names}: paired variance smaller by a factor {factors[a, b]:.3g}", flush=True)
    near = factors[PAIRS[-1]]
    print(f"{args.repeats} repetitions, N = {args.samples}; in brackets the mean distance")
    verdict = {
        "value": round(near, 1),
        "unit": "variance unpaired over paired, NFE 20 against 25",
        "goal": f">= {GOAL}",
    }
    print(json.dumps({"name": "pairing", **verdict, "holds": near >= GOAL}))


if __name__ == "__main__":
    main()
