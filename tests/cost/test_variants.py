"""Variants: one text each, the same answers within their dtype, nothing switched on silently."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from evalbench import registry
from evalbench.cost.variants import Variant
from evalbench.errors import EvalbenchError, Unsupported, UserError
from evalbench.interfaces import Model, Time

CPU = torch.device("cpu")
variants = st.builds(
    Variant,
    st.sampled_from(["eager", "compile", "cuda-graphs"]),
    st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
    st.sampled_from(["default", "math", "flash", "efficient", "cudnn"]),
)


@dataclass
class Network(Model):
    """A linear layer; it writes down what it was called with."""

    seen: list[Any] = field(default_factory=list)
    native = "eps"
    num_classes = 3

    def __post_init__(self) -> None:
        self.shape = (4,)

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.arange(16.0).reshape(4, 4).div(16).to(device, dtype)

    def predict(self, x: torch.Tensor, t: Time, alpha: Time, sigma: Time, labels: torch.Tensor | None) -> torch.Tensor:
        self.seen.append((x.dtype, getattr(t, "dtype", None), getattr(labels, "dtype", None)))
        out = x @ self.weight + sigma
        return out if labels is None else out + labels[:, None]

    def caption(self, label: int) -> str:
        return f"class {label}"


@given(variants)
def test_a_text_is_read_back(variant: Variant) -> None:
    assert Variant.parse(variant.text) == variant
    assert Variant.parse(" , ".join(reversed(variant.text.split(",")))) == variant


def test_the_default_is_eager_float32() -> None:
    assert Variant().text == "eager,float32"
    assert Variant.parse("compile") == Variant("compile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eager,bf16", "unknown word 'bf16' in variant 'eager,bf16'"),
        ("eager,compile", "names two of a kind: 'eager' and 'compile'"),
        ("", "unknown word ''"),
    ],
)
def test_what_is_no_variant(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Variant.parse(text)
    with pytest.raises(UserError, match="unknown execution 'fast' in variant"):
        Variant("fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_a_dtype_is_the_networks_and_the_state_keeps_its_own(dtype: str, tolerance: float) -> None:
    plain = Network()
    plain.to(torch.float32, CPU)
    inner = Network()
    model = Variant(dtype=dtype).apply(inner, CPU)
    x, t, labels = torch.randn(5, 4), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    expected, found = plain.predict(x, t, 0.5, 0.5, labels), model.predict(x, t, 0.5, 0.5, labels)
    assert inner.seen == [(getattr(torch, dtype),) * 2 + (torch.int64,)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (tolerance == 0) == bool((found == expected).all())


def test_all_else_is_the_models_own() -> None:
    model = Variant("compile", "bfloat16").apply(Network(), CPU, compiler=lambda predict: predict)
    assert (model.native, model.shape, model.num_classes, model.caption(2)) == ("eps", (4,), 3, "class 2")
    assert model.weight.dtype == torch.bfloat16


def test_only_compile_compiles() -> None:
    compiled = []

    def compiler(predict: Any) -> Any:
        compiled.append(predict)
        return lambda *arguments: 2 * predict(*arguments)

    x = torch.randn(2, 4)
    eager = Variant("eager").apply(Network(), CPU, compiler=compiler).predict(x, 0.5, 1.0, 0.0, None)
    assert compiled == []
    faster = Variant("compile").apply(Network(), CPU, compiler=compiler).predict(x, 0.5, 1.0, 0.0, None)
    assert len(compiled) == 1
    torch.testing.assert_close(faster, 2 * eager)


def test_cuda_graphs_need_a_cuda_device() -> None:
    for call in (Variant("cuda-graphs").check, lambda device: Variant("cuda-graphs").apply(Network(), device)):
        with pytest.raises(Unsupported, match="not supported: variant 'cuda-graphs,float32' needs a CUDA device"):
            call(CPU)
    assert issubclass(Unsupported, EvalbenchError)


def test_an_attention_kernel_holds_inside_the_network_only() -> None:
    enabled = []

    class Attends(Network):
        def predict(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            enabled.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
            return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    x = torch.randn(8, 4)
    found = [Variant(attention=kind).apply(Attends(), CPU).predict(x, 0.5, 1, 0, None) for kind in ("default", "math")]
    assert enabled == [before, (False, True)]
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_model_gives_the_same_samples() -> None:
    models = []
    for variant in (Variant("eager", "float64"), Variant("compile", "float64")):
        model = registry.build_model("gmm", {"dim": 8, "components": 6})
        models.append(variant.apply(model, CPU))
    x = torch.randn(4, 8, dtype=torch.float64)
    eager, compiled = (model.predict(x, 0.5, 0.8, 0.6, None) for model in models)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("times", [(0.9, 0.5, 0.1)])
def test_cuda_graphs_replay_what_eager_computes(times: tuple[float, ...]) -> None:
    device = torch.device("cuda")
    eager, replayed = (Variant(how).apply(Network(), device) for how in ("eager", "cuda-graphs"))
    for _ in range(2):  # the second time round every graph exists
        for t in times:
            for labels in (None, torch.tensor([0, 1], device=device)):
                x = torch.randn(2, 4, device=device)
                arguments = (x, t, 0.5, t, labels)
                torch.testing.assert_close(replayed.predict(*arguments), eager.predict(*arguments))
    kept = replayed.predict(x, times[0], 0.5, times[0], None)
    before = kept.clone()
    replayed.predict(2 * x, times[0], 0.5, times[0], None)  # a later replay may not touch what was returned
    torch.testing.assert_close(kept, before)


@pytest.mark.gpu
def test_reduced_precision_on_a_gpu() -> None:
    device = torch.device("cuda")
    model = Variant("eager", "bfloat16").apply(Network(), device)
    assert model.predict(torch.randn(2, 4, device=device), 0.5, 0.5, 0.5, None).dtype == torch.float32
