"""The exactness theorem on real weights: per-token patches at every block replace the instruction (theory §2).

It holds for any two prefixes P and P° before the same e; an inserted instruction, P = [H, I] and P° = H, is one case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from thought_kernels.models import in_memory
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.ops.checks import check_choice
from thought_kernels.ops.paired_attention import paired_attention
from thought_kernels.pairing.batches import Group, own_attention, prefix_blocks

REPLAYED = ("attention", "mlp")


@dataclass(frozen=True)
class ReplayReport:
    """How closely [P°, e] with per-token patches follows [P, e]; errors are max|x − x̂| / max|x| over e's tokens.

    Attributes:
        block_error: [L], of each block's output.
        logit_error: of the logits.
        control_error: of the logits without patches.
    """

    block_error: Tensor
    logit_error: float
    control_error: float


@dataclass(frozen=True)
class TokenPatches:
    """One block's per-token patches Δ_i = δ_i a_iᵀ / ‖a_i‖² at one site, kept as their factors.

    Attributes:
        delta: δ, [n, d_a]; d_a is Hq*D at the attention site and the hidden size at the MLP's.
        activation: a, [n, d_a].
        vector: what is added to the block's output, [n, d]; None at the attention site, which needs none.
    """

    delta: Tensor
    activation: Tensor
    vector: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x_i + δ_i (a_i · x_i) / ‖a_i‖², for x [n, d_a]; a token with a_i = 0 has no patch."""
        a = self.activation.to(self.delta.dtype)
        square = a.square().sum(-1, keepdim=True)
        along = (a * x).sum(-1, keepdim=True) / square.where(square > 0, torch.ones_like(square))
        return (x + self.delta * along).to(x.dtype)

    def at_last(self, x: Tensor) -> Tensor:
        """x [1, T, d_a] with its last n tokens patched."""
        count = len(self.delta)
        return torch.cat([x[:, :-count], self(x[0, -count:])[None]], dim=1)


