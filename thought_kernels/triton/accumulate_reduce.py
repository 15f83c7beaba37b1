"""Adds up in a fixed order what accumulate's other kernels left in scratch."""

from __future__ import annotations

import triton
import triton.language as tl

from thought_kernels.triton.accumulate_tile import add, locate


@triton.jit
def reduce_tiles_kernel(
    partials,
    cross,
    gram,  # pointer or None
    d_out,
    d_in,
    cross_row,
    cross_column,
    gram_row,
    gram_column,
    coefficient,
    first_tile,
    tiles_out,
    tiles_in,
    splits,
    BLOCK: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Adds the splits of STRIP rows of one tile to cross or gram."""
    tile = tl.program_id(0)
    strip = tl.program_id(1) * STRIP
    is_cross, m, n = locate(first_tile + tile, tiles_out, tiles_in)
    i = tl.arange(0, STRIP)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([STRIP, BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials + (tile * splits + split).to(tl.int64) * (BLOCK * BLOCK) + (strip + i) * BLOCK + j)
    total *= coefficient
    i = (m * BLOCK + strip + i).to(tl.int64)
    j = (n * BLOCK + j).to(tl.int64)
    if is_cross:
        add(cross + i * cross_row + j * cross_column, total, (i < d_out) & (j < d_in))
    elif gram is not None:
        inside = (i < d_in) & (j <= i)
        add(gram + i * gram_row + j * gram_column, total, inside)
        add(gram + j * gram_row + i * gram_column, total, inside & (j < i))


@triton.jit
def reduce_sums_kernel(
    sums,  # [blocks, d_out + d_in] float32, or None
    moment_parts,  # [blocks, 4] float64, or None
    delta_sum,  # pointer or None
    activation_sum,  # pointer or None
    moments,  # pointer or None
    blocks,
    d_out,
    d_in,
    delta_sum_stride,
    activation_sum_stride,
    moments_stride,
    coefficient,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the row blocks' partial sums of COLUMNS columns; the first program also adds the moments."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if sums is not None:
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, blocks, BLOCKS):
            block = (start + tl.arange(0, BLOCKS)).to(tl.int64)
            mask = (block < blocks)[:, None] & (column < d_out + d_in)[None, :]
            total += tl.sum(tl.load(sums + block[:, None] * (d_out + d_in) + column[None, :], mask, 0.0), 0)
        if delta_sum is not None:
            mask = column < d_out
            pointers = delta_sum + column * delta_sum_stride
            add(pointers, coefficient * total, mask)
        if activation_sum is not None:
            mask = (column >= d_out) & (column < d_out + d_in)
            pointers = activation_sum + (column - d_out) * activation_sum_stride
            add(pointers, coefficient * total, mask)
    if moments is not None and tl.program_id(0) == 0:
        which = tl.arange(0, 4)
        parts = tl.zeros([4], tl.float64)
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            inside = (block < blocks)[:, None]
            parts += tl.sum(tl.load(moment_parts + block[:, None] * 4 + which[None, :], mask=inside, other=0.0), 0)
        add(moments + which * moments_stride, parts, which < 4)
