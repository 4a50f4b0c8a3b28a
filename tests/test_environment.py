"""The settings in which bits are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import json
import numpy
from threadpoolctl import threadpool_info
from evalbench import environment
environment.prepare_process()
print(json.dumps({one["filepath"]: one["num_threads"] for one in threadpool_info()}))
"""


def test_a_process_that_computes_has_one_thread_in_every_library() -> None:
    """A second one of a BLAS waits by spinning, on a core that a worker needs, and may change the last bits."""
    unlimited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", PROBE], env=unlimited, check=True, capture_output=True, text=True)
    threads = json.loads(done.stdout)
    assert any("numpy" in library for library in threads)
    assert any("scipy" in library for library in threads)
    assert set(threads.values()) == {1}, threads
