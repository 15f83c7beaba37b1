"""A low-rank product whose rows each have the factors of one of several patches, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def launch(
    x: Tensor, right: Tensor, left: Tensor, index: Tensor, vector: Tensor | None, residual: Tensor | None
) -> Tensor:
    """gathered_low_rank on checked arguments, in the factors' dtype."""
    dtype, like = right.dtype, x if residual is None else residual
    output = torch.zeros(*x.shape[:2], left.shape[2], dtype=dtype, device=x.device)
    if residual is not None:
        output.copy_(residual)
    for patch in range(len(right)):
        rows = (index == patch).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        shift = x[rows].to(dtype) @ right[patch] @ left[patch]
        output[rows] += shift if vector is None else shift + vector[patch]
    return output.to(like.dtype)
