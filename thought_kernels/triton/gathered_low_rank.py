"""gathered_low_rank as two Triton kernels, as serving systems do: rows shrink to the rank, and expand from it.

Each program has tokens of one row of the batch, and finds its patch by index. Arithmetic is in float32. Where rows are
few, several programs share the features of x; their sums are added in a fixed order as they are read.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK_K = 32  # features, or ranks, that are multiplied at a time
BLOCK_R = 64  # ranks of a program that shrinks
BLOCK_D = 64  # outputs of a program that expands


@triton.jit
def shrink_kernel(
    x,
    right,
    index,
    hidden,  # [parts, B, T, r] float32
    length,
    d_in,
    rank,
    features,  # of each part
    hidden_part,
    x_batch,
    x_row,
    x_column,
    right_patch,
    right_row,
    right_column,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden[part, b] = x[b] V_p over one part's features, for BLOCK_T tokens and BLOCK_R ranks."""
    tiles = tl.cdiv(length, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(2)
    patch = tl.load(index + batch)
    if patch >= 0:
        token = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        column = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
        rows = x + batch * x_batch + token * x_row
        columns = right + patch * right_patch + column * right_column
        total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for start in range(part * features, tl.minimum(d_in, (part + 1) * features), BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            known = (token < length) & (k < d_in)[None, :]
            a = tl.load(rows + k[None, :] * x_column, mask=known, other=0.0).to(tl.float32)
            known = (k < d_in)[:, None] & (column < rank)
            b = tl.load(columns + k[:, None] * right_row, mask=known, other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        out = hidden + part * hidden_part + (batch * length + token) * rank + column
        tl.store(out, total, mask=(token < length) & (column < rank))


@triton.jit
def expand_kernel(
    hidden,
    left,
    index,
    vector,  # or None
    residual,  # or None
    output,  # [B, T, d_out]
    length,
    d_out,
    rank,
    parts,
    hidden_part,
    left_patch,
    left_row,
    left_column,
    vector_patch,
    vector_column,
    residual_batch,
    residual_row,
    residual_column,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """output[b] = residual[b] + Σ hidden[part, b] U_pᵀ + v_p, for BLOCK_T tokens and BLOCK_D outputs."""
    tiles = tl.cdiv(length, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    patch = tl.load(index + batch)
    token = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    mask = (token < length) & (column < d_out)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if patch >= 0:
        for start in range(0, rank, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            sums = hidden + (batch * length + token) * rank + k[None, :]
            known = (token < length) & (k < rank)[None, :]
            a = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
            for part in range(parts):
                a += tl.load(sums + part * hidden_part, mask=known, other=0.0)
            b = left + patch * left_patch + k[:, None] * left_row + column * left_column
            known = (k < rank)[:, None] & (column < d_out)
            total = tl.dot(a, tl.load(b, mask=known, other=0.0), total, input_precision="ieee")
        if vector is not None:
            total += tl.load(vector + patch * vector_patch + column * vector_column, mask=column < d_out, other=0.0)
    if residual is not None:
        stream = residual + batch * residual_batch + token * residual_row + column * residual_column
        total += tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    out = output + (batch * length + token) * d_out + column
    tl.store(out, total.to(output.dtype.element_ty), mask=mask)


class Plan(NamedTuple):
    """How a call is cut into programs.

    Attributes:
        block_t: tokens of a program.
        tiles: programs for the tokens of the whole batch.
        parts: into how many the features of x are cut.
        features: of each part.
    """

    block_t: int
    tiles: int
    parts: int
    features: int


def plan(batch: int, length: int, d_in: int, rank: int, processors: int) -> Plan:
    """Parts of at least 128 features, so many that every processor has a program where rows are few."""
    block_t = 16 if length <= 16 else 32
    tiles = batch * triton.cdiv(length, block_t)
    wanted = triton.cdiv(processors, tiles * triton.cdiv(rank, BLOCK_R))
    parts = max(1, min(wanted, d_in // 128))
    features = max(1, triton.cdiv(triton.cdiv(d_in, parts), BLOCK_K)) * BLOCK_K
    return Plan(block_t, tiles, max(1, triton.cdiv(d_in, features)), features)


def launch(
    x: torch.Tensor,
    right: torch.Tensor,
    left: torch.Tensor,
    index: torch.Tensor,
    vector: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """gathered_low_rank on checked arguments, in float32, on one GPU and in its current stream."""
    (batch, length, d_in), (rank, d_out) = x.shape, left.shape[1:]
    output = torch.empty(batch, length, d_out, dtype=(x if residual is None else residual).dtype, device=x.device)
    if output.numel() == 0:
        return output
    # The interpreter stands for a large chip.
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    chosen = plan(batch, length, d_in, max(1, rank), processors)
    index = index.contiguous()
    hidden = torch.empty(chosen.parts, batch, length, rank, dtype=torch.float32, device=x.device)
    of_vector = (0, 0) if vector is None else vector.stride()
    of_residual = (0, 0, 0) if residual is None else residual.stride()
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if rank > 0:
            shrink_kernel[(chosen.tiles, triton.cdiv(rank, BLOCK_R), chosen.parts)](
                x, right, index, hidden, length, d_in, rank, chosen.features, hidden.stride(0), *x.stride(),
                *right.stride(), chosen.block_t, BLOCK_R, BLOCK_K, **options,
            )  # fmt: skip
        expand_kernel[(chosen.tiles, triton.cdiv(d_out, BLOCK_D))](
            hidden, left, index, vector, residual, output, length, d_out, rank, chosen.parts, hidden.stride(0),
            *left.stride(), *of_vector, *of_residual, chosen.block_t, BLOCK_D, BLOCK_K, **options,
        )  # fmt: skip
    return output
