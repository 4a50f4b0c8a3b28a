"""What stays loaded in a process, and what goes first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import request, run_serial, small_suite

from evalbench import sampling, warm
from evalbench.cluster import worker_variables
from evalbench.cost.variants import Variant
from evalbench.errors import UserError
from evalbench.sampling import Setup
from evalbench.spec import Suite
from evalbench.warm import Warm

KB = 1000


def _network(kilobytes: int) -> list[torch.Tensor]:
    return [torch.zeros(kilobytes * KB, dtype=torch.uint8)]


class Loads:
    """A cache of at most 10 kB, one job for each thing that is asked for; what was loaded, in order."""

    def __init__(self, limit: float = 10 * KB) -> None:
        self.warm, self.loaded = Warm(lambda: limit), ""

    def ask(self, names: str, kilobytes: int = 4) -> None:
        for name in names:
            self.warm.next_job()
            self.need(name, kilobytes)

    def need(self, name: str, kilobytes: int = 4) -> None:
        def load() -> list[torch.Tensor]:
            self.loaded += name
            return _network(kilobytes)

        self.warm.get(name, load)


def test_what_fits_is_loaded_once() -> None:
    loads = Loads()
    loads.ask("abababab")
    assert loads.loaded == "ab"


def test_the_least_recently_used_goes_first() -> None:
    loads = Loads()
    loads.ask("abacab")  # c takes the place of b, which then takes that of c
    assert loads.loaded == "abcb"
    assert len(loads.warm) == 2


def test_what_one_job_uses_stays_whatever_it_holds() -> None:
    loads = Loads()
    for _ in range(3):
        loads.warm.next_job()
        for name in "abcd":
            loads.need(name)
    assert loads.loaded == "abcd"
    loads.ask("e", kilobytes=50)
    assert len(loads.warm) == 1


def test_a_limit_of_nothing_keeps_the_running_job_only() -> None:
    loads = Loads(limit=0)
    loads.ask("aabba")
    assert loads.loaded == "aba"


def test_what_finds_no_room_is_loaded_again_with_earlier_jobs_gone() -> None:
    kept = Warm(lambda: 10 * KB)
    kept.get("old", lambda: _network(4))
    kept.next_job()

    def load() -> list[torch.Tensor]:
        if len(kept):
            raise torch.OutOfMemoryError("no room beside the other")
        return _network(8)

    assert len(kept.get("new", load)) == 1
    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        kept.get("larger", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no room at all")))


def test_the_setting_is_in_gigabytes_and_travels_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(warm.VARIABLE, raising=False)
    assert 1e7 < warm.limit() < 1e15
    assert warm.VARIABLE not in worker_variables()
    monkeypatch.setenv(warm.VARIABLE, "1.5")
    assert warm.limit() == 1.5e9
    assert worker_variables()[warm.VARIABLE] == "1.5"
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(warm.VARIABLE, wrong)
        with pytest.raises(UserError, match="gigabytes that a worker keeps loaded, such as 8"):
            worker_variables()


def test_suites_that_take_turns_load_their_models_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built, build = [], sampling.build

    def watched(suite: Suite, variant: Variant | None = None) -> Setup:
        built.append(suite.name)
        return build(suite, variant)

    monkeypatch.setattr(sampling, "build", watched)
    warm.kept.forget()
    for i, name in enumerate(("gmm-smooth", "gmm-sharp") * 2):
        run_serial(request(small_suite(name, samples=32), ["ddim"], [2], seeds=(i,)), tmp_path / str(i))
    assert built == ["gmm-smooth", "gmm-sharp"]
