"""The benchmark that holds FLOP ratios against latency ratios: it times what saves work, prepared beforehand."""

from __future__ import annotations

import time

import numpy as np
import pytest
import twins
from methods_inside import ByHand, draw
from protocol_check import BASELINE, METHODS, CpuClock, measure, ratios

from evalbench import registry

FAMILIES = ("caching", "dynamic", "stitching")
CACHES = ("FirstBlockCache", "TaylorSeer", "MagCache", "FasterCache", "PAB")


def test_every_cache_exit_stitch_and_skip_is_timed() -> None:
    ours = tuple(f"evalbench.methods.{family}." for family in FAMILIES)
    wanted = {name for name in registry.names("method") if registry.get("method", name).__module__.startswith(ours)}
    wanted |= {"tfmq-cache", "autodiffusion", *(f"diffusers-cache:{name}" for name in CACHES)}
    timed = {registry.part_name(part) for method in METHODS for part in registry.build_method(method).parts}
    assert wanted <= timed
    assert all(registry.build_method(method).text != BASELINE for method in METHODS)


def test_both_ratios_are_of_the_method_alone_and_what_cannot_run_says_why() -> None:
    suite, methods = (
        twins.suite("dit").override(batch=2),
        ("ddim+harmonica(batch=1)", "ddim+layer-skip", "ddim+t-stitch"),
    )
    found, refused = measure(suite, methods, 4, 1, cpu_seconds=True)
    twin, both = ByHand.of("dit"), ratios(found)
    assert set(both) == {BASELINE, *methods[:2]}
    assert both[BASELINE] == (1.0, 1.0)
    assert both["ddim+layer-skip"][0] == pytest.approx(1 - twin.block / twin.whole)
    learned = draw("ddim+harmonica(batch=1)", 4)[1]
    assert both["ddim+harmonica(batch=1)"][0] == pytest.approx(float(np.mean(learned.cost)) / 4, rel=1e-9)
    assert all(one.seconds > 0 for one in found.values())
    assert refused == {"ddim+t-stitch": "not supported: needs role small"}


def test_cpu_seconds_do_not_pass_while_the_process_waits() -> None:
    clock = CpuClock(twins.setup("dit").device)
    assert clock.time(lambda: time.sleep(0.2)) < 0.1
