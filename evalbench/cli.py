"""The command line: thin, and fast to start, because nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from evalbench.api import Placement, make_request
from evalbench.errors import EvalbenchError, UserError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from evalbench.progress import ProgressBar
    from evalbench.runner import Executor, Request
    from evalbench.spec import Record, Suite
    from evalbench.store import Store

DONE, USER, TOOL, ERROR_ROWS, INTERRUPTED = 0, 2, 4, 5, 130
KINDS = ("suites", "methods", "metrics")
Computed = TypeVar("Computed")

app = typer.Typer(
    name="evalbench",
    help="Benchmark diffusion and flow sampling methods: how good, how sure, at what cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

references = typer.Typer(help="Reference statistics of images: make, show, verify.")
app.add_typer(references, name="reference")

suites = typer.Typer(help="What suites need that is not in the package.")
app.add_typer(suites, name="suite")

Methods = Annotated[str | None, typer.Option("--methods", help="Methods, comma-separated: 'ddim(eta=0.5),unipc'.")]
Method = Annotated[list[str] | None, typer.Option("--method", help="One method; may be repeated.")]
Nfe = Annotated[str | None, typer.Option("--nfe", help="Budgets of network evaluations: 5,10,20.")]
BudgetUnit = Annotated[str, typer.Option("--budget-unit", help="What --nfe counts: nfe, evals (rows) or steps.")]
Guidance = Annotated[str | None, typer.Option("--guidance", help="Guidance scales: 1.5,3 (1 is off).")]
Samples = Annotated[int | None, typer.Option("--samples", help="Samples per cell.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Run seeds: 0,1,2.")]
MetricIds = Annotated[str | None, typer.Option("--metrics", help="Metric ids; default: the suite's.")]
Measure = Annotated[str, typer.Option("--measure", help="quality, latency, or quality,latency.")]
Processes = Annotated[
    int | None, typer.Option("--processes", help="Fresh processes of a latency run; 5, below them no intervals.")
]
LatencyRounds = Annotated[int | None, typer.Option("--latency-rounds", help="Rounds in each of them, at least; 5.")]
LatencyBatch = Annotated[str | None, typer.Option("--latency-batch", help="Samples per timed call: 1,64.")]
VariantText = Annotated[
    str, typer.Option("--variant", help="How latency runs execute the network: compile,bfloat16; eager.")
]
Batch = Annotated[int | None, typer.Option("--batch", help="Samples per network call; part of the fingerprint.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 or float64.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default results/runs/SUITE.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file with @register; may be repeated.")]
Modules = Annotated[list[str] | None, typer.Option("--module", help="Features NAME=FILE.py:OBJECT; may be repeated.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Ray workers; default one per GPU or CPU core.")]
Address = Annotated[str | None, typer.Option("--address", help="A running Ray cluster to join.")]
Serial = Annotated[bool, typer.Option("--serial", help="No Ray: everything in this process.")]
Device = Annotated[str, typer.Option("--device", help="Kind of device of a Ray cluster: A100, or a custom resource.")]
ShardText = Annotated[str, typer.Option("--shard", help="I/N: one process of a job array, no Ray; see docs/slurm.md.")]
LeaseTime = Annotated[float, typer.Option("--lease", help="Seconds until a vanished shard's chunk is taken over.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds per chunk after which a worker counts as hanging.")]
Save = Annotated[bool, typer.Option("--save-samples", help="Keep every image, for `evalbench export`.")]
SmallN = Annotated[bool, typer.Option("--allow-small-n", help="Compute set distances below their least N.")]
ShowPlan = Annotated[
    bool, typer.Option("--plan", help="Print cells, chunks, hours and disk, by a short probe; run nothing.")
]
ModelText = Annotated[
    str, typer.Option("--model", help="Instead of the suite's: my_model.py:load, a diffusers folder, or an id.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run what comes along: pickled checkpoints, programs of `command:`.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, debug: Debug = False) -> None:
    """Benchmark diffusion and flow sampling methods: how good, how sure, at what cost."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="Suite name, or the path of a TOML.")],
    methods: Methods = None,
    method: Method = None,
    nfe: Nfe = None,
    budget_unit: BudgetUnit = "nfe",
    guidance: Guidance = None,
    samples: Samples = None,
    seeds: Seeds = None,
    metrics: MetricIds = None,
    measure: Measure = "quality",
    processes: Processes = None,
    latency_rounds: LatencyRounds = None,
    latency_batch: LatencyBatch = None,
    variant: VariantText = "",
    batch: Batch = None,
    dtype: Dtype = None,
    out: Out = None,
    plugin: Plugin = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = "",
    serial: Serial = False,
    shard: ShardText = "",
    lease: LeaseTime = 60.0,
    timeout: Timeout = 3600.0,
    save_samples: Save = False,
    allow_small_n: SmallN = False,
    model: ModelText = "",
    trust_remote_code: Trust = False,
    plan: ShowPlan = False,
    until: Annotated[str, typer.Option("--until", help="decided: stop each cell when its verdict stands.")] = "",
    against: Annotated[Path | None, typer.Option("--against", help="Run folder that --until decides against.")] = None,
) -> None:
    """Run methods on a suite; the same command again continues, and adds cells to an existing run."""
    placement = Placement(serial, workers, address, device, shard, lease, timeout)
    measured = _words(measure, "--measure")
    sequential = _is_sequential(until, against, samples, measured) if until or against else False
    request = make_request(
        suite,
        methods=_methods(methods, method),
        nfe=_numbers(nfe, "--nfe", int),
        budget_unit=budget_unit,
        guidance=_numbers(guidance, "--guidance", float),
        seeds=_numbers(seeds, "--seeds", int),
        metrics=None if metrics is None else _words(metrics, "--metrics"),
        measure=measured,
        processes=processes,
        latency_rounds=latency_rounds,
        latency_batch=_numbers(latency_batch, "--latency-batch", int) or (),
        variant=variant,
        samples=samples,
        batch=batch,
        dtype=dtype,
        save_samples=save_samples,
        allow_small_n=allow_small_n,
        plugins=plugin or [],
        model=model,
        trust_remote_code=trust_remote_code,
    )
    folder = out or Path("results/runs") / request.suite.name
    if plan:
        _print_plan(request, folder, placement)
        return
    if sequential and against is not None:
        apart = out or folder.with_name(f"{request.suite.name}-until")
        raise typer.Exit(_run_until(request, apart, against, placement))
    _finish(_run(request, folder, placement), folder)


