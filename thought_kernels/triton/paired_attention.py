"""Paired attention as one Triton kernel.

A program takes BLOCK_M rows: consecutive tokens of one example, each with all query heads that read one key head, so
that keys and values are loaded once per group. It runs an online softmax over the with-context prefix, one over the
without-context prefix and one over the example's own keys, and both outputs leave from these three states.

Only one accumulator lives in registers at a time. What the prefixes left is written to the memory in which delta will
stand (and to scratch, for the without-context prefix) and read back by the same program, mostly from L2. No atomics:
the same call gives the same bits.

Scores are kept in base 2: ``2^(s log2 e)`` is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from thought_kernels.triton.attention_plan import describe, on, plan, rows_of
from thought_kernels.triton.online_softmax import (
    LOG2_E,
    STRIP,
    attend,
    attend_own,
    empty_state,
    finish,
    halves,
    hyperbolic_tangent,
    load_queries,
    load_tile,
    locate,
    prefix_bounds,
    store_tile,
)


@triton.jit
def sigmoid2(x):
    """1 / (1 + 2^−x)."""
    return 1 / (1 + tl.exp2(-x))


@triton.jit
def difference_of_sigmoids(a, b, c):
    """σ(a − c) − σ(b − c) in base 2, to its own relative accuracy; a and b may be −inf.

    It is p (1 − h) (1 − 2^(b − a)) for p ≥ h, and with p and h exchanged otherwise; 1 − e^(−x) is formed as
    2 tanh(x/2) / (1 + tanh(x/2)).
    """
    gap = tl.where((a == float("-inf")) & (b == float("-inf")), 0.0, a - b)
    tangent = hyperbolic_tangent(tl.abs(gap) * (0.5 / LOG2_E))
    size = sigmoid2(tl.maximum(a, b) - c) * sigmoid2(c - tl.minimum(a, b)) * (2 * tangent / (1 + tangent))
    return tl.where(gap < 0, -size, size)


@triton.jit
def fork(
    own, FIRST: tl.constexpr, COLUMNS: tl.constexpr, p, h, difference, without, delta, scratch, target, used, stored,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes both outputs of some columns, given own keys' output; delta holds o_P and scratch o_H.

    p and h are the prefixes' shares beside the own keys alone, None for a prefix that is not there.
    """
    if COLUMNS > STRIP:
        left, right = halves(own, BLOCK_M, COLUMNS)
        fork(
            left, FIRST, COLUMNS // 2, p, h, difference, without, delta, scratch, target, used, stored, HEAD_DIM,
            BLOCK_M,
        )  # fmt: skip
        fork(
            right, FIRST + COLUMNS // 2, COLUMNS // 2, p, h, difference, without, delta, scratch, target, used, stored,
            HEAD_DIM, BLOCK_M,
        )  # fmt: skip
    else:
        output, change = own, tl.zeros_like(own)
        if h is not None:
            output_h = load_tile(scratch, target, used, FIRST, COLUMNS, HEAD_DIM)
            output = own + h[:, None] * (output_h - own)
            change = h[:, None] * (own - output_h)
        if p is not None:
            output_p = load_tile(delta, target, used, FIRST, COLUMNS, HEAD_DIM)
            if h is None:
                change = p[:, None] * (output_p - own)
            else:
                change = p[:, None] * (output_p - output_h) + difference[:, None] * (output_h - own)
        store_tile(without, tl.where(used[:, None], output, 0.0), target, stored, FIRST, BLOCK_M, COLUMNS, HEAD_DIM)
        store_tile(delta, tl.where(used[:, None], change, 0.0), target, stored, FIRST, BLOCK_M, COLUMNS, HEAD_DIM)


