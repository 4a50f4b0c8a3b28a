"""FLOPs by torch's own counter, which sees attention and every matmul (pitfall P39). A multiply-add counts 2.

Matrix products, convolutions and attention are counted by formula; attention counts dense, whatever its mask. Pointwise
operations, reductions, norms, softmax, resampling and data movement count 0, as is usual in the field. Any other
operation makes the count missing: NaN and the operation's name, never a number that is too low.

Not seen by any counter of this kind, and so the duty of whoever writes them: kernels that are launched around torch's
dispatcher (a raw Triton or CUDA launch, NumPy inside a forward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten


def _matrix_vector(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """(M, K) or (K,) with (K,)."""
    return 2 * math.prod(a)


def _integer_product(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """(M, K) with (K, N), 8-bit integers."""
    return 2 * a[0] * a[1] * b[1]


# Products for which torch's counter has no formula.
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten._int_mm: _integer_product,
}
# Operations of aten that count 0 and carry neither torch's tag `pointwise` nor `reduction`, nor are they views.
# Everything here is linear in the size of what it reads or writes (sorting: but for a logarithm).
_NORMS = """
    softmax log_softmax _softmax _log_softmax _safe_softmax logsumexp cumsum cumprod logcumsumexp cummax cummin
    native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit batch_norm cudnn_batch_norm
    _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update _fused_rms_norm
    native_layer_norm_backward native_group_norm_backward native_batch_norm_backward _softmax_backward_data
    _log_softmax_backward_data _fused_rms_norm_backward batch_norm_backward cudnn_batch_norm_backward
    native_dropout native_dropout_backward glu glu_backward mse_loss mse_loss_backward floor_divide floor_divide_
"""
_REDUCTIONS = """
    mean sum prod amax amin aminmax max min argmax argmin any all var std var_mean std_mean norm linalg_vector_norm
    median nanmedian mode count_nonzero unique_dim _unique2 unique_consecutive histc bincount
    sort topk kthvalue searchsorted bucketize
"""
_MOVES = """
    cat stack clone copy copy_ _to_copy contiguous _unsafe_view _reshape_alias _reshape_copy reshape lift_fresh
    lift_fresh_copy lift detach _conj _conj_physical resolve_conj view_as_real_copy view_copy expand_copy
    embedding embedding_dense_backward one_hot index index_select index_put index_put_ _unsafe_index
    _unsafe_index_put index_add index_add_ index_copy index_fill gather scatter scatter_ scatter_add scatter_add_
    scatter_reduce masked_select masked_scatter masked_scatter_ nonzero take put select_scatter slice_scatter
    diagonal_scatter as_strided_scatter select_backward slice_backward diagonal_backward gather_backward
    repeat repeat_interleave roll flip rot90 tril triu tril_ triu_ constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col col2im unfold_copy unfold_backward
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle meshgrid split_copy split_with_sizes_copy
"""
_MAKES = """
    arange linspace logspace ones zeros full empty empty_like empty_strided empty_permuted new_empty
    new_empty_strided new_zeros new_ones new_full ones_like zeros_like full_like rand randn rand_like randn_like
    randint randperm normal normal_ uniform_ bernoulli bernoulli_ multinomial eye scalar_tensor fill fill_ zero_
    resize_ set_ item is_nonzero equal is_same_size _local_scalar_dense _has_same_storage_numel _assert_async
    _assert_scalar
"""
_RESAMPLING = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
    upsample_bilinear2d_backward upsample_bicubic2d_backward grid_sampler_2d grid_sampler_3d
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool2d mkldnn_max_pool2d avg_pool2d_backward
    _adaptive_avg_pool2d_backward max_pool2d_with_indices_backward
"""
_CHEAP = frozenset(f"{_NORMS} {_REDUCTIONS} {_MOVES} {_MAKES} {_RESAMPLING}".split())
_SYSTEM = frozenset({"prim", "prims", "profiler"})  # reads of facts, and marks for a profiler


@dataclass(frozen=True)
class FlopCount:
    """Operations of one call.

    Attributes:
        flops: NaN when something could not be counted, or nothing that counts was seen.
        uncounted: why it is NaN: names of operations, such as `mylib::attend`; empty otherwise.
    """

    flops: float
    uncounted: tuple[str, ...] = ()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that are neither counted nor known to be cheap.

    It stands outside the counter, which splits composite operations first: only what is executed comes by.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _known(func):
            self.unknown.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def _known(func: Any) -> bool:
    if func._overloadpacket in flop_registry or func._overloadpacket in _FORMULAS:
        return True
    if func.namespace in _SYSTEM:
        return True
    cheap = {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags)
    return func.namespace == "aten" and bool(cheap or func.is_view or func._overloadpacket.__name__ in _CHEAP)


def count(call: Callable[[], object]) -> FlopCount:
    """Operations of one call, which is run in the caller's gradient mode.

    Whatever the call raises is raised here. Not reentrant.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))
    with _Watch() as watch, counter:
        call()
    if watch.unknown:
        return FlopCount(math.nan, tuple(sorted(watch.unknown)))
    return FlopCount(float(counter.get_total_flops()) or math.nan)


def count_forward(call: Callable[[], object]) -> FlopCount:
    """Operations of one call without gradients; an operation that cannot run under the counter is a missing count."""
    try:
        with torch.no_grad():
            return count(call)
    except Exception as error:  # the call proper, which follows, raises again if the network is what failed
        return FlopCount(math.nan, (f"{type(error).__name__} under the counter",))


def count_flops(call: Callable[[], object]) -> float:
    """Floating-point operations of one call; NaN (missing, never low) when one of its operations is not known."""
    return count_forward(call).flops