@app.command()
def quickstart(
    out: Out = None,
    workers: Workers = None,
    serial: Serial = False,
) -> None:
    """The main job on the embedded default: four samplers x three budgets on fashion-mixture, with a report."""
    placement = Placement(serial, workers)
    from evalbench.runner import light

    # one fresh process: enough to see the tables, too little for an interval, and the report says so
    request = light(make_request("fashion-mixture", measure=("quality", "latency")))
    folder = out or Path("results/runs/quickstart")
    _finish(_run(request, folder, placement), folder)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="suites, methods or metrics.")],
    json_: Annotated[bool, typer.Option("--json", help="A list of objects, for tools.")] = False,
    plugin: Plugin = None,
) -> None:
    """Names, one line each, what each needs, whether it can run here."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    from evalbench import catalogue

    _load_plugins(plugin)
    rows = catalogue.rows(kind)
    if json_:
        import json

        print(json.dumps(rows, indent=1))
        return
    _print_catalogue(rows)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    format_: Annotated[str, typer.Option("--format", help="md,html,csv,latex")] = "md,html,csv,latex",
) -> None:
    """Write table.csv, timings.csv and report/ (Markdown, HTML, figures, sample grids) of a run."""
    from evalbench.report import FORMATS

    formats = tuple(_words(format_, "--format"))
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    _write_report(run_folder, formats)


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="nfe, latency, pareto, breakdown, grid, rank-flip, tradeoff, claims.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders; of claims the ledger.")
    ] = None,
    style: Annotated[str, typer.Option("--style", help="neurips, icml or cvpr.")] = "neurips",
    width: Annotated[str, typer.Option("--width", help="column, or text for the whole width.")] = "column",
    metric: Annotated[str, typer.Option("--metric", help="On the y axis; default: the suite's primary.")] = "",
    against: Annotated[str, typer.Option("--against", help="On the x axis of tradeoff; default: a score.")] = "",
    axis: Annotated[str, typer.Option("--axis", help="x axis of pareto: cost, flops, nfe or latency.")] = "cost",
    nfe: Annotated[str | None, typer.Option("--nfe", help="Budgets of grid, rank-flip and tradeoff: 5,20.")] = None,
    guidance: Annotated[str | None, typer.Option("--guidance", help="Guidance scales; default: all.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for NAME.pdf, NAME.png and NAME.csv.")] = Path("figures"),
) -> None:
    """Draw one figure of a paper at the column width of a conference, with its caption."""
    from evalbench.report.paper import Choice
    from evalbench.report.paper import figure as draw

    choice = Choice(
        metric=metric,
        against=against,
        axis=axis,
        nfe=tuple(_numbers(nfe, "--nfe", int) or ()),
        guidance=tuple(_numbers(guidance, "--guidance", float) or ()),
    )
    drawn = draw(name, runs or [], out, style=style, width=width, choice=choice)
    for path in (drawn.pdf, drawn.png, drawn.csv):
        print(path)
    print(f"caption: {drawn.caption}")


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="Run folder to compare with.")],
    new: Annotated[Path, typer.Argument(help="Run folder to judge.")],
    tolerance: Annotated[
        str | None, typer.Option("--tolerance", help="METRIC=NUMBER,... in the metric's unit.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write JSON.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What is printed: console, md or json.")] = "console",
    strict: Annotated[bool, typer.Option("--strict", help="Undecided cells fail too.")] = False,
    control: Annotated[str, typer.Option("--control", help="Of errors over cells: holm, or bh for reports.")] = "holm",
    fast: Annotated[bool, typer.Option("--fast", help="Only: are the first 64 samples the same?")] = False,
    base_method: Annotated[str | None, typer.Option("--base-method", help="Compare this method of BASE ...")] = None,
    new_method: Annotated[str | None, typer.Option("--new-method", help="... with this one of NEW.")] = None,
) -> None:
    """Verdicts per cell: better, worse, indistinguishable, undecided; exit 1 for a regression, 3 not comparable."""
    from evalbench.compare import compare_command

    code = compare_command(
        base,
        new,
        tolerance,
        junit=junit,
        json_path=json_,
        fmt=format_,
        strict=strict,
        fast=fast,
        base_method=base_method,
        new_method=new_method,
        control=control,
    )
    raise typer.Exit(code)


@app.command()
def bisect(
    good: Annotated[str, typer.Argument(help="Commit whose samples are right.")],
    bad: Annotated[str, typer.Argument(help="Later commit whose samples are not.")],
    suite: Annotated[str, typer.Option("--suite", help="Suite that every commit runs.")] = "gmm-smooth",
    methods: Methods = None,
    nfe: Nfe = None,
    samples: Annotated[int, typer.Option("--samples", help="Samples per cell.")] = 64,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", help="Python file of the commit, with @register.")
    ] = None,
) -> None:
    """The first commit whose samples differ, found by the fast gate in a git worktree of its own."""
    from evalbench.bisect import Cells, bisect_command

    budgets = tuple(_numbers(nfe, "--nfe", int) or ())
    cells = Cells(suite, tuple(_methods(methods, None)), budgets, samples, tuple(plugin or ()))
    raise typer.Exit(bisect_command(good, bad, cells))


@app.command()
def curve(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    metrics: Annotated[str | None, typer.Option("--metrics", help="Metric ids; default the suite's primary.")] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="N: 512,1024,2048; default N, N/2, N/4, N/8.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object per cell.")] = False,
) -> None:
    """A run's metrics at several N from the same samples, with the line in 1/N, and whether the order holds."""
    from evalbench.curves import curve_command

    curve_command(run_folder, _words(metrics, "--metrics") if metrics else [], sizes, json_)


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder, .zip, or .npz of uint8 images.")],
    metrics: Annotated[str, typer.Option("--metrics", help="Metric ids: fd@fashion64,kid@fashion64.")],
    reference: Annotated[str | None, typer.Option("--reference", help="Statistics file, or images.")] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Text file, one class number per image.")] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Also at these N: 1000,2000; with the 1/N line.")] = None,
    captions: Annotated[str | None, typer.Option("--captions", help="JSON object or TSV: image id, caption.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Images of the same names to pair with.")] = None,
    plan: Annotated[str | None, typer.Option("--plan", help="balanced:10, or a file of ids and classes.")] = None,
    module: Modules = None,
    plugin: Plugin = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, with the protocol.")] = False,
    allow_small_n: SmallN = False,
) -> None:
    """Quality metrics of images that exist already."""
    from evalbench.score import score_command

    _load_plugins(plugin)
    _load_modules(module)
    wanted = _words(metrics, "--metrics")
    score_command(
        source,
        reference,
        wanted,
        json_,
        labels=labels,
        captions=captions,
        baseline=baseline,
        allow_small_n=allow_small_n,
        sizes=sizes,
        plan=plan,
    )


