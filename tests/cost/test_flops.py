"""FLOPs against sums made by hand from layer shapes; what cannot be counted is missing and named, never low."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evalbench import registry
from evalbench.cost.flops import FlopCount, count, count_flops, count_forward


@torch.library.custom_op("evalbench_test::project", mutates_args=())
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@torch.library.custom_op("evalbench_test::softmax", mutates_args=())
def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x, -1)


@contextmanager
def hooked(network: nn.Module) -> Iterator[dict[str, int]]:
    """FLOPs of every convolution and linear layer that a call runs, by the layer formulas: what module hooks see."""
    sums = {"layers": 0}

    def hook(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            per_output = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        else:
            per_output = layer.in_features
        sums["layers"] += 2 * per_output * out.numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    yield sums
    for handle in handles:
        handle.remove()


def attention(batch: int, heads: int, tokens: int, channels: int) -> int:
    """Q K' and its product with V: two products of 2 tokens^2 channels FLOPs for each head."""
    return batch * heads * 2 * (2 * tokens**2 * channels)


def counted(call: Callable[[], object]) -> float:
    found = count_forward(call)
    assert found.uncounted == ()
    return found.flops


# --- layers ---------------------------------------------------------------------------------------------------------


def test_a_multiply_add_is_two_operations() -> None:
    # 3 x 5 outputs of 7 multiply-adds each: 105 MAC, 210 FLOP
    assert counted(lambda: nn.Linear(7, 5)(torch.randn(3, 7))) == 2 * 105


def test_composite_operations_are_split_before_they_are_judged() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    with torch.inference_mode():  # here `linear` itself reaches the counter
        assert counted(lambda: layer(x)) == 2 * 105


@pytest.mark.parametrize(("stride", "groups", "size"), [(1, 1, 10), (2, 1, 5), (1, 2, 10)])
def test_convolution(stride: int, groups: int, size: int) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=1, groups=groups)
    assert counted(lambda: layer(torch.randn(2, 4, 10, 10))) == 2 * (2 * 6 * size * size) * (4 // groups * 9)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_scaled_dot_product_attention(backend: SDPBackend) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    with sdpa_kernel(backend):
        assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == attention(2, 4, 16, 8)


def test_cross_attention_counts_the_keys_it_reads() -> None:
    q, k, v = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 2 * (2 * 16 * 5 * 8)


def test_a_mask_does_not_make_attention_cheaper() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)) == attention(1, 2, 16, 8)


