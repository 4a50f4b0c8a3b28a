"""Claims: which can be stated, what is run for them, and which word an interval deserves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MISBEHAVING, CountingExecutor

from evalbench import claim_words, claims, registry
from evalbench.claim_words import Spread, verdict
from evalbench.claims import Judgement, NamedClaim
from evalbench.errors import EvalbenchError, UserError
from evalbench.interfaces import Claim
from evalbench.report import claims as text
from evalbench.spec import Failure, MetricValue, Record

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "results" / "claims.json"
SPREAD = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]) / math.sqrt(0.625)  # five seeds, mean 0, standard deviation 1
CLAIM = Claim(
    text="A multistep solver has a smaller error than DDIM from the same noise.",
    suite="gmm-smooth",
    arm="dpm-solver++",
    baseline="ddim",
    nfe=5,
    metric="paired-median@identity",
    direction="lower",
    effect=0.1,
    level="E",
    author="catalogue",
    transfer="fair",
    source="a test",
    samples=64,
    witness="tests/methods/test_agreement.py",
)


@pytest.fixture(autouse=True)
def no_other_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the claims of this project: what they say is not these tests' business."""
    for name in {registry.get("method", name).__module__ for name in registry.names("method")}:
        monkeypatch.delattr(sys.modules.get(name), "CLAIM", raising=False)


def named(**changes: Any) -> NamedClaim:
    return NamedClaim("test/1", replace(CLAIM, **changes))


def records(claim: Claim, differences: Any, *, baseline: float = 2.0, **changes: Any) -> list[Record]:
    """Records of both arms whose relative differences are those given, one per pair."""
    found: dict[str, Record] = {}
    for pair, difference in zip(claims.pairs(claim), np.ravel(differences), strict=True):
        for cell, value in ((pair.baseline, baseline), (pair.arm, baseline * (1 + difference))):
            content: dict[str, Any] = {
                "kind": "quality",
                "status": "ok",
                "cell": cell,
                "samples": claim.samples,
                "metrics": {claim.metric: MetricValue(value=value, n=claim.samples)},
                "counts": {"nfe": cell.nfe},
            }
            found[cell.id] = Record(**content | changes)
    return list(found.values())


# --- the words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mean", "sd", "word", "note"),
    [
        ({}, -0.10, 0.01, "observed here", ""),
        ({}, -0.05, 0.01, "observed here", "excludes the claimed size of 10 %"),
        ({}, 0.00, 0.01, "not observed here", ""),
        ({}, 0.30, 0.01, "not observed here", ""),
        ({}, -0.05, 0.20, "undecided here", "seeds would decide"),
        ({}, 0.30, 0.20, "undecided here", "seeds would decide"),  # a true claim would seldom be found so
        ({"witness": ""}, 0.00, 0.01, "undecided here", "no second witness"),
        ({"witness": ""}, -0.10, 0.01, "observed here", ""),
        ({"direction": "higher"}, 0.10, 0.01, "observed here", ""),
        ({"direction": "higher"}, -0.10, 0.01, "not observed here", ""),
        ({"direction": "equal"}, 0.05, 0.01, "observed here", ""),
        ({"direction": "equal"}, -0.20, 0.01, "not observed here", ""),
        ({"direction": "equal"}, 0.095, 0.02, "undecided here", "seeds would decide"),
        ({"direction": "equal"}, 0.1, 0.02, "undecided here", "no number of seeds"),  # on the border itself
        ({"level": "M"}, -0.10, 0.01, "holds", ""),
        ({"level": "M", "witness": ""}, 0.00, 0.01, "fails", ""),
        ({"level": "M"}, -0.05, 0.20, "nothing to say", "no verdict: "),
        ({"level": "M", "direction": "equal", "effect": 1e-6}, 0.0, 0.0, "holds", ""),
        ({"level": "M", "direction": "equal", "effect": 1e-6}, 1e-3, 0.0, "fails", ""),
    ],
)
def test_words(changes: dict[str, Any], mean: float, sd: float, word: str, note: str) -> None:
    claim = named(**changes)
    found = claims.judge(claim, records(claim.claim, mean + sd * SPREAD), "2026-01-02")
    assert found.word == word
    assert note in found.note
    assert bool(note) == bool(found.note)
    assert found.effect == pytest.approx(mean, abs=1e-12)
    half = 2.7764451 * sd / math.sqrt(5)  # Student's t, four degrees of freedom
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-9)
    assert [seed for _, seed, _ in found.values] == [0, 1, 2, 3, 4]
    assert (found.samples, found.model, found.date, found.spent) == (64, "gmm", "2026-01-02", (5, 5))


