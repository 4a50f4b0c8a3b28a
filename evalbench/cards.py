"""A run's numbers for other places: the `model-index` of a Hugging Face model card, and one JSON for a leaderboard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from evalbench.durable import write_atomic
from evalbench.errors import UserError
from evalbench.spec import Record, Suite, parse_suite
from evalbench.store import Store

FILES = {"model-index": "model-index.yaml", "submission": "submission.json"}


def write_card(run: Path, layout: str, to: Path) -> Path:
    """Write the numbers of all finished cells.

    Args:
        run: run folder. layout: `model-index` or `submission`. to: target folder.

    Raises:
        UserError: the run has no finished cell.
    """
    store = Store(run)
    suite = parse_suite(store.manifest()["suite"], "", where=f"manifest of {run}")
    records = [r for r in store.shown_records() if (r.kind, r.status) == ("quality", "ok")]
    if not records:
        raise UserError(f"run folder '{run}' has no finished cell; run `evalbench run` into it first")
    text = model_index(suite, records) if layout == "model-index" else submission(suite, records)
    to.mkdir(parents=True, exist_ok=True)
    write_atomic(to / FILES[layout], text)
    return to / FILES[layout]


def model_index(suite: Suite, records: list[Record]) -> str:
    """The `model-index` block of a model card, YAML: every metric of every cell, with NFE, guidance, N and protocol."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-to-image" if suite.conditions.prompts else "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=suite.name,
            dataset_name=suite.name,
            metric_type=name,
            metric_value=round(value.value, 6),
            metric_name=f"{name}, {record.cell.method}, NFE {record.cell.nfe}",
            metric_args=_where(record) | {"samples": value.n, "standard_error": value.se},
        )
        for record in records
        for name, value in record.metrics.items()
        if math.isfinite(value.value)
    ]
    return str(ModelCardData(model_name=_model_name(suite), eval_results=results).to_yaml()) + "\n"


def submission(suite: Suite, records: list[Record]) -> str:
    """One JSON: the suite's facts, and of each cell its metrics with intervals, counts, protocol and environment."""
    cells = [
        _where(record)
        | {
            "samples": record.samples,
            "metrics": {name: value.model_dump() for name, value in record.metrics.items()},
            "missing": dict(record.missing),
            "counts": dict(record.counts),
            "protocol_facts": record.protocol_facts,
            "environment": dict(record.environment),
        }
        for record in records
    ]
    content = {"schema": 1, "suite": suite.content(), "suite_id": suite.id, "cells": cells}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _where(record: Record) -> dict[str, Any]:
    cell = record.cell
    return {
        "method": cell.method,
        "nfe": cell.nfe,
        "guidance": cell.guidance,
        "seed": cell.seed,
        "protocol": record.protocol,
    }


def _model_name(suite: Suite) -> str:
    """What the suite calls its model: the last part of a folder or id, else the loader."""
    folder = str(suite.model.options.get("folder", ""))
    return folder.rstrip("/").rpartition("/")[2] or suite.model.loader
