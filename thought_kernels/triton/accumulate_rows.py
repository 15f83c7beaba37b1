"""What accumulate needs of each row: its factor w/ν, and its share of the sums and moments."""

from __future__ import annotations

import triton
import triton.language as tl

from thought_kernels.triton.accumulate_tile import load


@triton.jit
def row_statistics_kernel(
    delta,
    without,  # pointer, or None unless delta holds the with-context activations
    activation,
    weights,  # pointer or None
    factors,  # [rows] float32 or None: w / ν, and 0 for rows that add nothing
    further,  # [rows] float32 or None: a power of two that completes factors where w / ν is no normal float32
    sums,  # [programs, d_out + d_in] float32 or None: Σ w δ | Σ w a over the program's rows
    moments,  # [programs, 4] float64 or None
    rows,
    d_out,
    d_in,
    delta_row,
    delta_column,
    activation_row,
    activation_column,
    NORMALIZATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The row factors w/ν of ROWS rows, and these rows' share of the sums and moments."""
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if weights is None:
        weight = tl.where(inside, 1.0, 0.0)
    else:
        weight = tl.load(weights + row, mask=inside, other=0.0)
    counted = weight != 0  # rows of weight 0 are never read: they may hold NaN

    activation_square = tl.zeros([ROWS], tl.float64)  # no float32 overflows or underflows it
    for start in range(0, d_in, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = counted[:, None] & (column < d_in)[None, :]
        a = load(activation, row, column, activation_row, activation_column, mask).to(tl.float32)
        if NORMALIZATION != 0:
            activation_square += tl.sum(a.to(tl.float64) * a.to(tl.float64), 1)
        if sums is not None:
            total = tl.sum(a * weight[:, None], 0)
            tl.store(sums + program.to(tl.int64) * (d_out + d_in) + d_out + column, total, mask=column < d_in)

    if NORMALIZATION == 0:
        inverse = tl.full([ROWS], 1.0, tl.float64)
    else:
        nu = activation_square if NORMALIZATION == 2 else tl.sqrt(activation_square)
        zero = activation_square == 0
        inverse = 1.0 / tl.where(zero, 1.0, nu)
        # An infinite ν gives NaN rather than a silently dropped row.
        inverse = tl.where(zero, 0.0, tl.where(nu == float("inf"), float("nan"), inverse))
    factor = tl.where(counted, weight.to(tl.float64) * inverse, 0.0)
    if factors is not None:
        if further is not None:
            size = tl.abs(factor)
            ordinary = (size == 0) | ((size >= 1.2e-38) & (size <= 3.4e38))
            # About √(w/ν): w δ/‖a‖ and a/‖a‖ are then float32s wherever their product is.
            exponent = ((size.to(tl.int64, bitcast=True) >> 52) - 1023) >> 1
            root = tl.where(ordinary, 1.0, ((exponent + 1023) << 52).to(tl.float64, bitcast=True))
            tl.store(factors + row, (factor / root).to(tl.float32), mask=inside)
            tl.store(further + row, root.to(tl.float32), mask=inside)
        else:
            tl.store(factors + row, factor.to(tl.float32), mask=inside)

    if (sums is not None) or (moments is not None):
        delta_square = tl.zeros([ROWS], tl.float64)
        for start in range(0, d_out, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = counted[:, None] & (column < d_out)[None, :]
            difference = load(delta, row, column, delta_row, delta_column, mask).to(tl.float32)
            if without is not None:
                difference -= load(without, row, column, activation_row, activation_column, mask).to(tl.float32)
            if moments is not None:
                delta_square += tl.sum(difference.to(tl.float64) * difference.to(tl.float64), 1)
            if sums is not None:
                total = tl.sum(difference * weight[:, None], 0)
                tl.store(sums + program.to(tl.int64) * (d_out + d_in) + column, total, mask=column < d_out)
        if moments is not None:
            # A row whose factor is 0 adds nothing, even if its δ overflows.
            energy = tl.where(factor == 0, 0.0, factor * delta_square)
            tl.store(moments + program * 4 + 0, tl.sum(weight.to(tl.float64), 0))
            tl.store(moments + program * 4 + 1, tl.sum(factor, 0))
            tl.store(moments + program * 4 + 2, tl.sum(energy, 0))
            tl.store(moments + program * 4 + 3, tl.sum(counted.to(tl.float64), 0))
