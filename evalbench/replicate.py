"""`evalbench replicate KIT`: a published table measured again, from a manifest in suites/kits/.

A kit says what is needed and how it is run; what was published stands in results/published/ and nowhere else, and each
number is held against ours by `published.Published.beside`: a minimum against a minimum, a window from both sides. A
dry run walks every cell with a random network of the same interface and prints what the real run costs. The real run
ends in one file (`evalbench pack`), which whoever has the GPU sends back.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from evalbench.errors import UserError, unknown
from evalbench.published import Published, published
from evalbench.spec import (
    PHILOX,
    Frozen,
    ModelSpec,
    Noise,
    PathSpec,
    Reference,
    Suite,
    load_suite,
    noise_file,
    noise_words,
    validation_line,
)

if TYPE_CHECKING:
    from evalbench.runner import Request
    from evalbench.spec import Record

_ROWS = 2  # samples of a cell of a dry run
_DRY_NFE = 4  # budget of a cell whose budget the kit leaves to the user
_STAND_IN = Path(__file__).with_name("stand_in.py")
_ZOO = {"text": "fashion-sd", "labels": "fashion-dit"}  # suites whose models stand in for networks of an interface


class Kit(Frozen):
    """The manifest of a replication.

    Attributes:
        tables: ids in results/published/ whose cells are measured; empty where our sources have none.
        suite: what is run; empty for a kit that scores given `images`. network: interface of its network, for the
            stand-in: `edm`, `text` or `labels`. adapter: `--model` of the real run; empty where the suite's own is run.
        reference: what the numbers refer to, in words. noise: where x_T comes from; empty is the suite's.
        noise_limit: in what it is not the source's, in words.
        metrics: ids here by the published name, where a table has none. methods: of a kit whose table names none.
        needs: options that the sources do not state, and the user must give. grid, final: of the time steps.
    """

    name: str
    summary: str
    tables: tuple[str, ...]
    suite: str = ""
    images: str = ""
    network: Literal["", "edm", "text", "labels"] = ""
    adapter: str = ""
    reference: str
    noise: Literal[""] | Noise = ""
    noise_limit: str = ""
    seeds: tuple[int, ...]
    metrics: dict[str, str] = Field(default_factory=dict)
    methods: tuple[str, ...] = ()
    needs: tuple[Literal["nfe", "guidance"], ...] = ()
    grid: str = ""
    final: Literal["", "t_end", "zero"] = ""

    def numbers(self) -> list[Published]:
        """The published cells that are measured: those whose method and metric are here."""
        return [one for one in published() if one.table.id in self.tables and self.metric(one) and self._has_arm(one)]

    def metric(self, number: Published) -> str:
        """The metric here of a published number; empty without."""
        return number.metric or self.metrics.get(number.name, "")

    def _has_arm(self, number: Published) -> bool:
        return bool(number.row.arm or self.methods or self.images)

    def wanted_metrics(self) -> tuple[str, ...]:
        """Metrics of all cells."""
        return tuple(dict.fromkeys([*map(self.metric, self.numbers()), *self.metrics.values()]))

    def cells(self, nfe: Sequence[int] = ()) -> list[tuple[str, int]]:
        """(method, NFE) to run. nfe: budgets of what has none in its table."""
        listed = {(one.row.arm, one.nfe) for one in self.numbers() if one.row.arm and one.nfe}
        return sorted(listed) or [(method, budget) for method in self.methods for budget in nfe]


@dataclass(frozen=True)
class Given:
    """What the user brings to the real run.

    Attributes:
        model: `--model`, such as an adapter with its clone and checkpoint. nfe, guidance: where a kit needs them.
        images, reference: files of a kit that scores given images.
    """

    model: str = ""
    trust_remote_code: bool = False
    nfe: tuple[int, ...] = ()
    guidance: tuple[float, ...] = ()
    images: str = ""
    reference: str = ""


def kit_names() -> list[str]:
    """Names of the kits."""
    return sorted(f.name[:-5] for f in files("evalbench.suites.kits").iterdir() if f.name.endswith(".toml"))


def load_kit(name: str) -> Kit:
    """A kit by name.

    Raises:
        UserError: there is none, or its manifest is wrong.
    """
    if name not in kit_names():
        raise unknown("kit", name, kit_names())
    content = tomllib.loads(files("evalbench.suites.kits").joinpath(f"{name}.toml").read_text("utf-8"))
    try:
        return Kit(**content)
    except ValidationError as error:
        raise UserError(validation_line(error, f"kit '{name}'", Kit)) from None


# --- what it is -----------------------------------------------------------------------------------------------------


def describe(kit: Kit) -> Iterator[str]:
    """Lines: the kit, its protocol, the accepted values, the cost, the line to type."""
    yield f"{kit.name}: {kit.summary}"
    yield f"reference: {kit.reference}; noise: {_noise(kit)}"
    numbers = kit.numbers()
    conventions = dict.fromkeys((one.origin, one.table.nfe_convention or "none") for one in numbers)
    yield from (f"source: {origin}; NFE: {convention}" for origin, convention in conventions)
    for one in numbers:
        budget = f" at NFE {one.nfe}" if one.nfe else ""
        said = f"window {one.window[0]:g} to {one.window[1]:g}" if one.window else f"published {one.value:g}"
        yield f"  {one.row.method}{budget}, {kit.metric(one)}: {said}"
    if not numbers:
        yield "  no published cell stands in our sources: it measures, and judges nothing"
    if kit.suite:
        yield _cost(kit)
    yield f"to run it: {command(kit)}"


def _noise(kit: Kit) -> str:
    if not kit.suite:
        return "none: the samples are given"
    said = noise_words(kit.noise or load_suite(kit.suite).sampling.noise)
    return f"{said}; {kit.noise_limit}" if kit.noise_limit else said


def command(kit: Kit) -> str:
    """The line to type for the real run."""
    words = [f"evalbench replicate {kit.name}"]
    if kit.images:
        words.append(f"--images {kit.images} --reference {kit.reference}")
    if kit.adapter:
        words.append(f"--model '{kit.adapter}' --trust-remote-code")
    words += [f"--{option} ..." for option in kit.needs]
    return " ".join(words)


def _cost(kit: Kit) -> str:
    """GPU-hours by the time of a row of the network, which only the real machine knows."""
    suite = load_suite(kit.suite)
    guided = 1 if suite.sampling.guidance == 1 else 2
    samples = _samples(kit, suite) * len(kit.seeds) * guided
    evaluations = sum(nfe for _, nfe in kit.cells())
    rows, each = samples * max(evaluations, 1), "" if evaluations else " for each evaluation"
    return f"cost: {rows:,} rows of the network{each}; GPU-hours: {rows / 3.6e6:.3g} per ms of a row"


def _samples(kit: Kit, suite: Suite) -> int:
    return max((one.table.samples or 0 for one in kit.numbers()), default=0) or suite.sampling.samples


# --- dry run --------------------------------------------------------------------------------------------------------


def dry_run(kit: Kit) -> Iterator[str]:
    """Lines of a walk through every cell on a random stand-in; nothing is scored."""
    for metric in kit.wanted_metrics():
        _build_metric(metric)
    yield from _dry_images(kit) if kit.images else _dry_cells(kit)


def _build_metric(metric: str) -> None:
    from evalbench import registry

    registry.build_metric(metric)


def _dry_cells(kit: Kit) -> Iterator[str]:
    from evalbench import registry, starts
    from evalbench.cost.ledger import Ledger
    from evalbench.plan import make_cell
    from evalbench.sampling import conditions, images_of, sample, setup_of

    suite, plugins = _stand_in(kit)
    if file := noise_file(suite.sampling.noise):  # of the real network's shape
        yield f"dry run: philox stands in for {file.name}; {starts.missing(suite) or 'the file is there'}"
        suite = suite.override(noise=PHILOX)
    setup = setup_of(suite, plugins)
    indices = range(_ROWS)
    for method, nfe in kit.cells([_DRY_NFE]):
        cell = make_cell(suite, method, nfe, suite.sampling.guidance, kit.seeds[0])
        cond, ledger = conditions(suite, setup.model, indices, setup.device), Ledger(_ROWS, budget=nfe)
        x = sample(setup, registry.build_method(method), cell, indices, cond, ledger)
        images = images_of(setup.model, x)
        assert images is not None
        yield f"dry run: {method} at NFE {nfe}, spent {ledger.nfe[0]:g}, images {tuple(images.shape[1:])}: ok"


def _stand_in(kit: Kit) -> tuple[Suite, dict[str, str]]:
    """The kit's suite with a stand-in for its network; prompts become class names, so that no file is needed."""
    from evalbench.own_model import with_model

    suite = _protocol(kit, load_suite(kit.suite)).override(samples=_ROWS, batch=_ROWS)
    if kit.network == "edm":
        path = suite.path
        suite, plugins = with_model(suite, f"{_STAND_IN}:load")
        return suite.model_copy(update={"path": path}), plugins
    embedded = load_suite(_ZOO[kit.network])
    model = ModelSpec(loader=embedded.model.loader, options=embedded.model.options)
    return suite.model_copy(update={"model": model, "conditions": embedded.conditions, "image": ()}), {}