@references.command()
def make(
    source: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder, .zip, or .npz of uint8 images.")],
    features: Annotated[str, typer.Option("--features", help="Extractor, such as fashion64.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    keep: Annotated[int, typer.Option("--keep", help="Features to keep, for kid, precision and recall.")] = 10_240,
    labels: Annotated[str | None, typer.Option("--labels", help="Text file, one class number per image.")] = None,
    module: Modules = None,
    plugin: Plugin = None,
) -> None:
    """Write mean, covariance and features of images, with their facts."""
    from evalbench.reference_files import make_command

    _load_plugins(plugin)
    _load_modules(module)
    make_command(source, features, out, keep, labels)


@references.command()
def show(file: Annotated[Path, typer.Argument(help="Reference file.")]) -> None:
    """Print the facts of a reference file."""
    from evalbench.reference_files import show_command

    show_command(file)


@references.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Reference file.")],
    source: Annotated[str | None, typer.Option("--source", help="The images it was made of.")] = None,
) -> None:
    """Check digest, finite numbers, and that the covariance is one."""
    from evalbench.reference_files import verify_command

    verify_command(file, source)


@suites.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Suite name.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder with the files, in place of a download.")
    ] = None,
) -> None:
    """Model, prompts and images of a suite into EVALBENCH_CACHE; licences and sizes first."""
    from evalbench.fetching import fetch_suite

    for line in fetch_suite(name, source):
        print(line)


