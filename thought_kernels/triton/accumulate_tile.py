"""Which tile is whose, and blocks of matrices of any strides: what accumulate's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(base, row, column, row_stride, column_stride, mask):
    """A block of a matrix, 0 where the mask says no."""
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def add(pointers, values, mask):
    """What memory holds there, plus values, where the mask says yes."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def locate(tile, tiles_out, tiles_in):
    """Whether a tile belongs to cross, and its row and column: cross row by row, then gram's lower triangle."""
    is_cross = tile < tiles_out * tiles_in
    t = tile - tiles_out * tiles_in
    # The integer m with m (m + 1) / 2 <= t < (m + 1) (m + 2) / 2; the root may be off by one in float32.
    m = ((tl.sqrt(8.0 * tl.maximum(t, 0) + 1.0) - 1.0) * 0.5).to(tl.int32)
    m = tl.where(m * (m + 1) // 2 > t, m - 1, m)
    m = tl.where((m + 1) * (m + 2) // 2 <= t, m + 1, m)
    n = t - m * (m + 1) // 2
    return is_cross, tl.where(is_cross, tile // tiles_in, m), tl.where(is_cross, tile % tiles_in, n)