def _protocol(kit: Kit, suite: Suite) -> Suite:
    """The suite with the kit's time steps and noise."""
    suite = suite.override(grid=kit.grid or None, noise=kit.noise or None, samples=_samples(kit, suite))
    if kit.final:
        suite = suite.model_copy(update={"path": PathSpec(kind=kit.network, options={"final": kit.final})})
    return suite


def _dry_images(kit: Kit) -> Iterator[str]:
    """Random images in the layout that the evaluator reads."""
    import tempfile

    import numpy as np

    from evalbench.images_in import Seen, blocks, open_source

    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / kit.images
        np.savez(file, arr_0=images)
        read = sum(len(block.ids) for block in blocks(open_source(str(file)), Seen(), len(images)))
    yield f"dry run: {read} random images as {kit.images}: ok"


# --- real run -------------------------------------------------------------------------------------------------------


def score(kit: Kit, given: Given) -> Iterator[str]:
    """Lines: given images scored, each number beside the published one.

    Raises:
        UserError: a file that the kit needs was not given.
    """
    from evalbench.score import score_images

    if not (given.images and given.reference):
        raise UserError(f"kit '{kit.name}' scores given files; type: {command(kit)}")
    found = score_images(given.images, reference=given.reference, metrics=kit.wanted_metrics())
    values = {score.metric: score.value for score in found.scores}
    for one in kit.numbers():
        yield f"{one.row.method}, {kit.metric(one)}: {one.beside(values[kit.metric(one)].value).text}"


