"""Causal attention in which each row of a batch sees one of several shared prefixes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from thought_kernels.ops import library
from thought_kernels.ops.checks import check_range, check_row_integers
from thought_kernels.ops.library import message
from thought_kernels.ops.paired_attention import (
    Prefix,
    attention_unsupported,
    bounded,
    check_attention,
    check_prefix,
    empty_output,
    unpack_prefix,
)

_NAME = "shared_prefix_attention"


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[Prefix],
    prefix_index: Tensor,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    output_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attends to each row's own keys (causal, windowed) and to the one prefix that the row picks.

    ``output[b] = attention of query[b] over prefixes[prefix_index[b]] ∪ (key[b], value[b])``. The prefixes are read
    where they lie, never copied per row. Not differentiable.

    Args:
        query: ``[B, Hq, T, D]``, after rotary embedding; float64, float32, bfloat16 or float16.
        key, value: ``[B, Hkv, T, D]``, query's dtype; Hkv divides Hq; query head n reads key head n // (Hq / Hkv).
        prefixes: (key, value) pairs, each ``[Hkv, P, D]`` with a P of its own, 0 allowed, ending right before token 0.
        prefix_index: integers ``[B]``, −1 for no prefix.
        lengths: integers ``[B]``, real tokens of each row (right padding), 0 ≤ lengths ≤ T. Padded rows return zeros.
        window: key j is visible to query i iff 0 ≤ i − j < window, prefix keys standing at −P .. −1; None for no limit.
        scale: of the scores, D^-0.5 unless given.
        softcap: scores become softcap · tanh(score / softcap), or None.
        output_dtype: query's dtype unless given, or float32 beside bfloat16 or float16. A difference of two outputs
            that nearly agree needs float32; softmax weights then count as float32 in every backend.
        backend: "reference", "cpp", "triton", "cuda", or None for the fastest that supports the call.

    Returns:
        ``[B, Hq, T, D]`` in output_dtype, in memory ``[B, T, Hq, D]``.

    Raises:
        ValueError, TypeError: if an argument breaks the rules above, or the named backend cannot run the call.

    Source: Transmuting prompts into weights, Algorithm 1, lines 13-14 (the passes with and without context, here rows
        of one batch).
    """
    if not isinstance(prefixes, (tuple, list)):
        raise TypeError(message(_NAME, "prefixes", "be a list of (key, value) pairs", type(prefixes).__name__))
    pairs = [unpack_prefix(_NAME, f"prefixes[{index}]", prefix) for index, prefix in enumerate(prefixes)]
    keys, values = [prefix_key for prefix_key, _ in pairs], [prefix_value for _, prefix_value in pairs]
    through_torch = library.dispatched(query, key, value, *keys, *values, prefix_index, lengths)
    run = torch.ops.thought_kernels.shared_prefix_attention if through_torch else _run
    return run(
        query, key, value, keys, values, prefix_index,
        lengths=lengths, window=bounded(window), scale=scale, softcap=softcap, output_dtype=output_dtype,
        backend=backend,
    )  # fmt: skip


@torch.no_grad()
def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Sequence[Tensor],
    prefix_values: Sequence[Tensor],
    prefix_index: Tensor,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    output_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    _check(query, key, value, prefix_keys, prefix_values, prefix_index, lengths, window, scale, softcap, output_dtype)
    check_range(_NAME, "lengths", lengths, 0, query.shape[2])
    check_range(_NAME, "prefix_index", prefix_index, -1, len(prefix_keys) - 1)
    chosen = library.choose(_NAME, backend, query.device, functools.partial(attention_unsupported, query))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    limits = (window, scale, softcap, output_dtype or query.dtype)
    if chosen == "cpp":
        kernel = library.kernel(f"{_NAME}_cpp")
        counts = None if lengths is None else lengths.long()
        return kernel(query, key, value, prefix_keys, prefix_values, prefix_index.long(), counts, *limits)
    prefixes = list(zip(prefix_keys, prefix_values, strict=True))
    return library.launcher(_NAME, chosen)(query, key, value, prefixes, prefix_index, lengths, *limits)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Sequence[Tensor],
    prefix_values: Sequence[Tensor],
    prefix_index: Tensor,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    output_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    _check(query, key, value, prefix_keys, prefix_values, prefix_index, lengths, window, scale, softcap, output_dtype)
    return empty_output(query, output_dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Sequence[Tensor],
    prefix_values: Sequence[Tensor],
    prefix_index: Tensor,
    lengths: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    output_dtype: object,
) -> None:
    check_attention(_NAME, query, key, value, lengths, window, scale, softcap)
    if len(prefix_keys) != len(prefix_values):
        rule = f"hold a value for each of its {len(prefix_keys)} keys"
        raise ValueError(message(_NAME, "prefixes", rule, len(prefix_values)))
    for index, (prefix_key, prefix_value) in enumerate(zip(prefix_keys, prefix_values, strict=True)):
        check_prefix(_NAME, f"prefixes[{index}]", prefix_key, prefix_value, key)
    check_row_integers(_NAME, "prefix_index", prefix_index, query)
    check_output_dtype(output_dtype, query.dtype)


def check_output_dtype(output_dtype: object, dtype: torch.dtype) -> None:
    """None, the inputs' dtype, or float32 beside a narrower one."""
    if output_dtype is not None and not isinstance(output_dtype, torch.dtype):
        raise TypeError(message(_NAME, "output_dtype", "be a torch.dtype or None", type(output_dtype).__name__))
    allowed = (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)
    if output_dtype not in (None, *allowed):
        rule = f"be None or {' or '.join(map(str, allowed))} for a query in {dtype}"
        raise ValueError(message(_NAME, "output_dtype", rule, output_dtype))


library.declare(
    "shared_prefix_attention(Tensor query, Tensor key, Tensor value, Tensor[] prefix_keys, Tensor[] prefix_values,"
    " Tensor prefix_index, *, Tensor? lengths=None, SymInt? window=None, float? scale=None, float? softcap=None,"
    " ScalarType? output_dtype=None, str? backend=None) -> Tensor",
    implementation=_run,
    fake=_fake,
)
library.declare_kernel(
    "shared_prefix_attention_cpp(Tensor query, Tensor key, Tensor value, Tensor[] prefix_keys, Tensor[] prefix_values,"
    " Tensor prefix_index, Tensor? lengths, int? window, float scale, float? softcap,"
    " ScalarType output_dtype, str? instructions=None) -> Tensor"
)
