"""Make the reference statistics that suites refer to: features of exact draws, of real images, of a fine solution.

    python -m evalbench.models.references.make draws fashion64
    python -m evalbench.models.references.make converged fashion64
    python -m evalbench.models.references.make images fashion64 --data FOLDER
    python -m evalbench.models.references.make draws efficientnet-lite0-96 --samples 10240 --packed

Each writes SOURCE.EXTRACTOR.safetensors beside this file, with its facts in the header, and prints the SHA-256 that
the suite's TOML must name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from evalbench import registry
from evalbench.cost.ledger import Ledger
from evalbench.denoiser import Field, NetworkDoor
from evalbench.interfaces import Cond, Extractor, Model, SampleBatch
from evalbench.metrics.images import to_uint8
from evalbench.models.data import fashion_train
from evalbench.noise import NoiseSource
from evalbench.paths import VPLinear

FOLDER = Path(__file__).parent
MODEL = "fashion-mixture"
BATCH = 256
SAMPLES = 20_480  # draws of a reference; a multiple of the batch
DRAWS_SEED = 1_000_003  # of exact draws
CONVERGED_SEED = 2_000_003  # noise of the fine solution: far from the run seeds that suites use
FINE_METHOD, FINE_NFE, FINE_GRID = "unipc(order=3)", 64, "karras"  # those of the suite's [solution]
KEPT = 10_240  # features kept for kernel distances

Batches = Iterator[SampleBatch]


def draws(model: Model, samples: int) -> Batches:
    """Exact draws of the mixture, classes in turn."""
    labels = np.arange(samples) % model.num_classes
    x = torch.from_numpy(model.draws(labels, DRAWS_SEED)).float()  # type: ignore[attr-defined]
    for start in range(0, samples, BATCH):
        rows = slice(start, start + BATCH)
        yield SampleBatch(x[rows], to_uint8(x[rows]), Cond(torch.from_numpy(labels[rows])), model)


def converged(model: Model, samples: int) -> Batches:
    """A fine solution from noise of its own: what every solver converges to on this model."""
    path = VPLinear()
    door = NetworkDoor(model, path, FINE_GRID)
    solver = registry.build_method(FINE_METHOD).solver
    for start in range(0, samples, BATCH):
        indices = range(start, start + BATCH)
        cond = Cond(torch.tensor([i % model.num_classes for i in indices]))
        noise = NoiseSource(CONVERGED_SEED, indices, model.shape)
        door.ledger = Ledger(BATCH)
        x_T = noise.start() * float(path.sigma(path.t_start))
        x = solver.sample(Field(door, door.ledger), x_T, cond, FINE_NFE, noise)
        yield SampleBatch(x, to_uint8(x), cond, model)


def images(model: Model, data: str) -> Batches:
    """The 60,000 training images."""
    pixels, labels = fashion_train(data)
    for start in range(0, len(pixels), BATCH):
        block = torch.from_numpy(pixels[start : start + BATCH])
        yield SampleBatch(block / 127.5 - 1.0, block, Cond(torch.from_numpy(labels[start : start + BATCH])), model)


def features(batches: Batches, extract: Extractor) -> np.ndarray:
    """(N, D) float32."""
    with torch.no_grad():
        return np.concatenate([extract(batch).numpy() for batch in batches]).astype(np.float32)


def statistics(values: np.ndarray, packed: bool, keep: int) -> dict[str, np.ndarray]:
    """Moments in float64; with `packed`, the covariance as its float32 upper triangle and no features."""
    wide = values.astype(np.float64)
    mean, cov = wide.mean(0), np.cov(wide, rowvar=False)
    if packed:
        return {"mean": mean, "cov_triu": cov[np.triu_indices(len(cov))].astype(np.float32)}
    moments = {"mean": mean, "cov": cov}
    return moments | ({"features": values[:keep].astype(np.float16)} if keep else {})


def main() -> None:
    """Make one reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["draws", "converged", "images"])
    parser.add_argument("extractor")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="a multiple of 256")
    parser.add_argument("--data", default=os.environ.get("EVALBENCH_DATA"), help="folder with the training idx files")
    parser.add_argument("--packed", action="store_true", help="covariance triangle in float32, no features")
    args = parser.parse_args()
    if args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}")
    if args.source == "images" and args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    model = registry.build_model(MODEL, {})
    model.to(torch.float32, torch.device("cpu"))
    extract = registry.build_extractor(args.extractor)
    sources = {
        "draws": lambda: draws(model, args.samples),
        "converged": lambda: converged(model, args.samples),
        "images": lambda: images(model, args.data),
    }
    with torch.no_grad():
        values = features(sources[args.source](), extract)
    keep = KEPT if args.source == "draws" else 0
    name = "fashion-mnist-train" if args.source == "images" else f"{MODEL}-{args.source}"
    file = FOLDER / f"{name}.{args.extractor}.safetensors"
    facts = {
        "source": args.source,
        "n": str(len(values)),
        "extractor": extract.fingerprint(),
        "seed": str({"draws": DRAWS_SEED, "converged": CONVERGED_SEED}.get(args.source, "")),
        "solution": f"{FINE_METHOD} nfe={FINE_NFE} grid={FINE_GRID}" if args.source == "converged" else "",
    }
    # one key: safetensors writes several in no fixed order, and the file's hash must be the same each time
    save_file(statistics(values, args.packed, keep), file, metadata={"facts": json.dumps(facts)})
    print(json.dumps({"file": file.name, **facts, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))


if __name__ == "__main__":
    main()
