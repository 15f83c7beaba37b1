"""A decoder described block by block: embedding, blocks, final norm and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thought_kernels.models.block import Block
from thought_kernels.models.linear import FastLinear
from thought_kernels.models.norm import Norm, wide
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention

__all__ = ["Block", "Decoder"]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A transformers decoder as the package sees it: embedding, blocks, final norm, head.

    Attributes:
        model: the transformers model itself.
        config: its text config.
        blocks: all blocks, index = position.
        embed_tokens: token ids to the residual stream, with Gemma's scaling inside.
        embedding_multiplier: multiplies what embed_tokens gives.
        embed_positions: positions to what is added to the embedding; None where positions only rotate keys.
        norm: the final norm.
        lm_head: None in models without a language-model head.
        logit_divisor: divides the head's output.
        logit_softcap: c in c·tanh(logits / c), or None.
        frequencies: layer kind -> (inverse frequencies [R/2], factor on cos and sin).
    """

    model: Any
    config: Any
    blocks: tuple[Block, ...]
    embed_tokens: Any
    embedding_multiplier: float
    embed_positions: Any
    norm: Norm
    lm_head: Any
    logit_divisor: float
    logit_softcap: float | None
    frequencies: Callable[[str], tuple[Tensor, float]]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def context(self) -> int | None:
        """Tokens of the longest prompt, None where the configuration names no end."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return len(self.embed_tokens.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where input ids go; each block may be elsewhere."""
        return self.embed_tokens.weight.device

    @property
    def positions(self) -> Literal["rotary", "learned"]:
        """How positions enter: "rotary", or "learned" where they are part of the embedding (theory §3)."""
        return "rotary" if self.embed_positions is None else "learned"

    @torch.no_grad()
    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """The residual stream entering block 0.

        Args:
            input_ids: [B, T].
            positions: [B or 1, T], None for 0 to T − 1. Only learned positions enter here; others are rotary's.

        Returns:
            [B, T, d].

        Raises:
            ValueError: a learned position that the model does not have.
        """
        x = self.embed_tokens(input_ids.to(self.device))
        if self.embedding_multiplier != 1:
            x = x * self.embedding_multiplier
        if self.embed_positions is None:
            return x
        count = self.embed_positions.weight.shape[0]
        if positions is None:
            positions = torch.arange(input_ids.shape[1])[None]
        if positions.numel() and int(positions.max()) >= count:
            raise ValueError(
                f"embed: positions must be below {count}, which the model has learned, got {int(positions.max())}; "
                "shorten the prompt"
            )
        return x + self.embed_positions(positions.to(self.device))

    @torch.no_grad()
    def rotary(self, block_index: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a block's rotary embedding, f·cos(p·ω) and f·sin(p·ω) with ω repeated for both halves.

        Angles are float64 in a float64 model and float32 otherwise, as in transformers.

        Args:
            block_index: 0-based; sliding and full blocks may have different frequencies.
            positions: token positions, [B or 1, T], any integer dtype.

        Returns:
            cos and sin, [B or 1, T, R], in the residual stream's dtype, on the block's device. R is how many numbers
            of a head are rotated: D, less for partial rotary embeddings, and 0 for blocks without.
        """
        block = self.blocks[block_index]
        if not block.rotary:
            nothing = torch.empty(*positions.shape, 0, dtype=self.dtype, device=block.device)
            return nothing, nothing
        inv_freq, factor = self.frequencies(block.kind)
        angles = positions.to(block.device, wide(self.dtype))[..., None] * inv_freq.to(block.device, wide(self.dtype))
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(self.dtype), (angles.sin() * factor).to(self.dtype)

    @torch.no_grad()
    def final_norm(self, x: Tensor) -> Tensor:
        """The final norm of the residual stream after the last block, [B, T, d]."""
        return self.norm(x.to(self.norm.module.weight.device))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of the residual stream x [B, T, d] after the last block; applies final_norm itself.

        Raises:
            ValueError: if the model has no language-model head.
        """
        if self.lm_head is None:
            raise ValueError(
                f"logits: model must have a language-model head, got {type(self.model).__name__}; "
                "load it as a causal language model"
            )
        x = self.final_norm(x)
        with FastLinear():
            # A head that torch has quantised has no parameters, and is where the norm before it is.
            logits = self.lm_head(x.to(next(self.lm_head.parameters(), x).device))
        if self.logit_divisor != 1:
            logits = logits / self.logit_divisor
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    @torch.no_grad()
    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The model's own forward, computed through the steps of its blocks.

        Args:
            input_ids: [B, T], padded on the right.
            lengths: real tokens per row, [B]; None means T for all.

        Returns:
            Logits, [B, T, vocabulary]; rows beyond `lengths` are meaningless.

        Raises:
            ValueError: if input_ids is not [B, T], or the model has no language-model head.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"forward: input_ids must have shape [B, T], got {list(input_ids.shape)}")
        x = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for block in self.blocks:
            q, k, v = block.qkv(x)
            cos, sin = self.rotary(block.index, positions)
            nothing_shared = torch.full((len(x),), -1, device=q.device)
            o = shared_prefix_attention(
                block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, [], nothing_shared,
                lengths=None if lengths is None else lengths.to(q.device),
                window=block.window, scale=block.scale, softcap=block.softcap,
            )  # fmt: skip
            h = block.attention_residual(x, block.joined(o))
            x = block.mlp_output(h, block.mlp_input(h, x), x=x)
        return self.logits(x)
