"""Are reported seconds right? A network and a decoder that sleep for a known time, on the real clock.

Median, time per evaluation (slope and intercept) and the split of a call are compared with what was slept. The virtual
version of this, in which they are equal exactly, is a test.

    python benchmarks/latency_clock.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from evalbench import registry
from evalbench.cost.breakdown import Stopwatch, breakdown, metered, span
from evalbench.cost.clock import clock_for
from evalbench.cost.latency import interleaved
from evalbench.cost.ledger import Ledger
from evalbench.cost.line import time_per_evaluation
from evalbench.denoiser import Field, NetworkDoor
from evalbench.interfaces import Cond, Model, Time
from evalbench.noise import NoiseSource
from evalbench.paths import VPLinear

GOAL = 0.05
EVALUATION, DECODING = 0.050, 0.100  # seconds
BUDGETS = (1, 2, 4, 8)
ROUNDS, PASSES = 9, 5
BATCH = 4


class Sleeper(Model):
    """A network that takes its time."""

    native = "x0"
    shape = (3,)
    stopwatch: Stopwatch | None = None

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        with span(self.stopwatch, "denoiser"):
            out = x * 0.5
            time.sleep(EVALUATION)  # last: whoever wakes up on a busy machine may wait for its turn
            return out


def sampling(model: Sleeper, nfe: int) -> Callable[[], object]:
    """DDIM from noise, then the decoder."""
    door = NetworkDoor(model, VPLinear(), "logsnr")
    ddim = registry.build_method("ddim").solver
    noise = NoiseSource(0, range(BATCH), model.shape)

    def call() -> object:
        door.ledger = Ledger(BATCH, budget=nfe)
        with torch.no_grad():
            x = ddim.sample(Field(door, door.ledger), noise.start(), Cond(), nfe, noise)
        with span(model.stopwatch, "decoder"):
            time.sleep(DECODING)
        return x

    return call


def main() -> None:
    """Measure, print what was found beside what is true, then the worst relative error."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = Sleeper()
    calls = {str(nfe): sampling(model, nfe) for nfe in BUDGETS}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, spent, counts in interleaved(calls, ROUNDS, device):
        if counts:
            seconds[name].append(spent)
    line = time_per_evaluation({int(name): np.array(values) for name, values in seconds.items()})
    medians = {nfe: float(np.median(seconds[str(nfe)])) for nfe in BUDGETS}
    found = {f"median at NFE {nfe}": (median, DECODING + nfe * EVALUATION) for nfe, median in medians.items()}
    found |= {"slope": (line.slope, EVALUATION), "intercept": (line.intercept, DECODING)}

    last = BUDGETS[-1]
    model.stopwatch = Stopwatch(clock_for(device))
    parts = [metered(calls[str(last)], model.stopwatch) for _ in range(PASSES)]
    split = breakdown(parts, medians[last])
    found |= {"denoiser": (split.denoiser, last * EVALUATION), "decoder": (split.decoder, DECODING)}

    for what, (measured, true) in found.items():
        print(f"{what:<16} {1e3 * measured:8.2f} ms   slept {1e3 * true:6.1f} ms")
    print(f"{'arithmetic':<16} {1e3 * split.arithmetic:8.2f} ms   {'overhead':<9} {1e3 * split.overhead:5.2f} ms")
    worst = max(abs(measured / true - 1) for measured, true in found.values())
    result = {"value": round(worst, 4), "unit": "relative error", "goal": f"<= {GOAL}", "holds": worst <= GOAL}
    print(json.dumps({"name": "latency_clock", **result}))


if __name__ == "__main__":
    main()
