"""Twelve cells of `fashion-sd` through `evalbench run`, against the workflow that people have: one script per cell.

The script (this file with --cell) loads the diffusers pipeline, samples with a diffusers scheduler, writes PNG files,
and scores the folder by clean-fid with the same feature network. Both do the same network evaluations on the same
cores: the script with torch's threads, evalbench with a worker per core. Time is from command to finished table.

    python benchmarks/grid.py [--samples 256]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

GOAL = 3.0
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
NFE = (5, 10, 20)
EVALBENCH = Path(sys.executable).with_name("evalbench")


def one_cell(method: str, nfe: int, samples: int, folder: Path) -> None:
    """What a script of today does for one row of a table."""
    import diffusers
    from cleanfid import fid
    from safetensors.numpy import load_file

    from evalbench.models.nets import caption
    from evalbench.models.zoo import generative

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(generative.ZOO / "fashion-sd", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[method]).from_config(pipeline.scheduler.config)
    folder.mkdir()
    for start in range(0, samples, 128):
        texts = [caption(i % 10) for i in range(start, min(start + 128, samples))]
        generator = torch.Generator().manual_seed(start)
        images = pipeline(texts, num_inference_steps=nfe, guidance_scale=1.5, generator=generator).images
        for i, image in enumerate(images, start=start):
            image.save(folder / f"{i:05d}.png")
    features = fid.get_folder_features(
        str(folder),
        model=network(),
        num_workers=0,
        device=torch.device("cpu"),
        custom_fn_resize=as_it_is,
        verbose=False,
    )
    known = load_file(generative.ZOO.parent / "references" / "fashion-mnist-train.fashion64.safetensors")
    value = fid.frechet_distance(features.mean(0), np.cov(features, rowvar=False), known["mean"], known["cov"])
    print(json.dumps({"method": method, "nfe": nfe, "fd": float(value)}))


def as_it_is(image: np.ndarray) -> np.ndarray:
    """In place of clean-fid's resize to 299: this network sees 32 x 32."""
    return image.astype(np.float32)


def network() -> torch.nn.Module:
    """The feature network as clean-fid calls it: RGB in 0 to 255, (B, 3, 32, 32)."""
    from evalbench.models.nets import load_fashion64

    inner = load_fashion64().eval()

    class Seen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = inner(x[:, :1].to(torch.uint8))
            return found

    return Seen()


def by_scripts(samples: int, folder: Path) -> float:
    """Seconds of a script per cell, one after the other."""
    started = time.perf_counter()
    for method in SCHEDULERS:
        for nfe in NFE:
            command = [sys.executable, __file__, "--cell", method, str(nfe), "--samples", str(samples)]
            done = subprocess.run(
                [*command, "--out", folder / f"{method}-{nfe}"], check=True, capture_output=True, text=True
            )
            print(done.stdout.splitlines()[-1])
    return time.perf_counter() - started


def by_evalbench(samples: int, folder: Path) -> float:
    """Seconds of one command for all cells."""
    grid = ["--methods", ",".join(SCHEDULERS), "--nfe", ",".join(map(str, NFE)), "--samples", str(samples)]
    started = time.perf_counter()
    command = [EVALBENCH, "run", "fashion-sd", *grid, "--metrics", "fd@fashion64", "--out", folder / "run"]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return time.perf_counter() - started


def main() -> None:
    """Both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "NFE"), help="compute one cell as a script does")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.cell:
        one_cell(args.cell[0], int(args.cell[1]), args.samples, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours, scripts = by_evalbench(args.samples, Path(folder)), by_scripts(args.samples, Path(folder))
    ratio = scripts / ours
    print(f"twelve cells of {args.samples} samples: evalbench {ours:.0f} s, scripts {scripts:.0f} s")
    print(json.dumps({"name": "grid", "value": round(ratio, 2), "unit": "x", "goal": GOAL, "holds": ratio >= GOAL}))


if __name__ == "__main__":
    main()
