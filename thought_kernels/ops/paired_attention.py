"""Attention with and without a shared prefix, in one pass, and the difference of the two."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from thought_kernels.ops import library
from thought_kernels.ops.checks import check_float_tensor, check_like, check_number, check_range, check_row_integers
from thought_kernels.ops.library import message

Prefix = tuple[Tensor, Tensor]


def paired_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_prefix: Prefix,
    without_prefix: Prefix | None = None,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends once, and returns attention without a prefix and what the prefix adds to it.

    With S a query's own keys (causal, windowed), P the with-context and H the without-context prefix, o the attention
    output over one of them alone and s the logarithm of its sum of exponentials::

        without = attention over S ∪ H
        delta   = (attention over S ∪ P) − without
                = p (o_P − o_H) + (p − h)(o_H − o_S),      p = σ(s_P − s_S), h = σ(s_H − s_S)

    The difference is formed from the three softmax states, never by subtracting rounded outputs, so it keeps its
    relative accuracy however small the prefix's share of the softmax is. Not differentiable.

    Args:
        query: ``[B, Hq, T, D]``, after rotary embedding; float64, float32, bfloat16 or float16.
        key, value: ``[B, Hkv, T, D]``, query's dtype; Hkv divides Hq; query head n reads key head n // (Hq / Hkv).
        with_prefix: (key, value), each ``[Hkv, P, D]``, shared by all B; it ends right before token 0. P may be 0.
        without_prefix: the same with a length of its own, or None for none.
        lengths: integers ``[B]``, real tokens of each row (right padding), 0 ≤ lengths ≤ T. Padded rows return zeros.
        window: key j is visible to query i iff 0 ≤ i − j < window, prefix keys standing at −P .. −1; None for no limit.
        scale: of the scores, D^-0.5 unless given.
        softcap: scores become softcap · tanh(score / softcap), or None.
        backend: "reference", "cpp", "triton", "cuda", or None for the fastest that supports the call.

    Returns:
        without ``[B, Hq, T, D]`` in query's dtype, and delta, the same shape, in float32 (float64 for float64 inputs).
        Both lie in memory as ``[B, T, Hq, D]``: ``.transpose(1, 2).flatten(2)``, as o_proj and accumulate read them, is
        a view.

    Raises:
        ValueError, TypeError: if an argument breaks the rules above, or the named backend cannot run the call.

    Source: Transmuting prompts into weights, section 2.2, equations 5 and 6 (the residual stream in the presence of the
        full context, the instruction hidden); states merged as in Milakov and Gimelshein, arXiv:1805.02867.
    """
    with_key, with_value = unpack_prefix("paired_attention", "with_prefix", with_prefix)
    without_key, without_value = (
        (None, None) if without_prefix is None else unpack_prefix("paired_attention", "without_prefix", without_prefix)
    )
    tensors = (query, key, value, with_key, with_value, without_key, without_value)
    run = torch.ops.thought_kernels.paired_attention if library.dispatched(*tensors, lengths) else _run
    return run(
        *tensors, lengths=lengths, window=bounded(window), scale=scale, softcap=softcap, backend=backend
    )  # fmt: skip


@torch.no_grad()
def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_key: Tensor,
    with_value: Tensor,
    without_key: Tensor | None,
    without_value: Tensor | None,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, with_key, with_value, without_key, without_value, lengths, window, scale, softcap)
    check_range("paired_attention", "lengths", lengths, 0, query.shape[2])
    chosen = library.choose("paired_attention", backend, query.device, functools.partial(attention_unsupported, query))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if chosen == "cpp":
        kernel = library.kernel("paired_attention_cpp")
        counts = None if lengths is None else lengths.long()
        prefixes = (with_key, with_value, without_key, without_value)
        return kernel(query, key, value, *prefixes, counts, window, scale, softcap)
    without_prefix = None if without_key is None else (without_key, without_value)
    launch = library.launcher("paired_attention", chosen)
    return launch(query, key, value, (with_key, with_value), without_prefix, lengths, window, scale, softcap)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_key: Tensor,
    with_value: Tensor,
    without_key: Tensor | None,
    without_value: Tensor | None,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, with_key, with_value, without_key, without_value, lengths, window, scale, softcap)
    return empty_output(query), empty_output(query, torch.float64 if query.dtype == torch.float64 else torch.float32)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_key: Tensor,
    with_value: Tensor,
    without_key: Tensor | None,
    without_value: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    function = "paired_attention"
    check_attention(function, query, key, value, lengths, window, scale, softcap)
    check_prefix(function, "with_prefix", with_key, with_value, key)
    if (without_key is None) != (without_value is None):
        missing = "key" if without_key is None else "value"
        raise TypeError(message(function, f"without_prefix {missing}", "be a tensor", "NoneType"))
    if without_key is not None and without_value is not None:
        check_prefix(function, "without_prefix", without_key, without_value, key)


