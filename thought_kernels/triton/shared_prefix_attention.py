"""Attention over a shared prefix and a row's own keys as one Triton kernel; paired_attention is built from its pieces.

A program takes BLOCK_M rows: consecutive tokens of one example, each with all query heads that read one key head, so
that keys and values are loaded once per group. It runs one online softmax, over the prefix's keys and then over the
example's own. Scores are kept in base 2, where an exponential is one instruction. No atomics: the same call gives the
same bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
# Columns of a tile that leave registers at a time: then a thread's elements lie in few rows, whose offsets are few too.
STRIP = tl.constexpr(16)
# Features of float32 that are multiplied at a time, where there are more.
FLOAT32_STRIP = tl.constexpr(32)


@triton.jit
def hyperbolic_tangent(x):
    """tanh to float32's relative accuracy; (1 − e^(−2x)) / (1 + e^(−2x)) alone cancels near 0."""
    size = tl.abs(x)
    decay = tl.exp2(size * (-2 * LOG2_E))
    y = size * size
    series = 0.021869489 + y * -0.008863235
    series = 1 + y * (-0.33333334 + y * (0.13333334 + y * (-0.053968254 + y * series)))
    near = size * series
    result = tl.where(size < 0.35, near, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -result, result)


@triton.jit
def load_rows(
    source, batch, head, start, keys, row_stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + COLUMNS − 1 of a head's rows start .. start + BLOCK_N − 1, zeros beyond the tensor.

    source is a descriptor of [batch, head, row, feature], whose blocks have all columns, or a pointer to this head's
    first row.
    """
    if DESCRIPTORS:
        rows = source.load([batch, head, start, 0]).reshape(BLOCK_N, COLUMNS)
    else:
        row = start + tl.arange(0, BLOCK_N)
        column = (FIRST + tl.arange(0, COLUMNS))[None, :]
        mask = (row < keys)[:, None]
        if FIRST + COLUMNS > HEAD_DIM:
            mask = mask & (column < HEAD_DIM)
        rows = tl.load(source + row.to(tl.int64)[:, None] * row_stride + column, mask=mask, other=0.0)
    return rows


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax state of no keys: (maximum, total, accumulated)."""
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return maximum, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def multiply_keys(
    query, key, batch, head, start, keys, key_row, FIRST: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """query @ keysᵀ over some of the features, [BLOCK_M, BLOCK_N].

    Ordinary instructions want all of a thread's operands in registers at once, so float32 goes strip by strip.
    """
    if query.dtype == tl.float32 and COLUMNS > FLOAT32_STRIP and not DESCRIPTORS:
        left, right = halves(query, BLOCK_M, COLUMNS)
        scores = multiply_keys(
            left, key, batch, head, start, keys, key_row, FIRST, COLUMNS // 2, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N,
            DESCRIPTORS,
        )  # fmt: skip
        scores += multiply_keys(
            right, key, batch, head, start, keys, key_row, FIRST + COLUMNS // 2, COLUMNS // 2, PRECISION, HEAD_DIM,
            BLOCK_M, BLOCK_N, DESCRIPTORS,
        )  # fmt: skip
    else:
        k = load_rows(key, batch, head, start, keys, key_row, FIRST, COLUMNS, HEAD_DIM, BLOCK_N, DESCRIPTORS)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    return scores


@triton.jit
def attend(
    maximum,  # [BLOCK_M] float32, of the scores so far, base 2
    total,  # [BLOCK_M] float32
    accumulated,  # [BLOCK_M, BLOCK_D] float32
    query,  # [BLOCK_M, BLOCK_D]
    key,
    value,
    key_row,
    value_row,
    batch,
    head,
    first,  # keys first .. last - 1 are attended to
    last,
    keys,  # keys that exist; those beyond may hold NaN
    position,  # [BLOCK_M], of the query, where key j stands at j
    window,  # or None
    scale,
    softcap,  # or None
    MASK: tl.constexpr,  # "causal", "end" (keys from `keys` on are not there), or "none": all are seen, window aside
    ZERO: tl.constexpr,  # whether values beyond `keys` must be replaced by zeros
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds keys to a softmax state.

    Softmax weights enter their product as PARTS numbers of the values' dtype, each the rounding error of those before:
    three bfloat16 make a float32. The total sums what enters, so that a single dominant key gives its value exactly.
    """
    for start in tl.range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        scores = multiply_keys(
            query, key, batch, head, start, keys, key_row, 0, BLOCK_D, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N,
            DESCRIPTORS,
        )  # fmt: skip
        if softcap is None:
            scores *= scale * LOG2_E
        else:
            scores = hyperbolic_tangent(scores * (scale / softcap)) * (softcap * LOG2_E)
        if MASK == "causal":
            scores = tl.where(j[None, :] <= position[:, None], scores, float("-inf"))
        if MASK == "end":
            scores = tl.where((j < keys)[None, :], scores, float("-inf"))
        if window is not None:
            scores = tl.where(position[:, None] - j[None, :] < window, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # where no key is seen yet, 2^(−inf − 0) is 0
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        maximum = higher
        total *= shrink
        accumulated *= shrink[:, None]
        v = load_rows(value, batch, head, start, keys, value_row, 0, BLOCK_D, HEAD_DIM, BLOCK_N, DESCRIPTORS)
        if ZERO:
            v = tl.where((j < keys)[:, None], v, tl.zeros_like(v))
        # Not unrolled: on Blackwell each product in the code takes tensor memory for a whole accumulator.
        for _ in tl.range(0, PARTS, num_stages=1):
            part = weights.to(v.dtype)
            weights -= part.to(tl.float32)
            total += tl.sum(part.to(tl.float32), 1)
            accumulated = tl.dot(part, v, accumulated, input_precision=PRECISION)
    return maximum, total, accumulated


@triton.jit
def locate(lengths, length, window, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What this program works on: (batch, key head, rows' tokens, rows' heads in the group, real tokens, bounds).

    bounds: the first of its tokens, and its own keys first .. middle − 1, which all its queries see but for the window,
    and middle .. last − 1, of which some are masked. A program whose tokens are all padding has last = 0.
    """
    # The last tiles have the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(2)
    count = length
    if lengths is not None:
        count = tl.load(lengths + batch).to(tl.int32)
    token = tile * BLOCK_M // GROUP
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, count)
    last = tl.where(token < count, last, 0)
    first = 0
    if window is not None:
        first = tl.maximum(token - window + 1, 0) // BLOCK_N * BLOCK_N
    middle = (token + 1) // BLOCK_N * BLOCK_N
    return batch, tl.program_id(1), row // GROUP, row % GROUP, count, token, first, middle, last


@triton.jit
def prefix_bounds(token, count, last, window, BLOCK_N: tl.constexpr):
    """The keys (first, last) of a prefix of ``count`` that a program's queries see."""
    first = 0
    if window is not None:
        first = tl.maximum(token + count - window + 1, 0) // BLOCK_N * BLOCK_N
    return first, tl.where(last > 0, count, 0)


@triton.jit
def finish(total, accumulated):
    """The output of a softmax state; 0 for no keys. The largest score's weight is 1, so total is at least 1."""
    return accumulated / tl.maximum(total, 1.0)[:, None]


@triton.jit
def inside(rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The mask of a tile from its rows' mask and its columns FIRST .. FIRST + COLUMNS − 1."""
    mask = rows[:, None]
    if FIRST + COLUMNS > HEAD_DIM:
        mask = mask & (FIRST + tl.arange(0, COLUMNS) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_tile(source, offsets, rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns FIRST .. FIRST + COLUMNS − 1 of the rows at ``offsets``, zeros elsewhere."""
    pointers = source + offsets[:, None] + (FIRST + tl.arange(0, COLUMNS))[None, :]
    return tl.load(pointers, mask=inside(rows, FIRST, COLUMNS, HEAD_DIM), other=0.0)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def store_tile(
    target, tile, offsets, rows, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Writes a tile to the columns from FIRST on of the rows at ``offsets``, in the target's dtype."""
    if COLUMNS > STRIP:
        left, right = halves(tile, ROWS, COLUMNS)
        store_tile(target, left, offsets, rows, FIRST, ROWS, COLUMNS // 2, HEAD_DIM)
        store_tile(target, right, offsets, rows, FIRST + COLUMNS // 2, ROWS, COLUMNS // 2, HEAD_DIM)
    else:
        pointers = target + offsets[:, None] + (FIRST + tl.arange(0, COLUMNS))[None, :]
        tl.store(pointers, tile.to(target.dtype.element_ty), mask=inside(rows, FIRST, COLUMNS, HEAD_DIM))


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
    """The output of one tile of rows; the grid is (tiles, Hkv, B)."""
    batch, head, t, g, count, token, first, middle, last = locate(lengths, length, window, GROUP, BLOCK_M, BLOCK_N)
    used = t < count  # not padding
    query += (
        batch.to(tl.int64) * query_batch + token.to(tl.int64) * query_row + (head * GROUP).to(tl.int64) * query_head
    )
    q = load_tile(query, (t - token) * query_row + g * query_head, used, 0, BLOCK_D, HEAD_DIM)
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
    maximum, total, accumulated = attend(
        maximum, total, accumulated, q, key, value, key_row, value_row, batch, head, first, tl.minimum(middle, last),
        count, t, window, scale, softcap, "none", False, PARTS, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        DESCRIPTORS,
    )  # fmt: skip
    maximum, total, accumulated = attend(
        maximum, total, accumulated, q, key, value, key_row, value_row, batch, head, middle, last, count, t, window,
        scale, softcap, "causal", DESCRIPTORS and lengths is not None, PARTS, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N,
        BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    heads = tl.num_programs(1) * GROUP
    output += ((batch.to(tl.int64) * length + token) * heads + head * GROUP) * HEAD_DIM
    result = tl.where(used[:, None], finish(total, accumulated), 0.0)
    store_tile(output, result, ((t - token) * heads + g) * HEAD_DIM, t < length, 0, BLOCK_M, BLOCK_D, HEAD_DIM)


class Plan(NamedTuple):
    """How an attention call is cut into programs.

    Attributes:
        block_m, block_n, block_d: rows and keys per tile, and head_dim padded to a power of two.
        parts: into how many numbers of the inputs' dtype a softmax weight is split to count as float32.
        precision: Triton's input_precision.
        descriptors: whether keys and values are loaded by tensor descriptors (TMA).
        options: num_warps and num_stages.
    """

    block_m: int
    block_n: int
    block_d: int
    parts: int
    precision: str
    descriptors: bool
    options: dict[str, int]


def plan(query: torch.Tensor, key: torch.Tensor, *others: torch.Tensor) -> Plan:
    """The tiles of a call on its device; ``others`` are whatever else is loaded as keys and values are."""
    capability, shared = (9, 0), 232_448  # on a CPU the interpreter stands for a large chip
    if query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(query.device)
        shared = triton.runtime.driver.active.utils.get_device_properties(query.device.index or 0)["max_shared_mem"]
    descriptors = capability >= (9, 0) and all(map(describable, (key, *others)))
    rows = query.shape[2] * (query.shape[1] // key.shape[1])
    return choose_tiles(
        query.dtype, query.shape[3], rows, capability=capability, descriptors=descriptors, shared_memory=shared
    )


def choose_tiles(
    dtype: torch.dtype, head_dim: int, rows: int, *, capability: tuple[int, int], descriptors: bool, shared_memory: int
) -> Plan:
    """Chooses tiles that neither spill registers (tests/test_aot_attention.py) nor exceed shared memory.

    Args:
        dtype: of the inputs.
        head_dim: at most 256.
        rows: tokens times query heads per key head.
        capability: of the device, such as (9, 0).
        descriptors: whether the device has tensor descriptors and the inputs' strides allow them.
        shared_memory: bytes a program may have.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}[dtype]
    if dtype == torch.float32:
        # Without tensor cores a thread holds whole rows of its operands: beyond 64 features keys are read in strips, by
        # pointers. At head_dim 256 the 16 rows of values that its share of the outputs needs spill even so, some 600
        # bytes; more warps leave each fewer registers than they save (16: 1,416 bytes), and tf32 spills 352.
        block_m, block_n, warps, stages = (32, 16, 8, 2) if block_d <= 64 else (16, 16, 8, 1)
        descriptors = descriptors and block_d <= 64
    elif shared_memory < 160 * 1024 or (block_d == 256 and not descriptors):  # addresses take registers too
        block_m, block_n, warps, stages = 64, 32, 8 if block_d == 256 else 4, 2
    else:
        # Blackwell copies a wide accumulator from tensor memory to registers, which leaves room for fewer rows.
        block_m, warps = (64, 4) if rows <= 64 or (block_d == 256 and capability >= (10, 0)) else (128, 8)
        block_n, stages = 64 if block_d < (256 if descriptors else 128) else 32, 3
    return Plan(block_m, block_n, block_d, parts, "ieee", descriptors, {"num_warps": warps, "num_stages": stages})


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with unit stride along its last dimension, as the kernels assume."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe keys or values: rows start at multiples of 16 bytes."""
    strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False) if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in strides)
    return aligned and all(stride > 0 for stride in strides)


def describe(tensor: torch.Tensor | None, rows: int, chosen: Plan) -> TensorDescriptor | torch.Tensor | None:
    """A source for load_rows, ``rows`` at a time: ``[B, Hkv, T, D]``, or a prefix ``[Hkv, P, D]`` as one batch row."""
    if tensor is None or not chosen.descriptors:
        return tensor
    if tensor.dim() == 3:
        tensor = tensor[None]
    # The stride of a dimension of one element is never used, but must be a multiple of 16 bytes.
    strides = [16 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, chosen.block_d])


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which this makes the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
    grid = (triton.cdiv(length * group, chosen.block_m), key.shape[1], batch)
    with on(query.device):
        shared_prefix_attention_kernel[grid](
            query, *sources, prefix_index.contiguous(), bounds, None if lengths is None else lengths.contiguous(),
            output, length, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides, window, scale,
            softcap, group, parts, chosen.precision, head_dim, chosen.block_m, chosen.block_n, chosen.block_d,
            chosen.descriptors, **chosen.options, enable_fp_fusion=True,
        )  # fmt: skip
    return output.transpose(1, 2)
