"""rms_norm_pair as one Triton kernel: each row is read once, stays in registers, and leaves as both outputs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

LARGEST_ROW = 8192
PROGRAM = 4096  # elements of a program, in several rows where they are short


@triton.jit
def rms_norm_pair_kernel(
    x,
    delta,
    weight,
    residual,  # None, or what the first output is the sum of, with the norm
    norm,  # [rows, d], x's dtype
    difference,  # [rows, d], delta's dtype
    rows,
    d,
    x_row,
    x_column,
    delta_row,
    delta_column,
    weight_stride,
    residual_row,
    residual_column,
    eps,
    weight_offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Both outputs of ROWS rows, whose d ≤ COLUMNS elements are in registers; r' − r as in ops/rms_norm_pair.py."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < d)
    z = tl.load(x + row * x_row + column * x_column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(delta + row * delta_row + column * delta_column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column * weight_stride, mask=column < d, other=0.0).to(tl.float32) + weight_offset
    shifted = z + shift
    one = tl.full([ROWS], 1.0, tl.float32)
    scale = tl.div_rn(one, tl.sqrt_rn(tl.sum(z * z, 1) / d + eps))
    shifted_scale = tl.div_rn(one, tl.sqrt_rn(tl.sum(shifted * shifted, 1) / d + eps))
    change = tl.sum(shift * (2 * z + shift), 1) / d
    scale_change = -change * (scale * scale) * (shifted_scale * shifted_scale) / (scale + shifted_scale)
    out = row * d + column
    first = (gain * (z * scale[:, None])).to(norm.dtype.element_ty)
    if residual is not None:
        stream = tl.load(residual + row * residual_row + column * residual_column, mask=mask, other=0.0)
        first = (stream.to(tl.float32) + first.to(tl.float32)).to(norm.dtype.element_ty)
    tl.store(norm + out, first, mask=mask)
    change = gain * (shifted_scale[:, None] * shift + scale_change[:, None] * z)
    tl.store(difference + out, change.to(difference.dtype.element_ty), mask=mask)


def tiles(d: int) -> tuple[int, int, int]:
    """Rows and padded columns of a program, and its warps."""
    columns = triton.next_power_of_2(d)
    rows = max(1, min(16, PROGRAM // columns))
    return rows, columns, max(1, min(16, rows * columns // 512))


def launch(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm_pair on checked arguments, in float32, on one GPU and in its current stream; d ≤ LARGEST_ROW."""
    norm = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    difference = torch.empty(x.shape, dtype=delta.dtype, device=x.device)
    if x.numel() == 0:
        return norm, difference
    d = x.shape[-1]
    x, delta = x.reshape(-1, d), delta.reshape(-1, d)
    residual = None if residual is None else residual.reshape(-1, d)
    residual_strides = (0, 0) if residual is None else residual.stride()
    rows, columns, warps = tiles(d)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        rms_norm_pair_kernel[(triton.cdiv(x.shape[0], rows),)](
            x, delta, weight, residual, norm, difference, x.shape[0], d, *x.stride(), *delta.stride(),
            weight.stride(0), *residual_strides, eps, weight_offset, rows, columns, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return norm, difference