@app.command()
def weights(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Files to fetch; default: list.")
    ] = None,
) -> None:
    """Weights of published networks: what lies where, and fetch what is named, verified by SHA-256."""
    from evalbench.weights import command

    command(names or [])


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder made with --save-samples.")],
    layout: Annotated[
        str, typer.Option("--layout", help="folder, adm-npz, geneval, dpg; model-index, submission.")
    ] = "folder",
    to: Annotated[Path | None, typer.Option("--to", help="Where; default RUN/export.")] = None,
) -> None:
    """Samples of every cell for other tools, with a manifest; or its numbers for a model card or a leaderboard."""
    from evalbench.cards import FILES, write_card
    from evalbench.export import export_run

    if layout in FILES:
        print(write_card(run_folder, layout, to or run_folder / "export"))
        return
    for path in export_run(run_folder, layout, to or run_folder / "export"):
        print(path)


@app.command()
def pack(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="File; default RUN.evalbench.zip beside it.")] = None,
) -> None:
    """A run as one file: records, table, sums and scores, first images, digests; `evalbench verify FILE` checks it."""
    from evalbench.bundle import pack_command

    pack_command(run_folder, out)


@app.command("verify")
def verify_run(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a file of `evalbench pack`.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged, so that `evalbench run` computes it again.")
    ] = False,
) -> None:
    """Check records, chunks, preparations and the table of a run, or a packed run; exit 4 when something is wrong."""
    if run_folder.is_file():
        if repair:
            raise UserError(f"--repair is for run folders; '{run_folder}' is a file, pack the run again")
        from evalbench import bundle

        raise typer.Exit(bundle.verify_command(run_folder))
    from evalbench.upkeep import verify_command

    raise typer.Exit(verify_command(run_folder, repair=repair))


@app.command()
def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, of a run that may be running.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for tools.")] = False,
) -> None:
    """How far a run is: cells, speed, time left, what each worker does, errors so far."""
    from evalbench.status import status_command

    status_command(run_folder, json_=json_)


@app.command()
def gc(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    features: Annotated[
        bool,
        typer.Option(
            "--features", help="Also drop rows of features: they allow no new metric and no verdict after that."
        ),
    ] = False,
) -> None:
    """Remove what kills left behind; with --features also the large arrays. Records, counts and scores always stay."""
    from evalbench.upkeep import gc_command

    gc_command(run_folder, features=features)


