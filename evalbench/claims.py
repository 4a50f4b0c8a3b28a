"""Claims: what methods are said to do, run and judged in the words of design section 12. See docs/claims.md.

A claim is a `CLAIM = Claim(...)` in a method's file. Both arms run from the same noise; the effect is the relative
paired difference (arm - baseline) / baseline of each run seed, with a Student t interval over seeds. A metric that
estimates its finite-sample bias enters without it: for a Frechet distance that difference is the half-split
extrapolation 2 D_N - (D_a + D_b) / 2, and never the difference of two plug-in values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from evalbench import registry, runner
from evalbench.claim_words import Spread, Word, verdict
from evalbench.durable import write_atomic
from evalbench.errors import UserError, unknown
from evalbench.interfaces import Claim, Method
from evalbench.report import claims as text
from evalbench.runner import Executor, Observer, Request, make_cell
from evalbench.spec import Cell, Record, Suite, load_suite
from evalbench.store import Store

NOT_RUN, PARTLY_RUN = "no run holds both arms", "a run holds only some of the cells"
LEAST_SEEDS, LEAST_PREPARES = 5, 3


# --- what is claimed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedClaim:
    """A registered claim.

    Attributes:
        id: stem of the method's file and the claim's place in it: `dpm_solver/1`.
    """

    id: str
    claim: Claim


@dataclass(frozen=True)
class Pair:
    """The cells of one difference: same suite, N, guidance, run seed and noise.

    Attributes:
        prepare: seed of the arm's prepare; None when it has none.
    """

    prepare: int | None
    seed: int
    arm: Cell
    baseline: Cell


def registered() -> list[NamedClaim]:
    """The claims of all registered methods' files, plug-ins included, ordered by id.

    Raises:
        UserError: a claim that cannot be run or judged, or two files of one name.
    """
    modules = {registry.get("method", name).__module__ for name in registry.names("method")}
    found: dict[str, str] = {}
    claims = []
    for name in sorted(modules):
        module = sys.modules.get(name)
        if module is None or not hasattr(module, "CLAIM"):
            continue
        stem = Path(module.__file__ or name).stem
        if stem in found:
            raise UserError(f"claims of two files named {stem}.py: {found[stem]} and {name}; rename one")
        found[stem] = name
        stated = module.CLAIM if isinstance(module.CLAIM, tuple) else (module.CLAIM,)
        claims += [NamedClaim(f"{stem}/{k}", claim) for k, claim in enumerate(stated, start=1)]
    for named in claims:
        try:
            check(named.claim)
        except UserError as error:
            raise UserError(f"claim {named.id}: {error}") from None
    return sorted(claims, key=lambda named: (named.id.partition("/")[0], int(named.id.partition("/")[2])))


def select(only: Sequence[str] | None = None) -> list[NamedClaim]:
    """The registered claims, or those named: `dpm_solver` for all of a file, `dpm_solver/1` for one.

    Raises:
        UserError: as `registered`, or nobody has that name.
    """
    claims = registered()
    for name in only or ():
        if not any(_is_named(named, name) for named in claims):
            raise unknown("claim", name, {named.id for named in claims})
    return [named for named in claims if only is None or any(_is_named(named, name) for name in only)]


def _is_named(named: NamedClaim, name: str) -> bool:
    return name in (named.id, named.id.partition("/")[0])


def check(claim: Claim) -> None:
    """Refuse a claim that could not be run or judged.

    Raises:
        UserError: what is wrong with it.
    """
    if not isinstance(claim, Claim):
        raise UserError(f"CLAIM holds a {type(claim).__name__}; write CLAIM = Claim(...) or a tuple of Claims")
    for name, hint in get_type_hints(Claim).items():
        if getattr(hint, "__origin__", None) is Literal and getattr(claim, name) not in get_args(hint):
            raise unknown(name, getattr(claim, name), get_args(hint))
    if not (claim.text.strip() and claim.source.strip()):
        raise UserError("text and source say what is claimed and by whom; neither may be empty")
    if len(set(claim.seeds)) < LEAST_SEEDS or len(set(claim.seeds)) < len(claim.seeds) or min(claim.seeds) < 0:
        raise UserError(f"seeds {claim.seeds}: at least {LEAST_SEEDS} different ones, 0 or more")
    if not (math.isfinite(claim.effect) and claim.effect > 0):
        raise UserError(f"effect {claim.effect}: a size relative to the baseline, above 0")
    if claim.nfe < 1 or claim.baseline_nfe < 0 or claim.samples < 0:
        raise UserError("nfe is at least 1; baseline_nfe and samples are 0 (the arm's, the suite's) or more")
    _check_prepare(claim)
    registry.build_metric(claim.metric)
    first = pairs(claim)[0]
    if first.arm.id == first.baseline.id:
        raise UserError(f"arm and baseline are one cell: {first.arm.method} at NFE {first.arm.nfe}")


def _check_prepare(claim: Claim) -> None:
    random = [part for method in (claim.arm, claim.baseline) for part in _random_prepares(method)]
    if random and not claim.prepare_seeds:
        raise UserError(f"'{random[0].name}' prepares at random: state prepare_seeds=(0, 1, 2)")
    if not claim.prepare_seeds:
        return
    if len(set(claim.prepare_seeds)) < max(LEAST_PREPARES, len(claim.prepare_seeds)) or min(claim.prepare_seeds) < 0:
        raise UserError(f"prepare_seeds {claim.prepare_seeds}: at least {LEAST_PREPARES} different ones, 0 or more")
    if not _reseeded(claim):
        raise UserError(f"prepare_seeds: no part of '{claim.arm}' has a setting 'seed'")


def _has_seed(part: Method) -> bool:
    return is_dataclass(part) and any(entry.name == "seed" and entry.init for entry in fields(part))


def _random_prepares(method: str) -> list[Method]:
    """Parts of a chain whose `prepare` has a seed."""
    return [part for part in registry.build_method(method).parts if part.prepares and _has_seed(part)]


def _reseeded(claim: Claim) -> list[Method]:
    """What `prepare_seeds` repeats: random prepares of both arms; without any, what has a seed in the arm."""
    random = [*_random_prepares(claim.arm), *_random_prepares(claim.baseline)]
    return random or [part for part in registry.build_method(claim.arm).parts if _has_seed(part)]


def _with_seed(method: str, seed: int | None, parts: Sequence[Method]) -> str:
    """The chain with `seed=` set in these parts; as it is without a seed."""
    chain = registry.build_method(method)
    if seed is None:
        return chain.text

    def again(part: Any) -> Any:
        return replace(part, seed=seed) if part in parts else part

    solver, *others = map(again, chain.parts)
    return registry.Chain(solver, tuple(others)).text


def suite_of(claim: Claim) -> Suite:
    """The claim's suite, at its sample count."""
    return load_suite(claim.suite).override(samples=claim.samples or None)


