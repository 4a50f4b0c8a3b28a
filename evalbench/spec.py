"""Suite, Cell, Chunk, Record: frozen, JSON both ways, identified by a hash of their content. No torch, no ray."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from evalbench.errors import EvalbenchError, UserError, unknown

SCHEMA = 1
GRID_SAMPLES = 64  # the first images of a cell are always kept, for grids and galleries
DECLARED = "_declared"  # ends the name of a count that is somebody's word, not measured
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def content_id(content: Any, length: int = 16) -> str:
    """Hash of JSON-able content: the same for equal content on any machine."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


# --- noise ----------------------------------------------------------------------------------------------------------

PHILOX = "philox"
NOISES = (PHILOX, "edm", "diffusers-cpu", "file:NAME@SHA256")
_NOISE_FILE = re.compile(rf"file:({_NAME.pattern}\.(?:npy|npz|pt|safetensors))@([0-9a-f]{{64}}|unverified)")


class NoiseFile(NamedTuple):
    """A file of starts: its name in the folder `noise` of EVALBENCH_CACHE, and its SHA-256 or `unverified`."""

    name: str
    sha256: str


def noise_file(noise: str) -> NoiseFile | None:
    """The file that a noise names; None for the other kinds."""
    match = _NOISE_FILE.fullmatch(noise)
    return NoiseFile(*match.groups()) if match else None


def noise_words(noise: str) -> str:
    """A noise for readers: generators of other projects with the device that they are drawn on here."""
    file = noise_file(noise)
    if file is not None:
        return f"{file.name} (SHA-256 {file.sha256[:12]})"
    return "edm (drawn on the CPU)" if noise == "edm" else noise


def _known_noise(noise: str) -> str:
    if noise in NOISES[:-1] or noise_file(noise):
        return noise
    why = str(unknown("noise", noise, NOISES))
    if noise.startswith("file"):
        why = f"write {NOISES[-1]} or file:NAME@unverified, NAME ending in .npy, .npz, .pt or .safetensors"
    raise PydanticCustomError("noise", "{why}", {"why": why})


Noise = Annotated[str, AfterValidator(_known_noise)]


# --- suite ----------------------------------------------------------------------------------------------------------


class ModelSpec(Frozen):
    """Which model, and the options of its loader."""

    loader: str
    options: dict[str, Any] = {}


class PathSpec(Frozen):
    """The noise path: kind (`vp-linear`, `edm`, `flow`, `vp-discrete`) and its fields, see `evalbench.paths`."""

    kind: str
    options: dict[str, Any] = {}


class Prompts(Frozen):
    """A list of prompts: a file in the user's data folder (`prompts` in EVALBENCH_CACHE), known by its digest.

    Attributes:
        file, sha256: its name and bytes. source, licence: where it comes from, and what is stated there.
        format: `tsv` or `csv` with a header, `pairs` (id, tab, prompt), `jsonl`, `lines`, or `coco` (annotations: the
            caption of least id of each image, by image id).
        text, category, id: columns or keys; without `id` a prompt's id is its number, from 0.
        rows: how many prompts there are.
    """

    file: str
    sha256: str
    source: str
    licence: str
    format: Literal["tsv", "csv", "pairs", "jsonl", "lines", "coco"]
    text: str = ""
    category: str = ""
    id: str = ""
    rows: int = Field(gt=0)


class Conditions(Frozen):
    """What samples are conditioned on.

    `cyclic`: sample i has label i mod classes; `prompts`: sample i has prompt i mod rows; `none`: unconditional.
    """

    labels: Literal["cyclic", "none", "prompts"] = "none"
    classes: int = Field(0, ge=0)
    prompts: Prompts | None = None

    @model_validator(mode="after")
    def _has_prompts(self) -> Conditions:
        if (self.labels == "prompts") != (self.prompts is not None):
            raise ValueError("labels = 'prompts' needs [conditions.prompts], which needs it")
        return self

    def facts(self) -> dict[str, Any]:
        """What decides the conditions of a sample."""
        return self.model_dump(exclude=None if self.prompts else {"prompts"})

    def plan(self, indices: Iterable[int]) -> list[int] | None:
        """Labels of global sample indices; None without."""
        return [i % self.classes for i in indices] if self.labels == "cyclic" else None

    def prompt_of(self, indices: Iterable[int]) -> list[int] | None:
        """Which prompt global sample indices have; None without."""
        return None if self.prompts is None else [i % self.prompts.rows for i in indices]


class Sampling(Frozen):
    """How many samples and how they are drawn; all but `samples`, `nfe` and `seeds` change a sample's bits.

    `noise` is where x_T comes from: `philox`, or the convention of a published protocol, see `evalbench.starts`.
    """

    samples: int = Field(gt=0)
    batch: int = Field(gt=0)
    chunk: int = Field(gt=0)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    noise: Noise = PHILOX
    dtype: Literal["float32", "float64"] = "float32"
    grid: Literal["time", "quadratic", "logsnr", "karras"] = "logsnr"
    nfe: tuple[Annotated[int, Field(gt=0)], ...] = (5, 10, 20)
    guidance: float = 1.0
    guidance_grid: tuple[float, ...] = ()


class Metrics(Frozen):
    """Metric ids; `primary` is the one that verdicts and charts use, `optional` ones run when `--metrics` asks.

    `gating` are those on which a faster method may not be worse to count as a speed-up; empty is the primary alone.
    """

    names: tuple[str, ...]
    primary: str
    gating: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Solution(Frozen):
    """The fine solution that paired errors refer to: a method and its NFE, run from the same noise."""

    method: str
    nfe: int = Field(gt=0)


class Reference(Frozen):
    """Reference statistics of one feature: a file with its hash, or `model = true` for the model's exact moments.

    `file` is relative to the suite's TOML; the prefix `evalbench:` means a file inside the package, `cache:` one in the
    user's EVALBENCH_CACHE. `sha256 = "unverified"`: recorded at first use.
    """

    file: str = ""
    sha256: str = ""
    model: bool = False


class Floor(Frozen):
    """What a perfect sampler scores at N samples: reference draws against the reference."""

    metric: str
    samples: int
    value: float
    sd: float | None = None
    what: str = "floor"


class Suite(Frozen):
    """A standard suite: facts only, versioned.

    `methods` are what `evalbench run SUITE` runs when `--methods` is not given; `roles` are further models on the same
    path (`small`, `student`, `guide`) for methods that use several. `image` is the (C, H, W) of a finished image;
    `images` names real ones: `evalbench:fashion-test`, or a dataset that `evalbench suite fetch` knows. `source` and
    `licence` are those of the data.
    """

    schema_: int = Field(SCHEMA, alias="schema")
    name: str
    version: int = Field(gt=0)
    summary: str
    model: ModelSpec
    roles: dict[str, ModelSpec] = {}
    path: PathSpec | None = None
    conditions: Conditions = Conditions()
    sampling: Sampling
    metrics: Metrics
    references: dict[str, Reference] = {}
    solution: Solution | None = None
    floors: tuple[Floor, ...] = ()
    methods: tuple[str, ...] = ()
    image: tuple[int, ...] = ()
    images: str = ""
    source: str = ""
    licence: str = ""
    folder: str = Field("", exclude=True)  # where relative files are looked up; not part of the facts

    def generation(self) -> dict[str, Any]:
        """The facts that decide a sample's bits; a cell's id hashes them."""
        sampling = self.sampling.model_dump(exclude={"samples", "nfe", "seeds", "guidance", "guidance_grid"})
        roles = {"roles": {name: role.model_dump() for name, role in self.roles.items()}} if self.roles else {}
        return {
            **roles,
            "suite": self.name,
            "version": self.version,
            "model": self.model.model_dump(),
            "path": self.path.model_dump() if self.path else None,
            "conditions": self.conditions.facts(),
            "sampling": sampling,
        }

    def content(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        found = self.model_dump(mode="json", by_alias=True)
        for later in ("image", "images", "source", "licence"):  # the id of a suite without them is what it was
            if not found[later]:
                del found[later]
        if found["conditions"]["prompts"] is None:
            del found["conditions"]["prompts"]
        return found

    @property
    def id(self) -> str:
        """Hash of all facts."""
        return content_id(self.content())

    def override(self, **sampling: Any) -> Suite:
        """The same suite with other sampling facts (None means unchanged), as `--samples` or `--batch` ask for.

        Raises:
            UserError: a value out of range.
        """
        changes = {key: value for key, value in sampling.items() if value is not None}
        content = self.sampling.model_dump() | changes
        try:
            return self.model_copy(update={"sampling": Sampling(**content)})
        except ValidationError as error:
            raise UserError(validation_line(error, "command line", Sampling)) from None


def suite_names() -> list[str]:
    """Names of the built-in suites."""
    return sorted(f.name[:-5] for f in files("evalbench.suites").iterdir() if f.name.endswith(".toml"))


def load_suite(name_or_path: str) -> Suite:
    """A built-in suite by name, or one from a TOML file by path.

    A suite may say `extends = "NAME"` and then list only what differs; tables are merged key by key, floors by what
    they are of.

    Raises:
        UserError: no such suite or file, not TOML, unknown or missing key, value out of range.
    """
    is_path = name_or_path.endswith(".toml") or "/" in name_or_path
    content, folder = _read_toml(Path(name_or_path) if is_path else _builtin(name_or_path))
    content.setdefault("schema", SCHEMA)
    if content["schema"] != SCHEMA:
        raise UserError(f"suite '{name_or_path}' has schema {content['schema']}, this evalbench reads {SCHEMA}")
    return parse_suite(content, folder, where=f"suite '{name_or_path}'")


def parse_suite(content: dict[str, Any], folder: str, *, where: str) -> Suite:
    """A suite from its facts, as they stand in a TOML or a manifest.

    Raises:
        UserError: unknown or missing key, value out of range, unsafe name.
    """
    try:
        suite = Suite(**content, folder=folder)
    except ValidationError as error:
        raise UserError(validation_line(error, where, Suite)) from None
    if not _NAME.fullmatch(suite.name):
        raise UserError(f"{where}: name '{suite.name}' may hold letters, digits, '.', '_' and '-' only")
    if suite.metrics.primary not in suite.metrics.names:
        raise unknown("primary metric", suite.metrics.primary, suite.metrics.names, where=where)
    for metric in suite.metrics.gating:
        if metric not in suite.metrics.names:
            raise unknown("gating metric", metric, suite.metrics.names, where=where)
    return suite


def _builtin(name: str) -> Path:
    if name not in suite_names():
        raise unknown("suite", name, suite_names())
    return Path(str(files("evalbench.suites").joinpath(f"{name}.toml")))


def _read_toml(file: Path) -> tuple[dict[str, Any], str]:
    if not file.is_file():
        raise UserError(f"suite file '{file}' not found; give a suite name or the path of a TOML file")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"suite file '{file}' is not valid TOML: {error}") from None
    parent = content.pop("extends", None)
    if parent is not None:
        base, _ = _read_toml(_builtin(str(parent)))
        content = _merged(base, content)
    return content, str(file.parent)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both_tables else value
    if isinstance(base.get("floors"), list) and isinstance(changes.get("floors"), list):
        result["floors"] = _merged_floors(base["floors"], changes["floors"])
    return result


def _merged_floors(base: list[Any], changes: list[Any]) -> list[Any]:
    """Floors of both; where both have one of the same metric, N and kind, that of `changes`."""

    def of(floor: Any) -> tuple[Any, ...]:
        return tuple(floor.get(key) for key in ("metric", "samples", "what")) if isinstance(floor, dict) else (floor,)

    replaced = {of(floor) for floor in changes}
    return [floor for floor in base if of(floor) not in replaced] + changes