@triton.jit
def paired_attention_kernel(
    query,
    key,  # descriptors of [B, Hkv, T, D] with DESCRIPTORS, otherwise pointers; so are the next
    value,
    with_key,  # of [1, Hkv, P, D], or None without a with-context prefix
    with_value,
    header_key,  # the with-context prefix once more, in blocks of HEADER_N, or None
    header_value,
    without_key,  # in blocks of HEADER_N, or None without a without-context prefix
    without_value,
    lengths,  # [B] integers, or None
    without,  # [B, T, Hq, D], query's dtype
    delta,  # [B, T, Hq, D] float32
    scratch,  # [B, T, Hq, D] float32, or None without a without-context prefix
    length,
    with_count,
    without_count,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    with_key_head,
    with_key_row,
    with_value_head,
    with_value_row,
    without_key_head,
    without_key_row,
    without_value_head,
    without_value_row,
    window,  # or None
    scale,
    softcap,  # or None
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADER_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Both outputs of one tile of rows; the grid is (B · tiles, Hkv)."""
    batch, head, t, g, count, token, first, middle, last = locate(lengths, length, window, GROUP, BLOCK_M, BLOCK_N)
    # Rows are found from the program's first token in 32 bits: 64-bit offsets of a whole tile would not fit registers.
    heads = tl.num_programs(1) * GROUP
    start = ((batch.to(tl.int64) * length + token) * heads + head * GROUP) * HEAD_DIM
    target = ((t - token) * heads + g) * HEAD_DIM
    without += start
    delta += start
    used = t < count  # not padding
    stored = t < length
    q = load_queries(
        query, batch, head, token, t, g, used, query_batch, query_head, query_row, GROUP, HEAD_DIM, BLOCK_D
    )
    if not DESCRIPTORS:
        key += batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
        value += batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head

    if with_key is not None:
        maximum, total, accumulated = empty_state(BLOCK_M, BLOCK_D)
        if not DESCRIPTORS:
            with_key += head.to(tl.int64) * with_key_head
            with_value += head.to(tl.int64) * with_value_head
        begin, end = prefix_bounds(token, with_count, last, window, BLOCK_N)
        if header_key is not None:
            # The with-context prefix starts with the other one's tokens. They cancel in delta, so in float32.
            if not DESCRIPTORS:
                header_key += head.to(tl.int64) * with_key_head
                header_value += head.to(tl.int64) * with_value_head
            header = tl.minimum((without_count + HEADER_N - 1) // HEADER_N * HEADER_N, end)
            maximum, total, accumulated = attend(
                maximum, total, accumulated, q, header_key, header_value, with_key_row, with_value_row, 0, head, begin,
                header, with_count, t + with_count, window, scale, softcap, "end", False, PARTS, PRECISION, HEAD_DIM,
                BLOCK_M, HEADER_N, BLOCK_D, DESCRIPTORS,
            )  # fmt: skip
            begin = tl.maximum(begin, header)
        maximum, total, accumulated = attend(
            maximum, total, accumulated, q, with_key, with_value, with_key_row, with_value_row, 0, head, begin, end,
            with_count, t + with_count, window, scale, softcap, "end", False, 1, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N,
            BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
        lse_p = maximum + tl.log2(tl.maximum(total, 1.0))
        store_tile(delta, finish(total, accumulated), target, used, 0, BLOCK_M, BLOCK_D, HEAD_DIM)
    if without_key is not None:
        maximum, total, accumulated = empty_state(BLOCK_M, BLOCK_D)
        if not DESCRIPTORS:
            without_key += head.to(tl.int64) * without_key_head
            without_value += head.to(tl.int64) * without_value_head
        begin, end = prefix_bounds(token, without_count, last, window, HEADER_N)
        maximum, total, accumulated = attend(
            maximum, total, accumulated, q, without_key, without_value, without_key_row, without_value_row, 0, head,
            begin, end, without_count, t + without_count, window, scale, softcap, "end", False, PARTS, PRECISION,
            HEAD_DIM, BLOCK_M, HEADER_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
        lse_h = maximum + tl.log2(tl.maximum(total, 1.0))
        scratch += start
        store_tile(scratch, finish(total, accumulated), target, used, 0, BLOCK_M, BLOCK_D, HEAD_DIM)

    maximum, total, accumulated = empty_state(BLOCK_M, BLOCK_D)
    maximum, total, accumulated = attend_own(
        maximum, total, accumulated, q, key, value, key_row, value_row, batch, head, first, middle, last, count, t,
        window, scale, softcap, DESCRIPTORS and lengths is not None, 1, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        DESCRIPTORS,
    )  # fmt: skip
    lse = maximum + tl.log2(tl.maximum(total, 1.0))
    own = finish(total, accumulated)
    p = None if with_key is None else sigmoid2(lse_p - lse)
    h = None if without_key is None else sigmoid2(lse_h - lse)
    difference = None if with_key is None or without_key is None else difference_of_sigmoids(lse_p, lse_h, lse)
    tl.debug_barrier()  # other threads of this program wrote what fork reads back
    fork(own, 0, BLOCK_D, p, h, difference, without, delta, scratch, target, used, stored, HEAD_DIM, BLOCK_M)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    with_prefix: tuple[torch.Tensor, torch.Tensor],
    without_prefix: tuple[torch.Tensor, torch.Tensor] | None,
    lengths: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """paired_attention on checked arguments, on one GPU and in its current stream.

    float32 is multiplied by ordinary instructions; bfloat16 and float16 on tensor cores, where softmax weights are
    rounded to that dtype except those of the without-context prefix and of as many first keys of the with-context one.
    """
    batch, num_heads, length, head_dim = query.shape
    without = query.new_empty(batch, length, num_heads, head_dim)
    delta = query.new_empty(batch, length, num_heads, head_dim, dtype=torch.float32)
    outputs = without.transpose(1, 2), delta.transpose(1, 2)
    if query.numel() == 0:
        return outputs

    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    prefixes = [None if pair is None or pair[0].shape[1] == 0 else pair for pair in (with_prefix, without_prefix)]
    counts = [0 if pair is None else pair[0].shape[1] for pair in prefixes]
    parts = [None if part is None else rows_of(part) for pair in prefixes for part in (pair or (None, None))]
    strides = [stride for part in parts for stride in ((0, 0) if part is None else part.stride()[:2])]
    window = None if window is not None and window >= length + max(counts) else window
    group = num_heads // key.shape[1]
    chosen = plan(query, key, value, *(part for part in parts if part is not None))
    has_header = prefixes[1] is not None
    header = parts[:2] if has_header and chosen.parts > 1 else (None, None)
    sources = [describe(tensor, chosen.block_n, chosen) for tensor in (key, value, *parts[:2])]
    sources += [describe(tensor, chosen.header_n, chosen) for tensor in (*header, *parts[2:])]
    scratch = torch.empty_like(delta) if has_header else None
    grid = (batch * triton.cdiv(length * group, chosen.block_m), key.shape[1])
    with on(query.device):
        paired_attention_kernel[grid](
            query, *sources, None if lengths is None else lengths.contiguous(), without, delta, scratch, length,
            *counts, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides, window, scale, softcap,
            group, chosen.parts, chosen.precision, head_dim, chosen.block_m, chosen.block_n, chosen.block_d,
            chosen.header_n, chosen.descriptors, **chosen.options, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs
