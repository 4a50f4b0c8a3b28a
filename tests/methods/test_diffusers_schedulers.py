"""diffusers scheduler classes as methods: the right law, our noise, our budget, a reason for each that cannot run."""

from __future__ import annotations

import pytest
import torch
from exact_model import COND, draw, exact, solver

from evalbench import registry
from evalbench.errors import Unsupported, UserError
from evalbench.noise import NoiseSource
from evalbench.paths import VPDiscrete, make_path

FAMILY = registry.get("method", "diffusers:*")
MEMBERS = dict(FAMILY.members())
USABLE = [name for name, reason in MEMBERS.items() if not reason]
# They re-noise a network's x0, right for distilled networks only: too narrow on an exact one.
DISTILLED = {"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"}
KINDS = ("vp-linear", "flow", "edm")
GAUSSIAN = {"components": 1, "spread": 0.0, "offset": 1.0, "std": 0.5}


def test_well_known_classes_are_usable():
    known = ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "PNDM"]
    known += ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "IPNDM"]
    known += ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "EDMEuler", "EDMDPMSolverMultistep"]
    assert {f"{name}Scheduler" for name in known} <= set(USABLE)


def test_the_others_say_why():
    assert MEMBERS["DDIMInverseScheduler"] == "runs from data to noise"
    assert "original_image" in MEMBERS["RePaintScheduler"]
    assert "own noise path" in MEMBERS["UnCLIPScheduler"]
    assert all("\n" not in reason for reason in MEMBERS.values())


@pytest.mark.parametrize("name", USABLE)
def test_samples_have_the_right_law(name):
    """Data N(1, 0.25 I), 40 evaluations, 128 x 8 numbers: mean and standard deviation, on every path it takes."""
    ran = 0
    for kind in KINDS:
        try:
            x, nfe = draw(f"diffusers:{name}", make_path(kind), 40, 128, torch.float32, **GAUSSIAN)
        except Unsupported:
            continue
        ran += 1
        assert 20 <= nfe <= 40
        assert x.dtype == torch.float32
        assert float(x.mean()) == pytest.approx(1.0, abs=0.1)
        low = 0.25 if name in DISTILLED else 0.42
        assert low < float(x.std()) < 0.56
    assert ran


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
def test_budget_is_kept_or_the_least_is_named(name):
    for nfe in (1, 2, 3, 5, 12, 13):
        try:
            _, spent = draw(f"diffusers:{name}", make_path("vp-linear"), nfe, 2)
        except Unsupported as error:
            says = str(error)
        else:
            assert 0 < spent <= nfe
            continue
        assert f"cannot run in {nfe} evaluations" in says


def test_heun_finds_the_largest_number_of_steps():
    assert draw("diffusers:HeunDiscreteScheduler", make_path("vp-linear"), 9, 2)[1] == 9
    assert draw("diffusers:HeunDiscreteScheduler", make_path("vp-linear"), 10, 2)[1] == 9


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler"])
def test_noise_is_ours_whatever_the_chunks(name):
    path = make_path("vp-linear")

    def rows(samples: range) -> torch.Tensor:
        field = exact(path, len(samples))
        noise = NoiseSource(5, samples, field.shape, dtype=torch.float64)
        return solver(f"diffusers:{name}").sample(field, noise.start(), COND, 6, noise)

    torch.testing.assert_close(rows(range(6)), torch.cat([rows(range(2)), rows(range(2, 6))]))
    assert not torch.equal(rows(range(2)), rows(range(2, 4)))


def test_randn_tensor_is_given_back():
    draw("diffusers:DDPMScheduler", make_path("vp-linear"), 3, 2)
    import diffusers.schedulers.scheduling_ddpm as module
    from diffusers.utils.torch_utils import randn_tensor

    assert module.randn_tensor is randn_tensor


def test_prediction_does_not_change_the_samples():
    """Conversions are exact, so what the scheduler is told the network predicts is of no account."""
    ends = [
        draw(f"diffusers:DDIMScheduler(prediction={p})", make_path("vp-linear"), 8, 4)[0]
        for p in ("epsilon", "v_prediction", "sample")
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-4, atol=1e-4)


def test_settings_reach_the_scheduler():
    path = make_path("vp-linear")
    plain = draw("diffusers:DPMSolverMultistepScheduler", path, 8, 4)[0]
    for setting in ("solver_order=3", "algorithm_type=sde-dpmsolver++", "use_karras_sigmas=true"):
        assert not torch.equal(plain, draw(f"diffusers:DPMSolverMultistepScheduler({setting})", path, 8, 4)[0])


def test_table_of_the_path_is_the_schedulers():
    table = tuple(float(a) for a in torch.linspace(0.99, 0.02, 50))
    path = VPDiscrete(alphas_cumprod=table, t_end=0.02)
    scheduler = solver("diffusers:DDIMScheduler")._bridge(path).scheduler
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor(table))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("diffusers:EulerDiscretScheduler", "did you mean 'EulerDiscreteScheduler'"),
        ("diffusers:DDIMScheduler(solver_order=2)", "unknown setting 'solver_order' in .*known: timestep_spacing"),
        ("diffusers:DDIMScheduler(prediction=noise)", "prediction"),
    ],
)
def test_what_is_mistyped_is_named(text, says):
    with pytest.raises(UserError, match=says):
        registry.build_method(text)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("EulerDiscreteScheduler", "flow", "runs on vp paths, not on flow"),
        ("FlowMatchEulerDiscreteScheduler", "vp-linear", "runs on flow paths, not on vp"),
        ("RePaintScheduler", "vp-linear", "steps with"),
        ("DDIMInverseScheduler", "vp-linear", "runs from data to noise"),
    ],
)
def test_a_pair_that_cannot_run_says_why(name, kind, says):
    with pytest.raises(Unsupported, match=says):
        draw(f"diffusers:{name}", make_path(kind), 8, 2)
