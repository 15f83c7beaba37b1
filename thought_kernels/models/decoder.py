"""A decoder described block by block, and the arithmetic of a block between the sites that patches act on.

    x ── input_norm ─ q, k, v ─ attention ─ o ── o_proj ─ post_attention_norm ──(+x)── h
    h ── pre_feedforward_norm ── u ── mlp(u) ─ post_feedforward_norm ──(+h)── y

The linear modules are called as modules, so their hooks (a ThoughtPatch, an adapter) take part; `hooked` says which
others do. Norms and rotary angles are computed here, because transformers computes them in float32 even in a float64
model.
Rows are tokens: B examples, T tokens, d hidden size, Hq / Hkv query and key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.models.linear import OneDNNLinear
from thought_kernels.ops.rms_norm_pair import rms_norm_pair
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm n(z) = (weight_offset + weight) ⊙ z / √(mean z² + eps), in float64 for float64 z and float32 otherwise.

    Attributes:
        module: holds `weight`, and the forward hooks to run.
        eps: added to the mean square.
        weight_offset: 1.0 where the checkpoint stores the scale minus one, as Gemma does.
    """

    module: Any
    eps: float
    weight_offset: float

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        z = x.to(dtype)
        normed = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        out = normed * (self.weight_offset + self.module.weight.to(dtype))
        return hooked(self.module, (x,), out.to(x.dtype))

    def pair(self, x: Tensor, delta: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(n(x), n(x + delta) − n(x)), the second in delta's dtype and in difference form (theory §4).

        With a residual stream the first is residual + n(x), in one kernel unless hooks are to see n(x) itself.
        """
        run = partial(rms_norm_pair, x, delta, self.module.weight, eps=self.eps, weight_offset=self.weight_offset)
        if residual is not None and residual.dtype == x.dtype and not self.module._forward_hooks:
            return run(residual=residual)
        normed, change = run()
        normed = hooked(self.module, (x,), normed)
        return normed if residual is None else residual + normed, change


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its attention's shape, its modules, and the steps between its patch sites.

    Attributes:
        index: 0-based block index.
        kind: the layer type in transformers' words, such as "sliding_attention"; selects the rotary frequencies.
        layer: the decoder layer of the model, with `self_attn` and `mlp` inside.
        window: a query sees this many keys, itself included; None on full layers.
        scale: multiplies q·k before the softmax.
        softcap: c in c·tanh(score / c), or None.
        q_norm, k_norm, post_attention_norm, post_feedforward_norm: None where the architecture has none.
    """

    index: int
    kind: str
    layer: Any
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None
    scale: float
    softcap: float | None
    input_norm: Norm
    pre_feedforward_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    post_feedforward_norm: Norm | None = None

    # Read through the layer at each use: whoever wraps or replaces a linear module later is obeyed.

    @property
    def o_proj(self) -> nn.Module:
        return self.layer.self_attn.o_proj

    @property
    def mlp(self) -> nn.Module:
        return self.layer.mlp

    @property
    def gate_proj(self) -> nn.Module:
        return self.layer.mlp.gate_proj

    @property
    def up_proj(self) -> nn.Module:
        return self.layer.mlp.up_proj

    @property
    def device(self) -> torch.device:
        return self.input_norm.module.weight.device

    @torch.no_grad()
    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the residual stream, after the head norms and before the rotary embedding.

        Args:
            x: residual stream entering the block, [B, T, d].

        Returns:
            q [B, Hq, T, D], k and v [B, Hkv, T, D].
        """
        attention = self.layer.self_attn
        x = self.input_norm(x.to(self.device))
        with OneDNNLinear():
            q, k, v = (self._heads(project(x)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        return (self.q_norm(q) if self.q_norm else q), (self.k_norm(k) if self.k_norm else k), v

    @staticmethod
    def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding: t·cos + (−t₂, t₁)·sin with t = (t₁, t₂) split in halves.

        Args:
            t: queries or keys, [B, heads, T, D].
            cos, sin: from Decoder.rotary, [B or 1, T, D].

        Returns:
            The rotated t, [B, heads, T, D].
        """
        cos, sin = cos.to(t.device).unsqueeze(1), sin.to(t.device).unsqueeze(1)
        first, second = t.chunk(2, dim=-1)
        out = t * cos
        half = first.shape[-1]
        out[..., :half] -= second * sin[..., :half]  # in place, since queries are among a block's widest activations
        out[..., half:] += first * sin[..., half:]
        return out

    @torch.no_grad()
    def attention_residual(self, x: Tensor, o: Tensor) -> Tensor:
        """h = x + post_attention_norm(o_proj(o)).

        Args:
            x: residual stream entering the block, [B, T, d].
            o: attention output, heads concatenated, [B, T, Hq·D].

        Returns:
            h, [B, T, d].
        """
        with OneDNNLinear():
            z = self.o_proj(o.to(self.device))
        return x.to(z.device) + (self.post_attention_norm(z) if self.post_attention_norm else z)

    @torch.no_grad()
    def attention_delta(self, x: Tensor, o: Tensor, delta_o: Tensor) -> tuple[Tensor, Tensor]:
        """(h, h' − h) where only the attention output changes, o' = o + delta_o, in difference form.

        h' − h = n(W o + W delta_o) − n(W o), n the post-attention norm, W the linear part of o_proj: o_proj's bias,
        or the vector of a patch on it, counts once.

        Args:
            x: residual stream entering the block, the same with and without context, [B, T, d].
            o: attention output without context, [B, T, Hq·D].
            delta_o: with − without context, [B, T, Hq·D], float32 or float64.

        Returns:
            h [B, T, d] and h' − h [B, T, d], the second in float32, float64 in a float64 model.

        Source: theory §4, "Carry the difference through the norms".
        """
        o, delta_o = o.to(self.device), delta_o.to(self.device)
        with OneDNNLinear():
            z = self.o_proj(o)
            constant = self.o_proj(torch.zeros_like(o[..., :1, :]))
            delta_z = (self.o_proj(delta_o.to(o.dtype)) - constant).to(_wide(o.dtype))
        if self.post_attention_norm is None:
            return x.to(z.device) + z, delta_z
        return self.post_attention_norm.pair(z, delta_z, x.to(z.device))

    @torch.no_grad()
    def mlp_input(self, h: Tensor) -> Tensor:
        """u = pre_feedforward_norm(h), what gate_proj and up_proj multiply; h and u [B, T, d]."""
        return self.pre_feedforward_norm(h.to(self.device))

    @torch.no_grad()
    def mlp_input_delta(self, h: Tensor, delta_h: Tensor) -> tuple[Tensor, Tensor]:
        """(u, u' − u) for h' = h + delta_h, in difference form; all [B, T, d], the second in delta_h's dtype."""
        return self.pre_feedforward_norm.pair(h.to(self.device), delta_h.to(self.device))

    @torch.no_grad()
    def mlp_output(self, h: Tensor, u: Tensor, *, x: Tensor | None = None) -> Tensor:
        """y = h + post_feedforward_norm(down_proj(act(gate_proj u) · up_proj u)), the block's output.

        Forward hooks on the decoder layer (a patch's residual vector) act on y here as they do in the model's forward.

        Args:
            h: residual stream after attention, [B, T, d].
            u: mlp_input(h), [B, T, d].
            x: residual stream entering the block, which hooks on the layer are given as its input; None gives them h.

        Returns:
            y, [B, T, d].
        """
        with OneDNNLinear():
            out = self.mlp(u.to(self.device))
        h = h.to(out.device)
        y = h + (self.post_feedforward_norm(out) if self.post_feedforward_norm else out)
        return hooked(self.layer, (h if x is None else x,), y)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A transformers decoder as the package sees it: embedding, blocks, final norm, head.

    Attributes:
        model: the transformers model itself.
        config: its text config.
        blocks: all blocks, index = position.
        embed_tokens: token ids to the residual stream, with the architecture's scaling inside.
        norm: the final norm.
        lm_head: None in models without a language-model head.
        logit_softcap: c in c·tanh(logits / c), or None.
        frequencies: layer kind -> (inverse frequencies [D/2], factor on cos and sin).
    """

    model: Any
    config: Any
    blocks: tuple[Block, ...]
    embed_tokens: Any
    norm: Norm
    lm_head: Any
    logit_softcap: float | None
    frequencies: Callable[[str], tuple[Tensor, float]]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where input ids go; each block may be elsewhere."""
        return self.embed_tokens.weight.device

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """The residual stream entering block 0, [B, T, d], of input_ids [B, T]."""
        return self.embed_tokens(input_ids.to(self.device))

    @torch.no_grad()
    def rotary(self, block_index: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a block's rotary embedding, f·cos(p·ω) and f·sin(p·ω) with ω repeated for both halves.

        Angles are float64 in a float64 model and float32 otherwise, as in transformers.

        Args:
            block_index: 0-based; sliding and full blocks may have different frequencies.
            positions: token positions, [B or 1, T], any integer dtype.

        Returns:
            cos and sin, [B or 1, T, D], in the residual stream's dtype, on the block's device.
        """
        block = self.blocks[block_index]
        inv_freq, factor = self.frequencies(block.kind)
        wide = _wide(self.dtype)
        angles = positions.to(block.device, wide)[..., None] * inv_freq.to(block.device, wide)
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
        with OneDNNLinear():
            logits = self.lm_head(self.final_norm(x).to(self.lm_head.weight.device))
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
            h = block.attention_residual(x, o.transpose(1, 2).flatten(2))
            x = block.mlp_output(h, block.mlp_input(h), x=x)
        return self.logits(x)


def hooked(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """`out` after the forward hooks of a module whose own forward was not called but computed here.

    Patches and steering tools add to a norm's or a layer's output by such hooks. These hooks take part:

    - on linear modules, the embedding, the MLP and the head, which are called: all of theirs, and pre-hooks;
    - on norms: forward hooks, given the norm's input. The change that Norm.pair returns does not pass through them;
    - on decoder layers: forward hooks, given the residual stream and no keyword arguments; `out` is a tensor.

    These do not: pre-hooks of norms and decoder layers, any hook of `self_attn`, the decoder or the model itself, and
    hooks that are registered for all modules at once.
    """
    for key, hook in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        result = hook(module, args, {}, out) if with_kwargs else hook(module, args, out)
        out = out if result is None else result
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
