"""Floors and sensitivities of a suite's metrics: what a perfect sampler scores at N samples, and a spoiled one.

    python -m evalbench.models.references.floors fashion-mixture --samples 2048,4096 [--what floor,blur,jpeg,duplicated]
    python -m evalbench.models.references.floors fashion-mixture --what itself

Exact draws of the model (other seeds than the reference's), or real images that a trained model has not seen, are
scored like a method's samples; mean and standard deviation over repeats. `blur`, `jpeg` and `duplicated` are the same
images, spoiled: a metric that does not move for them sees little. `itself` scores the very draws that the reference
was made of, all of them: a distance must be 0 but for rounding. What refers to a trained model's own converged samples
has its floor from `make converged --floor`. Prints `[[floors]]` tables for the suite's TOML.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageFilter

from evalbench import registry, worker
from evalbench.interfaces import Cond, Metric, Model, SampleBatch
from evalbench.metrics.images import to_uint8
from evalbench.models.references import make
from evalbench.models.zoo_models import FashionZoo
from evalbench.spec import Suite, load_suite

SEED = 3_000_003  # of the first repeat; the reference's own draws have another
BATCH = 256


def blurred(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of radius 1 of a uint8 (H, W) image."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))


def jpeg(image: np.ndarray) -> np.ndarray:
    """JPEG at quality 75 and back, uint8 (H, W)."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=75)
    return np.asarray(Image.open(stream))


# What becomes of each uint8 (H, W) image.
SPOILS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"blur": blurred, "jpeg": jpeg}
WHAT = ("floor", *SPOILS, "duplicated", "itself")


_extractor = lru_cache(registry.build_extractor)


def perfect(model: Model, labels: np.ndarray, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """What a perfect sampler would draw: samples in [-1, 1] and uint8 images, (N, 1, 32, 32)."""
    if isinstance(model, FashionZoo):
        images = model.held_out(labels, seed)
        return torch.from_numpy(images).float() / 127.5 - 1.0, images
    x = torch.from_numpy(model.draws(labels, seed)).float()  # type: ignore[attr-defined]
    return x, to_uint8(x).numpy()


def parts(model: Model, metrics: list[Metric[object]], samples: int, seed: int, what: str) -> dict[str, np.ndarray]:
    """What the extractors make of `samples` exact draws, spoiled or not; `duplicated` is the first half, twice."""
    labels = np.arange(samples) % model.num_classes
    x, images = perfect(model, labels, seed)
    if what == "duplicated":
        once = np.arange(samples) % (samples // 2)
        x, images, labels = x[once], images[once], labels[once]
    if what in SPOILS:
        images = np.stack([SPOILS[what](image[0])[None] for image in images])
    names = sorted({name for metric in metrics for name in metric.needs})
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, samples, BATCH):
        rows = slice(start, start + BATCH)
        captions = tuple(model.caption(int(label)) for label in labels[rows])
        cond = Cond(torch.from_numpy(labels[rows]), captions)
        batch = SampleBatch(x[rows], torch.from_numpy(images[rows]), cond, model)
        for name in names:
            blocks[name].append(_extractor(name)(batch).numpy())
    return {name: np.concatenate(values) for name, values in blocks.items()}


def score(suite: Suite, metrics: list[Metric[object]], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Values by metric id."""
    values = {}
    for metric in metrics:
        reference = worker.load_reference(suite, metric.reference_key, {}) if metric.reference_key else None
        values[metric.id] = metric.compute(metric.update(found), reference).value
    return values


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("--samples", default="2048,4096")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--what", default="floor,blur,jpeg,duplicated", help=f"any of {', '.join(WHAT)}")
    args = parser.parse_args()
    wanted = args.what.split(",")
    if not set(wanted) <= set(WHAT):
        parser.error(f"--what {args.what}: name any of {', '.join(WHAT)}")
    suite = load_suite(args.suite)
    model = registry.build_model(suite.model.loader, suite.model.options)
    metrics = [metric for name in suite.metrics.names if not (metric := registry.build_metric(name)).paired]
    if isinstance(model, FashionZoo):
        metrics = [metric for metric in metrics if not metric.reference_key.startswith("converged/")]
    for samples in map(int, args.samples.split(",")):
        for what in (one for one in wanted if one != "itself"):
            rows = [
                score(suite, metrics, parts(model, metrics, samples, SEED + repeat, what))
                for repeat in range(args.repeats)
            ]
            for metric in metrics:
                values = np.array([row[metric.id] for row in rows])
                _print(metric.id, samples, what, float(values.mean()), float(values.std(ddof=1)))
    if "itself" in wanted:
        own = [metric for metric in metrics if metric.reference_key in metric.needs]
        found = score(suite, own, parts(model, own, make.SAMPLES, make.DRAWS_SEED, "itself"))
        for metric in own:
            _print(metric.id, make.SAMPLES, "itself", found[metric.id])


def _print(metric: str, samples: int, what: str, value: float, sd: float | None = None) -> None:
    """A `[[floors]]` table."""
    lines = ["[[floors]]", f'metric = "{metric}"', f"samples = {samples}", f'what = "{what}"', f"value = {value:.4g}"]
    print("\n".join([*lines, *([] if sd is None else [f"sd = {sd:.2g}"])]) + "\n", flush=True)


if __name__ == "__main__":
    main()
