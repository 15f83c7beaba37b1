"""RMSNorm of a row and of the same row shifted by delta, in difference form, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def launch(
    x: Tensor, delta: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """rms_norm_pair on checked arguments: float64 if x or delta is float64, float32 otherwise."""
    dtype = torch.float64 if torch.float64 in (x.dtype, delta.dtype) else torch.float32
    row, shift, gain = x.to(dtype), delta.to(dtype), weight.to(dtype) + weight_offset
    scale = (row.square().mean(-1, keepdim=True) + eps).rsqrt()
    shifted_scale = ((row + shift).square().mean(-1, keepdim=True) + eps).rsqrt()
    # r' − r without subtracting two nearly equal roots; s is the change of the mean square.
    change = (shift * (2 * row + shift)).mean(-1, keepdim=True)
    scale_change = -change * scale.square() * shifted_scale.square() / (scale + shifted_scale)
    norm = (gain * (row * scale)).to(x.dtype)
    if residual is not None:
        norm = residual + norm
    difference = gain * (shifted_scale * shift + scale_change * row)
    return norm.contiguous(), difference.to(delta.dtype).contiguous()
