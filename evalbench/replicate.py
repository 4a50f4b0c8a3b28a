"""`evalbench replicate KIT`: a published table from its manifest; `--dry-run` walks it on a stand-in.

What a kit cannot bring (weights, clones, references) it names. A dry run samples every cell with a random network of
the same interface, or scores random images, and prints what the real run costs and the command to type.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from evalbench.errors import UserError, unknown
from evalbench.spec import Frozen, ModelSpec, Suite, load_suite

_ROWS = 2  # samples of a dry cell
_STAND_IN = Path(__file__).with_name("stand_in.py")


class KitCell(Frozen):
    """One published number: a method at a budget, with the band or the window in which ours is the same number."""

    metric: str = ""
    method: str = ""
    nfe: int = 0
    published: float | None = None
    band: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def window(self) -> tuple[float, float] | None:
        """What ours must lie in; None where nothing was published."""
        if self.published is not None and self.band is not None:
            return self.published - self.band, self.published + self.band
        return (self.low, self.high) if self.low is not None and self.high is not None else None


class Kit(Frozen):
    """The manifest of a replication.

    `rule`: `each` value in its band, the `minimum` over the seeds (where a paper reports one), or a two-sided `window`.
    """

    name: str
    summary: str
    source: str
    suite: str = ""
    images: str = ""
    model: str = ""
    reference: str
    recipe: str
    noise: str
    nfe_convention: str
    samples: int
    seeds: tuple[int, ...]
    rule: Literal["each", "minimum", "window"]
    stand_in: str
    cells: tuple[KitCell, ...]

    def agrees(self, cell: KitCell, values: list[float]) -> bool | None:
        """Whether our values of a cell, one per seed, are the published number; None where there is none.

        A minimum is compared with a minimum, never with a mean.
        """
        if cell.window is None:
            return None
        low, high = cell.window
        if self.rule == "minimum":
            return len(values) == len(self.seeds) and low <= min(values) <= high
        return all(low <= value <= high for value in values)


def kit_names() -> list[str]:
    """Names of the kits."""
    return sorted(f.name[:-5] for f in files("evalbench.suites.kits").iterdir() if f.name.endswith(".toml"))


def load_kit(name: str) -> Kit:
    """A kit by name.

    Raises:
        UserError: there is none.
    """
    if name not in kit_names():
        raise unknown("kit", name, kit_names())
    content = tomllib.loads(files("evalbench.suites.kits").joinpath(f"{name}.toml").read_text("utf-8"))
    try:
        return Kit(**content)
    except ValidationError as error:
        raise UserError(f"kit '{name}': {error.errors()[0]['msg']}") from None


def replicate(name: str, *, dry_run: bool) -> Iterator[str]:
    """Lines of a kit: what it needs, its cells, its cost, the command; with `dry_run` also what the stand-in did.

    Raises:
        UserError: unknown kit.
    """
    kit = load_kit(name)
    yield f"{kit.name}: {kit.summary}"
    yield f"source: {kit.source}; replicated so far: 0"
    yield f"reference: {kit.reference}; recipe: {kit.recipe}; noise: {kit.noise}; NFE: {kit.nfe_convention}"
    for cell in kit.cells:
        said = "nothing published" if cell.window is None else "accepted {:.6g} .. {:.6g}".format(*cell.window)
        budget = f" NFE {cell.nfe}" if cell.nfe else ""
        yield f"  {cell.method or kit.images}{budget} {cell.metric or kit.recipe}: {said}"
    if kit.suite:
        yield from _cost(kit)
    if dry_run:
        yield from _dry(kit)
    yield f"to run it: {command(kit)}"


def command(kit: Kit) -> str:
    """The line to type for the real run."""
    if not kit.suite:
        wanted = ",".join(cell.metric for cell in kit.cells)
        return f"evalbench score {kit.images} --reference {kit.reference} --metrics {wanted}"
    methods = ",".join(dict.fromkeys(cell.method for cell in kit.cells))
    nfe = ",".join(str(n) for n in sorted({cell.nfe for cell in kit.cells}))
    seeds = ",".join(map(str, kit.seeds))
    model = f" --model '{kit.model}' --trust-remote-code" if kit.model else ""
    return (
        f"evalbench run {kit.suite} --methods '{methods}' --nfe {nfe} --samples {kit.samples} --seeds {seeds}"
        f" --metrics {kit.recipe}{model} && evalbench pack results/runs/{kit.suite}"
    )


def _cost(kit: Kit) -> Iterator[str]:
    guidance = load_suite(kit.suite).sampling.guidance
    runs = {(cell.method, cell.nfe) for cell in kit.cells}
    rows = sum(nfe for _, nfe in runs) * kit.samples * len(kit.seeds) * (1 if guidance == 1 else 2)
    hours = ", ".join(f"{rows * ms / 3.6e6:,.0f} at {ms} ms" for ms in (1, 10, 100))
    yield f"network rows: {rows:,}; GPU-hours by the time of a row: {hours}"


def _dry(kit: Kit) -> Iterator[str]:
    if not kit.suite:
        yield from _dry_images(kit)
        return
    from evalbench import registry
    from evalbench.cost.ledger import Ledger
    from evalbench.plan import make_cell
    from evalbench.sampling import conditions, images_of, sample, setup_of

    suite, plugins = _stand_in(kit)
    setup = setup_of(suite, plugins)
    for method, nfe in dict.fromkeys((cell.method, cell.nfe) for cell in kit.cells):
        cell = make_cell(suite, method, nfe, suite.sampling.guidance, 0)
        cond = conditions(suite, setup.model, range(_ROWS), setup.device)
        ledger = Ledger(_ROWS, budget=nfe)
        images = images_of(setup.model, sample(setup, registry.build_method(method), cell, range(_ROWS), cond, ledger))
        assert images is not None
        yield f"dry run: {cell.method} NFE {nfe}, spent {ledger.nfe[0]:g}, images {tuple(images.shape[1:])}: ok"


def _stand_in(kit: Kit) -> tuple[Suite, dict[str, str]]:
    """The kit's suite with the stand-in for its model; prompts become class names, so that no file is needed."""
    from evalbench.own_model import with_model

    suite = load_suite(kit.suite).override(samples=_ROWS, batch=_ROWS)
    if kit.stand_in == "edm":
        return with_model(suite, f"{_STAND_IN}:load")
    embedded = ModelSpec(loader="fashion-zoo", options={"folder": kit.stand_in})
    conditions = load_suite("fashion-sd").conditions
    return suite.model_copy(update={"model": embedded, "conditions": conditions}), {}


def _dry_images(kit: Kit) -> Iterator[str]:
    """Random images through the layout that the evaluator reads, and back."""
    import tempfile

    import numpy as np

    from evalbench import registry
    from evalbench.images_in import open_source

    for cell in kit.cells:
        registry.build_metric(cell.metric)
    images = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / kit.images
        np.savez(file, arr_0=images)
        source = open_source(str(file))
        yield f"dry run: {len(images)} random images as {kit.images}, read as {type(source).__name__}: ok"


def replicate_command(name: str, *, dry_run: bool) -> None:
    """`evalbench replicate`."""
    for line in replicate(name, dry_run=dry_run):
        print(line)
