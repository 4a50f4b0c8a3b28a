"""Records as tables: what the columns hold, and the bytes of the CSV files."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report.synthetic import METHODS, NOTE, N, failed, latency, make_records, make_suite, quality, value

import evalbench
from evalbench.errors import UserError
from evalbench.report import load
from evalbench.report.frames import cells_frame, latency_fits, timings_frame, write_table, write_timings
from evalbench.spec import Chunk, Record, Suite
from evalbench.store import Store


def table(records: list[Record], path: Path) -> list[dict[str, str]]:
    write_table(cells_frame(records, make_suite()), path)
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_cell_has_its_numbers(records: list[Record], suite: Suite) -> None:
    frame = cells_frame(records, suite)
    row = frame[(frame["method"] == "unipc") & (frame["nfe"] == 10)].iloc[0]
    assert row["fd@fashion64"] == 1.42
    assert row["fd@fashion64:se"] == pytest.approx((0.03 * 1.42 + 0.02) / 1.96)
    assert row["fd@fashion64:high"] - row["fd@fashion64:low"] == pytest.approx(2 * (0.03 * 1.42 + 0.02))
    assert (row["samples"], row["status"], row["seed"], row["guidance"]) == (N, "ok", 0, 1.0)
    assert (row["nfe_measured"], row["evals_total"], row["evals.base"], row["flops"]) == (10, 20, 20, 1.3e10)
    assert row["align@tiny:note"] == "missing: the suite has no captions"
    assert math.isnan(row["align@tiny"])


def test_the_footprint_of_a_quantised_network_is_columns_where_there_is_one(
    records: list[Record], suite: Suite, tmp_path: Path
) -> None:
    plain = table(records, tmp_path / "plain.csv")
    assert not [name for name in plain[0] if name.startswith("footprint")]
    rounded = quality("ddim+ptq4dm", 10, 2.2, footprint={"weight_bits": 8.5, "bops": 7.8e9})
    rows = {row["method"]: row for row in table([*records, rounded], tmp_path / "t.csv")}
    assert [rows["ddim+ptq4dm"][f"footprint.{name}"] for name in ("weight_bits", "bops")] == ["8.5", "7800000000"]
    assert rows["unipc"]["footprint.weight_bits"] == ""
    assert rows["unipc"].keys() - plain[0].keys() == {"footprint.weight_bits", "footprint.bops"}


def test_rows_are_sorted_by_the_keys(suite: Suite) -> None:
    found = [r for g in (3.0, 1.0) for s in (1, 0) for r in make_records(guidance=g, seed=s)]
    random.Random(0).shuffle(found)
    frame = cells_frame(found, suite)
    keys = list(zip(frame["guidance"], frame["seed"], frame["method"], frame["nfe"], strict=True))
    assert keys == sorted(keys)
    assert len(keys) == 4 * (len(METHODS) * 3 + 1)


def test_csv_is_the_same_bytes_in_any_order_of_the_records(records: list[Record], tmp_path: Path) -> None:
    suite, results = make_suite(), []
    for i in range(5):
        random.Random(i).shuffle(records)
        cells = write_table(cells_frame(records, suite), tmp_path / "table.csv").read_bytes()
        results.append(cells + write_timings(records, tmp_path / "timings.csv").read_bytes())
    assert len(set(results)) == 1
    assert b"\r" not in results[0]
    assert not list(tmp_path.glob(".*"))


def test_table_holds_nothing_that_a_clock_said(records: list[Record], tmp_path: Path) -> None:
    before = write_table(cells_frame(records, make_suite()), tmp_path / "a.csv").read_bytes()
    slower = [r.model_copy(update={"seconds": 99.0, "environment": {"device": "other"}}) for r in records]
    assert write_table(cells_frame(slower, make_suite()), tmp_path / "b.csv").read_bytes() == before
    assert not {"seconds", "wall_s", "device"} & set(before.decode().split("\n")[0].split(","))


def test_failures_are_rows_with_the_first_line_of_the_reason(records: list[Record], tmp_path: Path) -> None:
    rows = {(r["method"], r["nfe"]): r for r in table(records, tmp_path / "t.csv")}
    broken, lacking = rows["heun", "5"], rows["faster-diffusion(keys=uniform:4)", "10"]
    assert (broken["status"], broken["error"]) == ("error", "budget 5, spent 6")
    assert (lacking["status"], lacking["error"]) == ("unsupported", "not supported: needs split")
    assert broken["fd@fashion64"] == broken["nfe_measured"] == ""
    assert "/secret/path" not in (tmp_path / "t.csv").read_text()


def test_floats_have_ten_digits_and_text_is_quoted(tmp_path: Path) -> None:
    method = 'odd(a="x,y")'
    row = table([quality(method, 10, 1 / 3)], tmp_path / "t.csv")[0]
    assert row["method"] == method
    assert row["fd@fashion64"] == "0.3333333333"
    assert row["nfe"] == "10"


def test_not_a_number_is_missing_and_never_a_score(tmp_path: Path) -> None:
    metrics = {"fd@fashion64": value(float("nan"), half=1.0)}
    row = table([quality("ddim", 5, 1.0, metrics=metrics)], tmp_path / "t.csv")[0]
    assert row["fd@fashion64"] == ""
    assert row["fd@fashion64:note"] == "missing: not a finite number"


def test_a_note_stands_beside_its_number(records: list[Record], tmp_path: Path) -> None:
    notes = {r["method"]: r["fd@fashion64:note"] for r in table(records, tmp_path / "t.csv") if r["status"] == "ok"}
    assert notes == {m: NOTE if m == "ddim" else "" for m in METHODS}


def test_one_text_with_two_settings_is_two_names(suite: Suite) -> None:
    old, new = quality("ddim", 5, 3.0), quality("ddim", 5, 2.0)
    new = new.model_copy(update={"cell": new.cell.model_copy(update={"settings": "abcdef0123"})})
    assert "ddim #abcdef" in set(cells_frame([old, new], suite)["method"])
    assert cells_frame([old, new], suite)["method"].nunique() == 2


def test_latencies_are_percentiles_of_raw_seconds() -> None:
    record = latency("ddim", 10, 9.0)
    row = timings_frame([quality("ddim", 10, 8.9), record]).iloc[0]
    ms = 1e3 * np.array(record.latency[0].calls)
    assert row["call_median_ms"] == pytest.approx(np.median(ms))
    assert row["call_p90_ms"] == pytest.approx(np.quantile(ms, 0.9))
    assert row["image_median_ms"] == pytest.approx(np.median(ms) / 64)
    assert (row["timings"], row["processes"], row["peak_mb"], row["wall_s"]) == (5, 5, 412.0, 12.5)
    assert (row["variant"], row["batch"], row["cold_s"], row["first_s"]) == ("eager,float32", 64, 2.5, 0.3)
    assert (row["denoiser_ms"], row["overhead_ms"]) == pytest.approx((90.0, 3.0))
    assert row["energy:note"] == "no NVIDIA GPU: this runs on cpu"


def test_every_variant_and_batch_has_its_row_and_the_cell_is_named_once_without_one() -> None:
    slow, fast = latency("ddim", 10, 9.0), latency("ddim", 10, 5.0, changes={"variant": "compile,float32"})
    both = fast.model_copy(update={"latency": (*fast.latency, fast.latency[0].model_copy(update={"batch": 1}))})
    frame = timings_frame([quality("ddim", 10, 8.9), slow, both, quality("heun", 10, 3.0)])
    rows = list(zip(frame["method"], frame["variant"], frame["batch"].fillna(0), strict=True))
    ddim = [("ddim", "compile,float32", 1), ("ddim", "compile,float32", 64), ("ddim", "eager,float32", 64)]
    assert rows == [*ddim, ("heun", "", 0)]


def test_timings_of_the_first_protocol_are_no_latency() -> None:
    import json

    from evalbench.spec import record_from_json

    content = json.loads(latency("ddim", 10, 9.0).to_json())
    old = {"batch": 64, "seconds": [0.1], "warmup": 2, "device": "cpu", "threads": 1, "peak_bytes": 5}
    assert record_from_json(json.dumps(content | {"latency": old}), where="here").latency == ()
    assert record_from_json(json.dumps(content | {"latency": None}), where="here").latency == ()
    assert record_from_json(json.dumps(content), where="here") == latency("ddim", 10, 9.0)


def test_latency_line_has_the_cost_of_an_evaluation(records: list[Record]) -> None:
    fits = latency_fits(timings_frame(records)).set_index("method")
    assert fits.loc["ddim", "ms_per_nfe"] == pytest.approx(9.0)
    assert fits.loc["ddim", "intercept_ms"] == pytest.approx(4.0)
    assert fits.loc["ddim", "r2"] == pytest.approx(1.0)
    assert fits.loc["ddim", "points"] == 3
    assert "heun" not in fits.index  # two points fit any line


@pytest.mark.parametrize("found", [[], [failed("ddim", 5, "error", "boom")], [quality("ddim", 5, 1.0)]])
def test_runs_without_latencies_have_empty_tables(found: list[Record]) -> None:
    timings = timings_frame(found)
    assert latency_fits(timings).empty
    assert timings["image_median_ms"].isna().all()


def test_load_is_the_table_of_a_run(make_store: Callable[..., Store], records: list[Record], suite: Suite) -> None:
    folder = make_store(records).folder
    frame = evalbench.load(folder)
    assert frame.equals(cells_frame(records, suite))
    assert load(str(folder)).equals(frame)


def test_load_of_another_folder_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path)


# --- samples ----------------------------------------------------------------------------------------------------------


def write_samples(store: Store, record: Record, start: int, stop: int, **more: np.ndarray) -> None:
    index = np.arange(start, stop)
    arrays = {"score": index / 10, "features": np.zeros((len(index), 3)), "count:nfe": np.full(len(index), 5.0)}
    store.write_chunk(Chunk(record.cell.id, start, stop), arrays | more, {})


def test_samples_have_a_row_each_with_scores_and_counts(make_store: Callable[..., Store]) -> None:
    first, second = quality("deis", 5, 3.0, samples=6), quality("euler", 5, 3.0, samples=6)
    store = make_store([second, first, failed("heun", 5, "error", "boom")])
    for start, stop in ((4, 8), (0, 4)):  # the folder holds two samples more than the record is about
        write_samples(store, first, start, stop)
    write_samples(store, second, 0, 6, images=np.zeros((6, 1, 4, 4), np.uint8))
    frame = load(store.folder, "samples")
    assert list(frame.columns) == [
        *("suite", "method", "nfe", "guidance", "seed", "sample", "nfe_measured", "score", "cell"),
    ]
    assert list(frame["method"]) == ["deis"] * 6 + ["euler"] * 6
    assert list(frame["sample"]) == [*range(6), *range(6)]
    assert list(frame["score"][:6]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert set(frame["nfe_measured"]) == {5.0}
    assert set(frame["cell"]) == {first.cell.id, second.cell.id}


def test_a_score_that_some_chunks_lack_is_no_column(make_store: Callable[..., Store]) -> None:
    record = quality("deis", 5, 3.0, samples=8)
    store = make_store([record])
    write_samples(store, record, 0, 4, later=np.zeros(4))
    write_samples(store, record, 4, 8)
    assert "later" not in load(store.folder, "samples")


def test_a_run_without_chunks_has_no_samples(make_store: Callable[..., Store]) -> None:
    assert load(make_store([quality("other", 5, 3.0)]).folder, "samples").empty


def test_an_unknown_table_names_the_known_ones(make_store: Callable[..., Store]) -> None:
    store = make_store([])
    assert load(store.folder, "timings").empty
    with pytest.raises(UserError, match="unknown table 'sample'; did you mean 'samples'"):
        load(store.folder, "sample")