def validation_line(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One of pydantic's complaints as one line; an unknown key first, since it explains a missing one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return str(unknown("key", place, _keys(model, first["loc"]), where=where))
    if first["type"] == "missing":
        return f"{where}: key '{place}' is missing"
    return f"{where}: {place} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Valid keys at the table where an unknown key stands."""
    prefix: list[str] = []
    for part in location[:-1]:
        prefix.append(str(part))
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        nested = [annotation, *getattr(annotation, "__args__", ())]
        found = [t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)]
        if found:
            model = found[0]
    names = [(f.alias or name) for name, f in model.model_fields.items() if name != "folder"]
    return [".".join([*prefix, name]) for name in names]


# --- cell, chunk, record --------------------------------------------------------------------------------------------


class Cell(Frozen):
    """One row of the table: a method at a budget, guidance and seed, on a suite.

    Attributes:
        suite, suite_version: which suite. generation: hash of the facts that decide a sample's bits.
        method: canonical chain text. settings: hash of every setting and part version, defaults included.
        nfe: budget. guidance: scale, 1 is off. seed: run seed.
    """

    suite: str
    suite_version: int
    generation: str
    method: str
    settings: str
    nfe: int = Field(gt=0)
    guidance: float = 1.0
    seed: int = 0

    @property
    def id(self) -> str:
        """Hash of everything a sample of this cell depends on."""
        return _cell_id(self)


@lru_cache(maxsize=1 << 14)  # it is asked for several times per chunk
def _cell_id(cell: Cell) -> str:
    return content_id(cell.model_dump(exclude={"method"}))


class Chunk(NamedTuple):
    """Global sample indices [start, stop) of a cell: the unit of work, caching and retry."""

    cell_id: str
    start: int
    stop: int


def chunks_of(cell_id: str, samples: int, size: int) -> list[Chunk]:
    """The fixed chunks of a cell; only the last may be short."""
    return [Chunk(cell_id, start, min(start + size, samples)) for start in range(0, samples, size)]


class MetricValue(Frozen):
    """A metric in a record: see `interfaces.Value`."""

    value: float
    n: int
    se: float | None = None
    low: float | None = None
    high: float | None = None
    bias: float | None = None
    note: str = ""
    unit: str = ""
    higher_is_better: bool = False


class Imported(Frozen):
    """A score of a cell that another program computed from its samples.

    Attributes:
        cell: its id. metric: `EVALUATOR@VERSION`. value: with a note that says it was imported, and from what.
    """

    cell: str
    metric: str
    value: MetricValue


class Failure(Frozen):
    """Why a cell or a metric has no value."""

    type: str
    message: str
    traceback: str = ""


class Split(Frozen):
    """Seconds of one call by part, see `evalbench.cost.breakdown`."""

    denoiser: float
    decoder: float
    conditioning: float
    arithmetic: float
    overhead: float
    excess: float
    calls: int


class MemoryUse(Frozen):
    """Bytes around one call, see `evalbench.cost.memory`."""

    before: int | None
    peak: int
    reserved: int | None
    weights: int | None = None
    note: str = ""


class EnergyUse(Frozen):
    """Joules of one call, or why they are missing, see `evalbench.cost.energy`."""

    joules: float | None
    calls: int = 0
    seconds: float = 0.0
    note: str = ""


