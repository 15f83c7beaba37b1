"""The tiles of accumulate's cross and gram: products of scaled rows, summed over one split of them."""

from __future__ import annotations

import triton
import triton.language as tl

from thought_kernels.triton.accumulate_tile import load, locate


@triton.jit
def _round_to_tf32(x):
    # Half away from zero, so that the tensor core's truncation of the low 13 bits drops only zeros.
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _product(
    left, minus, right, factors, further, first, last, left_offset, left_width, right_offset, right_width, left_row,
    left_column, right_row, right_column, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ over rows first..last-1 of factor (left - minus)[row, m] further right[row, n], [BLOCK, BLOCK] float32.

    minus, factors and further may be None; minus has right's strides. further holds powers of two, which round nothing.
    """
    m = left_offset + tl.arange(0, BLOCK)
    n = right_offset + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        if factors is None:
            used = row < last
        else:
            factor = tl.load(factors + row, mask=row < last, other=0.0)
            used = factor != 0  # the other rows may hold NaN
        x_used = used[:, None] & (m < left_width)[None, :]
        x = load(left, row, m, left_row, left_column, x_used)
        y = load(right, row, n, right_row, right_column, used[:, None] & (n < right_width)[None, :])
        if minus is not None:
            x = x.to(tl.float32) - load(minus, row, m, right_row, right_column, x_used).to(tl.float32)
        if factors is not None:
            x = x.to(tl.float32) * factor[:, None]
            if further is not None:
                y = y.to(tl.float32) * tl.load(further + row, mask=used, other=1.0)[:, None]
        x = x.to(OPERAND)
        if PRECISION == "tf32":
            x = _round_to_tf32(x)
        total = tl.dot(tl.trans(x), y.to(OPERAND), total, input_precision=PRECISION)
    return total


@triton.jit
def product_kernel(
    delta,
    without,  # pointer, or None unless delta holds the with-context activations
    activation,
    factors,  # [rows] float32, or None where every factor is 1
    further,  # [rows] float32 or None: completes the factors
    partials,  # [grid's tiles, splits, BLOCK, BLOCK] float32
    rows,
    d_out,
    d_in,
    delta_row,
    delta_column,
    activation_row,
    activation_column,
    first_tile,
    tiles_out,
    tiles_in,
    rows_per_split,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of cross or gram, without coefficient, over the rows of one split."""
    # Neighbouring programs share the same rows, so that L2 serves all tiles of one slice of the inputs.
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    is_cross, m, n = locate(first_tile + tile, tiles_out, tiles_in)
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    target = partials + (tile * tl.num_programs(1) + split).to(tl.int64) * (BLOCK * BLOCK) + i * BLOCK + j
    if is_cross:
        total = _product(
            delta, without, activation, factors, further, first, last, m * BLOCK, d_out, n * BLOCK, d_in,
            delta_row, delta_column, activation_row, activation_column, OPERAND, PRECISION, BLOCK, BLOCK_K,
        )  # fmt: skip
        tl.store(target, total)
    else:
        total = _product(
            activation, None, activation, factors, further, first, last, m * BLOCK, d_in, n * BLOCK, d_in,
            activation_row, activation_column, activation_row, activation_column, OPERAND, PRECISION, BLOCK, BLOCK_K,
        )  # fmt: skip
        tl.store(target, total)
