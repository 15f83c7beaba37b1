"""What `transmute` is measured against: hooks on Hugging Face forwards, each ending in the same accumulation.

Every function streams (δ, a, w) of the attention site of all blocks into an accumulator. The prompts are [H, I, e] and
[H, e]; all e have one length here, so that batches need no padding and the peers no masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.models.decoder import Decoder
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[list[Tensor]]:
    """Collects the input of every o_proj, in the order of the blocks."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in model.base_model.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def add(accumulator: ThoughtAccumulator, together: list[Tensor], alone: list[Tensor], length: int) -> None:
    for layer, (prime, plain) in enumerate(zip(together, alone, strict=True)):
        plain = plain[:, -length:]
        weights = torch.full(plain.shape[:2], 1 / length, dtype=plain.dtype, device=plain.device)
        accumulator.update(layer, "attention", prime[:, -length:] - plain, plain, weights)


@torch.no_grad()
def naive(model: Any, header: Tensor, instruction: Tensor, tokens: Tensor, batch: int) -> ThoughtAccumulator:
    """Two whole forwards, language-model head and all, of `batch` examples at a time; tokens [examples, n]."""
    accumulator = ThoughtAccumulator(dtype=torch.promote_types(model.dtype, torch.float32))
    for rows in tokens.split(batch):
        outputs = []
        for prefix in (torch.cat([header, instruction]), header):
            with recorded(model) as seen:
                model(torch.cat([prefix.expand(len(rows), -1), rows], 1), use_cache=False)
            outputs.append(seen)
        add(accumulator, outputs[0], outputs[1], tokens.shape[1])
    return accumulator


@torch.no_grad()
def strong(model: Any, header: Tensor, instruction: Tensor, tokens: Tensor, batch: int) -> ThoughtAccumulator:
    """Both prefixes read once, their caches repeated per batch, only e's tokens run, without the head."""
    accumulator = ThoughtAccumulator(dtype=torch.promote_types(model.dtype, torch.float32))
    base, caches = model.base_model, []
    for prefix in (torch.cat([header, instruction]), header):
        cache = DynamicCache(config=model.config)
        base(prefix[None], past_key_values=cache, use_cache=True)
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    for rows in tokens.split(batch):
        outputs = []
        for pairs in caches:
            repeated = DynamicCache(config=model.config)
            for layer, pair in enumerate(pairs):
                repeated.update(*(part.expand(len(rows), -1, -1, -1) for part in pair), layer)
            with recorded(model) as seen:
                base(rows, past_key_values=repeated, use_cache=True)
            outputs.append(seen)
        add(accumulator, outputs[0], outputs[1], tokens.shape[1])
    return accumulator


@torch.no_grad()
def naive_layerwise(model: Any, header: Tensor, instruction: Tensor, tokens: Tensor) -> ThoughtAccumulator:
    """The layerwise pairing by hooks: each layer is called a second time on the with-context stream without I."""
    accumulator, base = ThoughtAccumulator(dtype=torch.promote_types(model.dtype, torch.float32)), model.base_model
    start, length = len(header) + len(instruction), tokens.shape[1]
    kept = torch.cat([torch.arange(len(header)), torch.arange(start, start + length)]).to(tokens.device)
    positions = torch.arange(len(kept), device=tokens.device)[None]
    mask = torch.full((len(kept), len(kept)), -torch.inf, dtype=model.dtype, device=tokens.device)  # within any window
    mask = mask.triu(1)[None, None]
    for row in tokens:
        with recorded(model) as together:
            ids = torch.cat([header, instruction, row])[None]
            streams = base(ids, use_cache=False, output_hidden_states=True).hidden_states[:-1]
        with recorded(model) as alone:
            for index, (layer, x) in enumerate(zip(base.layers, streams, strict=True)):
                angles = base.rotary_emb(x, positions, model.config.layer_types[index])
                layer(x[:, kept], position_embeddings=angles, attention_mask=mask)
        add(accumulator, together, alone, length)
    return accumulator


@torch.no_grad()
def with_context(model: Any, header: Tensor, instruction: Tensor, tokens: Tensor) -> Tensor:
    """The last block's attention output at e with context, by hooks, [examples, n, Hq·D]: as `one_forward`'s."""
    with recorded(model) as seen:
        model.base_model(
            torch.cat([torch.cat([header, instruction]).expand(len(tokens), -1), tokens], 1), use_cache=False
        )
    return seen[-1][:, -tokens.shape[1] :]


@torch.no_grad()
def one_forward(decoder: Decoder, prefixes: list[tuple[Tensor, Tensor]], tokens: Tensor, batch: int) -> Tensor:
    """The with-context stream alone over cached prefixes, up to the last block's attention, whose output it returns.

    It is the floor: this project's own path, since it is faster than transformers' with a cache.
    """
    start, outputs = prefixes[0][0].shape[1], []
    for rows in tokens.split(batch):
        x = decoder.embed(rows)
        index = torch.zeros(len(rows), dtype=torch.long, device=x.device)
        for block, prefix in zip(decoder.blocks, prefixes, strict=True):
            q, k, v = block.qkv(x)
            cos, sin = decoder.rotary(block.index, start + torch.arange(rows.shape[1])[None])
            o = shared_prefix_attention(
                block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, [prefix], index,
                window=block.window, scale=block.scale, softcap=block.softcap,
            )  # fmt: skip
            o = o.transpose(1, 2).flatten(2)
            if block is not decoder.blocks[-1]:
                h = block.attention_residual(x, o)
                x = block.mlp_output(h, block.mlp_input(h, x), x=x)
        outputs.append(o)
    return torch.cat(outputs)