def bounded(window: int | None) -> int | None:
    """A window that operators can be given, whose integers have 64 bits: no sequence is as long as the largest."""
    return min(window, 2**62) if type(window) is int else window


def empty_output(query: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``[B, Hq, T, D]`` over memory ``[B, T, Hq, D]``, as every backend returns it."""
    batch, num_heads, length, head_dim = query.shape
    return query.new_empty((batch, length, num_heads, head_dim), dtype=dtype or query.dtype).transpose(1, 2)


def attention_unsupported(query: Tensor, backend: str) -> str | None:
    """Why an available backend cannot take this query's dtype or head_dim, or None."""
    if backend != "triton":
        return None
    if query.dtype == torch.float64:
        return f"it computes in float32, not {query.dtype}"
    if query.shape[3] > 256:
        return f"it takes D up to 256, not {query.shape[3]}"
    return library.interpreter_unsupported(query)


def check_attention(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    window: object,
    scale: float | None,
    softcap: float | None,
) -> None:
    """The rules that every attention operator shares, from shapes and dtypes alone; check_range reads contents."""
    check_float_tensor(function, "query", query)
    if query.dim() != 4 or query.shape[3] == 0:
        raise ValueError(message(function, "query", "be [B, Hq, T, D] with D ≥ 1", list(query.shape)))
    batch, num_heads, length, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check_like(function, name, tensor, "query", query)
        shape = tuple(tensor.shape)
        if len(shape) != 4 or (shape[0], shape[2], shape[3]) != (batch, length, head_dim):
            rule = f"be [B, Hkv, T, D] with query's B = {batch}, T = {length}, D = {head_dim}"
            raise ValueError(message(function, name, rule, list(shape)))
        if shape[1] == 0 or num_heads % shape[1]:
            rule = f"have a number of heads that divides query's {num_heads}"
            raise ValueError(message(function, name, rule, shape[1]))
    if key.shape != value.shape:
        raise ValueError(message(function, "value", f"have key's shape {list(key.shape)}", list(value.shape)))
    if lengths is not None:
        check_row_integers(function, "lengths", lengths, query)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(message(function, "window", "be an int or None", type(window).__name__))
        if window < 1:
            raise ValueError(message(function, "window", "be at least 1", window, "it counts the query's own key"))
    if scale is not None:
        check_number(function, "scale", scale)
    if softcap is not None:
        check_number(function, "softcap", softcap, positive=True)


def check_prefix(function: str, name: str, prefix_key: Tensor, prefix_value: Tensor, key: Tensor) -> None:
    """A prefix must be two ``[Hkv, P, D]`` tensors of key's dtype and device."""
    heads, head_dim = key.shape[1], key.shape[3]
    for part, tensor in ((f"{name} key", prefix_key), (f"{name} value", prefix_value)):
        check_like(function, part, tensor, "query", key)
        if tensor.dim() != 3 or tensor.shape[0] != heads or tensor.shape[2] != head_dim:
            rule = f"be [Hkv, P, D] with Hkv = {heads}, D = {head_dim}"
            context = "a prefix is shared by all rows and has no batch dimension" if tensor.dim() == 4 else ""
            raise ValueError(message(function, part, rule, list(tensor.shape), context))
    if prefix_key.shape != prefix_value.shape:
        rule = f"have its key's shape {list(prefix_key.shape)}"
        raise ValueError(message(function, f"{name} value", rule, list(prefix_value.shape)))


def unpack_prefix(function: str, name: str, prefix: object) -> Prefix:
    """A prefix as a caller gives it must be a pair."""
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
        actual = f"a {type(prefix).__name__}" + (
            f" of length {len(prefix)}" if isinstance(prefix, (tuple, list)) else ""
        )
        raise TypeError(message(function, name, "be a (key, value) pair", actual))
    for part, tensor in zip(("key", "value"), prefix, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(message(function, f"{name} {part}", "be a tensor", type(tensor).__name__))
    return prefix[0], prefix[1]


library.declare(
    "paired_attention(Tensor query, Tensor key, Tensor value, Tensor with_key, Tensor with_value, Tensor? without_key,"
    " Tensor? without_value, *, Tensor? lengths=None, SymInt? window=None, float? scale=None, float? softcap=None,"
    " str? backend=None) -> (Tensor, Tensor)",
    implementation=_run,
    fake=_fake,
)
library.declare_kernel(
    "paired_attention_cpp(Tensor query, Tensor key, Tensor value, Tensor with_key, Tensor with_value,"
    " Tensor? without_key, Tensor? without_value, Tensor? lengths, int? window, float scale, float? softcap,"
    " str? instructions=None) -> (Tensor, Tensor)"
)
