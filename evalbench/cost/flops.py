"""FLOPs by torch's own counter, which sees attention and every matmul (pitfall P39). A multiply-add counts 2."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], torch.Tensor]) -> float:
    """Floating-point operations of one call; NaN (missing, never low) when the counter knows none of its operations.

    Elementwise operations are not counted, as is usual in the field.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops()) or math.nan
