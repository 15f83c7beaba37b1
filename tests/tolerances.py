"""The one table of tolerances: a backend may err twice as much as plain PyTorch in the same dtype does, plus a floor.

Errors are measured against float64 on the same inputs. The floor matters where plain PyTorch happens to be exact. Plain
PyTorch adds in an order that depends on the CPU, so that its error is one draw of many: where a problem magnifies
rounding, a backend may also err by as much as the problem's condition lets any order of additions err.
"""

from __future__ import annotations

import math

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

# Float32 results of a whole tiny model by two paths, relative to the largest: what the project claims. Some 16 products
# follow one another, of 64 terms at most whose absolute values sum up to about twice the result; each errs by
# 2 · rounding(64) = 20 · eps, and √16 times that is 80 · eps.
FORWARD = 1e-5

# Float32 differences, relative to themselves, by the same steps in another order: each factor of the difference form
# carries the rounding of scores of size 10 or so in an exponent, 10 · eps, and a sum's few eps.
DIFFERENCE = 100 * torch.finfo(torch.float32).eps

# Tensor cores read softmax weights in the inputs' dtype, each off by up to half of eps of its own.
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


def rounding(terms: int, dtype: torch.dtype) -> float:
    """How far a sum of so many products may come out in any order, relative to the sum of their absolute values.

    Each of the additions errs by at most eps/2 of a partial sum, and partial sums are at most Σ |terms|. Were all these
    errors of one sign, they would come to terms · eps/2; they are not, and come to √terms · eps/2 or less (Higham and
    Mary, 2019). Twice that is not exceeded by chance. The products and the result are rounded once each.
    """
    return (2 + math.sqrt(terms)) * torch.finfo(dtype).eps


def allowed_error(truth: Tensor, plain: Tensor, dtype: torch.dtype | None = None, condition: float = 0.0) -> float:
    """The largest error a backend may make.

    Args:
        truth: float64.
        plain: plain PyTorch's result on the same inputs, twice whose error is allowed.
        dtype: whose floor is added; plain's if not given.
        condition: the error that the problem itself lets any order of additions make, where that is larger.
    """
    dtype = dtype or plain.dtype
    both = 2 if dtype == torch.float64 else 1  # the truth is float64 too, and errs as much
    return max(2 * largest(plain.double() - truth), both * condition) + FLOORS[dtype] * largest(truth)