@app.command()
def claims(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run folders to judge; default those in --out.")
    ] = None,
    run_: Annotated[bool, typer.Option("--run", help="Run both arms of each claim first, into --out.")] = False,
    only: Annotated[str | None, typer.Option("--only", help="Claims: dpm_solver,ddim/2; default all.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of run folders SUITE-N.")] = Path("results/runs/claims"),
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Update this file: results/claims.json.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="A list of objects, for tools.")] = False,
    plugin: Plugin = None,
    workers: Workers = None,
    address: Address = None,
    serial: Serial = False,
) -> None:
    """What runs say of each registered claim: holds, fails; observed, not observed, undecided here."""
    placement = Placement(serial, workers, address)
    if runs and run_:
        raise UserError("RUN judges what is there and --run computes; drop one of them")
    from evalbench import claims as found
    from evalbench.registry import read_plugin

    _load_plugins(plugin)
    chosen = found.select(None if only is None else _words(only, "--only"))
    if run_:
        plugins = dict(read_plugin(path) for path in plugin or [])
        _compute(lambda make, bar: found.run(chosen, out, make, bar, plugins), placement)
    folders = runs or sorted(file.parent for file in out.glob("*/manifest.json"))
    raise typer.Exit(found.claims_command(chosen, folders, json_=json_, ledger=ledger))


@app.command()
def check(
    suite: Annotated[str, typer.Argument(help="Suite name, or the path of a TOML.")],
    model: ModelText = "",
    trust_remote_code: Trust = False,
) -> None:
    """Whether a model is called as it was trained: denoise real images; exit 2 names what looks wrong."""
    request = make_request(suite, model=model, trust_remote_code=trust_remote_code)
    from evalbench.conventions import check_command

    print(check_command(request.suite, request.plugins))


@app.command("import-scores")
def import_scores(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder whose samples were judged.")],
    file: Annotated[Path, typer.Argument(help="JSON: evaluator, version, log, scores by cell.")],
) -> None:
    """Scores of an external evaluator as a metric of the run, with its name, version and log."""
    from evalbench.imports import import_command

    import_command(run_folder, file)


@app.command()
def replicate(
    kit: Annotated[
        str, typer.Argument(help="edm-cifar10, diff-sampler-cifar10, adm-evaluator, mlperf-sdxl, dit-xl-256.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Walk every cell on a random stand-in.")] = False,
    model: ModelText = "",
    trust_remote_code: Trust = False,
    nfe: Nfe = None,
    guidance: Guidance = None,
    images: Annotated[str, typer.Option("--images", help="Sample file of a kit that scores one.")] = "",
    reference: Annotated[str, typer.Option("--reference", help="Reference file of such a kit.")] = "",
    out: Out = None,
    workers: Workers = None,
    address: Address = None,
    serial: Serial = False,
) -> None:
    """A published table measured again: protocol, accepted values, cost; the run ends in one file to send back."""
    from evalbench import replicate as kits

    found = kits.load_kit(kit)
    _print_lines(kits.describe(found))
    if dry_run:
        _print_lines(kits.dry_run(found))
        return
    given = kits.Given(
        model,
        trust_remote_code,
        tuple(_numbers(nfe, "--nfe", int) or ()),
        tuple(_numbers(guidance, "--guidance", float) or ()),
        images,
        reference,
    )
    if found.images:
        _print_lines(kits.score(found, given))
        return
    folder = out or Path("results/runs") / found.name
    records = _run(kits.request_of(found, given), folder, Placement(serial, workers, address))
    _print_lines(kits.judged(found, records))

    from evalbench.bundle import pack_command

    pack_command(folder, None)
    _finish(records, folder)


@app.command()
def doctor() -> None:
    """What works on this machine and what is missing, with the line to type."""
    from evalbench import catalogue

    console = _console()
    for name, ok, text in catalogue.checkup():
        console.print(f"[{'green' if ok else 'yellow'}]{'ok     ' if ok else 'missing'}[/] {name:<28} {text}")


# --- what the commands share ----------------------------------------------------------------------------------------


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{option} '{text}': an entry is empty; write a comma-separated list")
    return words


def _methods(methods: str | None, method: list[str] | None) -> list[str]:
    if methods is None:
        return method or []
    from evalbench.registry import parse_methods

    return [*parse_methods(methods), *(method or [])]


def _numbers(text: str | None, option: str, kind: type[Any]) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(word) for word in _words(text, option)]
    except ValueError:
        noun = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} '{text}': write {noun} separated by commas") from None


