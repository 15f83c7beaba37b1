"""Streaming rank-one accumulation as Triton kernels.

Four kernels in two pairs, the second of each adding up in a fixed order what the first left in scratch:

1. ``row_statistics_kernel`` and ``reduce_sums_kernel``: the row factors w_i/ν_i, the sums and the moments. They run
   when a normalisation, a sum or the moments are asked for.
2. ``product_kernel`` and ``reduce_tiles_kernel``: the tiles of cross and gram, in one grid. Where there are fewer tiles
   than multiprocessors the rows are split among several programs per tile.

So the inputs are streamed from memory once by the products, and once more by the row statistics where they run: ‖a_i‖²
needs the whole row before its first product. Nothing of the inputs' size is written: scratch is 4 or 8 bytes per row,
1/64 of a float32 input for partial sums, and 64 KiB for each of at most four programs per multiprocessor. No atomics:
the same call gives the same bits.

Of gram only the tiles on and below the diagonal are computed; what is added is exactly symmetric.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

NORMALIZATIONS = {"none": 0, "norm": 1, "squared_norm": 2}
STATISTICS_ROWS = 64  # rows per program of row_statistics_kernel, hence per partial sum
COLUMNS = 128  # per program of reduce_sums_kernel, and per step of row_statistics_kernel
STRIP = 32  # rows of a tile per program of reduce_tiles_kernel


@triton.jit
def _load(base, row, column, row_stride, column_stride, mask):
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def _add(pointers, values, mask):
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


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
        a = _load(activation, row, column, activation_row, activation_column, mask).to(tl.float32)
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
            difference = _load(delta, row, column, delta_row, delta_column, mask).to(tl.float32)
            if without is not None:
                difference -= _load(without, row, column, activation_row, activation_column, mask).to(tl.float32)
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
        x = _load(left, row, m, left_row, left_column, x_used)
        y = _load(right, row, n, right_row, right_column, used[:, None] & (n < right_width)[None, :])
        if minus is not None:
            x = x.to(tl.float32) - _load(minus, row, m, right_row, right_column, x_used).to(tl.float32)
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
def _locate(tile, tiles_out, tiles_in):
    """Whether a tile belongs to cross, and its row and column: cross row by row, then gram's lower triangle."""
    is_cross = tile < tiles_out * tiles_in
    t = tile - tiles_out * tiles_in
    # The integer m with m (m + 1) / 2 <= t < (m + 1) (m + 2) / 2; the root may be off by one in float32.
    m = ((tl.sqrt(8.0 * tl.maximum(t, 0) + 1.0) - 1.0) * 0.5).to(tl.int32)
    m = tl.where(m * (m + 1) // 2 > t, m - 1, m)
    m = tl.where((m + 1) * (m + 2) // 2 <= t, m + 1, m)
    n = t - m * (m + 1) // 2
    return is_cross, tl.where(is_cross, tile // tiles_in, m), tl.where(is_cross, tile % tiles_in, n)


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
    is_cross, m, n = _locate(first_tile + tile, tiles_out, tiles_in)
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
    is_cross, m, n = _locate(first_tile + tile, tiles_out, tiles_in)
    i = tl.arange(0, STRIP)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([STRIP, BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials + (tile * splits + split).to(tl.int64) * (BLOCK * BLOCK) + (strip + i) * BLOCK + j)
    total *= coefficient
    i = (m * BLOCK + strip + i).to(tl.int64)
    j = (n * BLOCK + j).to(tl.int64)
    if is_cross:
        _add(cross + i * cross_row + j * cross_column, total, (i < d_out) & (j < d_in))
    elif gram is not None:
        inside = (i < d_in) & (j <= i)
        _add(gram + i * gram_row + j * gram_column, total, inside)
        _add(gram + j * gram_row + i * gram_column, total, inside & (j < i))


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
            _add(pointers, coefficient * total, mask)
        if activation_sum is not None:
            mask = (column >= d_out) & (column < d_out + d_in)
            pointers = activation_sum + (column - d_out) * activation_sum_stride
            _add(pointers, coefficient * total, mask)
    if moments is not None and tl.program_id(0) == 0:
        which = tl.arange(0, 4)
        parts = tl.zeros([4], tl.float64)
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            inside = (block < blocks)[:, None]
            parts += tl.sum(tl.load(moment_parts + block[:, None] * 4 + which[None, :], mask=inside, other=0.0), 0)
        _add(moments + which * moments_stride, parts, which < 4)


class Plan(NamedTuple):
    """How the products of one call are cut into programs.

    Attributes:
        operand: dtype in which the matrix units read both factors.
        precision: Triton's input_precision for that dtype.
        block, block_k: tile edge, and rows per step.
        options: num_warps and num_stages.
        tiles_out, tiles_in: tiles down and across cross.
        tiles: of cross and gram together.
        batch: tiles per launch, so that their scratch is bounded.
        splits, rows_per_split: into how many parts the rows are cut, and their size.
    """

    operand: torch.dtype
    precision: str
    block: int
    block_k: int
    options: dict[str, int]
    tiles_out: int
    tiles_in: int
    tiles: int
    batch: int
    splits: int
    rows_per_split: int


def plan(
    delta: torch.dtype, activation: torch.dtype, *, rows: int, d_out: int, d_in: int, gram: bool, scaled: bool,
    processors: int,
) -> Plan:  # fmt: skip
    """Cuts one call into programs; the same arguments always give the same order of summation.

    The operand takes the activation's dtype. float16 that is scaled or subtracted goes through TF32 instead: the same
    11 significant bits, but w δ/‖a‖² leaves float16's range. float32 is multiplied by ordinary instructions, because
    tensor cores truncate as they accumulate, which sums of thousands of float32 products show.

    Args:
        delta, activation: dtypes of the inputs.
        rows, d_out, d_in: sizes, rows > 0.
        gram: whether gram is accumulated too.
        scaled: whether rows are multiplied by a factor, or δ is formed as a difference.
        processors: multiprocessors of the device.
    """
    block, block_k, options = 128, 64, {"num_warps": 8, "num_stages": 5 if scaled else 3}
    if activation == torch.bfloat16:
        operand, precision = torch.bfloat16, "ieee"
    elif activation == torch.float16 and delta == torch.float16 and not scaled:
        operand, precision = torch.float16, "ieee"
    elif activation == torch.float16:
        operand, precision, block_k = torch.float32, "tf32", 32
    else:
        operand, precision, block, block_k = torch.float32, "ieee", 64, 32
    tiles_out, tiles_in = triton.cdiv(d_out, block), triton.cdiv(d_in, block)
    tiles = tiles_out * tiles_in + (tiles_in * (tiles_in + 1) // 2 if gram else 0)
    splits, rows_per_split = split_rows(rows, tiles, processors, block_k)
    batch = min(tiles, 4 * processors)
    return Plan(operand, precision, block, block_k, options, tiles_out, tiles_in, tiles, batch, splits, rows_per_split)


def split_rows(rows: int, tiles: int, processors: int, block_k: int) -> tuple[int, int]:
    """Into how many parts to cut the rows so that ``tiles`` keep ``processors`` busy, and the rows of each part.

    Minimises waves · rows per part + 6 · tiles · parts / processors · waves of scratch traffic, in rows: writing a 128²
    partial tile and reading it back takes all processors together about as long as one processor needs for 6 rows.
    """

    def cost(parts: int) -> int:
        waves = triton.cdiv(tiles * parts, processors)
        return waves * triton.cdiv(rows, parts) + 6 * tiles * parts

    most = max(1, min(triton.cdiv(rows, 4 * block_k), 4 * processors // max(1, tiles)))
    parts = min(range(1, most + 1), key=cost)
    size = triton.cdiv(triton.cdiv(rows, parts), block_k) * block_k
    return triton.cdiv(rows, size), size


def launch(
    cross: torch.Tensor,
    delta: torch.Tensor,
    activation: torch.Tensor,
    *,
    pair: bool,
    weights: torch.Tensor | None,
    normalization: str,
    coefficient: float,
    gram: torch.Tensor | None,
    delta_sum: torch.Tensor | None,
    activation_sum: torch.Tensor | None,
    moments: torch.Tensor | None,
) -> None:
    """Adds the rows' sums to the accumulators in place, on one GPU and in its current stream.

    Args:
        cross: ``[d_out, d_in]`` float32, any strides.
        delta: ``[rows, d_out]``, any strides; with ``pair``, the with-context activation instead.
        activation: ``[rows, d_in]``, any strides; bfloat16 and float16 run on tensor cores, other dtypes in float32.
        pair: whether δ = delta − activation, formed here in float32, rather than delta itself.
        weights: ``[rows]`` or None for ones; rounded to float32.
        normalization: "none", "norm" or "squared_norm".
        coefficient: multiplies everything but moments.
        gram: ``[d_in, d_in]`` float32 or None.
        delta_sum: ``[d_out]`` float32 or None.
        activation_sum: ``[d_in]`` float32 or None.
        moments: ``[4]`` float64 or None.

    Raises:
        ValueError: if cross is not float32.
    """
    if cross.dtype != torch.float32:
        raise ValueError(f"accumulate: cross must be float32 for the triton backend, got {cross.dtype}")
    if activation.shape[0] == 0:
        return
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    # The interpreter (on a CPU) counts as eight processors.
    processors = torch.cuda.get_device_properties(cross.device).multi_processor_count if cross.is_cuda else 8
    with torch.cuda.device(cross.device) if cross.is_cuda else contextlib.nullcontext():
        factors, further = _sums(
            delta, activation, pair, weights, normalization, coefficient, delta_sum, activation_sum, moments
        )  # fmt: skip
        _products(cross, gram, delta, activation, pair, factors, further, coefficient, processors)


def _sums(
    delta: torch.Tensor, activation: torch.Tensor, pair: bool, weights: torch.Tensor | None, normalization: str,
    coefficient: float, delta_sum: torch.Tensor | None, activation_sum: torch.Tensor | None,
    moments: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Accumulates the sums and moments, and returns the row factors w/ν in two parts, None where all are 1."""
    (rows, d_out), d_in = delta.shape, activation.shape[1]
    wants_sums = delta_sum is not None or activation_sum is not None
    if normalization == "none" and not wants_sums and moments is None:
        return weights, None
    blocks = triton.cdiv(rows, STATISTICS_ROWS)
    new = functools.partial(torch.empty, device=delta.device)
    factors = new(rows, dtype=torch.float32) if normalization != "none" else None
    further = new(rows, dtype=torch.float32) if normalization == "squared_norm" else None
    sums = new(blocks, d_out + d_in, dtype=torch.float32) if wants_sums else None
    parts = new(blocks, 4, dtype=torch.float64) if moments is not None else None
    row_statistics_kernel[(blocks,)](
        delta, activation if pair else None, activation, weights, factors, further, sums, parts, rows, d_out,
        d_in, *delta.stride(), *activation.stride(), NORMALIZATIONS[normalization], STATISTICS_ROWS, COLUMNS,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    if wants_sums or moments is not None:
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (delta_sum, activation_sum, moments)]
        reduce_sums_kernel[(triton.cdiv(d_out + d_in, COLUMNS),)](
            sums, parts, delta_sum, activation_sum, moments, blocks, d_out, d_in, *strides, coefficient, 16, COLUMNS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return (weights if factors is None else factors), further


def _products(
    cross: torch.Tensor, gram: torch.Tensor | None, delta: torch.Tensor, activation: torch.Tensor, pair: bool,
    factors: torch.Tensor | None, further: torch.Tensor | None, coefficient: float, processors: int,
) -> None:  # fmt: skip
    (rows, d_out), d_in = delta.shape, activation.shape[1]
    p = plan(
        delta.dtype, activation.dtype, rows=rows, d_out=d_out, d_in=d_in, gram=gram is not None,
        scaled=pair or factors is not None, processors=processors,
    )  # fmt: skip
    operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[p.operand]
    partials = torch.empty(p.batch, p.splits, p.block, p.block, dtype=torch.float32, device=cross.device)
    gram_strides = (0, 0) if gram is None else gram.stride()
    for first in range(0, p.tiles, max(1, p.batch)):
        tiles = min(p.batch, p.tiles - first)
        product_kernel[(tiles, p.splits)](
            delta, activation if pair else None, activation, factors, further, partials, rows, d_out, d_in,
            *delta.stride(), *activation.stride(), first, p.tiles_out, p.tiles_in, p.rows_per_split, operand,
            p.precision, p.block, p.block_k, **p.options, enable_fp_fusion=True,
        )  # fmt: skip
        reduce_tiles_kernel[(tiles, p.block // STRIP)](
            partials, cross, gram, d_out, d_in, *cross.stride(), *gram_strides, coefficient, first, p.tiles_out,
            p.tiles_in, p.splits, p.block, STRIP, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
