"""What both attention kernels are timed against: torch's flash attention, which knows nothing of prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flash_over_both(inputs: Inputs, prefix: str, window: int | None, lengths: Tensor | None) -> Callable[[], Tensor]:
    """One call on a CPU over the keys of a prefix and a row's own, concatenated, with a mask; ready to run."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    batch, _, length, _ = query.shape
    count = 0
    if inputs[prefix] is not None:
        count = inputs[prefix][0].shape[1]
        key, value = (
            torch.cat([part.expand(batch, -1, -1, -1), own], 2)
            for part, own in zip(inputs[prefix], (key, value), strict=True)
        )
    if count == 0 and window is None and lengths is None:
        return lambda: ON_CPU(query, key, value, 0.0, True)[0]
    distance = torch.arange(length)[:, None] - torch.arange(-count, length)
    visible = (distance >= 0) & (distance < (window or distance.numel()))
    mask = torch.zeros(length, count + length, dtype=query.dtype).masked_fill_(~visible, -torch.inf)[None, None]
    if lengths is None:
        return lambda: ON_CPU(query, key, value, 0.0, False, attn_mask=mask)[0]
    padding = torch.arange(length) >= lengths[:, None]
    return lambda: ON_CPU(query, key, value, 0.0, False, attn_mask=mask)[0].masked_fill_(padding[:, None, :, None], 0)


def flash(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """flash attention on a device, (query, key, value, visible) -> (output, lse), keys of query's last position last.

    visible is "causal", aligned at the last query and key, or "all".
    """
    if device != "cpu":
        call = torch.ops.aten._scaled_dot_product_flash_attention
        return lambda q, k, v, visible: call(q, k, v, 0.0, visible == "causal")[:2]

    def on_cpu(q: Tensor, k: Tensor, v: Tensor, visible: str) -> tuple[Tensor, Tensor]:
        mask = None
        if visible == "causal":
            future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1 + k.shape[2] - q.shape[2])
            mask = torch.zeros(future.shape, dtype=q.dtype).masked_fill_(future, -torch.inf)[None, None]
        return ON_CPU(q, k, v, 0.0, False, attn_mask=mask)[:2]

    return on_cpu


def attention_peers(
    device: str, own: tuple[Tensor, Tensor, Tensor], prefix: tuple[Tensor, Tensor]
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What flash attention can do; the concatenated keys of the first two are made beforehand, untimed."""
    query, key, value = own
    batch, heads, length, head_dim = query.shape
    call = flash(device)
    together = [torch.cat([p.expand(batch, -1, -1, -1), o], 2) for p, o in zip(prefix, (key, value), strict=True)]
    shared = [part[None] for part in prefix]

    def both() -> dict[str, Tensor]:
        with_context = call(query, *together, "causal")[0]
        without = call(query, key, value, "causal")[0]
        return {"with": with_context, "without": without}

    def merged() -> dict[str, Tensor]:
        """Two calls and a merge: all rows of the batch meet the shared prefix as one long row."""
        without, lse = call(query, key, value, "causal")
        rows = query.transpose(0, 1).reshape(1, heads, batch * length, head_dim)
        prefix_output, prefix_lse = call(rows, *shared, "all")
        prefix_output = prefix_output.reshape(heads, batch, length, head_dim).transpose(0, 1)
        prefix_lse = prefix_lse.reshape(heads, batch, length).transpose(0, 1)
        share = (prefix_lse - lse).sigmoid()[..., None]
        return {"without": without, "rounded delta": share * (prefix_output.float() - without.float())}

    return {
        "flash, with context alone": lambda: {"with": call(query, *together, "causal")[0]},
        "flash, both contexts": both,
        "flash on own keys and on the prefix, merged": merged,
    }