def _run(request: Request, folder: Path, placement: Placement) -> list[Record]:
    from evalbench import runner

    shard, policy = placement.claim(), placement.policy()
    return _compute(
        lambda make, bar: runner.run(request, folder, make, bar, shard=shard, policy=policy),
        placement,
    )


def _is_sequential(until: str, against: Path | None, samples: int | None, measure: list[str]) -> bool:
    from evalbench.sequential import check_options

    return check_options(until, against, samples, measure)


def _run_until(request: Request, folder: Path, against: Path, placement: Placement) -> int:
    """Print where each cell stopped; the exit code."""
    from evalbench.sequential import exit_code, until_decided

    stopped = _compute(lambda make, bar: list(until_decided(request, folder, against, make, bar)), placement)
    for one in stopped:
        print(one.text)
    print("verdicts only: cells that stopped early have unequal N and are no table values")
    return exit_code(stopped)


def _compute(work: Callable[[Callable[[], Executor], ProgressBar], Computed], placement: Placement) -> Computed:
    """Do work that needs an executor, with a progress bar; let go of the executor."""
    from evalbench.progress import ProgressBar

    made: list[Executor] = []

    def executor() -> Executor:
        made.append(placement.executor())
        return made[0]

    try:
        with ProgressBar(_console(stderr=True)) as bar:
            return work(executor, bar)
    finally:
        for one in made:
            one.shutdown()


def _finish(records: list[Record], folder: Path) -> None:
    """Write the report, print the table, name the files; exit 5 when a row is an error."""
    from evalbench.report import print_table
    from evalbench.runner import needs_attention

    paths, suite, store = _write_report(folder, ("md", "html", "csv"), quiet=True)
    wanted = {record.cell.id for record in records}
    shown = [record for record in store.records() if record.cell.id in wanted]
    print_table(shown, suite, _console())
    for name in ("table", "html"):
        if name in paths:
            print(f"{name}: {paths[name]}")
    if needs_attention(records):
        raise typer.Exit(ERROR_ROWS)


def _write_report(folder: Path, formats: tuple[str, ...], quiet: bool = False) -> tuple[dict[str, Path], Suite, Store]:
    from evalbench.compare import Pairs
    from evalbench.report import build_report
    from evalbench.spec import parse_suite
    from evalbench.store import Store

    store = Store(folder)
    paths = build_report(store, folder / "report", formats, Pairs(store))
    if not quiet:
        for name, path in paths.items():
            print(f"{name}: {path}")
    return paths, parse_suite(store.manifest()["suite"], "", where=f"manifest of {folder}"), store


def _print_plan(request: Request, folder: Path, placement: Placement) -> None:
    from evalbench import forecast
    from evalbench.runner import make_plan

    plan = make_plan(request)
    found = forecast.forecast(plan, folder, forecast.probe(plan) if "quality" in request.measure else None)
    print("\n".join(forecast.lines(found, 1 if placement.serial else placement.workers or forecast.workers_here())))


def _load_plugins(paths: list[str] | None) -> None:
    from evalbench.registry import load_plugins, read_plugin

    load_plugins(dict(map(read_plugin, paths or [])))


def _load_modules(words: list[str] | None) -> None:
    if words:
        from evalbench.metrics.modules import load_modules

        load_modules(words)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_catalogue(rows: list[dict[str, Any]]) -> None:
    """One line each, never wrapped: names are there to be copied and grepped."""
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        needs = f" [needs {', '.join(row['requires'])}]" if row["requires"] else ""
        here = "" if row["available"] else f" NOT HERE: {row['reason']}"
        print(f"{row['name']:<{width}}  {row['summary']}{needs}{here}")


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: one line per error, and the exit codes of the design; nothing else ever exits 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")  # valid anywhere on the line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    signal.signal(signal.SIGTERM, _interrupt)  # what a cluster sends before it takes the machine back
    sys.exit(_guarded(debug))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _guarded(debug: bool) -> int:
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
            raise KeyboardInterrupt
        return int(code or DONE)
    except EvalbenchError as error:
        return _complain(str(error), error.exit_code, debug)
    except typer.TyperException as error:
        return _complain(error.format_message().replace("\n", " "), USER, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted; run the same command again to continue", INTERRUPTED, False)
    except BrokenPipeError:
        return DONE
    except Exception as error:
        return _complain(f"evalbench failed: {type(error).__name__}: {error}; add --debug", TOOL, debug)


def _complain(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr)
    return code