def request_of(kit: Kit, given: Given) -> Request:
    """What to run.

    Raises:
        UserError: something that the kit needs was not given.
    """
    from evalbench.api import make_request

    missing = [f"--{name}" for name in kit.needs if not getattr(given, name)]
    if kit.adapter and not given.model:
        missing.insert(0, "--model")
    if missing:
        raise UserError(f"kit '{kit.name}' needs {', '.join(missing)}; type: {command(kit)}")
    if len(given.nfe) > 1 or len(given.guidance) > 1:  # a published number is one cell's
        raise UserError(f"kit '{kit.name}' measures one cell: give one --nfe and one --guidance")
    request = make_request(
        kit.suite,
        methods=list(dict.fromkeys(method for method, _ in kit.cells(given.nfe))),
        nfe=sorted({nfe for _, nfe in kit.cells(given.nfe)}),
        guidance=given.guidance or None,
        seeds=kit.seeds,
        metrics=list(kit.wanted_metrics()),
        model=given.model,
        trust_remote_code=given.trust_remote_code,
    )
    return replace(request, suite=_referenced(kit, _protocol(kit, request.suite)))


def judged(kit: Kit, records: Sequence[Record]) -> Iterator[str]:
    """Lines: each published number beside ours, over the seeds as its table has it."""
    for one in kit.numbers():
        metric = kit.metric(one)
        mine = [r for r in records if not one.row.arm or (r.cell.method, r.cell.nfe) == (one.row.arm, one.nfe)]
        values = [r.metrics[metric].value for r in mine if metric in r.metrics]
        what = f"{one.row.method}, {metric}"
        if not values:
            reason = next((r.missing[metric] for r in mine if metric in r.missing), "no value")
            yield f"{what}: {reason}"
            continue
        ours = min(values) if one.table.statistic == "minimum" else sum(values) / len(values)
        yield f"{what}: {one.beside(ours, samples=mine[0].samples, runs=len(values)).text}"


def _referenced(kit: Kit, suite: Suite) -> Suite:
    """The suite with a reference for every metric of the kit, in the user's cache."""
    from evalbench import registry

    found = dict(suite.references)
    for name in kit.wanted_metrics():
        key = registry.build_metric(name).reference_key
        if key and key not in found:
            file = f"cache:references/{suite.images}.{key.replace(':', '-')}.safetensors"
            found[key] = Reference(file=file, sha256="unverified")
    return suite.model_copy(update={"references": found})