def pairs(claim: Claim) -> list[Pair]:
    """The cells of a claim, prepare seed by prepare seed, run seed by run seed."""
    suite = suite_of(claim)
    guidance = claim.guidance or suite.sampling.guidance
    parts, found = _reseeded(claim), []
    for prepare in claim.prepare_seeds or (None,):
        arm, baseline = (_with_seed(method, prepare, parts) for method in (claim.arm, claim.baseline))
        for seed in claim.seeds:
            cells = (
                make_cell(suite, arm, claim.nfe, guidance, seed),
                make_cell(suite, baseline, claim.baseline_nfe or claim.nfe, guidance, seed),
            )
            found.append(Pair(prepare, seed, *cells))
    return found


# --- running --------------------------------------------------------------------------------------------------------


def run(
    chosen: Sequence[NamedClaim],
    out: Path,
    executor: Callable[[], Executor],
    observer: Observer | None = None,
    plugins: Mapping[str, str] | None = None,
) -> list[Path]:
    """Run both arms of each claim into `out/SUITE-N`; what is there already is not computed again.

    Args:
        chosen: which claims. out: folder of run folders. executor: makes the executor, at most once.
        plugins: file name -> source, for workers.

    Returns:
        The run folders.
    """
    make = cache(executor)
    folders = []
    todo = requests(chosen, registered(), plugins or {})
    for number, (folder, request) in enumerate(todo, start=1):
        if observer is not None:
            budgets = ", ".join(map(str, request.nfe))
            observer.note(f"{number} of {len(todo)}: {folder}, {', '.join(request.methods)} at NFE {budgets}")
        runner.run(request, out / folder, make, observer)
        folders.append(out / folder)
    return list(dict.fromkeys(folders))


