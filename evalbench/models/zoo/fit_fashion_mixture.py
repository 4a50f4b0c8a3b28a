"""Fit the mixture of low-rank Gaussians of `fashion-mixture` to the Fashion-MNIST training images.

Per class: k-means into clusters, then probabilistic PCA (Tipping & Bishop 1999, eq. 7-8) of each cluster inside the
span of the first principal components of all images. What is written (float16) defines the model exactly; it is never
compared with the images it was fitted to.

    python -m evalbench.models.zoo.fit_fashion_mixture --data FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy.cluster.vq import kmeans2

from evalbench.models.data import fashion_train

CLUSTERS, RANK, SPAN, SEED = 8, 24, 192, 0
COARSE, STARTS, LEAST = 32, 10, 100  # clusters are found in 32 components, where single odd images do not win one
NOISE = 0.04  # std of the isotropic part, about 5 grey levels: see the card for what the fit left over
OUT = Path(__file__).with_name("fashion-mixture.safetensors")


def fit(images: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The mixture's tensors and figures of the fit.

    Args:
        images: float64 (N, 1024) in [-1, 1]. labels: (N,) in 0..9.
    """
    mean = images.mean(0)
    centred = images - mean
    _, vectors = np.linalg.eigh(centred.T @ centred / len(images))
    span = vectors[:, ::-1][:, :SPAN]  # (1024, q)
    z = centred @ span
    lost = float(np.sqrt(((centred - z @ span.T) ** 2).mean()))
    means, factors, weights, inner = [], [], [], []
    for label in range(10):
        of_class = z[labels == label]
        assignment = _clusters(of_class[:, :COARSE], seed=SEED + label)
        for k in range(CLUSTERS):
            cluster = of_class[assignment == k]
            mu, factor, rest = _ppca(cluster)
            means.append(mu)
            factors.append(factor)
            weights.append(len(cluster) / len(of_class))
            inner.append(rest)
    tensors = {
        "mean": mean.astype(np.float16),
        "span": np.ascontiguousarray(span).astype(np.float16),
        "means": np.stack(means).astype(np.float16),  # (80, q)
        "factors": np.stack(factors).astype(np.float16),  # (80, q, r)
        "weights": np.asarray(weights, dtype=np.float32).reshape(10, CLUSTERS),
        "noise": np.asarray(NOISE, dtype=np.float32),
    }
    figures = {"rms_outside_span": lost, "rms_inside_span_outside_factors": float(np.sqrt(np.mean(inner)))}
    return tensors, figures


def _clusters(points: np.ndarray, seed: int) -> np.ndarray:
    """Cluster of each point: the best of a few k-means starts whose clusters all can carry RANK factors."""
    best = np.inf
    assignment: np.ndarray | None = None
    for start in range(STARTS):
        centres, found = kmeans2(points, CLUSTERS, minit="++", seed=seed + 100 * start, iter=30)
        inertia = float(((points - centres[found]) ** 2).sum())
        if np.bincount(found, minlength=CLUSTERS).min() >= LEAST and inertia < best:
            best, assignment = inertia, found
    if assignment is None:
        raise RuntimeError(f"no k-means start of {STARTS} gave clusters of at least {LEAST} images")
    return assignment


def _ppca(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, factors F (q, r) with F F^T + NOISE^2 I the covariance, and the mean variance F leaves over."""
    mu = points.mean(0)
    values, vectors = np.linalg.eigh(np.cov((points - mu).T))
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = np.sqrt(np.maximum(values[:RANK] - NOISE**2, 0.0))
    return mu, vectors[:, :RANK] * kept, float(values[RANK:].mean())


def main() -> None:
    """Fit, write the weights and their card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("EVALBENCH_DATA"), help="folder with the idx files")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    started = time.perf_counter()
    images, labels = fashion_train(args.data)
    tensors, figures = fit(images.reshape(len(images), -1) / 127.5 - 1.0, labels)
    save_file(tensors, args.out)
    card = {
        "what": "class-conditional mixture of low-rank Gaussians, closed-form denoiser",
        "data": "Fashion-MNIST training images (60,000, MIT), padded to 32x32, scaled to [-1, 1]",
        "components": 10 * CLUSTERS,
        "rank": RANK,
        "span": SPAN,
        "noise_std": NOISE,
        "seed": SEED,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": "2 CPU cores",
        "fit": figures,
        "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
    }
    args.out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
