"""Whether a network is called as it was trained: noise real images to t, denoise at t; the error must fall.

Where it does not, or where another reading of the same network fits far better, the check says which convention looks
wrong: the direction or the unit of time, what is predicted, the range of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from evalbench.errors import UserError
from evalbench.images_in import Seen, blocks, open_source
from evalbench.interfaces import Cond, Model
from evalbench.models.data import fashion_test
from evalbench.noise import NoiseSource
from evalbench.paths import Path
from evalbench.predictions import convert
from evalbench.registry import load_plugins
from evalbench.sampling import build
from evalbench.spec import Suite
from evalbench.suite_references import images_file

RATIOS = (0.2, 0.5, 1.0, 2.0)  # sigma / alpha of the noised images, whose range is [-1, 1]
ROWS = 16
_BETTER = 0.6  # against a reading whose error falls, another is right with less than this share of its error
_NATIVE = ("x0", "eps", "v", "velocity", "score")
_SEED = 20_000  # of the noise; no run has it

Reading = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """How far a network removes noise under one reading of its conventions.

    Attributes:
        reading: in words; empty for the declared one.
        ratios: error of the denoised images over that of the noised ones, by `RATIOS`; below 1 the error falls.
    """

    reading: str
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        return ", ".join(f"{ratio:.2f}" for ratio in self.ratios)

    @property
    def falls(self) -> bool:
        """Whether the error is smaller after denoising, at every level."""
        return all(ratio < 1 for ratio in self.ratios)

    @property
    def score(self) -> float:
        """Geometric mean of the ratios; infinity when one is not a number."""
        if not all(math.isfinite(ratio) for ratio in self.ratios):
            return math.inf
        return math.exp(sum(math.log(max(ratio, 1e-12)) for ratio in self.ratios) / len(self.ratios))


def findings(model: Model, path: Path, x_0: torch.Tensor, cond: Cond) -> list[Finding]:
    """The declared reading, then every other that is tried.

    Args:
        model: with its weights. path: its noise path. x_0: clean samples, (B, *S). cond: their conditions.
    """
    noise = NoiseSource(_SEED, range(len(x_0)), tuple(x_0.shape[1:]), x_0.dtype, x_0.device).start()
    found: dict[str, list[float]] = {}
    for ratio in RATIOS:
        for reading, error in _errors(model, path, x_0, noise, cond, ratio):
            found.setdefault(reading, []).append(error)
    return [Finding(reading, tuple(errors)) for reading, errors in found.items()]


def _errors(
    model: Model, path: Path, x_0: torch.Tensor, noise: torch.Tensor, cond: Cond, ratio: float
) -> Iterator[tuple[str, float]]:
    """Relative errors at one noise level, by reading; each network call serves every reading of its output."""
    t = float(path.t_of_lambda(-math.log(ratio)))
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    is_pixels = float(x_0.abs().max()) <= 1.0
    for span, clean in (("", x_0), *([("images in [0, 1]", (x_0 + 1) / 2)] if is_pixels else [])):
        x = alpha * clean + sigma * noise
        for unit, called in (("", t), *_times(path, t)):
            with torch.no_grad():
                out = model.predict(x, torch.full((len(x),), called), alpha, sigma, model.given(cond))
            for words, sign, native in _predictions(model):
                reading = " and ".join(word for word in (span, unit, words) if word)
                guess = convert(sign * out, x, path, t, native, "x0")  # type: ignore[arg-type]
                yield reading, float((guess - clean).pow(2).mean().sqrt()) / ratio


def _times(path: Path, t: float) -> list[tuple[str, float]]:
    """Other ways to tell a network the same time."""
    return [
        ("time that runs the other way", path.t_start + path.t_end - t if path.t_start < 2 else path.t_start - t),
        ("times 1000 as large", 1000 * t),
        ("times 1000 times smaller", t / 1000),
    ]


def _predictions(model: Model) -> list[tuple[str, float, str]]:
    """(words, sign, native) of the declared prediction, and of the others."""
    others = [(f"a prediction of {name}", 1.0, name) for name in _NATIVE if name != model.native]
    return [("", 1.0, model.native), *others, ("a velocity that points at the data", -1.0, "velocity")]


def verdict(found: list[Finding]) -> str:
    """What looks wrong, in one line; empty when the declared conventions are right."""
    declared, *others = found
    best = min(others, key=lambda finding: finding.score)
    levels = f"at sigma/alpha = {', '.join(map(str, RATIOS))}"
    falls = declared.falls
    if best.falls and best.score < (_BETTER if falls else 1.0) * declared.score:
        said = f"denoising real images leaves {declared} of their noise {levels}"
        return f"{said}; with {best.reading} it would leave {best}"
    if not falls:
        return f"denoising real images leaves {declared} of their noise {levels}: the error does not fall"
    return ""


def require(model: Model, path: Path, x_0: torch.Tensor, cond: Cond, *, where: str) -> list[Finding]:
    """The findings, when they are as they should be.

    Raises:
        UserError: which convention looks wrong.
    """
    found = findings(model, path, x_0, cond)
    if wrong := verdict(found):
        raise UserError(f"{where}: {wrong}; correct path, predicts or time (docs/your-model.md)")
    return found


def check_suite(suite: Suite) -> list[Finding]:
    """Load a suite's model and check its conventions on the suite's real images; nothing where there are none.

    Raises:
        UserError: which convention looks wrong, or the model's images are not of the suite's size.
    """
    given = real_images(suite)
    if given is None:
        return []
    setup = build(suite)
    images, labels = given
    where = f"model of suite '{suite.name}'"
    encode = getattr(setup.model, "encode", None)
    x_0 = images.to(setup.device, setup.dtype)
    x_0 = x_0 if encode is None else encode(x_0)
    if tuple(x_0.shape[1:]) != setup.model.shape:
        raise UserError(f"{where}: samples are {setup.model.shape}, the suite's images {tuple(x_0.shape[1:])}")
    captions = None
    if suite.conditions.labels == "none":
        labels = None
    elif labels is not None and type(setup.model).caption is not Model.caption:
        captions = tuple(setup.model.caption(int(label)) for label in labels)
    return require(setup.model, setup.path, x_0, Cond(labels, captions), where=where)


def check_command(suite: Suite, plugins: Mapping[str, str]) -> str:
    """`evalbench check`: what was found, in a line.

    Raises:
        UserError: which convention looks wrong, or there are no real images to try.
    """
    load_plugins(plugins)
    found = check_suite(suite)
    if not found:
        raise UserError(f"suite '{suite.name}' names no real images that are here; see `evalbench suite fetch`")
    levels = ", ".join(map(str, RATIOS))
    return f"the error falls: denoising leaves {found[0]} of the noise at sigma/alpha = {levels}"


def real_images(suite: Suite) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Real images of a suite in [-1, 1], (ROWS, C, H, W), and their labels; None where none are at hand.

    The first ones: a fixed handful. Of a suite with images in the user's cache those that `evalbench suite fetch` put
    there, with the classes that stand beside them, if any.
    """
    if suite.images == "evalbench:fashion-test":
        images, labels = fashion_test()
        return _pixels(torch.from_numpy(images[:ROWS])), torch.from_numpy(labels[:ROWS].astype("int64"))
    file = images_file(suite.images)
    if not suite.images or not file.is_file():
        return None
    source = open_source(file)
    first = next(blocks(source, Seen(), ROWS)).images
    return _pixels(first), None if source.labels is None else torch.tensor(source.labels[: len(first)])


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in [-1, 1]."""
    return images.float() / 127.5 - 1.0
