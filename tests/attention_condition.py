"""What attention's own condition lets rounding do: how far its outputs may come out in any order of additions.

A score s_j = scale · Σ_d q_d k_jd errs by rounding(D) · scale · Σ_d |q_d k_jd|, and a softmax passes that on as

    |Δ output| ≤ Σ_j w_j |v_j − output| |Δ s_j|,    |Δ log Σ e^s| ≤ Σ_j w_j |Δ s_j|

to first order: much where scores are large and two keys share the weight, nothing where one key has it all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from dense_attention import visible
from tolerances import rounding
from torch import Tensor

Prefix = tuple[Tensor, Tensor] | None


class State(NamedTuple):
    """The softmax over some keys in float64, each part beside the error that is allowed to it."""

    lse: Tensor  # [B, H, T, 1], −inf for a query that sees none of the keys
    lse_error: Tensor
    output: Tensor  # [B, H, T, D]
    output_error: Tensor


def softmax_state(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor, float]],
    seen: Tensor,
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    softcap: float | None = None,
) -> State:
    """The state over keys and values ``[..., Hkv, n, D]`` of several sources that are summed in ``dtype``.

    Each source comes with the relative error of its softmax weights, where these are rounded to a narrow dtype; it acts
    as an error of the scores does. ``seen [T, keys]`` says which keys a query sees.
    """
    batch, heads, _, head_dim = query.shape
    eps, scale = torch.finfo(dtype).eps, head_dim**-0.5 if scale is None else scale
    wide = [
        [p.double().expand(batch, *p.shape[-3:]).repeat_interleave(heads // p.shape[-3], 1) for p in part[:2]]
        for part in parts
    ]
    key, value = (torch.cat(each, 2) for each in zip(*wide, strict=True))
    weight_error = torch.cat([torch.full((part[0].shape[-2],), part[2]).double() for part in parts])
    scores = query.double() @ key.mT * scale
    # The slope of a softcap is at most 1.
    error = rounding(head_dim, dtype) * scale * (query.double().abs() @ key.abs().mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().masked_fill(~seen, 0).nan_to_num(0)
    # A score is scaled, capped, moved to base 2, has a maximum subtracted and is exponentiated: 4 · eps of its own
    # size, 2 · eps of the exponent's and 2 · eps of the exponential.
    steps = eps * (4 * scores.abs() + 2 * (scores - lse).abs() + 2)
    error = (error + steps + weight_error).masked_fill(~seen, 0)
    sums = rounding(scores.shape[-1], dtype)
    output = weights @ value
    felt = weights * error
    columns = zip(value.unbind(-1), output.unbind(-1), strict=True)
    spread = [(felt * (v[:, :, None] - o[..., None]).abs()).sum(-1) for v, o in columns]
    output_error = torch.stack(spread, -1) + sums * (weights @ value.abs() + output.abs())
    lse_error = felt.sum(-1, keepdim=True) + sums + 2 * eps * lse.abs().nan_to_num(posinf=0)
    return State(lse, lse_error, output, output_error)


def output_error(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix = None, *, lengths: Tensor | None = None,
    window: int | None = None, weight_error: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """``[B, H, T, D]``: the error allowed to attention over a prefix and own keys; options as softmax_state's."""
    parts = [(key, value, weight_error)] if prefix is None else [(*prefix, weight_error), (key, value, weight_error)]
    seen = visible(query.shape[2], 0 if prefix is None else prefix[0].shape[1], window)
    return real_rows(softmax_state(query, parts, seen, **options).output_error, lengths)


def difference_error(
    query: Tensor, key: Tensor, value: Tensor, with_prefix: Prefix, without_prefix: Prefix = None, *,
    lengths: Tensor | None = None, window: int | None = None, weight_error: float = 0.0, header: int = 0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """``[B, H, T, D]``: the error allowed to paired attention's delta, p (o_P − o_H) + (p − h) (o_H − o_S).

    p and h are the shares of the with- and without-context prefix beside the own keys alone, each a sigmoid of a
    difference of two lse; without a without-context prefix h is 0 and o_H is o_S. The first ``header`` keys of the
    with-context prefix and all of the without-context prefix are free of ``weight_error``.
    """
    length, eps = query.shape[2], torch.finfo(options["dtype"]).eps
    own = softmax_state(query, [(key, value, weight_error)], visible(length, 0, window), **options)

    def state(prefix: Prefix, exact: int) -> State | None:
        if prefix is None or prefix[0].shape[1] == 0:
            return None
        halves = [part.split([exact, part.shape[1] - exact], 1) for part in prefix]
        parts = [(*half, error) for *half, error in zip(*halves, (0.0, weight_error), strict=True)]
        seen = visible(length, prefix[0].shape[1], window)[:, : prefix[0].shape[1]]
        return softmax_state(query, parts, seen, **options)

    p = state(with_prefix, header)
    h = state(without_prefix, 0 if without_prefix is None else without_prefix[0].shape[1])
    if p is None or h is None:
        one = p or h
        error = torch.zeros_like(own.output) if one is None else _product_error(one, one, own, eps)
        return real_rows(error, lengths)
    larger, smaller = torch.maximum(p.lse, h.lse), torch.minimum(p.lse, h.lse)
    faint = torch.exp(-(larger - smaller)).nan_to_num(0)  # e^−gap; of two that are both hidden, the share is 0
    above, below = (larger - own.lse).sigmoid(), (own.lse - smaller).sigmoid()
    difference = above * below * (1 - faint)  # p − h, but for its sign
    # σ(x) errs by σ (1 − σ) Δx.
    gap_error = p.lse_error + h.lse_error + 4 * eps
    change = difference * ((2 - above - below) * (gap_error + own.lse_error) + 8 * eps)
    change = change + above * below * faint * gap_error
    error = _product_error(p, p, h, eps, own) + change * (h.output - own.output).abs()
    error = error + difference * (h.output_error + own.output_error + eps * (h.output.abs() + own.output.abs()))
    return real_rows(error, lengths)


def _product_error(share: State, first: State, second: State, eps: float, beside: State | None = None) -> Tensor:
    """The error of p (first − second), p being the share of one state beside another, ``second`` if not given."""
    beside = second if beside is None else beside
    p = (share.lse - beside.lse).sigmoid()
    p_error = p * ((1 - p) * (share.lse_error + beside.lse_error) + 4 * eps)
    subtracted = first.output_error + second.output_error + eps * (first.output.abs() + second.output.abs())
    return p_error * (first.output - second.output).abs() + p * subtracted


def real_rows(error: Tensor, lengths: Tensor | None) -> Tensor:
    """0 for padding, which must come out as 0."""
    if lengths is None:
        return error
    return error.masked_fill(torch.arange(error.shape[2])[None, None, :, None] >= lengths[:, None, None, None], 0)
