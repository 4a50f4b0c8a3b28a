"""Clusters of several nodes, on loopback: nodes that are killed and join, and nodes that compute other bits.

The second node of a mixed cluster has torch's plain CPU kernels (ATEN_CPU_CAPABILITY), so that it really is of another
fingerprint class.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from support import SLOW, SMALL_CHUNKS, Faults, landed

from evalbench.store import Store

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("EVALBENCH_CHAOS", "3"))
EVALBENCH = [sys.executable, "-m", "evalbench"]
HERE = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head node with one core."""
    # else a driver takes 127.0.0.1 for the machine's other address, where these nodes do not listen
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    found = Cluster(initialize_head=True, head_node_args=HERE | {"resources": {"fast": 1.0}})
    yield found
    found.shutdown()


def command(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "chaos.toml").write_text(SMALL_CHUNKS)
    grid = ["--methods", "slow,ddim", "--nfe", "5", "--samples", "640", "--metrics", "fd@identity", "--batch", "32"]
    plugin = ["--plugin", str(tmp_path / "slow.py"), "--allow-small-n"]
    return [*EVALBENCH, "run", str(tmp_path / "chaos.toml"), *grid, *plugin, "--out", str(folder), *more]


def ran(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def classes(folder: Path) -> dict[str, set[str]]:
    """Fingerprint classes of the chunks of each cell."""
    store = Store(folder)
    found: dict[str, set[str]] = {}
    for record in store.records():
        if record.kind == "quality":
            facts = [store.chunk_facts(chunk) for chunk in store.present_chunks(record.cell.id)]
            found[record.cell.id] = {one["environment"]["class"] for one in facts if one}
    return found


def test_nodes_are_killed_and_join_while_a_run_goes_on(cluster: Cluster, tmp_path: Path, faults: Faults) -> None:
    """SIGKILL of the second node's raylet at random moments, each time a node joins; the table is that of serial."""
    seed = random.SystemRandom().randrange(1000)
    rng, folder, killed, before = random.Random(seed), tmp_path / "r", 0, {}
    node = cluster.add_node(**HERE)
    with subprocess.Popen(command(folder, tmp_path, "--address", cluster.address), stderr=subprocess.PIPE) as running:
        try:
            for step in sorted(rng.sample(range(2, 30), TIMES)):
                deadline = time.monotonic() + 300
                while len(landed(folder)) < step and running.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                if running.poll() is not None:
                    break
                before |= landed(folder)
                os.kill(raylet(node), signal.SIGKILL)
                killed += 1
                node = cluster.add_node(**HERE)
            _, errors = running.communicate(timeout=600)
        finally:
            running.kill()
    faults("raylet killed", killed)
    assert running.returncode == 0, f"seed {seed}: {errors.decode()}"
    assert killed == TIMES, f"seed {seed}"
    assert before.items() <= landed(folder).items(), f"seed {seed}: what had landed was computed again"
    ran(command(tmp_path / "whole", tmp_path, "--serial"))
    assert (folder / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes(), f"seed {seed}"


def test_a_mixed_cluster_computes_a_cell_in_one_class_and_times_where_it_is_told(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(**HERE, resources={"slow-kernels": 1.0}, env_vars={"ATEN_CPU_CAPABILITY": "default"})
    folder, address = tmp_path / "r", ["--address", cluster.address]
    ran(command(folder, tmp_path, *address))
    found = classes(folder)
    assert len(found) == 2
    assert len(set.union(*found.values())) == 1, "one class for the whole run"
    refused = subprocess.run(command(folder, tmp_path, *address, "--measure", "latency"), capture_output=True)
    assert refused.returncode == 2
    assert b"devices of several kinds (fast, slow-kernels)" in refused.stderr
    quick = ["--measure", "latency", "--processes", "1", "--latency-rounds", "1"]
    for kind, capability in (("slow-kernels", "DEFAULT"), ("fast", "AVX")):
        out = tmp_path / kind
        ran(command(out, tmp_path, *address, *quick, "--device", kind))
        devices = {record.environment["device"] for record in Store(out).records() if record.kind == "latency"}
        assert len(devices) == 1
        assert capability in devices.pop()


def test_a_run_without_an_address_has_a_ray_of_its_own(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment names somebody's cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ran(command(tmp_path / "r", tmp_path, "--workers", "2"))  # more than that cluster has
