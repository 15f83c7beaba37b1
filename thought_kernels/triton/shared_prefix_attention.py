"""Attention over a shared prefix and a row's own keys as one Triton kernel.

A program takes BLOCK_M rows: consecutive tokens of one example, each with all query heads that read one key head, so
that keys and values are loaded once per group. It runs one online softmax, over the prefix's keys and then over the
example's own. Scores are kept in base 2, where an exponential is one instruction. No atomics: the same call gives the
same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from thought_kernels.triton.attention_plan import describe, on, plan, rows_of
from thought_kernels.triton.online_softmax import (
    attend,
    attend_own,
    empty_state,
    finish,
    load_queries,
    locate,
    prefix_bounds,
    store_tile,
)


@triton.jit
def shared_prefix_attention_kernel(
    query,
    key,  # descriptors of [B, Hkv, T, D] with DESCRIPTORS, otherwise pointers; so are the next
    value,
    prefix_key,  # of [1, Hkv, keys of all prefixes, D], or None where there are none
    prefix_value,
    prefix_index,  # [B] integers, -1 for no prefix
    bounds,  # [prefixes, 2] int32: where a prefix starts in prefix_key, and how many keys it has
    lengths,  # [B] integers, or None
    output,  # [B, T, Hq, D]
    length,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    prefix_key_head,
    prefix_key_row,
    prefix_value_head,
    prefix_value_row,
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
    DESCRIPTORS: tl.constexpr,
):
    """The output of one tile of rows; the grid is (B · tiles, Hkv)."""
    batch, head, t, g, count, token, first, middle, last = locate(lengths, length, window, GROUP, BLOCK_M, BLOCK_N)
    used = t < count  # not padding
    q = load_queries(
        query, batch, head, token, t, g, used, query_batch, query_head, query_row, GROUP, HEAD_DIM, BLOCK_D
    )
    if not DESCRIPTORS:
        key += batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
        value += batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head

    maximum, total, accumulated = empty_state(BLOCK_M, BLOCK_D)
    if prefix_key is not None:
        if not DESCRIPTORS:
            prefix_key += head.to(tl.int64) * prefix_key_head
            prefix_value += head.to(tl.int64) * prefix_value_head
        index = tl.load(prefix_index + batch).to(tl.int32)
        start = tl.load(bounds + 2 * tl.maximum(index, 0))
        keys = tl.where(index < 0, 0, tl.load(bounds + 2 * tl.maximum(index, 0) + 1))
        begin, end = prefix_bounds(token, keys, last, window, BLOCK_N)
        maximum, total, accumulated = attend(
            maximum, total, accumulated, q, prefix_key, prefix_value, prefix_key_row, prefix_value_row, 0, head,
            start + begin, start + end, start + keys, t + start + keys, window, scale, softcap, "end", False, PARTS,
            PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
    maximum, total, accumulated = attend_own(
        maximum, total, accumulated, q, key, value, key_row, value_row, batch, head, first, middle, last, count, t,
        window, scale, softcap, DESCRIPTORS and lengths is not None, PARTS, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N,
        BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    heads = tl.num_programs(1) * GROUP
    output += ((batch.to(tl.int64) * length + token) * heads + head * GROUP) * HEAD_DIM
    result = tl.where(used[:, None], finish(total, accumulated), 0.0)
    store_tile(output, result, ((t - token) * heads + g) * HEAD_DIM, t < length, 0, BLOCK_M, BLOCK_D, HEAD_DIM)


@functools.lru_cache(maxsize=64)
def _bounds(bounds: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """Kept, because a run asks for the same few again and again and each copy to a GPU waits for it."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _join(prefixes: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    """Prefixes ``[Hkv, P, D]`` one after the other, each padded with zeros to whole tiles."""
    sizes = [triton.cdiv(prefix.shape[1], block) * block for prefix in prefixes]
    joined = prefixes[0].new_zeros(prefixes[0].shape[0], sum(sizes), prefixes[0].shape[2])
    for part, prefix in zip(joined.split(sizes, 1), prefixes, strict=True):
        part[:, : prefix.shape[1]] = prefix
    return joined


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]],
    prefix_index: torch.Tensor,
    lengths: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """shared_prefix_attention on checked arguments, on one GPU and in its current stream.

    Two prefixes or more are first copied together: once a call, not once a row.
    """
    batch, num_heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, num_heads, head_dim, dtype=output_dtype)
    if query.numel() == 0:
        return output.transpose(1, 2)
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    counts = [prefix_key.shape[1] for prefix_key, _ in prefixes]
    group = num_heads // key.shape[1]
    some = [pair for pair in prefixes if pair[0].shape[1] > 0]
    chosen = plan(query, key, value, *(part for pair in some[:1] if len(some) == 1 for part in map(rows_of, pair)))
    joined: list[torch.Tensor | None] = [None, None]
    if len(some) == 1:
        joined = [rows_of(part) for part in some[0]]
    elif some:
        joined = [_join(parts, chosen.block_n) for parts in zip(*some, strict=True)]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + triton.cdiv(count, chosen.block_n) * chosen.block_n)
    bounds = _bounds(tuple(zip(starts, counts, strict=False)), query.device) if some else None
    strides = [stride for part in joined for stride in ((0, 0) if part is None else part.stride()[:2])]
    window = None if window is not None and window >= length + max(counts, default=0) else window
    sources = [describe(tensor, chosen.block_n, chosen) for tensor in (key, value, *joined)]
    # A float32 output of narrower inputs is asked for by who subtracts outputs, to whom rounded weights are errors.
    parts = chosen.parts if output_dtype == torch.float32 else 1
    grid = (batch * triton.cdiv(length * group, chosen.block_m), key.shape[1])
    with on(query.device):
        shared_prefix_attention_kernel[grid](
            query, *sources, prefix_index.contiguous(), bounds, None if lengths is None else lengths.contiguous(),
            output, length, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides, window, scale,
            softcap, group, parts, chosen.precision, head_dim, chosen.block_m, chosen.block_n, chosen.block_d,
            chosen.descriptors, **chosen.options, enable_fp_fusion=True,
        )  # fmt: skip
    return output.transpose(1, 2)
