"""The synthetic run as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report.synthetic import make_records, make_suite, write_run

from evalbench.spec import Record, Suite
from evalbench.store import Store


@pytest.fixture
def suite() -> Suite:
    return make_suite()


@pytest.fixture
def records() -> list[Record]:
    return make_records()


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """Writes records into a run folder."""
    return lambda found, name="run": write_run(tmp_path / name, found)
