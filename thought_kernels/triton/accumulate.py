"""Streaming rank-one accumulation as Triton kernels.

Four kernels in two pairs, the second of each adding up in a fixed order what the first left in scratch:

1. ``row_statistics_kernel`` and ``reduce_sums_kernel``: the row factors w_i/ν_i, the sums and the moments. They run
   when a normalisation, a sum or the moments are asked for.
2. ``product_kernel`` and ``reduce_tiles_kernel``: the tiles of cross and gram, in one grid. Where there are fewer tiles
   than multiprocessors the rows are split among several programs per tile.

They are in accumulate_rows, accumulate_product and accumulate_reduce; accumulate_plan cuts a call into programs, and
this file launches them.

So the inputs are streamed from memory once by the products, and once more by the row statistics where they run: ‖a_i‖²
needs the whole row before its first product. Nothing of the inputs' size is written: scratch is 4 or 8 bytes per row,
1/64 of a float32 input for partial sums, and 64 KiB for each of at most four programs per multiprocessor. No atomics:
the same call gives the same bits.

Of gram only the tiles on and below the diagonal are computed; what is added is exactly symmetric.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

from thought_kernels.triton.accumulate_plan import plan
from thought_kernels.triton.accumulate_product import product_kernel
from thought_kernels.triton.accumulate_reduce import reduce_sums_kernel, reduce_tiles_kernel
from thought_kernels.triton.accumulate_rows import row_statistics_kernel

NORMALIZATIONS = {"none": 0, "norm": 1, "squared_norm": 2}
STATISTICS_ROWS = 64  # rows per program of row_statistics_kernel, hence per partial sum
COLUMNS = 128  # per program of reduce_sums_kernel, and per step of row_statistics_kernel
STRIP = 32  # rows of a tile per program of reduce_tiles_kernel


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
