"""The tile loop of both attention kernels: queries, keys and values come in, softmax states go out.

A program has BLOCK_M rows: consecutive tokens of one example, each with all query heads that read one key head. A state
is (maximum, total, accumulated) of the keys seen so far; scores are kept in base 2, where an exponential is one
instruction. Everything here is inlined into the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Columns of a tile that leave registers at a time: then a thread's elements lie in few rows, whose offsets are few too.
# Also features or keys of float32 that are multiplied at a time, the fewest that tl.dot takes.
STRIP = tl.constexpr(16)


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
def locate(lengths, length, window, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What this program works on: (batch, key head, rows' tokens, rows' heads in the group, real tokens, bounds).

    bounds: the first of its tokens, and its own keys first .. middle − 1, which all its queries see but for the window,
    and middle .. last − 1, of which some are masked. A program whose tokens are all padding has last = 0.
    """
    # The last tiles have the most keys, so they start first. Examples share the first axis, which alone is long.
    tiles = (length * GROUP + BLOCK_M - 1) // BLOCK_M
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(0) // tiles
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
def load_rows(
    source, batch, head, start, keys, row_stride, FIRST, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
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
        if BLOCK_D > HEAD_DIM:
            mask = mask & (column < HEAD_DIM)
        rows = tl.load(source + row.to(tl.int64)[:, None] * row_stride + column, mask=mask, other=0.0)
    return rows


@triton.jit
def load_queries(
    query, batch, head, token, t, g, used, batch_stride, head_stride, row_stride, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's queries [BLOCK_M, BLOCK_D]; of float32 [BLOCK_M] pointers to them, to be read again and again.

    Rows that are padding read the program's first row then, which is there.
    """
    query += batch.to(tl.int64) * batch_stride + token.to(tl.int64) * row_stride
    query += (head * GROUP).to(tl.int64) * head_stride
    offsets = (t - token) * row_stride + g * head_stride
    if query.dtype.element_ty == tl.float32:
        queries = query + tl.where(used, offsets, 0)
    else:
        queries = load_tile(query, offsets, used, 0, BLOCK_D, HEAD_DIM)
    return queries


@triton.jit
def multiply_keys(
    query, key, batch, head, start, keys, key_row, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """query @ keysᵀ, [BLOCK_M, BLOCK_N]."""
    if query.dtype.is_ptr():
        # A matrix product's usual loop, both operands from memory: held in registers, a thread's queries would take one
        # for each feature. The queries stay in L1, and copies run ahead of the products.
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for feature in tl.range(0, BLOCK_D, STRIP):
            column = (feature + tl.arange(0, STRIP))[None, :]
            if BLOCK_D > HEAD_DIM:
                q = tl.load(query[:, None] + column, mask=column < HEAD_DIM, other=0.0)
            else:
                q = tl.load(query[:, None] + column)
            k = load_rows(key, batch, head, start, keys, key_row, feature, STRIP, HEAD_DIM, BLOCK_D, BLOCK_N, False)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    else:
        k = load_rows(key, batch, head, start, keys, key_row, 0, BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIPTORS)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    return scores


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax state of no keys: (maximum, total, accumulated)."""
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return maximum, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def attend(
    maximum,  # [BLOCK_M] float32, of the scores so far, base 2
    total,  # [BLOCK_M] float32
    accumulated,  # [BLOCK_M, BLOCK_D] float32
    query,  # of load_queries
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
            query, key, batch, head, start, keys, key_row, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, DESCRIPTORS
        )
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
        if query.dtype.is_ptr():
            total += tl.sum(weights, 1)
            # Strip by strip too, for the same reason; a warp has whole rows of weights, so shuffles gather them.
            for key_strip in tl.range(0, BLOCK_N, STRIP):
                chosen = (key_strip + tl.arange(0, STRIP))[None, :].broadcast_to(BLOCK_M, STRIP)
                v = load_rows(
                    value, batch, head, start + key_strip, keys, value_row, 0, BLOCK_D, HEAD_DIM, BLOCK_D, STRIP, False
                )
                accumulated = tl.dot(tl.gather(weights, chosen, 1), v, accumulated, input_precision=PRECISION)
        else:
            v = load_rows(
                value, batch, head, start, keys, value_row, 0, BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIPTORS
            )
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
def attend_own(
    maximum, total, accumulated, query, key, value, key_row, value_row, batch, head, first, middle, last, count, t,
    window, scale, softcap, ZERO: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds an example's own keys to a softmax state: first those that all of the program's queries see."""
    maximum, total, accumulated = attend(
        maximum, total, accumulated, query, key, value, key_row, value_row, batch, head, first,
        tl.minimum(middle, last), count, t, window, scale, softcap, "none", False, PARTS, PRECISION, HEAD_DIM, BLOCK_M,
        BLOCK_N, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    return attend(
        maximum, total, accumulated, query, key, value, key_row, value_row, batch, head, middle, last, count, t, window,
        scale, softcap, "causal", ZERO, PARTS, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
