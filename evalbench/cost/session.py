"""One process of a latency run: first calls, warm-up, rounds, energy and breakdown, at every batch size."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evalbench.cost.bench import ArmRun, Order, Rules, Sitting, Stand
from evalbench.cost.breakdown import Stopwatch, metered
from evalbench.cost.energy import energy_of
from evalbench.cost.honesty import Kept, keep_which, machine_flags, observe
from evalbench.cost.latency import interleaved
from evalbench.cost.memory import measured
from evalbench.cost.pin import pin
from evalbench.errors import BadSamples
from evalbench.spec import Failure

_OWN_SAMPLES = 1 << 24  # global indices that belong to one process: no sample is drawn twice in a run


def sit(order: Order, now: Callable[[], int] = time.perf_counter_ns) -> Sitting:
    """Everything that one process measures."""
    stand = order.bench.build()
    built = now()
    threads = torch.get_num_threads()
    cores = pin(threads) if order.rules.pin and stand.device.type == "cpu" else ()
    session = _Session(stand, order, now)
    for batch in order.bench.batches:
        session.measure(batch)
    return Sitting(
        process=order.process,
        build=(built - order.launched) / 1e9,
        cold=session.cold,
        clock=stand.clock.name,
        threads=threads,
        cores=cores,
        runs=tuple(run for run in session.runs if run.arm not in session.failures),
        failures=session.failures,
        flags=tuple(session.flags),
    )


@dataclass
class _Session:
    """One process at work."""

    stand: Stand
    order: Order
    now: Callable[[], int]
    cold: float | None = None
    runs: list[ArmRun] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)
    flags: list[tuple[int, str]] = field(default_factory=list)
    drawn: dict[str, int] = field(default_factory=dict)  # samples of each arm so far

    def measure(self, batch: int) -> None:
        """First calls, rounds, energy and breakdown at one batch size."""
        first = {arm: self._first(arm, batch) for arm in self.order.arms if arm not in self.failures}
        rounds = self._rounds(batch)
        for arm, opening in first.items():
            if opening is None or arm in self.failures:
                continue
            rest = self._tried(arm, lambda arm=arm: self._rest(arm, batch))  # type: ignore[misc]
            if rest is not None:
                self.runs.append(ArmRun(arm=arm, batch=batch, **opening, **rounds[arm], **rest))

    def _indices(self, arm: str, batch: int) -> range:
        """The next samples, the same for every arm's n-th call, and nobody's before."""
        start = self.drawn.get(arm, 0)
        self.drawn[arm] = start + batch
        start += self.order.process * _OWN_SAMPLES
        return range(start, start + batch)

    def _tried(self, arm: str, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return attempt()
        except Exception as error:
            self._fail(arm, error)
            return None

    def _fail(self, arm: str, error: Exception) -> None:
        text = str(error).strip()
        message = text.splitlines()[0] if text else type(error).__name__
        trace = "".join(traceback.format_exception(error))
        self.failures[arm] = Failure(type=type(error).__name__, message=message, traceback=trace)

    def _first(self, arm: str, batch: int) -> dict[str, Any] | None:
        fresh_process = self.cold is None and not self.failures

        def attempt() -> dict[str, Any]:
            call = self.stand.call(arm, self._indices(arm, batch))
            ready, spent = self.now(), list[float]()
            memory = measured(lambda: spent.append(self.stand.clock.time(call)), self.stand.device, self.stand.weights)
            if fresh_process:
                self.cold = (ready - self.order.launched) / 1e9 + spent[0]
            return {"first": spent[0], "memory": memory, "fresh": fresh_process}

        return self._tried(arm, attempt)

    def _rounds(self, batch: int) -> dict[str, dict[str, Any]]:
        """Warm-up and measured rounds of all arms that are still in."""
        rules, arms = self.order.rules, [arm for arm in self.order.arms if arm not in self.failures]
        fixed = self.order.rounds.get(batch)
        inputs: dict[str, tuple[range, Callable[[], Any]]] = {}
        outputs: dict[str, Any] = {}

        def prepare(arm: str) -> None:
            indices = self._indices(arm, batch)
            inputs[arm] = (indices, self.stand.call(arm, indices))

        def call(arm: str) -> Callable[[], None]:
            return lambda: outputs.__setitem__(arm, inputs[arm][1]())

        race = interleaved(
            {arm: call(arm) for arm in arms},
            fixed or rules.rounds,
            self.stand.device,
            clock=self.stand.clock,
            steady=rules.steady,
            samples=rules.samples,
            seconds=0.0 if fixed else rules.seconds,
            most=rules.most,
            before=prepare,
            failed=self._fail,
        )
        notes = {arm: _Notes(self._which(arm, batch)) for arm in arms}
        before = observe(self.stand.gpu)
        for arm, spent, counts in race:
            indices, output = inputs[arm][0], outputs.pop(arm)
            if len(output) != batch:
                self._fail(arm, BadSamples(f"{arm} returned {len(output)} samples, expected {batch}"))
            else:
                notes[arm].add(spent, counts, indices, output)
        seen = machine_flags(before, observe(self.stand.gpu), frozenset({os.getpid(), os.getppid()}))
        self.flags += [(batch, flag) for flag in seen]
        return {arm: note.finished(rules) for arm, note in notes.items()}

    def _which(self, arm: str, batch: int) -> dict[int, tuple[int, ...]]:
        rules, place = self.order.rules, self.order.bench.arms.index(arm)
        rng = np.random.default_rng([rules.seed, self.order.process, place, batch])
        return keep_which(rng, rules.rounds * rules.samples, batch, rules.kept)

    def _rest(self, arm: str, batch: int) -> dict[str, Any]:
        """Energy and breakdown, after the rounds."""
        stand = self.stand
        energy = energy_of(lambda: stand.call(arm, self._indices(arm, batch))(), stand.clock, stand.gpu)
        stopwatch = Stopwatch(stand.clock)
        stand.meter(stopwatch)
        try:
            calls = [stand.call(arm, self._indices(arm, batch)) for _ in range(self.order.rules.metered)]
            parts = tuple(metered(call, stopwatch) for call in calls)
        finally:
            stand.meter(None)
        return {"energy": energy, "parts": parts}


@dataclass
class _Notes:
    """Timings and kept outputs of one arm in the rounds."""

    which: Mapping[int, tuple[int, ...]]
    warmup: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, spent: float, counts: bool, indices: range, output: torch.Tensor) -> None:
        if not counts:
            self.warmup.append(spent)
            return
        for row in self.which.get(len(self.seconds), ()):
            self.indices.append(indices[row])
            self.rows.append(output[row].cpu().numpy().copy())
        self.seconds.append(spent)

    def finished(self, rules: Rules) -> dict[str, Any]:
        size = rules.samples
        return {
            "warmup": tuple(self.warmup),
            "steady": rules.steady.reached(self.warmup),
            "seconds": tuple(tuple(self.seconds[i : i + size]) for i in range(0, len(self.seconds), size)),
            "kept": Kept(tuple(self.indices), np.stack(self.rows) if self.rows else np.empty(0)),
        }