class Attention(nn.Module):
    """Self-attention of (B, L, C) with four projections."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed)


def test_module_hooks_miss_what_attention_costs() -> None:
    block, x = Attention(32, 4), torch.randn(2, 256, 32)
    projections = 2 * (2 * 256) * 32 * (3 * 32 + 32)
    with hooked(block) as seen:
        total = counted(lambda: block(x))
    assert seen["layers"] == projections
    assert total == projections + attention(2, 4, 256, 8)
    assert total / seen["layers"] == 5.0  # the undercount of a module-hook counter here


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (lambda: torch.randn(3, 4) @ torch.randn(4), 2 * 3 * 4),
        (lambda: torch.randn(4) @ torch.randn(4), 2 * 4),
        (lambda: torch.einsum("bij,bjk->bik", torch.randn(2, 3, 4), torch.randn(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda: torch._int_mm(*torch.ones(2, 32, 32, dtype=torch.int8)), 2 * 32**3),
    ],
    ids=["matrix-vector", "dot", "einsum", "int8"],
)
def test_products(call: Callable[[], object], flops: int) -> None:
    assert counted(call) == flops


# --- networks -------------------------------------------------------------------------------------------------------


def test_unet() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 7])
    with hooked(network) as seen:
        total = counted(lambda: network(x, t))
    # attention at 8 x 8 with 4 heads of 8: one down, one in the middle, two up
    assert total == seen["layers"] + 4 * attention(2, 4, 8 * 8, 8)
    assert total == 2 * unet_by_hand()


def unet_by_hand() -> int:
    """FLOPs of one row of the network above, from its settings: widths 16 and 32, times in 64, images of 16 x 16."""

    def conv(into: int, out: int, size: int, kernel: int = 3) -> int:
        return 2 * into * out * kernel**2 * size**2

    def linear(into: int, out: int, tokens: int = 1) -> int:
        return 2 * into * out * tokens

    def resnet(into: int, out: int, size: int) -> int:
        shortcut = conv(into, out, size, kernel=1) if into != out else 0
        return conv(into, out, size) + linear(64, out) + conv(out, out, size) + shortcut

    def attend(width: int, size: int) -> int:
        return 4 * linear(width, width, size**2) + attention(1, width // 8, size**2, 8)

    time = linear(16, 64) + linear(64, 64)
    down = resnet(16, 16, 16) + conv(16, 16, 8) + resnet(16, 32, 8) + attend(32, 8)  # a strided convolution between
    middle = 2 * resnet(32, 32, 8) + attend(32, 8)
    up = resnet(32 + 32, 32, 8) + resnet(32 + 16, 32, 8) + 2 * attend(32, 8) + conv(32, 32, 16)
    up += resnet(32 + 16, 16, 16) + resnet(16 + 16, 16, 16)
    return time + conv(3, 16, 16) + down + middle + up + conv(16, 3, 16)


def test_dit() -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    layers, heads, channels = 3, 2, 8
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=channels,
        in_channels=4,
        num_layers=layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    ).eval()
    x, t, labels = torch.randn(2, 4, 16, 16), torch.tensor([5, 7]), torch.tensor([1, 2])
    with hooked(network) as seen:
        total = counted(lambda: network(x, t, labels))
    # 8 x 8 patches
    assert total == seen["layers"] + layers * attention(2, heads, 8 * 8, channels)
    assert total > 1.1 * seen["layers"]
    assert total == 2 * dit_by_hand(layers, width=heads * channels, heads=heads, tokens=8 * 8)


def dit_by_hand(layers: int, width: int, heads: int, tokens: int) -> int:
    """FLOPs of one row of the network above, from its settings: patches of 2 x 2 x 4, an MLP of 4 widths."""
    patch = 2 * 2 * 4
    embed_time = 2 * (256 * width + width * width)  # sinusoids of 256 through two layers
    modulate = 2 * width * 6 * width
    attend = 4 * 2 * tokens * width**2 + attention(1, heads, tokens, width // heads)
    mlp = 2 * 2 * tokens * width * 4 * width
    last = embed_time + 2 * width * 2 * width + 2 * tokens * width * patch
    return 2 * tokens * patch * width + layers * (embed_time + modulate + attend + mlp) + last


@pytest.mark.parametrize("name", ["gmm", "fashion-mixture"])
def test_embedded_models_use_nothing_unknown(name: str) -> None:
    model = registry.build_model(name, {})
    model.to(torch.float32, torch.device("cpu"))
    x = torch.randn(2, *model.shape)
    found = count_forward(lambda: model.predict(x, 0.5, 0.8, 0.6, torch.tensor([0, 1])))
    assert found.uncounted == ()


# --- what cannot be counted -----------------------------------------------------------------------------------------


def missing(found: FlopCount, *names: str) -> bool:
    return math.isnan(found.flops) and found.uncounted == names


def test_a_custom_operation_makes_the_count_missing() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4)

    def call() -> torch.Tensor:
        return project(x @ weight, weight)

    with FlopCounterMode(display=False) as low:
        call()
    assert low.get_total_flops() == 2 * 3 * 4 * 4  # half of it: what torch's counter alone would say
    assert missing(count_forward(call), "evalbench_test::project")


def test_a_name_that_is_cheap_in_torch_is_not_trusted_elsewhere() -> None:
    weight = torch.randn(4, 4)
    assert missing(count_forward(lambda: softmax(weight) @ weight), "evalbench_test::softmax")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: torch.fft.fft(torch.randn(4, 4, dtype=torch.complex64)), "aten::_fft_c2c"),
        (lambda: torch.cdist(torch.randn(3, 4), torch.randn(5, 4)), "aten::_cdist_forward"),
        (lambda: torch.linalg.cholesky_ex(torch.eye(4)), "aten::linalg_cholesky_ex"),
    ],
    ids=["fft", "cdist", "cholesky"],
)
def test_operations_without_a_formula(call: Callable[[], object], name: str) -> None:
    weight = torch.randn(4, 4)
    assert missing(count_forward(lambda: (weight @ weight, call())), name)


def test_torchs_fused_attention_layer_is_not_taken_for_free() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 3, 8)
    assert missing(count_forward(lambda: layer(x, x, x)), "aten::_native_multi_head_attention")


def test_nothing_that_counts_is_missing_too() -> None:
    assert missing(count_forward(lambda: torch.randn(3) + 1))
    assert math.isnan(count_flops(lambda: None))


def test_a_call_that_raises_under_the_counter_is_missing() -> None:
    def call() -> None:
        raise ValueError

    assert missing(count_forward(call), "ValueError under the counter")
    with pytest.raises(ValueError):  # noqa: PT011
        count(call)


def test_a_backward_pass_is_counted_where_it_runs() -> None:
    layer = nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4, requires_grad=True)
    out = layer(x).sum()
    # d out / d x and d out / d W: a product of the forward's size each
    assert count(lambda: out.backward()).flops == 2 * (2 * 3 * 4 * 5)