def test_the_seeds_advised_decide() -> None:
    found = claims.judge(named(), records(CLAIM, -0.05 + 0.2 * SPREAD))
    seeds = int(found.note.split()[0])
    assert seeds > 5

    def word(n: int) -> str:
        claim = replace(CLAIM, seeds=tuple(range(n)))
        return verdict(claim, -0.05, Spread(((0.2**2, n),)))[0]

    assert word(seeds - 1) == "undecided here"
    assert word(seeds) == "observed here"


def test_a_metric_enters_without_its_bias() -> None:
    found = records(CLAIM, -0.1 + 0.01 * SPREAD)  # plug-in values say lower by 10 %
    arms = {pair.arm.id for pair in claims.pairs(CLAIM)}
    biased = []
    for record in found:
        bias = -0.2 if record.cell.id in arms else 0.5
        value = record.metrics[CLAIM.metric].model_copy(update={"bias": bias, "note": "bias-dominated"})
        biased.append(record.model_copy(update={"metrics": {CLAIM.metric: value}}))
    judged = claims.judge(named(), biased)
    assert judged.effect == pytest.approx((1.8 + 0.2) / 1.5 - 1)
    assert (judged.word, judged.note) == ("not observed here", "plug-in values say -10 %; bias-dominated")


def test_frechet_values_without_bias_differ_as_verdicts_say() -> None:
    """The half-split extrapolation of claims and the expansion of verdicts estimate one number."""
    from evalbench.metrics.frechet import Fit, Gaussian, moments
    from evalbench.metrics.unbiased import paired_difference

    rng = np.random.default_rng(0)
    a = rng.standard_normal((400, 3))
    b, reference = 0.9 * a + 0.1, Gaussian(np.zeros(3), np.eye(3))
    free = [fit.whole.distance - fit.bias for fit in (Fit((x,), reference, moments(x)) for x in (a, b))]
    found = paired_difference(a, b, reference)
    assert free[0] - free[1] == pytest.approx(found.value, abs=found.error.se / 2)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word", "note"),
    [
        (
            {"status": "error", "failure": Failure(type="BudgetExceeded", message="budget 5, spent 9")},
            "error",
            "arm, dpm-solver++ at NFE 5, seed 3: budget 5, spent 9",
        ),
        (
            {"status": "unsupported", "failure": Failure(type="Unsupported", message="not supported: needs split")},
            "not supported",
            "needs split",
        ),
        (
            {"metrics": {}, "missing": {CLAIM.metric: "the suite has no fine solution"}},
            "nothing to say",
            "no paired-median@identity: the suite has no fine solution",
        ),
        ({"protocol_facts": {"allow_small_n": True}}, "nothing to say", "protocols differ at seed 3"),
        ({"samples": 128}, "nothing to say", claims.PARTLY_RUN),
        ({"kind": "latency"}, "nothing to say", claims.PARTLY_RUN),
    ],
)
def test_what_has_no_verdict_says_why(change: dict[str, Any], word: str, note: str) -> None:
    found = records(CLAIM, -0.1 + 0.01 * SPREAD)
    spoiled = claims.pairs(CLAIM)[3].arm.id
    found = [r.model_copy(update=change) if r.cell.id == spoiled else r for r in found]
    judged = claims.judge(named(), found)
    assert judged.word == word
    assert note in judged.note
    assert judged.effect is None
    assert note.split(":")[0] in text.table([judged.row()]).replace("\\", "")  # a visible row


def test_no_run_and_no_positive_baseline() -> None:
    assert (claims.judge(named(), []).word, claims.judge(named(), []).note) == ("nothing to say", claims.NOT_RUN)
    zero = claims.judge(named(), records(CLAIM, SPREAD, baseline=0.0))
    assert zero.word == "nothing to say"
    assert "needs one above 0" in zero.note


