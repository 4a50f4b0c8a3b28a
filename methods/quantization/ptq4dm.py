"""PTQ4DM: "Post-training Quantization on Diffusion Models" (Shang et al. 2023), with its calibration ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from evalbench.engine import check_choice, check_least
from evalbench.errors import UserError
from evalbench.interfaces import Artifact, Claim, Preparation
from evalbench.registry import register

from ._calibration import States, check_samples, nearest
from ._core import Bits, LayerPlan, adaround, static_ranges
from ._wrap import Quantisation, all_layers, observed, packed

if TYPE_CHECKING:
    import torch

TABLE = 1000  # time steps of the paper's models


@register("ptq4dm")
@dataclass(frozen=True)
class PTQ4DM(Quantisation):
    """PTQ4DM: static 8-bit quantisation, calibrated on the denoising chain at normally distributed times (NDTC).

    Every Linear and Conv layer, weights per output channel and inputs per tensor, one static range each, chosen among
    80 shrunk ones by |error|^2.4 (`measure`, its second ablation); the first and the last layer keep at least 8 bits.
    SiLU, softmax and the products of attention stay in float, as in the release. Calibration: for each of `samples`
    noises the full-precision chain is walked by the chain's own solver with `steps` evaluations, and the state nearest
    to a drawn time is taken: normal with mean `mean` and standard deviation sqrt(T / 2) / T, T = 1000
    (`variant=paper`), or 0.4 (`variant=released`), clamped to the path. The release labels states with the loop
    counter, so that x and t are mirrored; here a state has the time it was met at. Fake quantisation: bits, bytes and
    bit operations, no time saved. Not `tfmq`, whose ranges are per time group, nor Q-Diffusion (block reconstruction).

    Attributes:
        bits: wXaY, whole bits in 2..8, 16 or 32.
        calibration: `ndtc`; its ablations `uniform` times on the denoising chain, `noise` (x_T at the start),
            `images` (clean images at the end), `forward` (images with noise added, at uniform times).
        samples: calibration states; the paper's is 1024, the default is a smoke test. steps: of the chain walked.
        mean: of the drawn times as a share of the path, the paper's at most 0.5, its script's 0.4.
        measure: what chooses a range. adaround: iterations per layer of learned rounding; 0 rounds to the nearest.
        variant: `paper` or `released`. seed: of times and of noises.
    """

    bits: str | float = "w8a8"
    calibration: Literal["ndtc", "uniform", "noise", "images", "forward"] = "ndtc"
    samples: int = 32
    steps: int = 10
    mean: float = 0.4
    measure: Literal["minmax", "mse", "l1", "cosine", "kl"] = "mse"
    adaround: int = 0
    variant: Literal["paper", "released"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        Bits.parse("ptq4dm", self.bits)
        check_samples("ptq4dm", self.samples)
        check_choice("ptq4dm", "calibration", self.calibration, ("ndtc", "uniform", "noise", "images", "forward"))
        check_least("ptq4dm", 1, steps=self.steps)
        check_least("ptq4dm", 0, adaround=self.adaround, seed=self.seed)
        if not 0.0 < self.mean <= 1.0:
            raise UserError(f"ptq4dm: mean must lie in 0..1 of the path, got {self.mean}")

    def prepare(self, context: Preparation) -> Artifact:
        network = context.denoiser(1).network
        names = all_layers(network)
        states = self._states(context)
        learning = names if self.adaround else []
        observer = observed(context, network, states, 1, names, {}, learning)
        wanted = Bits.parse("ptq4dm", self.bits)
        plans = {}
        for name in names:
            ends = name in (names[0], names[-1])
            bits = Bits(max(wanted.weights, 8), max(wanted.activations, 8)) if ends else wanted
            if not observer.seen[name].values:
                continue  # a layer that this model never runs
            ranges = static_ranges(observer.seen[name], 1, [bits], self.measure)
            plan = LayerPlan((bits,), "static", measure=self.measure, ranges=ranges)
            plans[name] = (
                plan if not self.adaround or bits.weights > 8 else self._learned(context, observer, name, plan)
            )
        return packed(network, plans, observer, 1, {"times": states.t.double().cpu().tolist()})

    def _learned(self, context: Preparation, observer: object, name: str, plan: LayerPlan) -> LayerPlan:
        import dataclasses

        import torch

        seen = observer.seen[name]  # type: ignore[attr-defined]
        layer = context.denoiser(1).network.get_submodule(name)
        inputs = torch.cat(seen.inputs[0])
        up = adaround(layer, plan, plan.bits[0].weights, inputs, self.adaround, context.rng(self.seed))
        return dataclasses.replace(plan, up=up)

    def _states(self, context: Preparation) -> States:
        rng = context.rng(self.seed)
        n = self.samples
        if self.calibration in ("ndtc", "uniform"):
            return nearest(context, self._shares(rng), self.steps, self.seed)
        noise = context.noise(range(n), self.seed)
        if self.calibration == "noise":
            x = context.x_T(noise)
            return States(x, x.new_full((n,), context.path.t_start), context.cond(range(n)))
        x, cond = context.data(n, self.seed)
        if self.calibration == "images":
            return States(x, x.new_full((n,), context.path.t_end), cond)
        return self._forward(context, x, cond, rng)

    def _shares(self, rng: np.random.Generator) -> np.ndarray:
        if self.calibration == "uniform":
            return rng.uniform(0.0, 1.0, self.samples)
        std = np.sqrt(TABLE / 2) / TABLE if self.variant == "paper" else 0.4
        return np.clip(rng.normal(self.mean, std, self.samples), 0.0, 1.0)

    def _forward(self, context: Preparation, x: torch.Tensor, cond: object, rng: np.random.Generator) -> States:
        path = context.path
        t = path.t_end + (path.t_start - path.t_end) * rng.uniform(0.0, 1.0, len(x))
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (
            x.new_tensor(np.array([f(float(one)) for one in t])).reshape(shape) for f in (path.alpha, path.sigma)
        )
        noisy = alpha * x + sigma * context.noise(range(len(x)), self.seed).start()
        return States(noisy, x.new_tensor(t), cond)  # type: ignore[arg-type]


_SOURCE = "PTQ4DM; catalogue B 40: at W8A8 in the paper, W6A6 here, as eight bits of a small network hide the order"

CLAIM = (
    Claim(
        text="States of the denoising chain calibrate better than forward-noised images",
        suite="fashion-sd",
        arm="ddim+ptq4dm(bits=w6a6,samples=256,steps=20)",
        baseline="ddim+ptq4dm(bits=w6a6,samples=256,steps=20,calibration=forward)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.1,
        level="E",
        author="paper",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
    Claim(
        text="Forward-noised images calibrate better than clean images",
        suite="fashion-sd",
        arm="ddim+ptq4dm(bits=w6a6,samples=256,steps=20,calibration=forward)",
        baseline="ddim+ptq4dm(bits=w6a6,samples=256,steps=20,calibration=images)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.3,
        level="E",
        author="paper",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
    Claim(
        text="Normally distributed times calibrate better than uniform ones",
        suite="fashion-sd",
        arm="ddim+ptq4dm(bits=w6a6,samples=256,steps=20)",
        baseline="ddim+ptq4dm(bits=w6a6,samples=256,steps=20,calibration=uniform)",
        nfe=20,
        metric="paired-rms@pixels",
        samples=128,
        direction="lower",
        effect=0.05,
        level="E",
        author="paper",
        transfer="weak",
        source=_SOURCE,
        prepare_seeds=(0, 1, 2),
        witness="tests/methods/test_quantization.py",
    ),
)
