"""Counts of a cell: means over all samples, whichever chunks have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import small_suite

from evalbench.reduce import reduce_cell
from evalbench.spec import Chunk
from evalbench.store import open_run
from evalbench.worker import _column, _names


def test_a_count_that_some_chunks_lack_is_zero_there(tmp_path: Path) -> None:
    chunks = [Chunk("c", 0, 2), Chunk("c", 2, 4)]
    with open_run(tmp_path / "r", small_suite(), {}) as store:
        store.write_chunk(chunks[0], {"count:nfe": np.array([4.0, 6.0])}, {})
        store.write_chunk(chunks[1], {"count:nfe": np.array([5.0, 5.0]), "count:aux.reward": np.ones(2)}, {})
        counts = reduce_cell(store, chunks, None, [], lambda _: None).counts
    assert counts["nfe"] == 5.0
    assert counts["aux.reward"] == 0.5


def test_a_missing_count_is_left_out_and_never_zero(tmp_path: Path) -> None:
    chunk = Chunk("c", 0, 2)
    with open_run(tmp_path / "r", small_suite(), {}) as store:
        store.write_chunk(chunk, {"count:nfe": np.ones(2), "count:flops": np.array([1.0, np.nan])}, {})
        assert "flops" not in reduce_cell(store, [chunk], None, [], lambda _: None).counts


def test_batches_of_a_chunk_may_differ_in_their_counts() -> None:
    blocks = [{"count:nfe": np.ones(2)}, {"count:nfe": np.ones(1), "count:backward": np.ones(1)}]
    joined = {name: np.concatenate([_column(block, name) for block in blocks]) for name in _names(blocks)}
    np.testing.assert_array_equal(joined["count:backward"], [0, 0, 1])