def requests(
    chosen: Sequence[NamedClaim], every: Sequence[NamedClaim], plugins: Mapping[str, str]
) -> list[tuple[str, Request]]:
    """What to run, by name of the run folder.

    A cell is measured in the metrics of all the claims that hold it, chosen or not: a record with fewer would take the
    place of one with more.
    """
    metrics: dict[tuple[str, str], set[str]] = {}
    for named in (*every, *chosen):
        folder = _folder(suite_of(named.claim))
        for cell in _cells(named.claim):
            metrics.setdefault((folder, cell.id), set()).add(named.claim.metric)
    seeds: dict[tuple[Any, ...], dict[int, None]] = {}
    suites = {}
    for named in chosen:
        suite = suite_of(named.claim)
        folder = _folder(suite)
        suites[folder] = suite
        for cell in _cells(named.claim):
            measured = tuple(sorted(metrics[folder, cell.id]))
            seeds.setdefault((folder, cell.nfe, cell.guidance, measured, cell.method), {})[cell.seed] = None
    methods: dict[tuple[Any, ...], list[str]] = {}
    for (*key, method), wanted in seeds.items():
        methods.setdefault((*key, tuple(wanted)), []).append(method)
    return [
        (folder, Request(suites[folder], tuple(texts), (nfe,), (guidance,), wanted, measured, plugins=plugins))
        for (folder, nfe, guidance, measured, wanted), texts in methods.items()
    ]


def _cells(claim: Claim) -> Iterable[Cell]:
    return (cell for pair in pairs(claim) for cell in (pair.arm, pair.baseline))


def _folder(suite: Suite) -> str:
    return f"{suite.name}-{suite.sampling.samples}"


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What was found of a claim.

    Attributes:
        word: the verdict. note: why there is none, or what must be known beside it.
        effect: mean relative difference, -0.1 for an arm 10 % below its baseline; low, high: its 95 % interval.
        power: of a verdict "observed" if the claim were true at the claimed size, from the spread that was measured.
        values: (prepare seed, run seed, relative difference). spent: measured NFE of arm and baseline.
        samples: N. model: loader of the suite's model. date: when the run folder was made.
    """

    named: NamedClaim
    word: Word
    note: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    power: float | None = None
    values: tuple[tuple[int | None, int, float], ...] = ()
    spent: tuple[float, float] | None = None
    samples: int = 0
    model: str = ""
    date: str = ""

    def row(self) -> dict[str, Any]:
        """The claim's facts and the judgement, JSON-able; numbers with six digits."""
        content = asdict(self)
        named = content.pop("named")
        rounded = {key: _rounded(value) for key, value in content.items()}
        return {"id": named["id"], "claim": _rounded(named["claim"])} | rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class _NoVerdict(Exception):
    """The first argument is the word, the second the note."""


def judge(named: NamedClaim, records: Iterable[Record], date: str = "") -> Judgement:
    """The verdict on a claim from the records of one run.

    Args:
        named: the claim. records: of a run folder; those of other cells or another N are passed over.
        date: of the run.
    """
    claim, suite = named.claim, suite_of(named.claim)
    facts: dict[str, Any] = {"samples": suite.sampling.samples, "model": suite.model.loader, "date": date}
    held = {r.cell.id: r for r in records if r.kind == "quality" and r.samples == suite.sampling.samples}
    try:
        differences = [_difference(claim, pair, held) for pair in pairs(claim)]
    except _NoVerdict as reason:
        word, note = reason.args
        return Judgement(named, word, note, **facts)
    grid = np.array([d.value for d in differences]).reshape(-1, len(claim.seeds))
    effect, spread = float(grid.mean()), Spread.of(grid)
    found = spread.interval(effect)
    power = spread.power(claim.effect, claim.direction)
    word, note = verdict(claim, effect, spread)
    plugin = float(np.mean([d.plugin for d in differences]))
    biased = f"plug-in values say {100 * plugin:+.3g} %" if any(d.plugin != d.value for d in differences) else ""
    notes = [note, biased, *dict.fromkeys(n for d in differences for n in d.notes)]
    return Judgement(
        named,
        word,
        "; ".join(filter(None, notes)),
        effect,
        found.low,
        found.high,
        power,
        tuple((d.pair.prepare, d.pair.seed, d.value) for d in differences),
        (float(np.mean([d.spent[0] for d in differences])), float(np.mean([d.spent[1] for d in differences]))),
        **facts,
    )


@dataclass(frozen=True)
class _Difference:
    pair: Pair
    value: float
    plugin: float  # with the bias still in it
    spent: tuple[float, float]
    notes: tuple[str, ...]