def test_other_metrics_features_do_not_make_arms_incomparable() -> None:
    found = records(CLAIM, -0.1 + 0.01 * SPREAD, protocol_facts={"features": {"identity": "a"}})
    one = claims.pairs(CLAIM)[0].arm.id
    for changed, word in (({"identity": "a", "modes": "b"}, "observed here"), ({"identity": "c"}, "nothing to say")):
        facts = {"protocol_facts": {"features": changed}}
        again = [r.model_copy(update=facts) if r.cell.id == one else r for r in found]
        assert claims.judge(named(), again).word == word


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "dpm-solver+++"}, "cannot read method"),
        ({"arm": "dpm-solvr"}, "unknown method 'dpm-solvr'; did you mean 'dpm-solver'?"),
        ({"baseline": "ddim(etta=1)"}, "did you mean 'eta'?"),
        ({"suite": "gmm-smoth"}, "did you mean 'gmm-smooth'?"),
        ({"metric": "paired-mdian@identity"}, "did you mean 'paired-median'?"),
        ({"direction": "less"}, "unknown direction 'less'"),
        ({"level": "P"}, "unknown level 'P'"),
        ({"author": "us"}, "unknown author 'us'"),
        ({"transfer": "good"}, "unknown transfer 'good'"),
        ({"seeds": (0, 1, 2, 3)}, "at least 5 different ones"),
        ({"seeds": (0, 1, 2, 3, 3, 4)}, "at least 5 different ones"),
        ({"seeds": (-1, 0, 1, 2, 3)}, "at least 5 different ones"),
        ({"effect": 0.0}, "effect 0.0: a size relative to the baseline, above 0"),
        ({"effect": math.nan}, "effect nan"),
        ({"nfe": 0}, "nfe is at least 1"),
        ({"baseline_nfe": -1}, "baseline_nfe and samples are 0"),
        ({"text": " "}, "neither may be empty"),
        ({"source": ""}, "neither may be empty"),
        ({"arm": "ddim()"}, "arm and baseline are one cell: ddim at NFE 5"),
        ({"prepare_seeds": (0, 1, 2)}, "no part of 'dpm-solver++' has a setting 'seed'"),
    ],
)
def test_bad_claims_are_one_clear_line(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[registry.get("method", "ddim").__module__]
    monkeypatch.setattr(module, "CLAIM", (CLAIM, replace(CLAIM, **changes)), raising=False)
    with pytest.raises(UserError) as raised:
        claims.registered()
    assert str(raised.value).startswith("claim ddim/2: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_something_else_than_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[registry.get("method", "ddim").__module__]
    monkeypatch.setattr(module, "CLAIM", "DDIM is good", raising=False)
    with pytest.raises(UserError, match=r"claim ddim/1: CLAIM holds a str; write CLAIM = Claim\(...\)"):
        claims.registered()


def test_claims_are_found_in_order_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    solvers = {name: sys.modules[registry.get("method", name).__module__] for name in ("ddim", "unipc")}
    monkeypatch.setattr(solvers["unipc"], "CLAIM", CLAIM, raising=False)
    many = tuple(replace(CLAIM, nfe=nfe) for nfe in range(1, 12))
    monkeypatch.setattr(solvers["ddim"], "CLAIM", many, raising=False)
    found = claims.registered()
    mine = [n for n in found if n.id.partition("/")[0] in ("ddim", "unipc")]
    assert [n.id for n in mine] == [f"ddim/{k}" for k in range(1, 12)] + ["unipc/1"]
    assert [n.claim.nfe for n in mine] == [*range(1, 12), 5]
    assert [n.id for n in claims.select(["unipc", "ddim/10"])] == ["ddim/10", "unipc/1"]
    assert claims.select(None) == found
    with pytest.raises(UserError, match="did you mean 'unipc/1'"):
        claims.select(["unipcc/1"])


# --- statistics -----------------------------------------------------------------------------------------------------


def test_power_is_that_of_the_noncentral_t() -> None:
    from scipy.stats import nct, t

    for n in (5, 8, 20):
        for size in (0.02, 0.1, 0.3):
            spread = Spread(((0.1**2, n),))
            expected = nct.sf(t.ppf(0.975, n - 1), n - 1, size / spread.se)
            assert spread.power(size, "lower") == spread.power(size, "higher") == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("direction", ["lower", "equal"])
def test_power_grows_with_effect_and_seeds(direction: str) -> None:
    spread = Spread(((0.1**2, 5),))
    by_size = [spread.power(size, direction) for size in (0.05, 0.1, 0.2, 0.4, 0.8)]
    by_seeds = [spread.with_seeds(n).power(0.08, direction) for n in (5, 7, 10, 15, 30)]
    for powers in (by_size, by_seeds):
        assert powers == sorted(powers)
        assert powers[0] < 0.5 < 0.95 < powers[-1]
    assert Spread(((0.0, 5),)).power(1e-9, direction) == 1.0


def _shares(claim: Claim, grids: np.ndarray) -> dict[str, float]:
    """How often each word is said of differences (repetitions, K, S)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim_words, "_advice", lambda *_: "")  # slow, and of no account here
        words = [verdict(claim, float(grid.mean()), Spread.of(grid))[0] for grid in grids]
    return {word: words.count(word) / len(words) for word in sorted(set(words))}


def _crossed(rng: np.random.Generator, n: int, prepare: float, seed: float, both: float) -> np.ndarray:
    """Differences (n, 3, 5) with these standard deviations over prepare seeds, run seeds, and both."""
    parts = (prepare, (n, 3, 1)), (seed, (n, 1, 5)), (both, (n, 3, 5))
    return np.asarray(sum(sd * rng.standard_normal(shape) for sd, shape in parts))


REPETITIONS = 400
SLACK = 3 * math.sqrt(0.05 * 0.95 / REPETITIONS)  # three standard errors of a share of 5 %


@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_two_equal_arms_are_seldom_told_apart(direction: str) -> None:
    rng = np.random.default_rng(7)
    shared = rng.standard_normal((2, REPETITIONS, 1, 5))
    arm, baseline = (1 + 0.1 * (shared[0] + 0.5 * rng.standard_normal((REPETITIONS, 1, 5))) for _ in range(2))
    said = _shares(replace(CLAIM, direction=direction), (arm - baseline) / baseline)
    assert said.get("observed here", 0.0) <= 0.05 + SLACK
    assert said["undecided here"] > 0.5


@pytest.mark.parametrize(
    "spread", [(0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.1, 0.1, 0.1), (0.1, 0.05, 0.02), (0.02, 0.1, 0.05)]
)
def test_nor_with_a_random_prepare(spread: tuple[float, float, float]) -> None:
    grids = _crossed(np.random.default_rng(8), REPETITIONS, *spread)
    assert _shares(CLAIM, grids).get("observed here", 0.0) <= 0.05 + SLACK
    # to take the K x S differences for as many independent ones would be wrong where the prepare decides
    naive = _shares(CLAIM, grids.reshape(REPETITIONS, 1, 15)).get("observed here", 0.0)
    assert spread[0] < 0.1 or spread[1:] == (0.1, 0.1) or naive > 0.2


def test_arms_as_different_as_the_tolerance_seldom_pass_for_equal() -> None:
    rng = np.random.default_rng(9)
    said = _shares(replace(CLAIM, direction="equal"), 0.1 + 0.02 * rng.standard_normal((REPETITIONS, 1, 5)))
    assert said.get("observed here", 0.0) <= 0.05 + SLACK
    assert said.get("not observed here", 0.0) <= 0.05 + SLACK


def test_power_is_the_share_of_true_claims_observed() -> None:
    rng = np.random.default_rng(10)
    noise = 0.08 * rng.standard_normal((4 * REPETITIONS, 1, 5))
    for direction, mean in (("lower", -0.1), ("equal", 0.0)):
        share = _shares(replace(CLAIM, direction=direction), mean + noise).get("observed here", 0.0)
        power = Spread(((0.08**2, 5),)).power(0.1, direction)
        assert share == pytest.approx(power, abs=3 * math.sqrt(0.25 / len(noise)))


def test_no_true_claim_is_called_not_observed_too_often() -> None:
    rng = np.random.default_rng(11)
    for sd in (0.02, 0.05, 0.2):
        said = _shares(CLAIM, -0.1 + sd * rng.standard_normal((REPETITIONS, 1, 5)))
        assert said.get("not observed here", 0.0) <= 0.05 + SLACK


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_same_bytes_from_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "registered", lambda: [named()])
    found = records(CLAIM, -0.1 + 0.01 * SPREAD)
    for name, content in (("a", found), ("b", found[::-1])):
        claims.write([claims.judge(named(), content, "2026-01-02")], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = text.read_ledger(tmp_path / "a")
    assert rows == [claims.judge(named(), found, "2026-01-02").row()]
    assert text.page(rows) == text.page(json.loads(text.to_json(rows)))


def test_a_ledger_keeps_what_it_knows_and_forgets_changed_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "claims.json"
    known = claims.judge(named(), records(CLAIM, -0.1 + 0.01 * SPREAD))
    other = NamedClaim("test/2", replace(CLAIM, nfe=7))
    monkeypatch.setattr(claims, "registered", lambda: [named(), other])
    assert [row["word"] for row in claims.write([known], ledger)] == ["observed here", "nothing to say"]
    silent = claims.judge(named(), [])
    assert [row["word"] for row in claims.write([silent], ledger)] == ["observed here", "nothing to say"]
    assert [row["word"] for row in claims.write([], ledger)] == ["observed here", "nothing to say"]
    failed = Judgement(named(), "error", "arm: the method broke")
    assert [row["word"] for row in claims.write([failed], ledger)] == ["error", "nothing to say"]
    claims.write([known], ledger)
    monkeypatch.setattr(claims, "registered", lambda: [named(effect=0.05)])  # the claim was changed after its run
    assert [(row["word"], row["note"]) for row in claims.write([], ledger)] == [("nothing to say", claims.NOT_RUN)]
    ledger.write_text("[]x")
    with pytest.raises(EvalbenchError, match="is not a ledger of claims"):
        claims.write([], ledger)


def test_a_table_holds_every_column_and_no_markup_of_others() -> None:
    claim = named(text="a | b <script>alert(1)</script>", source="[x](javascript:1)")
    rows = [claims.judge(claim, records(claim.claim, -0.1 + 0.01 * SPREAD), "2026-01-02").row()]
    lines = text.table(rows).splitlines()
    assert lines[0].split(" | ")[0] == "| claim"
    cells = lines[2].replace(r"\|", "").split("|")[1:-1]
    assert len(cells) == len(text.HEADER)
    assert [cell.strip() for cell in cells[2:]] == [
        *("gmm-smooth", "E", "catalogue", "fair", "observed here"),
        *("-10.0 ± 1.2 %", "lower by 10 %", "&gt; 99 %", "gmm", "2026-01-02"),
    ]
    for page in (text.table(rows), text.page(rows)):
        assert "<script" not in page
        assert "[x](" not in page


def test_a_table_between_markers() -> None:
    assert text.insert(f"a\n{text.BEGIN}\nold\n{text.END}\nb\n", []) == (
        f"a\n{text.BEGIN}\nNo method states a claim yet.\n{text.END}\nb\n"
    )
    with pytest.raises(EvalbenchError, match="the page has no lines"):
        text.insert("a\nb\n", [])


def test_the_readme_shows_the_ledger() -> None:
    readme = (ROOT / "README.md").read_text()
    if text.BEGIN not in readme or not LEDGER.is_file():
        pytest.skip("README.md has no claims section yet, or results/claims.json is not there")
    rows = text.read_ledger(LEDGER)
    assert text.insert(readme, rows) == readme, "run: python docs/make.py claims"
    assert (ROOT / "docs" / "claims.md").read_text() == text.page(rows), "run: python docs/make.py claims"


@pytest.fixture(scope="module")
def built_in() -> dict[str, dict[str, Any]]:
    """Facts of this project's claims by id; from a process of its own, since other tests register methods."""
    code = "from evalbench import claims; from evalbench.report.claims import to_json\n" + (
        "print(to_json([claims.judge(named, []).row() for named in claims.registered()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["id"]: row["claim"] for row in json.loads(done.stdout)}


def test_claims_of_this_project_can_be_judged_and_name_tests_that_exist(built_in: dict[str, dict[str, Any]]) -> None:
    complaints = []
    for name, claim in built_in.items():
        file, _, test = claim["witness"].partition("::")
        if file and not (ROOT / file).is_file():
            complaints.append(f"{name}: {file} does not exist")
        elif test and f"def {test.partition('[')[0]}(" not in (ROOT / file).read_text():
            complaints.append(f"{name}: {file} has no test {test}")
    assert not complaints, "\n".join(["", *complaints])


@pytest.mark.skipif(not LEDGER.is_file(), reason="results/claims.json is not there yet")
def test_the_ledger_is_about_the_claims_that_are_stated(built_in: dict[str, dict[str, Any]]) -> None:
    for row in text.read_ledger(LEDGER):
        assert built_in.get(row["id"]) == row["claim"], f"{row['id']} changed after it was judged; run: make claims"


# --- what is run ----------------------------------------------------------------------------------------------------


def test_claims_that_share_cells_and_metrics_share_runs() -> None:
    first, second = named(), NamedClaim("test/2", replace(CLAIM, arm="unipc", metric="sw@identity"))
    other_n = NamedClaim("test/3", replace(CLAIM, samples=128))
    every = [first, second, other_n]
    todo = claims.requests(every, every, {})
    cells = [(folder, m, request.metrics) for folder, request in todo for m in request.methods]
    both = ("paired-median@identity", "sw@identity")
    assert sorted(cells) == [
        ("gmm-smooth-128", "ddim", both[:1]),
        ("gmm-smooth-128", "dpm-solver++", both[:1]),
        ("gmm-smooth-64", "ddim", both),
        ("gmm-smooth-64", "dpm-solver++", both[:1]),
        ("gmm-smooth-64", "unipc", both[1:]),
    ]
    assert all(request.seeds == (0, 1, 2, 3, 4) and request.nfe == (5,) for _, request in todo)
    assert [request.suite.sampling.samples for folder, request in todo] == [int(f.split("-")[2]) for f, _ in todo]
    # chosen alone, a shared cell is still measured for the others: a poorer record would replace a richer one
    alone = {m: request.metrics for _, request in claims.requests([first], every, {}) for m in request.methods}
    assert alone == {"ddim": both, "dpm-solver++": both[:1]}


# --- a run ----------------------------------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass, field

from evalbench.engine import PlannedSolver
from evalbench.interfaces import Claim, Solver
from evalbench.registry import build_method, register


@register("claiming")
@dataclass(frozen=True)
class Claiming(Solver):
    """DDIM that ends a little off, by its seed: what a random search might leave."""

    seed: int = 0

    def sample(self, denoiser, x_T, cond, nfe, noise):
        return build_method("ddim").solver.sample(denoiser, x_T, cond, nfe, noise) + 0.02 * self.seed


COMMON = dict(suite="SUITE", metric="paired-median@identity", level="E", author="catalogue", transfer="fair",
              source="a test", samples=64)
CLAIM = (
    Claim("DPM-Solver++(2M) errs less than DDIM.", arm="dpm-solver++", baseline="ddim", nfe=5, direction="lower",
          effect=0.1, **COMMON),
    Claim("DDIM with 10 evaluations errs less than with 5.", arm="ddim", baseline="ddim", nfe=10, baseline_nfe=5,
          direction="lower", effect=0.1, **COMMON),
    Claim("An offset by seed is DDIM up to 1 %.", arm="claiming", baseline="ddim", nfe=5, direction="equal",
          effect=0.01, prepare_seeds=(0, 1, 2), **COMMON),
    Claim("A method that breaks.", arm="raises", baseline="ddim", nfe=5, direction="lower", effect=0.1, **COMMON),
    Claim("A method that needs more.", arm="needs-split", baseline="ddim", nfe=5, direction="lower", effect=0.1,
          **COMMON),
)
'''


@pytest.fixture
def stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A plug-in with claims on a small suite; its parts are forgotten afterwards."""
    for kind, parts in registry._parts.items():
        registry.names(kind)
        monkeypatch.setitem(registry._parts, kind, dict(parts))
    monkeypatch.setattr(registry, "_origins", dict(registry._origins))
    suite = tmp_path / "small.toml"
    suite.write_text(
        'extends = "gmm-smooth"\nname = "small"\n'
        '[sampling]\nbatch = 32\nchunk = 32\n[solution]\nmethod = "heun"\nnfe = 64\n'
    )
    plugins = {"claiming.py": PLUGIN.replace("SUITE", str(suite)), "misbehaving.py": MISBEHAVING}
    loaded = [registry.load_plugin(source, name).__name__ for name, source in plugins.items()]
    yield plugins
    for name in loaded:
        sys.modules.pop(name)


def test_a_random_prepare_needs_three_seeds(stated: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.get("method", "claiming"), "prepares", "once")
    claim = claims.select(["claiming/3"])[0].claim
    for seeds, message in (((), "'claiming' prepares at random: state prepare_seeds"), ((0, 1), "at least 3")):
        with pytest.raises(UserError, match=message):
            claims.check(replace(claim, prepare_seeds=seeds))


def test_only_what_is_prepared_is_repeated(stated: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # the baseline has a seed too, but of its adaptive steps alone
    claim = replace(claims.select(["claiming/3"])[0].claim, baseline="dpm-solver")
    claims.check(claim)
    assert {pair.baseline.method for pair in claims.pairs(claim)} == {"dpm-solver"}
    seeded = ["claiming", "claiming(seed=1)", "claiming(seed=2)"]
    assert [pair.arm.method for pair in claims.pairs(claim)[::5]] == seeded
    monkeypatch.setattr(registry.get("method", "claiming"), "prepares", "once")
    both = replace(claim, arm="claiming", baseline="claiming", baseline_nfe=10)
    assert [(p.arm.method, p.baseline.method) for p in claims.pairs(both)[::5]] == [(s, s) for s in seeded]
    other_way = replace(claim, arm="ddim", baseline="claiming")
    claims.check(other_way)
    assert {pair.arm.method for pair in claims.pairs(other_way)} == {"ddim"}
    assert [pair.baseline.method for pair in claims.pairs(other_way)[::5]] == seeded


def test_claims_of_a_plugin_are_run_once_and_judged(
    stated: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = claims.select(["claiming"])
    assert [n.id for n in chosen] == [f"claiming/{k}" for k in range(1, 6)]
    assert [n.word for n in claims.judge_runs(chosen, [])] == ["nothing to say"] * 5

    executor = CountingExecutor()
    # one claim alone first, then all: nothing is computed twice
    (folder,) = claims.run(chosen[:1], tmp_path / "out", lambda: executor, plugins=stated)
    assert folder == tmp_path / "out" / "small-64"
    alone = len(executor.jobs)
    assert alone == 2 * 5 * (2 + 1)  # chunks x seeds x (two arms and the fine solution)
    (first,) = claims.judge_runs(chosen[:1], [folder])
    claims.run(chosen, tmp_path / "out", lambda: executor, plugins=stated)
    jobs = [(job.cell.id, job.chunk) for job in executor.jobs]
    assert len(jobs) == len(set(jobs))
    computed = {(job.cell.method, job.cell.nfe) for job in executor.jobs[alone:]}
    assert computed == {
        ("ddim", 10),
        *((method, 5) for method in ("claiming", "claiming(seed=1)", "claiming(seed=2)", "raises", "needs-split")),
    }
    done = len(executor.jobs)
    claims.run(chosen[:3], tmp_path / "out", lambda: executor, plugins=stated)
    assert len(executor.jobs) == done

    judged = claims.judge_runs(chosen, [folder])
    assert judged[0] == first
    words = [judgement.word for judgement in judged]
    assert words == ["observed here", "observed here", "undecided here", "error", "not supported"]
    assert judged[1].spent == (10, 5)
    assert len(judged[2].values) == 15
    assert len({value for prepare, seed, value in judged[2].values if seed == 0}) == 3
    assert "the method broke" in judged[3].note
    assert first.effect is not None
    assert -1 < first.effect < -0.1

    ledger = tmp_path / "claims.json"
    assert claims.claims_command(chosen, [folder], json_=True, ledger=ledger) == 5
    shown = json.loads(capsys.readouterr().out)
    assert shown == [row for row in text.read_ledger(ledger) if row["id"].startswith("claiming/")]
    assert claims.claims_command(chosen[:2], [folder]) == 0
    out = capsys.readouterr().out
    assert "claiming/1" in out
    assert "2 observed here" in out
