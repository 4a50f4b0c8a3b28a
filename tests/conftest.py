"""Settings that every test runs under."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before any test module imports a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS="0",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note faults that a test injects; the end of the run says how many of each kind, and how many were survived."""

    def note(kind: str, count: int = 1) -> None:
        request.node.user_properties.append(("faults", [kind, int(count)]))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Faults by kind; survived are those of tests that passed."""
    injected: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            found = [value for name, value in report.user_properties if name == "faults" and report.when == "call"]
            for kind, count in found:
                injected[kind] += count
                survived[kind] += count * (outcome == "passed")
    if injected:
        terminalreporter.section("faults injected and survived")
        for kind in sorted(injected):
            terminalreporter.line(f"{kind}: {injected[kind]} injected, {survived[kind]} survived")
