"""`evalbench import-scores RUN FILE`: what an external judge (GenEval, DPG-Bench) says of a run's samples.

The judge is its authors' program; nothing of it is here. The file says who judged, in which version, and by which log:

    {"evaluator": "geneval", "version": "COMMIT", "log": "results.jsonl", "unit": "fraction",
     "scores": [{"method": "ddim", "nfe": 20, "guidance": 5.0, "seed": 0, "value": 0.5, "n": 2212, "se": 0.01}]}

`log` lies beside the file and its SHA-256 is noted with each score; guidance and seed may be left out where only one
cell fits. The score then stands in tables and reports as metric `geneval@COMMIT`, marked as imported; it has no
verdict.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from evalbench.errors import UserError
from evalbench.report import build_report
from evalbench.spec import Frozen, Imported, MetricValue, Record, validation_line
from evalbench.store import Store

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class Score(Frozen):
    """One score of a cell."""

    method: str
    nfe: int
    guidance: float | None = None
    seed: int | None = None
    value: float = Field(allow_inf_nan=False)
    n: int = Field(gt=0)
    se: float | None = Field(None, ge=0, allow_inf_nan=False)


class Judgement(Frozen):
    """A file of scores; see the module."""

    evaluator: str
    version: str
    log: str
    unit: str = ""
    higher_is_better: bool = True
    scores: tuple[Score, ...] = Field(min_length=1)


def import_scores(run: Path, file: Path) -> list[Imported]:
    """Add the scores of a file to a run folder.

    Raises:
        UserError: the file is not of the format, its log is missing, or a score fits no cell or several.
    """
    store, judgement = Store(run), _read(file)
    log = file.parent / judgement.log
    if not log.is_file():
        raise UserError(f"'{file}': the evaluator's log '{log}' is not there; put it beside the file")
    digest = hashlib.sha256(log.read_bytes()).hexdigest()
    records = [record for record in store.records() if (record.kind, record.status) == ("quality", "ok")]
    note = f"imported: {judgement.evaluator} {judgement.version}, log sha256 {digest[:16]}"
    found = [
        Imported(
            cell=_cell_of(score, records, str(file)).cell.id,
            metric=f"{judgement.evaluator}@{judgement.version}",
            value=MetricValue(
                value=score.value,
                n=score.n,
                se=score.se,
                note=note,
                unit=judgement.unit,
                higher_is_better=judgement.higher_is_better,
            ),
        )
        for score in judgement.scores
    ]
    store.append_imported(found)
    return found


def _read(file: Path) -> Judgement:
    try:
        judgement = Judgement.model_validate_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scores '{file}' cannot be read: {error}") from None
    except ValidationError as error:
        raise UserError(validation_line(error, f"scores '{file}'", Judgement)) from None
    for word in (judgement.evaluator, judgement.version):
        if not _NAME.fullmatch(word):
            raise UserError(f"scores '{file}': '{word}' must be letters, digits, '.', '_' and '-'")
    return judgement


def _cell_of(score: Score, records: Sequence[Record], where: str) -> Record:
    """The one record that a score is of."""
    given = {key: value for key, value in score.model_dump(include={"guidance", "seed"}).items() if value is not None}
    fitting = [
        record
        for record in records
        if (record.cell.method, record.cell.nfe) == (score.method, score.nfe)
        and all(getattr(record.cell, key) == value for key, value in given.items())
    ]
    if len(fitting) != 1:
        what = f"{score.method} at NFE {score.nfe}"
        how = "no finished cell" if not fitting else f"{len(fitting)} cells; give guidance and seed"
        raise UserError(f"scores '{where}': {what} fits {how}")
    return fitting[0]


def import_command(run: Path, file: Path) -> None:
    """Import, make the tables anew, and say what was added."""
    found = import_scores(run, file)
    build_report(Store(run), run / "report", ("csv",))
    print(f"{len(found)} scores of {found[0].metric} added to {run / 'table.csv'}; `evalbench report {run}` shows them")
