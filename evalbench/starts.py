"""Where x_T comes from, by a suite's `noise`: a published protocol is replayed with its own.

philox           evalbench.noise, the default: counter-based, the same for every method
edm              NVlabs/edm, generate.py (StackedRandomGenerator): a torch generator for each sample, whose seed is the
                 sample's number, modulo 2^32; its README gives three runs the seeds 0-49999, 50000-99999,
                 100000-149999, so sample i of run seed s has 50,000 s + i
diffusers-cpu    a list of CPU generators, one for each image, as diffusers' `randn_tensor` takes them: sample i of run
                 seed s has the seed s + i
file:NAME@HASH   latents in the folder `noise` of EVALBENCH_CACHE: one for all samples (MLPerf), or one for each

The unit normals of x_T alone come from there: steps that draw noise, searches and further candidates stay Philox, and
labels stay those of the suite's plan (generate.py draws labels and churn from the same generators, after the latents).
Generators draw float32 on the CPU. generate.py draws on its GPU, whose generator gives other numbers for a seed: other
samples of the same law. torch does not promise the last bits of a draw on another CPU or in another version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evalbench.errors import UserError
from evalbench.noise import Start
from evalbench.prompts import read_prompts
from evalbench.spec import PHILOX, NoiseFile, Prompts, Sampling, Suite, noise_file
from evalbench.weights import cache, check_pinned, sha256

EDM_SAMPLES = 50_000  # seeds of one run
# How many generators later the samples of the next run seed start; with a file they start at the same latents.
_SEED_STEP = {"edm": EDM_SAMPLES, "diffusers-cpu": 1}


def origin_of(noise: str, shape: tuple[int, ...]) -> Start | None:
    """Where x_T comes from; None for Philox.

    Args:
        noise: of a suite. shape: of one sample.

    Raises:
        UserError: the file is absent, another file, or holds no latents of this shape.
    """
    file = noise_file(noise)
    if file is not None:
        latents = read_latents(file, shape)
        # timed calls have sample numbers beyond the suite's: they begin again
        return lambda _seed, sample, _shape: latents[sample % len(latents)]
    return {"edm": edm, "diffusers-cpu": diffusers_cpu}.get(noise)


def edm(seed: int, sample: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit normals of a sample, float32: `StackedRandomGenerator` of generate.py on the CPU."""
    return _drawn((EDM_SAMPLES * seed + sample) % 2**32, shape)