def _difference(claim: Claim, pair: Pair, held: Mapping[str, Record]) -> _Difference:
    """(arm - baseline) / baseline at one seed, each without its estimated bias."""
    if pair.arm.id not in held or pair.baseline.id not in held:
        raise _NoVerdict("nothing to say", PARTLY_RUN if any(c.id in held for c in _cells(claim)) else NOT_RUN)
    arm, baseline = held[pair.arm.id], held[pair.baseline.id]
    (a, raw_a), (b, raw_b) = (
        _values(side, record, claim.metric) for side, record in (("arm", arm), ("baseline", baseline))
    )
    if _protocol(arm, claim.metric) != _protocol(baseline, claim.metric):
        raise _NoVerdict("nothing to say", f"the arms' protocols differ at seed {pair.seed}: not comparable")
    if min(b, raw_b) <= 0:
        why = f"the baseline's {claim.metric} is {b:.3g} at seed {pair.seed}; a relative difference needs one above 0"
        raise _NoVerdict("nothing to say", why)
    notes = [record.metrics[claim.metric].note for record in (arm, baseline)]
    if len({record.environment.get("class") for record in (arm, baseline)}) > 1:
        notes.append("arms of two fingerprint classes")
    spent = (arm.counts.get("nfe", 0.0), baseline.counts.get("nfe", 0.0))
    return _Difference(pair, (a - b) / b, (raw_a - raw_b) / raw_b, spent, tuple(filter(None, notes)))


def _protocol(record: Record, metric: str) -> dict[str, Any]:
    """What makes a metric of two records comparable; the features of other metrics do not count."""
    features = record.protocol_facts.get("features", {})
    needed = {name: features.get(name) for name in registry.build_metric(metric).needs}
    return record.protocol_facts | {"features": needed}


def _values(side: str, record: Record, metric: str) -> tuple[float, float]:
    """A metric of a record without its estimated bias, and with it."""
    where = f"{side}, {record.cell.method} at NFE {record.cell.nfe}, seed {record.cell.seed}"
    if record.status != "ok":
        word = "not supported" if record.status == "unsupported" else "error"
        raise _NoVerdict(word, f"{where}: {record.failure.message if record.failure else record.status}")
    if metric not in record.metrics:
        raise _NoVerdict("nothing to say", f"{where}: no {metric}: {record.missing.get(metric, 'was not measured')}")
    found = record.metrics[metric]
    return found.value - (found.bias or 0.0), found.value


# --- runs and the ledger --------------------------------------------------------------------------------------------


def judge_runs(chosen: Sequence[NamedClaim], folders: Sequence[Path]) -> list[Judgement]:
    """Each claim by the first run that has something to say of it.

    Raises:
        UserError, EvalbenchError: not a run folder, or a record cannot be read.
    """
    runs = [(store.records(), str(store.manifest()["created"])[:10]) for store in map(Store, folders)]
    return [min([judge(named, *run) for run in runs or [([], "")]], key=_silence) for named in chosen]


def _silence(judgement: Judgement) -> int:
    """How little a judgement says."""
    if judgement.values:
        return 0
    return 1 if judgement.word != "nothing to say" else 2 if judgement.note not in (NOT_RUN, PARTLY_RUN) else 3


def write(judged: Sequence[Judgement], file: Path) -> list[dict[str, Any]]:
    """Put judgements into a ledger and return its rows: same bytes for the same runs.

    A row stays when nothing new is known of its claim and the claim is still the one that was judged. Rows of claims
    that no method states any more go.
    """
    old = {row["id"]: row for row in text.read_ledger(file)} if file.is_file() else {}
    new = {judgement.named.id: judgement for judgement in judged}
    rows = []
    for named in registered():
        judgement = new.get(named.id) or judge(named, [])
        row, kept = judgement.row(), old.get(named.id)
        is_new = judgement.note not in (NOT_RUN, PARTLY_RUN)
        rows.append(kept if kept and not is_new and kept["claim"] == row["claim"] else row)
    write_atomic(file, text.to_json(rows))
    return rows


def claims_command(
    chosen: Sequence[NamedClaim], folders: Sequence[Path], *, json_: bool = False, ledger: Path | None = None
) -> int:
    """`evalbench claims`: judge, print, update a ledger; the exit code: 5 when an arm is an error row.

    Raises:
        UserError, EvalbenchError: as `judge_runs`.
    """
    judged = judge_runs(chosen, folders)
    rows = [judgement.row() for judgement in judged]
    if ledger is not None:
        write(judged, ledger)
    if json_:
        print(text.to_json(rows), end="")
    else:
        text.print_rows(rows)
    return 5 if any(row["word"] == "error" for row in rows) else 0
