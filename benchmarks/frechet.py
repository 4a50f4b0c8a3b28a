"""The Frechet distance at 2048 dimensions in one thread: ours, scipy.linalg.sqrtm, and torchmetrics' eigenvalues.

One run, the same covariances of 3,000 synthetic features, full rank; in turn, the median of three, nothing cached.

    python benchmarks/frechet.py
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings

import numpy as np
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from evalbench.metrics.frechet import Gaussian, frechet_distance, moments

DIMS, N, GOAL, TIMES = 2048, 3000, 20, 3


def sets() -> list[Gaussian]:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(DIMS, DIMS)) / np.sqrt(DIMS)
    return [moments(rng.normal(size=(N, DIMS)) @ mixing + shift).gaussian() for shift in (0.0, 0.02)]


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """As pytorch-fid and clean-fid compute it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(a.cov @ b.cov)
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root).real)


def by_eigvals(a: Gaussian, b: Gaussian) -> float:
    """As torchmetrics computes it."""
    return float(_compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.cov, b.mean, b.cov))))


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":  # BLAS reads it when it is loaded: start anew
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    torch.set_num_threads(1)
    a, b = sets()
    ways = {"evalbench": frechet_distance, "sqrtm": by_sqrtm, "torchmetrics": by_eigvals}
    values: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMES):
        for name, compute in ways.items():
            start = time.perf_counter()
            values[name] = compute(a, b)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    for name, value in values.items():
        print(f"{name:<13} {value:.10g}  {seconds[name]:.2f} s")
    gaps = {name: abs(value / values["evalbench"] - 1) for name, value in values.items()}
    print(f"largest relative difference {max(gaps.values()):.1e} (goal 1e-6)")
    print(f"torchmetrics' eigenvalues take {seconds['torchmetrics'] / seconds['evalbench']:.1f} times as long as ours")
    ratio = seconds["sqrtm"] / seconds["evalbench"]
    holds = ratio >= GOAL and max(gaps.values()) <= 1e-6
    verdict = {"value": round(ratio, 1), "unit": "x", "goal": f">= {GOAL}, same value to 1e-6", "holds": holds}
    print(json.dumps({"name": "frechet-against-sqrtm", **verdict}))


if __name__ == "__main__":
    main()