def diffusers_cpu(seed: int, sample: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit normals of a sample, float32: `randn_tensor` with a CPU generator for each image."""
    return _drawn(seed + sample, shape)


def _drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def facts(noise: str) -> dict[str, Any]:
    """What a record's protocol says of the starts; empty for Philox, whose records stay as they were."""
    if noise == PHILOX:
        return {}
    file = noise_file(noise)
    return {"starts": {"file": file.name, "sha256": file.sha256} if file else {"device": "cpu", "dtype": "float32"}}


# --- checks before a run --------------------------------------------------------------------------------------------


def check(suite: Suite, shape: tuple[int, ...], *, gaussian: bool = True) -> None:
    """Whether a suite's samples can start as it says.

    Args:
        shape: of one sample of its model. gaussian: the model starts from normal numbers.

    Raises:
        UserError: they cannot.
    """
    noise, wanted = suite.sampling.noise, suite.sampling.samples
    if noise != PHILOX and not gaussian:
        raise UserError(f"suite '{suite.name}': model '{suite.model.loader}' starts from no normal numbers; {_ELSE}")
    file = noise_file(noise)
    if file is None:
        return
    if why := missing(suite):
        raise UserError(why)
    held = len(read_latents(file, shape))
    if 1 < held < wanted:
        raise UserError(
            f"suite '{suite.name}': {file.name} holds {held} latents for {wanted} samples; needs one, or one for each: "
            f"type --samples {held}"
        )
    if held == 1 and wanted > (conditions := _conditions(suite)):
        raise UserError(
            f"suite '{suite.name}': {file.name} holds one latent for all of {wanted} samples, which have {conditions} "
            f"conditions: the others would be copies; type --samples {conditions}"
        )


def _conditions(suite: Suite) -> int:
    """How many different conditions samples have."""
    given = suite.conditions
    return given.prompts.rows if given.prompts else given.classes if given.labels == "cyclic" else 1


def repeats(suite: Suite, shape: tuple[int, ...], indices: Iterable[int]) -> list[bool]:
    """Which samples start as an earlier one and read the same text, so that most methods make them once more.

    28 captions stand in MLPerf's file more than once, and all prompts start from one latent.
    """
    file, prompts = noise_file(suite.sampling.noise), suite.conditions.prompts
    if file is None or prompts is None or len(read_latents(file, shape)) > 1:
        return [False for _ in indices]
    first = _first(prompts)
    return [first[i % len(first)] < i for i in indices]


@lru_cache(maxsize=2)
def _first(prompts: Prompts) -> tuple[int, ...]:
    """The first prompt of the same text, by prompt."""
    found: dict[str, int] = {}
    return tuple(found.setdefault(prompt.text, number) for number, prompt in enumerate(read_prompts(prompts)))


def check_seeds(sampling: Sampling, seeds: Sequence[int]) -> None:
    """Whether runs of these seeds draw different samples.

    Raises:
        UserError: two of them share starts.
    """
    if sampling.noise == PHILOX:
        return
    step = _SEED_STEP.get(sampling.noise, 0)
    if all((b - a) * step >= sampling.samples for a, b in pairwise(sorted(seeds))):
        return
    given = ",".join(map(str, seeds))
    apart = f"give seeds {math.ceil(sampling.samples / step)} apart" if step else "give one seed"
    raise UserError(f"--seeds {given}: with noise '{sampling.noise}' these runs share their starts; {apart}")


def pinned(suite: Suite) -> Suite:
    """The suite with the digest of an `unverified` file in place of the word: a cell is known by what it started from.

    The file is there, see `check`.
    """
    file = noise_file(suite.sampling.noise)
    if file is None:
        return suite
    return suite.override(noise=f"file:{file.name}@{sha256(start_file(file))}")


# --- files ----------------------------------------------------------------------------------------------------------

_ELSE = "or set noise = 'philox' in a suite of your own"


def start_file(file: NoiseFile) -> Path:
    """Where a file of latents belongs."""
    return cache() / "noise" / file.name


def missing(suite: Suite) -> str:
    """What to put where, when a suite's file of latents is absent; empty when it is there, or none is needed."""
    file = noise_file(suite.sampling.noise)
    if file is None or start_file(file).is_file():
        return ""
    folder = start_file(file).parent
    source = f" of {suite.source}" if suite.source else ""
    return (
        f"suite '{suite.name}': noise not found; put {file.name}{source} (SHA-256 {file.sha256}) into {folder}, {_ELSE}"
    )


def read_latents(file: NoiseFile, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit normals (M, *shape), float32, of a file that holds (M, *shape) or one (*shape).

    Raises:
        UserError: the file is absent, another file, or holds something else.
    """
    path = start_file(file)
    if not path.is_file():
        raise UserError(f"noise not found; put {file.name} (SHA-256 {file.sha256}) into {path.parent}")
    check_pinned(path, file.sha256)
    found = _read(path, sha256(path))
    if found.shape == shape:
        return found[None]
    if found.shape[1:] != shape or not len(found):
        raise UserError(f"{path} holds {_size(found.shape)}, the model starts from {_size(shape)}; {_ELSE}")
    return found


@lru_cache(maxsize=2)
def _read(path: Path, _digest: str) -> torch.Tensor:
    try:
        arrays = _READERS[path.suffix](path)
        (values,) = arrays.values() if isinstance(arrays, Mapping) else (arrays,)
        found = torch.as_tensor(values)
    except Exception as error:  # whatever a reader says of a file that is none of its kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} holds no single array of latents ({reason}); put the right file there") from None
    if not (found.is_floating_point() and bool(torch.isfinite(found).all())):
        raise UserError(f"{path} holds values that are no finite floating-point numbers; put the right file there")
    return found.to(torch.float32)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


_READERS: dict[str, Any] = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".npz": _npz,
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    ".safetensors": _safetensors,
}


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
