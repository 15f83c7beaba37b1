"""Causal attention whose rows each see one of several shared prefixes, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thought_kernels.reference.paired_attention import (
    SoftmaxState,
    heads_first,
    heads_last,
    merge,
    own_state,
    prefix_state,
    zero_padding,
)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    prefix_index: Tensor,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """shared_prefix_attention on checked arguments: float64 throughout for float64 inputs, float32 for all others."""
    if query.numel() == 0:
        return query.new_empty(query.shape, dtype=output_dtype)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = heads_first(query, key.shape[1], dtype)  # [Hkv, B, G, T, D]
    own = own_state(rows, key, value, lengths=lengths, window=window, scale=scale, softcap=softcap)
    output = own.output()
    for index, prefix in enumerate(prefixes):
        chosen = (prefix_index == index).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        state = prefix_state(rows[:, chosen], prefix, window=window, scale=scale, softcap=softcap)
        if state is not None:
            output[:, chosen] = merge(SoftmaxState(*(part[:, chosen] for part in own)), state).output()
    return zero_padding(heads_last(output, output_dtype), lengths)
