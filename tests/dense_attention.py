"""Attention over concatenated keys under an explicit mask: what the attention operators are tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One softmax over prefix and own keys, everything in ``dtype``; heads are repeated and masks written out."""
    batch, num_heads, length, head_dim = query.shape
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    num_prefix = 0
    if prefix is not None:
        num_prefix = prefix[0].shape[1]
        key = torch.cat([prefix[0].to(dtype).expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([prefix[1].to(dtype).expand(batch, -1, -1, -1), value], 2)
    key, value = (part.repeat_interleave(num_heads // part.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    output = scores.masked_fill(~visible(length, num_prefix, window, query.device), -torch.inf).softmax(-1) @ value
    if lengths is not None:
        real = torch.arange(length, device=query.device) < lengths[:, None]
        output = output.masked_fill(~real[:, None, :, None], 0)
    return output


def visible(length: int, num_prefix: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Whether query i sees a key: ``[length, num_prefix + length]``, prefix keys first."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(-num_prefix, length, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values of a seed of their own, rounded to ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_mass(
    instruction: float, header: float, dtype: torch.dtype, *, length: int = 64, head_dim: int = 64
) -> dict[str, Any]:
    """Arguments of paired_attention in which the with-context prefix has these shares of every query's softmax mass.

    A header, of 4 keys, stands in both prefixes, so that only the instruction's 16 keys behind it make a difference.
    Features 0 and 1 of the queries hold what the instruction's and the header's scores need to that end; rounding them
    to ``dtype`` changes the shares by a few percent.
    """
    query = normal(2, 4, length, head_dim, seed=0).mul_(0.25)
    key, value = normal(2, 1, length, head_dim, seed=1), normal(2, 1, length, head_dim, seed=2)
    parts = [tuple(normal(1, count, head_dim, seed=seed + i) for i in (3, 4)) for seed, count in ((0, 16), (2, 4))]
    key[..., :2] = 0
    query[..., :2] = 0
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    own_mass = (query @ key.transpose(2, 3) * head_dim**-0.5).masked_fill_(future, -torch.inf).logsumexp(-1)
    for feature, ((part_key, _), share) in enumerate(zip(parts, (instruction, header), strict=True)):
        part_key[..., :2] = 0
        mass = (query @ part_key.transpose(1, 2) * head_dim**-0.5).logsumexp(-1)
        part_key[..., feature] = head_dim**0.5
        if share:
            query[..., feature] = math.log(share / (1 - instruction - header)) + own_mass - mass
    with_prefix, without_prefix = parts[0], None
    if header:
        without_prefix = tuple(part.to(dtype) for part in parts[1])
        with_prefix = tuple(torch.cat(both, 1) for both in zip(parts[1], parts[0], strict=True))
    return {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "value": value.to(dtype),
        "with_prefix": tuple(part.to(dtype) for part in with_prefix),
        "without_prefix": without_prefix,
    }


def deltas_from_outputs(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """with − without of two dense outputs of paired_attention's arguments, each rounded to ``dtype`` first."""
    own = (arguments["query"], arguments["key"], arguments["value"])
    wide = torch.promote_types(dtype, torch.float32)
    outputs = [dense_attention(*own, arguments[f"{name}_prefix"], dtype=wide) for name in ("with", "without")]
    return outputs[0].to(dtype).to(wide) - outputs[1].to(dtype).to(wide)


def deltas_from_rows(arguments: dict[str, Any], backend: str | None = None) -> Tensor:
    """The same difference from rows of one call of shared_prefix_attention with a float32 output."""
    from thought_kernels import shared_prefix_attention

    own = [torch.cat([arguments[name]] * 2) for name in ("query", "key", "value")]
    prefixes = [pair for pair in (arguments["with_prefix"], arguments["without_prefix"]) if pair is not None]
    half = len(arguments["query"])
    index = torch.tensor([0] * half + [len(prefixes) - 1 or -1] * half, device=own[0].device)
    output = shared_prefix_attention(*own, prefixes, index, output_dtype=torch.float32, backend=backend)
    together, without = output.chunk(2)
    return together - without


def norm_error(delta: Tensor, truth: Tensor) -> float:
    """The relative error in the norm of all entries."""
    return ((delta.double() - truth).norm() / truth.norm()).item()
