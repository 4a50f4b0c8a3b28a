"""Make the reference statistics that suites refer to: features of exact draws, of real images, of a fine solution.

    python -m evalbench.models.references.make draws fashion64
    python -m evalbench.models.references.make converged fashion64 --suite fashion-dit --samples 10240 --floor 1024
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
from evalbench.interfaces import Cond, Extractor, Model, SampleBatch
from evalbench.metrics.frechet import frechet_distance, moments
from evalbench.metrics.images import to_uint8
from evalbench.models.data import fashion_train
from evalbench.plan import make_cell
from evalbench.sampling import Setup, conditions, images_of, sample, setup_of
from evalbench.spec import Suite, load_suite

FOLDER = Path(__file__).parent
BATCH = 256
SAMPLES = 20_480  # draws of a reference; a multiple of the batch
DRAWS_SEED = 1_000_003  # of exact draws
CONVERGED_SEED = 2_000_003  # noise of the fine solution: far from the run seeds that suites use
KEPT = 10_240  # features kept for kernel distances

Batches = Iterator[SampleBatch]


def draws(model: Model, samples: int) -> Batches:
    """Exact draws of the mixture, classes in turn."""
    labels = np.arange(samples) % model.num_classes
    x = torch.from_numpy(model.draws(labels, DRAWS_SEED)).float()  # type: ignore[attr-defined]
    for start in range(0, samples, BATCH):
        rows = slice(start, start + BATCH)
        yield SampleBatch(x[rows], to_uint8(x[rows]), Cond(torch.from_numpy(labels[rows])), model)


def converged(setup: Setup, samples: int, batch: int = BATCH) -> Batches:
    """The suite's fine solution from noise of its own: what every solver converges to on its model."""
    suite = setup.suite
    assert suite.solution is not None
    solution, guidance = suite.solution, suite.sampling.guidance
    chain = registry.build_method(solution.method)
    cell = make_cell(suite, solution.method, solution.nfe, guidance, CONVERGED_SEED)
    for start in range(0, samples, batch):
        indices = range(start, start + batch)
        cond = conditions(suite, setup.model, indices, setup.device)
        x = sample(setup, chain, cell, indices, cond, Ledger(batch, budget=cell.nfe))
        yield SampleBatch(x, images_of(setup.model, x), cond, setup.model)


def real_images(model: Model, data: str) -> Batches:
    """The 60,000 training images."""
    pixels, labels = fashion_train(data)
    for start in range(0, len(pixels), BATCH):
        block = torch.from_numpy(pixels[start : start + BATCH])
        yield SampleBatch(block / 127.5 - 1.0, block, Cond(torch.from_numpy(labels[start : start + BATCH])), model)


def features(batches: Batches, extract: Extractor) -> np.ndarray:
    """(N, D) float32."""
    with torch.no_grad():
        return np.concatenate([extract(batch).cpu().numpy() for batch in batches]).astype(np.float32)


def statistics(values: np.ndarray, packed: bool, keep: int) -> dict[str, np.ndarray]:
    """Moments in float64; with `packed`, the covariance as its float32 upper triangle and no features."""
    wide = values.astype(np.float64)
    mean, cov = wide.mean(0), np.cov(wide, rowvar=False)
    if packed:
        return {"mean": mean, "cov_triu": cov[np.triu_indices(len(cov))].astype(np.float32)}
    moments = {"mean": mean, "cov": cov}
    return moments | ({"features": values[:keep].astype(np.float16)} if keep else {})


def solution_text(suite: Suite) -> str:
    """The fine solution in words."""
    assert suite.solution is not None
    guidance = f" guidance={suite.sampling.guidance:g}" if suite.sampling.guidance != 1.0 else ""
    return f"{suite.solution.method} nfe={suite.solution.nfe} grid={suite.sampling.grid}{guidance}"


def floor_table(metric: str, reference: np.ndarray, further: np.ndarray, repeats: int) -> str:
    """The `[[floors]]` table of what further samples of the reference's own kind score, a share of them per repeat."""
    known = moments(reference).gaussian()
    found = [frechet_distance(moments(part).gaussian(), known) for part in np.split(further, repeats)]
    facts = [f'metric = "{metric}"', f"samples = {len(further) // repeats}", 'what = "floor"']
    return "\n".join(["[[floors]]", *facts, f"value = {np.mean(found):.4g}", f"sd = {np.std(found, ddof=1):.2g}"])


def main() -> None:
    """Make one reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["draws", "converged", "images"])
    parser.add_argument("extractor")
    parser.add_argument("--suite", default="fashion-mixture", help="whose model, solution and guidance")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="a multiple of 256")
    parser.add_argument("--floor", type=int, default=0, help="of converged: print what so many further samples score")
    parser.add_argument("--repeats", type=int, default=8, help="of the floor, each from samples of its own")
    parser.add_argument("--batch", type=int, default=BATCH, help="of converged: samples at a time, more for a GPU")
    parser.add_argument("--data", default=os.environ.get("EVALBENCH_DATA"), help="folder with the training idx files")
    parser.add_argument("--packed", action="store_true", help="covariance triangle in float32, no features")
    args = parser.parse_args()
    if args.samples % args.batch or args.repeats * args.floor % args.batch:
        parser.error(f"--samples and --repeats times --floor must be multiples of {args.batch}")
    if args.source == "images" and args.data is None:
        parser.error("give --data FOLDER or set EVALBENCH_DATA")
    setup = setup_of(load_suite(args.suite), {})
    if args.source == "converged" and setup.suite.solution is None:
        parser.error(f"suite {args.suite} has no [solution]")
    model = setup.model
    if args.source == "draws" and not hasattr(model, "draws"):
        parser.error(f"suite {args.suite} has a trained model, which makes no exact draws; use converged or images")
    extract = registry.build_extractor(args.extractor)
    sources = {
        "draws": lambda: draws(model, args.samples),
        "converged": lambda: converged(setup, args.samples + args.repeats * args.floor, args.batch),
        "images": lambda: real_images(model, args.data),
    }
    with torch.no_grad():
        values = features(sources[args.source](), extract)
    values, further = np.split(values, [args.samples]) if args.floor else (values, None)
    keep = 0 if args.source == "converged" else KEPT
    name = "fashion-mnist-train" if args.source == "images" else f"{setup.suite.name}-{args.source}"
    file = FOLDER / f"{name}.{args.extractor}.safetensors"
    facts = {
        "source": args.source,
        "n": str(len(values)),
        "extractor": extract.fingerprint(),
        "seed": str({"draws": DRAWS_SEED, "converged": CONVERGED_SEED}.get(args.source, "")),
        "solution": solution_text(setup.suite) if args.source == "converged" else "",
    }
    # one key: safetensors writes several in no fixed order, and the file's hash must be the same each time
    save_file(statistics(values, args.packed, keep), file, metadata={"facts": json.dumps(facts)})
    print(json.dumps({"file": file.name, **facts, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    if further is not None:
        print(floor_table(f"fd_to_converged@{args.extractor}", values, further, args.repeats))


if __name__ == "__main__":
    main()