@torch.no_grad()
def replay(model: Any, with_ids: Tensor, span: tuple[int, int], *, site: str = "attention") -> ReplayReport:
    """Removes a span of the prompt, patches every token at every block for it, and compares the activations.

        attention    o_i ← o_i + δ_i (a_i · o_i) / ‖a_i‖²
        mlp          u_i ← u_i + δ_i (a_i · u_i) / ‖a_i‖²        y_i ← y_i + h'_i − h_i

    at e's tokens, o_i, u_i and y_i recomputed in the run over [H, e], with a and δ of the layerwise pairing. The run
    over [H, e] is the model's own, from position 0; learned positions stay as they are in [H, I, e] (theory §3). In a
    float64 model all arithmetic is float64, and the errors are rounding.

    Args:
        model: a transformers causal language model.
        with_ids: the whole prompt [H, I, e], [T] integers.
        span: (start, stop) of I in it; at least one token must follow.
        site: "attention", or "mlp", the paper's own: its matrix at the MLP's input with its vector at the block's
            output.

    Returns:
        A ReplayReport.

    Raises:
        ValueError: if the model has no language-model head, with_ids is not one row of the model's ids, span is empty,
            outside, or leaves no token after, or site is another.
        TypeError: a model without an adapter, or a span that is not two integers.

    Source: "Transmuting prompts into weights", §2.2, eq. 3-6; the attention site is ours.
    """
    check_choice("replay", "site", site, REPLAYED)
    decoder = in_memory("replay", model, divided=True)
    if decoder.lm_head is None:
        raise ValueError(
            f"replay: model must have a language-model head, got {type(decoder.model).__name__}; load it with "
            "AutoModelForCausalLM"
        )
    try:
        ids = torch.as_tensor(with_ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"replay: with_ids must be token ids, got {type(with_ids).__name__}") from None
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"replay: with_ids must be one row of token ids, got {list(ids.shape)} {ids.dtype}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < decoder.vocabulary:
        raise ValueError(
            f"replay: with_ids must be between 0 and {decoder.vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    bounds = span if isinstance(span, (tuple, list)) else ()
    if len(bounds) != 2 or not all(isinstance(b, Integral) and not isinstance(b, bool) for b in bounds):
        raise TypeError(f"replay: span must be two integers (start, stop), got {span!r}")
    start, stop = map(int, bounds)
    if not 0 <= start < stop < len(ids):
        raise ValueError(
            f"replay: span must satisfy 0 <= start < stop < {len(ids)}, got ({start}, {stop}); "
            "a token after the span is needed to compare"
        )
    tokens = tuple(int(token) for token in ids)
    return replay_group(decoder, Group(tokens[:start], tokens[start:stop], (), ()), tokens[stop:], site)


@torch.no_grad()
def replay_group(decoder: Decoder, group: Group, e: Sequence[int], site: str = "attention") -> ReplayReport:
    """replay for a group's two prefixes P and P°: [P°, e], run from position 0, with per-token patches for [P, e]."""
    start = len(group.without_prefix)
    without = torch.tensor([[*group.without_prefix, *e]])
    positions = torch.cat([torch.arange(start)[None], group.positions(len(e))], dim=1)
    with undisturbed(decoder.model):
        patches, blocks, final = token_patches(decoder, group, torch.tensor([list(e)]), site)
        replayed, replayed_final = run_patched(decoder, without, patches, positions)
        _, control_final = run_patched(decoder, without, None, positions)
        logits = decoder.logits(final)
        errors = [relative_error(x[:, start:], y) for x, y in zip(replayed, blocks, strict=True)]
        return ReplayReport(
            block_error=torch.tensor(errors, dtype=torch.float64),
            logit_error=relative_error(decoder.logits(replayed_final[:, start:]), logits),
            control_error=relative_error(decoder.logits(control_final[:, start:]), logits),
        )


def token_patches(
    decoder: Decoder, group: Group, e: Tensor, site: str = "attention"
) -> tuple[list[TokenPatches], list[Tensor], Tensor]:
    """Runs [P, e] and returns each block's per-token patches, each block's output at e [1, n, d], and the last."""
    prefixes = prefix_blocks(decoder, group, len(decoder.blocks) - 1)
    positions = group.positions(e.shape[1])
    x = decoder.embed(e, positions)
    patches, outputs = [], []
    for block, prefix in zip(decoder.blocks, prefixes, strict=True):
        q, k, v = block.qkv(x)
        cos, sin = decoder.rotary(block.index, positions)
        o, delta = paired_attention(
            block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, prefix.with_context, prefix.without_context,
            window=block.window, scale=block.scale, softcap=block.softcap,
        )  # fmt: skip
        o, delta = block.joined(o), block.joined(delta)
        if site == "attention":
            patches.append(TokenPatches(delta[0], o[0]))
        else:
            h, delta_h = block.attention_delta(x, o, delta)
            u, delta_u = block.mlp_input_delta(h, delta_h, x)
            patches.append(TokenPatches(delta_u[0], u[0], delta_h[0]))
        h = block.attention_residual(x, (o.to(delta.dtype) + delta).to(o.dtype))
        x = block.mlp_output(h, block.mlp_input(h, x), x=x)
        outputs.append(x)
    return patches, outputs, x


def run_patched(
    decoder: Decoder, ids: Tensor, patches: list[TokenPatches] | None, positions: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Runs ids [1, T] with per-token patches at the last tokens; every block's output, and the last.

    Rotary positions start at 0 and close up; `positions` [1, T] are the learned ones.
    """
    x = decoder.embed(ids, positions)
    outputs = []
    for block in decoder.blocks:
        patch = None if patches is None else patches[block.index]
        o, _, _ = own_attention(decoder, block, x)
        if patch is not None and patch.vector is None:
            o = patch.at_last(o)
        h = block.attention_residual(x, o)
        u = block.mlp_input(h, x)
        if patch is None or patch.vector is None:
            x = block.mlp_output(h, u, x=x)
        else:
            x = block.mlp_output(h, patch.at_last(u), x=x)
            x[:, -len(patch.vector) :] += patch.vector.to(x.dtype)
        outputs.append(x)
    return outputs, x


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """max|x − x̂| / max|x| (theory §2)."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    return float((approximate.to(wide) - exact.to(wide)).abs().max() / exact.abs().max())
