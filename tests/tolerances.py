"""The one table of tolerances: a backend may err twice as much as plain PyTorch in the same dtype does, plus a floor.

Errors are measured against float64 on the same inputs. The floor matters where plain PyTorch happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest true value: a result rounded once to its dtype is off by up to half of eps at its own size,
# and a float32 or float64 sum taken in another order than plain PyTorch's by a few eps more.
FLOORS = {
    torch.float64: 16 * torch.finfo(torch.float64).eps,  # the truth is float64 too, and errs as much
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}

# Differences (paired attention's delta, rms_norm_pair's second output), relative to the difference itself: each factor
# of the difference form carries the rounding of scores of size 10 or so in an exponent, 10 * eps, and a sum's few eps.
DIFFERENCES = {
    torch.float64: 100 * torch.finfo(torch.float64).eps,
    torch.float32: 100 * torch.finfo(torch.float32).eps,
}

# Tensor cores read softmax weights in the inputs' dtype, each off by up to half of eps: relative to the largest output
# or, since every weight of the difference form carries it, to the difference itself.
SOFTMAX_WEIGHTS = {
    torch.float32: 0.0,  # ordinary instructions
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}

# Float64 patches fitted by another path, relative to their largest element: the rounding of three blocks, 1e-14, times
# the condition of the systems solved, below 1e4 with the ridges that tests use.
SOLVED = 1e-10


def largest(tensor: Tensor) -> float:
    """max |x|, 0 for an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def allowed_error(truth: Tensor, plain: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error a backend may make: twice that of ``plain`` against float64 ``truth``, and the floor."""
    return 2 * largest(plain.double() - truth) + FLOORS[dtype or plain.dtype] * largest(truth)
