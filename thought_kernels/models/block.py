"""One decoder block: its modules, and the arithmetic between the sites that patches act on.

    x ── input_norm ─ q, k, v ─ attention ─ o ── o_proj ─ post_attention_norm ──(· m, + x)── h
    h (x where the block is parallel) ── pre_feedforward_norm ── u ── mlp(u) ─ post_feedforward_norm ──(· m, + h)── y

Norms that a family lacks are the identity, and m is 1 nearly everywhere. The linear modules are called as modules, so
their hooks (a ThoughtPatch, an adapter) take part; `norm.hooked` says which others do. Norms and rotary angles are
computed here, because transformers computes them in float32 even in a float64 model.
Rows are tokens: B examples, T tokens, d hidden size, Hq / Hkv query and key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.models.families import Family
from thought_kernels.models.linear import FastLinear, input_width
from thought_kernels.models.norm import Norm, hooked, wide
from thought_kernels.models.quantised import unpacks
from thought_kernels.models.sharded import part, whole


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its attention's shape, its modules, and the steps between its patch sites.

    Attributes:
        index: 0-based block index.
        kind: the layer type in transformers' words, such as "sliding_attention"; selects the rotary frequencies.
        layer: the decoder layer of the model, with attention and MLP inside.
        parts: what the layer's modules are called.
        window: a query sees this many keys, itself included; None on full layers.
        scale: multiplies q·k before the softmax.
        softcap: c in c·tanh(score / c), or None.
        rotary: whether queries and keys are rotated.
        shares_heads: whether o_proj takes the heads of this process alone, where weights are divided among several.
        parallel: whether the MLP reads the stream that enters the block, beside attention and not after it.
        residual_multiplier: m, multiplies what attention and MLP add to the stream.
        input_norm and the other norms: None where the architecture has none.
    """

    index: int
    kind: str
    layer: Any
    parts: Family
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None
    scale: float
    softcap: float | None
    rotary: bool
    shares_heads: bool
    parallel: bool
    residual_multiplier: float
    input_norm: Norm | None
    pre_feedforward_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    post_attention_norm: Norm | None
    post_feedforward_norm: Norm | None

    # Read through the layer at each use: whoever wraps or replaces a linear module later is obeyed.

    @property
    def attention(self) -> nn.Module:
        return getattr(self.layer, self.parts.attention)

    @property
    def o_proj(self) -> nn.Module:
        return getattr(self.attention, self.parts.o_proj)

    @property
    def mlp(self) -> nn.Module:
        return self.layer.mlp

    @property
    def mlp_inputs(self) -> tuple[nn.Module, ...]:
        """The linear modules that multiply u; none in a mixture of experts."""
        names = self.parts.mlp_inputs
        return tuple(getattr(self.mlp, name) for name in names) if hasattr(self.mlp, names[0]) else ()

    @property
    def down_proj(self) -> nn.Module | None:
        """The MLP's output projection, None in a mixture of experts."""
        return getattr(self.mlp, self.parts.down_proj, None)

    @property
    def attention_width(self) -> int:
        """Width of o, Hq·D."""
        return self.num_attention_heads * self.head_dim

    @property
    def mlp_width(self) -> int | None:
        """Width of down_proj's input, None in a mixture of experts."""
        return None if self.down_proj is None else input_width(self.down_proj)

    @property
    def device(self) -> torch.device:
        return next(self.layer.parameters()).device

    @torch.no_grad()
    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the residual stream, after the head norms and before the rotary embedding.

        Args:
            x: residual stream entering the block, [B, T, d].

        Returns:
            q [B, Hq, T, D], k and v [B, Hkv, T, D]; the heads of this process where they are divided (sharded.py).
        """
        x = x.to(self.device)
        x = self.input_norm(x) if self.input_norm else x
        with FastLinear():
            projected = [getattr(self.attention, name)(x) for name in self.parts.qkv]
        q, k, v = projected if len(projected) == 3 else self._unfused(projected[0])
        return self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v, None)

    def rotate(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of the first R numbers of each head: t·cos + (−t₂, t₁)·sin, (t₁, t₂) their two halves.

        Args:
            t: queries or keys, [B, heads, T, D].
            cos, sin: from Decoder.rotary, [B or 1, T, R] with R <= D; R = 0 leaves t as it is.

        Returns:
            The rotated t, [B, heads, T, D].
        """
        width = cos.shape[-1]
        if not width:
            return t
        cos, sin = cos.to(t.device).unsqueeze(1), sin.to(t.device).unsqueeze(1)
        first, second = t[..., :width].chunk(2, dim=-1)
        out = t[..., :width] * cos
        half = width // 2
        out[..., :half] -= second * sin[..., :half]  # in place, since queries are among a block's widest activations
        out[..., half:] += first * sin[..., half:]
        return out if width == t.shape[-1] else torch.cat([out, t[..., width:]], dim=-1)

    def joined(self, o: Tensor) -> Tensor:
        """[B, heads, T, D] of this process's heads to [B, T, Hq·D] of all, the layout of o_proj's input."""
        return whole(self.o_proj, o.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def attention_residual(self, x: Tensor, o: Tensor) -> Tensor:
        """h = x + m post_attention_norm(o_proj(o)).

        Args:
            x: residual stream entering the block, [B, T, d].
            o: attention output, heads concatenated, [B, T, Hq·D].

        Returns:
            h, [B, T, d].
        """
        with FastLinear():
            z = self.o_proj(self._own(o.to(self.device)))
        return x.to(z.device) + self._scaled(self.post_attention_norm(z) if self.post_attention_norm else z)

    @torch.no_grad()
    def attention_delta(self, x: Tensor, o: Tensor, delta_o: Tensor) -> tuple[Tensor, Tensor]:
        """(h, h' − h) where only the attention output changes, o' = o + delta_o, in difference form.

        h' − h = m (n(W o + W delta_o) − n(W o)), n the post-attention norm, W the linear part of o_proj: o_proj's
        bias, or the vector of a patch on it, counts once.

        Args:
            x: residual stream entering the block, the same with and without context, [B, T, d].
            o: attention output without context, [B, T, Hq·D].
            delta_o: with − without context, [B, T, Hq·D], float32 or float64.

        Returns:
            h [B, T, d] and h' − h [B, T, d], the second in float32, float64 in a float64 model.

        Source: theory §4, "Carry the difference through the norms".
        """
        o, delta_o = self._own(o.to(self.device)), self._own(delta_o.to(self.device))
        with FastLinear():
            z = self.o_proj(o)
            constant = self.o_proj(torch.zeros_like(o[..., :1, :]))
            if constant.any():  # which would round a small difference away in a narrow dtype
                delta_o, constant = delta_o.to(wide(o.dtype)), torch.zeros_like(o[..., :1, :], dtype=wide(o.dtype))
                delta_z = _called(self.o_proj, delta_o) - _called(self.o_proj, constant)
            else:
                delta_z = self.o_proj(delta_o.to(o.dtype)).to(wide(o.dtype))
        x = x.to(z.device)
        if self.post_attention_norm is None:
            return x + self._scaled(z), self._scaled(delta_z)
        if self.residual_multiplier == 1:
            return self.post_attention_norm.pair(z, delta_z, x)
        z, delta_z = self.post_attention_norm.pair(z, delta_z)
        return x + self._scaled(z), self._scaled(delta_z)

    @torch.no_grad()
    def mlp_input(self, h: Tensor, x: Tensor) -> Tensor:
        """u, the MLP's input.

        Args:
            h: residual stream after attention, [B, T, d].
            x: residual stream entering the block, [B, T, d]; parallel blocks read it in place of h.

        Returns:
            u, [B, T, d].
        """
        stream = (x if self.parallel else h).to(self.device)
        return self.pre_feedforward_norm(stream) if self.pre_feedforward_norm else stream

    @torch.no_grad()
    def mlp_input_delta(self, h: Tensor, delta_h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(u, u' − u) for h' = h + delta_h and the same x, in difference form: the change of a parallel block is 0.

        Args:
            h, delta_h: residual stream after attention and its change, [B, T, d].
            x: residual stream entering the block, [B, T, d].

        Returns:
            u and u' − u, [B, T, d], the second in delta_h's dtype.
        """
        if self.parallel:
            return self.mlp_input(h, x), torch.zeros_like(delta_h, device=self.device)
        h, delta_h = h.to(self.device), delta_h.to(self.device)
        return self.pre_feedforward_norm.pair(h, delta_h) if self.pre_feedforward_norm else (h, delta_h)

    @torch.no_grad()
    def mlp_output(self, h: Tensor, u: Tensor, *, x: Tensor) -> Tensor:
        """y = h + m post_feedforward_norm(mlp(u)), the block's output.

        Forward hooks on the decoder layer (a patch's residual vector) act on y here as they do in the model's forward.

        Args:
            h: residual stream after attention, [B, T, d].
            u: mlp_input(h, x), [B, T, d].
            x: residual stream entering the block, which hooks on the layer are given as its input.

        Returns:
            y, [B, T, d].
        """
        with FastLinear():
            out = self.mlp(u.to(self.device))
        return self.mlp_residual(h, out, x=x)

    @torch.no_grad()
    def mlp_alone(self, u: Tensor) -> Tensor:
        """The MLP's output for u [B, T, d], before the norm behind it, in u's dtype: as ``mlp_activation``'s."""
        with FastLinear():
            return _called(self.mlp, u.to(self.device))

    @torch.no_grad()
    def mlp_activation(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's output and, from the same call of it, what its down_proj multiplied.

        Args:
            u: mlp_input(h, x), [B, T, d]. Where it is float32 and weights are float16 or bfloat16, they are widened for
                the call: a difference of two narrow outputs is mostly their rounding where it is small.

        Returns:
            down_proj(z) [B, T, d] and z [B, T, mlp_width] in u's dtype. Hooks take part: z is what they left for
            down_proj.

        Raises:
            ValueError: a mixture of experts, which has no down_proj.
        """
        if self.down_proj is None:
            raise ValueError(f"mlp_activation: block must have one MLP, got a mixture of experts; block {self.index}")
        seen: list[Tensor] = []
        handle = self.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            out = self.mlp_alone(u)
        finally:
            handle.remove()
        return out, whole(self.down_proj, seen[0])

    @torch.no_grad()
    def mlp_residual(self, h: Tensor, out: Tensor, *, x: Tensor) -> Tensor:
        """y = h + m post_feedforward_norm(out) for an output of the MLP; all [B, T, d], x as mlp_output's."""
        y = h.to(out.device) + self._scaled(self.post_feedforward_norm(out) if self.post_feedforward_norm else out)
        return hooked(self.layer, (x,), y)

    def _unfused(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, T, heads·D] from the output of one projection."""
        if self.parts.qkv_by_head:
            by_head = projected.unflatten(-1, (-1, 3 * self.head_dim))
            return tuple(part.flatten(-2) for part in by_head.chunk(3, dim=-1))
        keys = self.num_key_value_heads * self.head_dim
        return projected.split([self.attention_width, keys, keys], dim=-1)

    def _heads(self, projected: Tensor, norm: Norm | None) -> Tensor:
        """[B, T, heads·D] to [B, heads, T, D], normed over each head or before over all, as wide as the norm is."""
        over_all = norm is not None and norm.module.weight.shape[-1] != self.head_dim
        if norm is not None and over_all:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads if norm is None or over_all else norm(heads)

    def _own(self, o: Tensor) -> Tensor:
        """What o_proj is called with: o [B, T, Hq·D], or this process's heads of it."""
        return part(self.o_proj, o) if self.shares_heads else o

    def _scaled(self, z: Tensor) -> Tensor:
        return z if self.residual_multiplier == 1 else z * self.residual_multiplier


def _called(module: nn.Module, rows: Tensor) -> Tensor:
    """The module's output in the rows' dtype, hooks included: narrower weights are widened for the call.

    Those that unpack themselves are unpacked: not all of them multiply rows of another dtype, or can be converted.
    """
    narrow = (torch.float16, torch.bfloat16)
    if rows.dtype in narrow:
        return module(rows)
    widened = {
        name: (weight.dequantize() if unpacks(weight) else weight).to(rows.dtype)
        for name, weight in module.named_parameters()
        if weight.dtype in narrow
    }
    return torch.func.functional_call(module, widened, (rows,)) if widened else module(rows)