class Latency(Frozen):
    """A timed cell at one batch size, on named hardware: raw seconds of whole calls, and what stands beside them.

    Attributes:
        batch: samples per call. seconds: of every measured call, by fresh process, round and sample.
        warmup: calls before the measured ones, by process. steady: whether they settled in every process.
        session: what was timed together, in the same processes and rounds, has the same one.
        variant: how networks were executed. impl: `reference`, `optimised` or `official`.
        training_free: a solver on the unchanged network, nothing prepared: it may serve as a baseline.
        embedded: the model is one of those that evalbench brings along; its timings check the protocol.
        device, threads, cores, clock: where and how; cores by process, empty where they were not pinned.
        cold: seconds from asking for a process to the first samples, of the processes this cell opened.
        build: seconds until the model was loaded, by process. first: of the first call (lazy set-up, compiling).
        breakdown, memory, energy: see there. flags: doubts about the machine and the warm-up.
        doubt: why the timed outputs are not the quality run's; empty when they are. checked: outputs looked at.
    """

    batch: int
    seconds: tuple[tuple[tuple[float, ...], ...], ...]
    warmup: tuple[int, ...]
    steady: bool
    session: str
    variant: str
    impl: Literal["reference", "optimised", "official"] = "reference"
    training_free: bool
    embedded: bool
    device: str
    threads: int
    cores: tuple[tuple[int, ...], ...] = ()
    clock: str
    cold: tuple[float, ...]
    build: tuple[float, ...]
    first: tuple[float, ...]
    breakdown: Split | None = None
    memory: MemoryUse
    energy: EnergyUse
    flags: tuple[str, ...] = ()
    doubt: str = ""
    checked: int = 0

    @property
    def calls(self) -> list[float]:
        """Seconds of all measured calls."""
        return [seconds for process in self.seconds for round_ in process for seconds in round_]


class Record(Frozen):
    """The measured outcome of a cell. `kind` quality or latency; errors are records too.

    Attributes:
        protocol: hash of all that makes numbers comparable; protocol_facts: what was hashed.
        samples: N. metrics: by id. missing: metrics that have no value, by id, with the reason.
        counts: per-sample means: nfe, nfe_p95, depth, cost, flops, evals.ROLE; of a method that runs as a program of
            its own nfe_declared (and cost, depth likewise) in their place: what its authors say, not measured.
        bill: what preparation spent in all, once: nfe, evals.ROLE, backward, cost, flops, and seconds.
        footprint: of a quantised network: weight_bits, activation_bits, weight_bytes, bops (one evaluation), and
            weight_bytes_full, bops_full at 32 bits; see docs/cost.md. Empty where nothing is quantised.
        seconds: wall time of the chunks. environment: versions, device, threads, fingerprint class.
        latency: one entry per batch size. variant: of a latency record; empty in a quality record.
    """

    schema_: int = Field(SCHEMA, alias="schema")
    kind: Literal["quality", "latency"]
    status: Literal["ok", "error", "unsupported"]
    cell: Cell
    samples: int = 0
    protocol: str = ""
    protocol_facts: dict[str, Any] = {}
    metrics: dict[str, MetricValue] = {}
    missing: dict[str, str] = {}
    counts: dict[str, float] = {}
    bill: dict[str, float] = {}
    footprint: dict[str, float] = {}
    seconds: float = 0.0
    latency: tuple[Latency, ...] = ()
    variant: str = ""
    failure: Failure | None = None
    environment: dict[str, Any] = {}

    @field_validator("latency", mode="before")
    @classmethod
    def _of_the_protocol(cls, value: Any) -> Any:
        """Timings of one process without rounds, as evalbench once recorded them, are no latency: timed again."""
        return () if value is None or "peak_bytes" in value else value

    @property
    def chunk(self) -> int | None:
        """Samples of each chunk of its cell; None when the record does not say its protocol."""
        size: int | None = self.protocol_facts.get("generation", {}).get("sampling", {}).get("chunk")
        return size

    def to_json(self) -> str:
        """One line."""
        return self.model_dump_json(by_alias=True)


def record_from_json(line: str, *, where: str) -> Record:
    """A record from its line.

    Raises:
        EvalbenchError: not a record, or written by a newer schema.
    """
    try:
        content = json.loads(line)
        schema = content.get("schema")
    except (json.JSONDecodeError, AttributeError):
        raise EvalbenchError(f"{where} is not a record; the file is corrupt, move it away and run again") from None
    if schema != SCHEMA:
        raise EvalbenchError(f"{where} has schema {schema}, this evalbench reads {SCHEMA}; upgrade evalbench")
    try:
        return Record(**content)
    except ValidationError as error:
        raise EvalbenchError(validation_line(error, where, Record)) from None
