"""The host's clock and the device's own."""

from __future__ import annotations

import time

import pytest
import torch

from evalbench.cost.clock import CudaClock, HostClock, clock_for

CPU = torch.device("cpu")


def test_a_cpu_has_the_hosts_clock() -> None:
    clock = clock_for(CPU)
    assert isinstance(clock, HostClock)
    assert clock.name == "perf_counter_ns"
    assert clock.seconds(1_000, 2_500_001_000) == 2.5
    assert 0.02 <= clock.time(lambda: time.sleep(0.02)) < 1.0


@pytest.mark.gpu
def test_a_gpu_has_its_own_and_both_agree() -> None:
    device = torch.device("cuda")
    events, host = clock_for(device), HostClock(device)
    assert isinstance(events, CudaClock)
    x = torch.randn(8192, 8192, device=device)

    def work() -> None:
        for _ in range(20):
            x @ x

    work()
    assert events.time(work) == pytest.approx(host.time(work), rel=0.1)


@pytest.mark.gpu
def test_work_on_another_stream_is_no_way_around_the_clock() -> None:
    device = torch.device("cuda")
    x, side = torch.randn(8192, 8192, device=device), torch.cuda.Stream()

    def work() -> None:
        with torch.cuda.stream(side):
            for _ in range(20):
                x @ x

    work()
    clock = CudaClock(device)
    assert clock.time(work) == pytest.approx(HostClock(device).time(work), rel=0.1)
