"""`evalbench score` end to end against clean-fid, pytorch-fid and torch-fidelity: seconds on two cores.

The same two folders of random 64 x 64 PNG files and the same seeded Kaiming-normal Inception weights for all. Each tool
runs in processes of its own, from its imports to its number, with two threads, its own batch size and two loaders where
it has any, in rounds A B C ... A B C; the least time of each counts. Ours runs once for each tool's recipe and also
computes its standard error and bias; the value is checked against the tool's.

    python benchmarks/scoring.py [--images 512] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

SIDE, THREADS = 64, "2"
TOOLS = {"clean": "clean-fid", "pytorch": "pytorch-fid", "tf1": "torch-fidelity"}  # recipe -> whose it is
SAME = 1e-3  # relative; float32 networks in other batch sizes


# --- in a process of its own ----------------------------------------------------------------------------------------


def ours(recipe: str, cache: Path, made: str, real: str) -> float:
    """The command itself; only the table of known digests is that of the random weights."""
    import contextlib
    import io

    import _inception_weights

    from evalbench import weights
    from evalbench.cli import app

    os.environ["EVALBENCH_CACHE"] = str(cache)
    weights.KNOWN = _inception_weights.pinned(cache)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        words = ["score", made, "--reference", real, "--metrics", f"fid@{recipe}", "--allow-small-n", "--json"]
        app(words, standalone_mode=False)
    return float(json.loads(shown.getvalue())["scores"][0]["value"])


def clean(cache: Path, made: str, real: str) -> float:
    import torch
    from cleanfid import fid

    from evalbench import weights

    layers = torch.jit.load(cache / "weights" / weights.KNOWN["inception-torchscript"].file).layers
    network = lambda x: layers((x - 128) / 128)  # noqa: E731 - the scaling of its InceptionV3W
    return float(
        fid.compute_fid(
            made, real, mode="clean", custom_feat_extractor=network, device=torch.device("cpu"), num_workers=2,
            use_dataparallel=False, verbose=False,
        )
    )  # fmt: skip


def pytorch(cache: Path, made: str, real: str) -> float:
    import _inception_weights
    from pytorch_fid import fid_score, inception

    inception.load_state_dict_from_url = lambda *args, **kwargs: _inception_weights.random_state()
    return float(fid_score.calculate_fid_given_paths([made, real], 50, "cpu", 2048, num_workers=2))


def tf1(cache: Path, made: str, real: str) -> float:
    from torch_fidelity import calculate_metrics

    from evalbench import weights

    file = str(cache / "weights" / weights.KNOWN["inception-pth"].file)
    options = {"feature_extractor_weights_path": file, "cuda": False, "cache": False, "verbose": False}
    found = calculate_metrics(input1=made, input2=real, fid=True, **options)
    return float(found["frechet_inception_distance"])


def child(name: str, recipe: str, folder: str) -> None:
    """Print the value and the seconds of processor time."""
    warnings.simplefilter("ignore")
    cache, made, real = Path(folder), f"{folder}/made", f"{folder}/real"
    theirs = {"clean": clean, "pytorch": pytorch, "tf1": tf1}[recipe]
    value = ours(recipe, cache, made, real) if name == "evalbench" else theirs(cache, made, real)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"value": value, "cpu": sum(u.ru_utime + u.ru_stime for u in usage)}))


# --- the comparison -------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, seed: int) -> None:
    """Smooth random images, so that PNG and the network have something to do."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")


def timed(name: str, recipe: str, folder: str) -> tuple[float, float, float]:
    """Value, seconds, seconds of processor time."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), THREADS)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, recipe, folder],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **one},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    return found["value"], seconds, found["cpu"]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="in each folder")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    import _inception_weights

    runs = [("evalbench", recipe) for recipe in TOOLS] + [(tool, recipe) for recipe, tool in TOOLS.items()]
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        _inception_weights.install(Path(folder))
        for seed, name in enumerate(("made", "real")):
            write_images(Path(folder) / name, args.images, seed)
        for _ in range(args.rounds):
            for run in runs:
                found[run].append(timed(*run, folder))
                value, seconds, cpu = found[run][-1]
                print(f"{run[0]:<15} {run[1]:<8} {value:.8g}  {seconds:6.1f} s  processor {cpu:6.1f} s", flush=True)
    least = {run: min(seconds for _, seconds, _ in each) for run, each in found.items()}
    same = True
    for recipe, tool in TOOLS.items():
        a, b = found["evalbench", recipe][0][0], found[tool, recipe][0][0]
        same &= abs(a / b - 1) <= SAME
        ratio = least[tool, recipe] / least["evalbench", recipe]
        print(f"{tool} takes {ratio:.2f} times as long as fid@{recipe}; relative difference {abs(a / b - 1):.1e}")
    slowest = max(least["evalbench", recipe] for recipe in TOOLS)
    fastest = min(least[tool, recipe] for recipe, tool in TOOLS.items())
    verdict = {"value": round(fastest / slowest, 2), "unit": "x, fastest tool over our slowest recipe", "goal": ">= 1"}
    print(json.dumps({"name": "scoring", **verdict, "holds": same and fastest >= slowest}))


if __name__ == "__main__":
    main()
