"""Somebody's own program as a method: `command:their-arm.toml`."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalbench.errors import Unsupported, UserError, unknown
from evalbench.interfaces import PLACEHOLDERS, Outside, Program
from evalbench.registry import register
from evalbench.weights import sha256 as digest

_DIGITS = 16  # of the digest, in names


class _Arm(BaseModel):
    """The keys of an arm's file; see `Command`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: tuple[str, ...] = Field(min_length=1)
    folder: str = "."
    env: dict[str, str] = {}
    files: tuple[str, ...] = ()
    timeout: float = Field(1800.0, gt=0)
    guidance: float = 1.0
    nfe: int | None = Field(None, gt=0)
    depth: float | None = Field(None, gt=0)
    cost: float | None = Field(None, gt=0)


@register("command:*")
@dataclass(frozen=True)
class Command(Outside):
    """A program of somebody's own, run under our seeds, noise and conditions: `command:their-arm.toml`.

    The file says how to run it; for each chunk it gets x_T, labels or prompts in files and leaves images, which are
    scored as any others. What it evaluates cannot be seen from here: its counts are declared (`nfe_declared`, `cost`
    and `depth` likewise) and stand apart from measured ones, which are missing. Metrics of states, not of images, are
    missing too. Keys of the file, all but `run` may be left out:

        run       the command, a list of words, without a shell; {noise} {labels} {prompts} {seed} {start} {count} {nfe}
                  {guidance} {out} in them, or in env, are filled in (see docs/your-model.md)
        folder    where it runs, relative to the file; the file's own
        env       a table, added to the environment
        files     what else decides its images, relative to folder: scripts, weights; their digests belong to the cell
        timeout   seconds of a chunk, 1800
        guidance  the scale it runs at, where it does not read {guidance}; 1
        nfe       evaluations per sample, where it does not read {nfe}; depth, cost likewise, optional

    Attributes:
        target: the file. sha256: first digits of the digest of it and its `files`; filled in, refused where it differs.
    """

    target: str
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.sha256:  # a name that is in a record has it, and needs no file to be read
            object.__setattr__(self, "sha256", self._digest())

    def identity(self) -> dict[str, Any]:
        return {"name": "command:*", "target": ""}  # the digest names the arm, wherever it lies

    def check(self, nfe: int, blocks: int) -> None:
        self._program()

    def program(self, nfe: int, guidance: float) -> Program:
        found, arm = self._program(), self._arm
        declared = nfe if arm.nfe is None else arm.nfe
        if declared > nfe:
            raise Unsupported(f"not supported: {self._name} declares {declared} evaluations, the budget is {nfe}")
        if "guidance" not in found.reads and guidance != arm.guidance:
            raise Unsupported(
                f"not supported: {self._name} runs at guidance {arm.guidance:g}, the cell is at {guidance:g}; "
                "read {guidance} in the command, or say guidance = in its file"
            )
        return Program(found.words, found.folder, found.env, found.timeout, {**found.spends, "nfe": declared})

    @property
    def _name(self) -> str:
        return f"command:{self.target}"

    @cached_property
    def _arm(self) -> _Arm:
        """The file's content.

        Raises:
            UserError: missing, no TOML, an unknown key or a wrong value.
        """
        file = Path(self.target).expanduser()
        if not file.is_file():
            raise UserError(f"{self._name}: no such file; give the path of a TOML that says how to run the program")
        try:
            return _Arm(**tomllib.loads(file.read_text("utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self._name} is not valid TOML: {error}") from None
        except ValidationError as error:
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise unknown("key", key, _Arm.model_fields, where=self._name) from None
            raise UserError(f"{self._name}: key '{key}': {first['msg'].lower()}") from None

    def _program(self) -> Program:
        """What runs, with what is declared.

        Raises:
            UserError: the file has changed, or does not say what is needed.
        """
        arm = self._arm
        if not self._digest().startswith(self.sha256):
            raise UserError(
                f"{self._name} or one of its files has changed: SHA-256 {self._digest()}..., not {self.sha256}...; "
                "restore it, or leave sha256 out to measure the new one"
            )
        spends = {name: float(value) for name in ("depth", "cost") if (value := getattr(arm, name)) is not None}
        program = Program(arm.run, self._folder, arm.env, arm.timeout, spends)
        for name in sorted(program.reads - PLACEHOLDERS):
            raise unknown("placeholder", name, PLACEHOLDERS, where=self._name)
        if "out" not in program.reads:
            raise UserError(f"{self._name}: the command reads no {{out}}, the folder its images are expected in")
        if "noise" not in program.reads and not {"seed", "start"} <= program.reads:
            raise UserError(
                f"{self._name}: its samples must follow our seeds; read {{noise}}, or {{seed}} and {{start}}"
            )
        if ("nfe" in program.reads) == (arm.nfe is not None):
            raise UserError(f"{self._name}: say what it evaluates: read {{nfe}} in the command, or nfe = in the file")
        return program

    @property
    def _folder(self) -> Path:
        return Path(self.target).expanduser().resolve().parent / Path(self._arm.folder).expanduser()

    def _digest(self) -> str:
        """First digits of the SHA-256 of the file, and of those it names."""
        found = hashlib.sha256()
        arm = self._arm
        for file in (Path(self.target).expanduser(), *(self._folder / name for name in arm.files)):
            if not file.is_file():
                raise UserError(f"{self._name}: its file '{file}' does not exist; correct files or folder")
            found.update(bytes.fromhex(digest(file)))
        return found.hexdigest()[:_DIGITS]
