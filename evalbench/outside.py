"""Images that somebody's program makes under our seeds, noise and conditions: what runs for a chunk of `command:`.

The program is told by its arguments or its environment what to sample, and leaves its images in a folder:

    {noise}             x_T, .npy, (n, *S) in the suite's dtype: unit normals times sigma(t_start)
    {labels}            JSON, a list of n classes
    {prompts}           JSON, a list of n texts
    {seed}              the run's seed
    {start}, {count}    index of the first sample in the run, and n; the same noise belongs to the same index
    {nfe}, {guidance}   budget and scale of the cell
    {out}               an empty folder, for n PNGs numbered in order, or one .npz with `arr_0`, uint8 (n, H, W, C)

It is no part of this process: what it evaluates cannot be counted, so its counts are what its file declares.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evalbench.errors import BadSamples, EvalbenchError, Unsupported, UserError, some
from evalbench.images_in import open_source
from evalbench.interfaces import PLACEHOLDER, Program


@dataclass(frozen=True)
class Task:
    """What a program is to sample.

    Attributes:
        name: of the method, for messages. seed, start, nfe, guidance: of the cell and the chunk.
        noise: x_T, (n, *S). labels, prompts: one per sample; None without. shape: (C, H, W) of its images; empty where
            any will do.
    """

    name: str
    seed: int
    start: int
    nfe: int
    guidance: float
    noise: np.ndarray
    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    shape: tuple[int, ...] = ()

    @property
    def ids(self) -> range:
        """Global indices of the samples."""
        return range(self.start, self.start + len(self.noise))


def images_of(program: Program, task: Task) -> np.ndarray:
    """Run the program; its images, uint8 (n, C, H, W), in the order of the samples.

    Raises:
        Unsupported: the suite has conditions that the program does not read.
        EvalbenchError: it failed, with the last line of its errors, or took too long.
        BadSamples: it made another number of images, of another size, or none that can be read.
    """
    _check_conditions(program, task)
    with tempfile.TemporaryDirectory(prefix="evalbench-") as made:
        folder = Path(made)
        values = _hand_over(folder, task)
        _execute(program, values, folder / "errors.txt", task.name)
        try:
            images = _read(folder / "out")
        except UserError as error:
            raise BadSamples(f"{task.name}: {str(error).replace(str(folder / 'out'), '{out}')}") from None
    return _checked(images, task)


def _check_conditions(program: Program, task: Task) -> None:
    """Refuse a program that would make other samples than those of the suite's conditions."""
    if task.labels is not None and not program.reads & {"labels", "prompts"}:
        raise Unsupported(
            f"not supported: the suite has labels, and {task.name} reads neither {{labels}} nor {{prompts}}"
        )
    if task.labels is None and task.prompts is not None and "prompts" not in program.reads:
        raise Unsupported(f"not supported: the suite has prompts, and {task.name} does not read {{prompts}}")
    for what, given in (("labels", task.labels), ("prompts", task.prompts)):
        if what in program.reads and given is None:
            raise Unsupported(f"not supported: {task.name} reads {{{what}}}, and the suite has none")


def _hand_over(folder: Path, task: Task) -> dict[str, str]:
    """Write what the program reads; what stands for each placeholder."""
    out = folder / "out"
    out.mkdir()
    values = {"out": str(out), "noise": str(folder / "noise.npy")}
    np.save(folder / "noise.npy", task.noise)
    for what, given in (("labels", task.labels), ("prompts", task.prompts)):
        if given is not None:
            file = folder / f"{what}.json"
            file.write_text(json.dumps(list(given), ensure_ascii=False), encoding="utf-8")
            values[what] = str(file)
    numbers = {"seed": task.seed, "start": task.start, "count": len(task.noise), "nfe": task.nfe}
    return values | {name: str(number) for name, number in numbers.items()} | {"guidance": f"{task.guidance:g}"}


def _execute(program: Program, values: Mapping[str, str], errors: Path, name: str) -> None:
    """Run the command without a shell, in a session of its own, so that whatever it started ends with it."""

    def filled(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: values[match[1]], text)

    words = [filled(word) for word in program.words]
    environment = os.environ | {key: filled(value) for key, value in program.env.items()}
    with errors.open("wb") as stream:
        try:
            process = subprocess.Popen(
                words,
                cwd=program.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{name}: cannot run '{words[0]}' in {program.folder}: {error.strerror}") from None
        try:
            code = process.wait(program.timeout)
        except subprocess.TimeoutExpired:
            raise EvalbenchError(f"{name} ran longer than {program.timeout:g} s and was ended; see timeout") from None
        finally:
            _end(process)
    if code:
        raise EvalbenchError(f"{name} ended with exit code {code}: {_last_line(errors)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program's session, whatever of it still runs."""
    with contextlib.suppress(ProcessLookupError):  # nothing does
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(errors: Path) -> str:
    lines = errors.read_text("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing on stderr")


def _read(out: Path) -> list[np.ndarray]:
    """The images in a folder, (H, W, C) each: of its one .npz, or its PNGs in the order of their numbers."""
    archives = sorted(out.glob("*.npz"))
    if len(archives) > 1:
        raise UserError(f"{len(archives)} .npz files in {out}; write one")
    if archives:
        return [image for _, image in open_source(archives[0]).read()]
    named = dict(open_source(out).read())
    other = [name for name in named if not name.lower().endswith(".png")]
    if other:
        raise UserError(f"'{other[0]}' is no PNG; other formats lose what is measured")
    numbers = {name: _number(name) for name in named}
    first = min(numbers.values())
    if sorted(numbers.values()) != list(range(first, first + len(numbers))):
        raise UserError("the numbers in the names of the images do not follow each other; name them 0.png, 1.png, ...")
    return [named[name] for name in sorted(named, key=lambda name: numbers[name])]


def _number(name: str) -> int:
    """The last number in a file's name."""
    found = re.findall(r"\d+", Path(name).stem)
    if not found:
        raise UserError(f"'{name}' has no number in its name; name the images 0.png, 1.png, ...")
    return int(found[-1])


def _checked(images: Sequence[np.ndarray], task: Task) -> np.ndarray:
    """One array of what was asked for."""
    if len(images) != len(task.ids):
        raise BadSamples(f"{task.name} made {len(images)} images, not {len(task.ids)} (samples {some(task.ids)})")
    planes = [image.transpose(2, 0, 1) for image in images]
    shape = task.shape or planes[0].shape
    for i, plane in zip(task.ids, planes, strict=True):
        if plane.shape != shape:
            raise BadSamples(f"{task.name} made an image of size {plane.shape}, not {tuple(shape)} (sample {i})")
    return np.ascontiguousarray(planes)
