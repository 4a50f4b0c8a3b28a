"""A run's numbers for a model card and a leaderboard, read back by the libraries that read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from support import request, run_serial, small_suite

from evalbench.cards import write_card
from evalbench.errors import UserError
from evalbench.store import Store

METRIC = "paired-median@identity"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "run"
    run_serial(request(small_suite(), ["ddim", "unipc"], [3, 5], metrics=(METRIC,)), folder)
    return folder


def test_a_model_card_reads_every_number_with_its_protocol(run: Path, tmp_path: Path) -> None:
    text = write_card(run, "model-index", tmp_path).read_text()
    content = yaml.safe_load(text)
    name, results = model_index_to_eval_results(content["model-index"])
    assert name == "gmm"
    records = {(r.cell.method, r.cell.nfe): r for r in Store(run).records()}
    assert len(results) == len(records) == 4
    for result in results:
        record = records[result.metric_args["method"], result.metric_args["nfe"]]
        assert result.metric_value == pytest.approx(record.metrics[METRIC].value, abs=1e-6)
        assert result.metric_args["protocol"] == record.protocol
        assert result.dataset_type == record.cell.suite
    assert ModelCardData(**content).to_dict()


def test_a_submission_holds_intervals_counts_and_protocol(run: Path, tmp_path: Path) -> None:
    content = json.loads(write_card(run, "submission", tmp_path).read_text())
    assert content["suite"]["name"] == "gmm-smooth"
    cell = content["cells"][0]
    record = Store(run).records()[0]
    assert cell["metrics"][METRIC] == record.metrics[METRIC].model_dump()
    assert cell["counts"]["nfe"] == record.counts["nfe"]
    assert cell["protocol_facts"] == json.loads(json.dumps(record.protocol_facts))


def test_the_command_line_writes_them_without_samples(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evalbench", "export", str(run), "--layout", "submission", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "submission.json")


def test_a_run_without_a_finished_cell_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    with pytest.raises(UserError, match="has no finished cell"):
        write_card(tmp_path, "model-index", tmp_path)
