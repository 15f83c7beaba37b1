"""Steps of a block that the pairings share, over one batch: attention, observed rows, the rest of the block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thought_kernels.models.decoder import Block
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention
from thought_kernels.pairing.batches import Batch, Group, Packed
from thought_kernels.pairing.before_norm import before_norm
from thought_kernels.pairing.run import Run
from thought_kernels.patches.patch import ThoughtPatch

# Rows that go through an MLP at once. Its intermediates are the widest tensors of a pass; beyond these numbers larger
# products are no faster, so the MLP's weights are read once more for every so many rows and never for want of rows.
MLP_ROWS = {"cpu": 256}
MLP_ROWS_ELSEWHERE = 4096

KeysValues = tuple[Tensor, Tensor]


def patched(patch: ThoughtPatch | None, layer: int, site: str, rows: Tensor) -> Tensor:
    """Rows with a site's patch applied, x + x Δᵀ + v; the same rows where the patch has nothing there."""
    shift = shifted(patch, layer, site, rows)
    return rows if shift is None else (rows.to(shift.dtype) + shift).to(rows.dtype)


def shifted(patch: ThoughtPatch | None, layer: int, site: str, rows: Tensor) -> Tensor | None:
    """x Δᵀ + v in the patch's dtype, None where the patch has nothing."""
    entry = None if patch is None else patch.entries.get((layer, site))
    return None if entry is None else entry.shift(rows.to(next(iter(entry.tensors().values()))))


def attend(
    run: Run, block: Block, x: Tensor, group: Group, prefixes: Sequence[KeysValues | None], packed: Packed
) -> Tensor:
    """Attention output of one batch in as many streams as there are prefixes, each stream behind its own prefix.

    In float32 at least: where H holds most of the softmax mass, a difference of two bf16 outputs is nothing but their
    rounding (theory §4).

    Args:
        x: residual streams, [streams, N, d].
        prefixes: keys and values, each [Hkv, P, D], of each stream's prefix; None for none.

    Returns:
        [streams, N, Hq·D], float32 or float64.
    """
    wide, batch = torch.promote_types(x.dtype, torch.float32), packed.batch
    q, k, v = block.qkv(x)
    cos, sin = run.decoder.rotary(block.index, group.start + packed.columns)
    numbers, count = [], 0
    for prefix in prefixes:
        numbers += [-1 if prefix is None else count] * len(batch.lengths)
        count += prefix is not None
    o = shared_prefix_attention(
        packed.unpack(block.rotate(q, cos, sin)), packed.unpack(block.rotate(k, cos, sin)), packed.unpack(v),
        list(filter(None, prefixes)),
        torch.tensor(numbers, device=q.device), lengths=batch.lengths.to(q.device).repeat(len(prefixes)),
        window=block.window, scale=block.scale, softcap=block.softcap, output_dtype=wide,
    )  # fmt: skip
    return packed.pack(block.joined(o).unflatten(0, (len(prefixes), -1)))


def through_mlp(block: Block, h: Tensor, x: Tensor, patch: ThoughtPatch | None = None) -> Tensor:
    """The block's output y, written over h, a few rows at a time; with the patch of its sites from the MLP on.

    Args:
        h: residual streams after attention, [S, N, d]; overwritten.
        x: residual streams entering the block, [S, N, d].
        patch: None for none.

    Returns:
        y, [S, N, d], in h's memory.
    """
    h = h.contiguous()  # so that its parts are views
    for here, entering in zip(_parts(h), _parts(x), strict=True):
        u = patched(patch, block.index, "mlp", block.mlp_input(here, entering))
        if patch is None or (block.index, "down") not in patch.entries:
            y = block.mlp_output(here, u, x=entering)
        else:
            y = block.mlp_residual(here, _patched_mlp(block, u, patch)[0], x=entering)
        here.copy_(patched(patch, block.index, "residual", y))
    return h


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [S, N, width] as parts [1, n, width], as many at a time as should go through an MLP together."""
    return rows.reshape(1, -1, rows.shape[-1]).split(MLP_ROWS.get(rows.device.type, MLP_ROWS_ELSEWHERE), dim=1)


def _patched_mlp(block: Block, u: Tensor, patch: ThoughtPatch | None) -> tuple[Tensor, Tensor]:
    """(m, z) of Block.mlp_activation with the patch of the down site, m + Δ z + v."""
    m, z = block.mlp_activation(u)
    shift = shifted(patch, block.index, "down", z)
    return (m if shift is None else (m.to(shift.dtype) + shift).to(m.dtype)), z


def observe_difference(
    run: Run, block: Block, x: Tensor, o: Tensor, delta: Tensor, batch: Batch, stage: frozenset[str],
    patch: ThoughtPatch | None,
) -> None:  # fmt: skip
    """Rows of a block whose two sides share the residual stream x, in difference form (theory §4)."""
    weights = batch.weights
    if "attention" in stage:
        run.update(block, "attention", delta, o, weights, batch)
    if stage & {"mlp", "residual", "down"}:
        shift = shifted(patch, block.index, "attention", o)
        if shift is not None:
            o, delta = (o.to(shift.dtype) + shift).to(o.dtype), delta - shift.to(delta.dtype)
        h, delta_h = block.attention_delta(x, o, delta)
        if "residual" in stage:
            run.update(block, "residual", delta_h, None, weights, batch)
        if stage & {"mlp", "down"}:
            u, delta_u = block.mlp_input_delta(h, delta_h, x)
            if "mlp" in stage:
                run.update(block, "mlp", delta_u, run.mlp_rows(u, h), weights, batch)
            if "down" in stage:
                _observe_down(run, block, u + delta_u, u.to(delta_u.dtype), delta_h, batch, patch)


def observe_streams(
    run: Run, block: Block, x: Tensor, o: Tensor, batch: Packed, stage: frozenset[str], patch: ThoughtPatch | None
) -> None:
    """Rows of a block whose two sides have streams of their own: the first half of x and o saw the instruction."""
    if "attention" in stage:
        observe_attention(run, block, x, o, batch)
    if stage & {"mlp", "residual", "down"}:
        h = after_attention(block, x, o, patch)
        observe_residual(run, block, x, h, batch, stage)
        if "down" in stage:
            observe_down(run, block, x, h, batch, patch)


def observe_attention(run: Run, block: Block, x: Tensor, o: Tensor, batch: Packed) -> None:
    """Rows of the attention site, from both streams' attention outputs."""
    prime, plain = o.chunk(2)
    run.update(block, "attention", prime - plain, plain.to(x.dtype), batch.weights, batch)


def after_attention(block: Block, x: Tensor, o: Tensor, patch: ThoughtPatch | None) -> Tensor:
    """Both streams after attention, [2, N, d], float32 or float64; the one without context with its patch."""
    prime, plain = o.chunk(2)
    o = torch.cat([prime, patched(patch, block.index, "attention", plain)]).to(x.dtype)
    return block.attention_residual(x, o).to(torch.promote_types(x.dtype, torch.float32))


def observe_residual(run: Run, block: Block, x: Tensor, h: Tensor, batch: Packed, stage: frozenset[str]) -> None:
    """Rows of the sites that are read at the attention's output, from both streams h after it."""
    prime, plain = h.chunk(2)
    if "residual" in stage:
        run.update(block, "residual", prime - plain, None, batch.weights, batch)
    if "mlp" in stage:
        u_prime, u = block.mlp_input(h, x.to(h.dtype)).chunk(2)
        run.update(block, "mlp", u_prime - u, run.mlp_rows(u, plain).to(x.dtype), batch.weights, batch)


def observe_down(
    run: Run, block: Block, x: Tensor, h: Tensor, batch: Packed, patch: ThoughtPatch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the down site, from both streams h after attention.

    Returns:
        What down_proj gives with context, and without, [1, N, d], and what it multiplies without, z [1, N, mlp_width].
        The last two are the block's with the patch of its sites up to the mlp.
    """
    prime, plain = h.chunk(2)
    u_prime, u = block.mlp_input(h, x.to(h.dtype)).chunk(2)
    return _observe_down(run, block, u_prime, u, prime - plain, batch, patch)


def _observe_down(
    run: Run, block: Block, prime: Tensor, plain: Tensor, delta_h: Tensor, batch: Batch | Packed,
    patch: ThoughtPatch | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of the down site: z, and what down_proj must add for the block's output to be the one with context.

    The MLP runs in float32 at least: a difference of two bf16 outputs is mostly their rounding where it is small
    (theory §4).

    Args:
        prime, plain: MLP inputs with context, and without as the mlp site's patch finds it, [S, N, d], float32 or
            float64.
        delta_h: difference of the residual streams after attention, [S, N, d].

    Returns:
        As observe_down.
    """
    plain = patched(patch, block.index, "mlp", plain)
    m_prime = torch.cat([block.mlp_alone(part) for part in _parts(prime)], dim=1).view(prime.shape)
    found = [block.mlp_activation(part) for part in _parts(plain)]
    m, z = (torch.cat(parts, dim=1).view(*plain.shape[:-1], -1) for parts in zip(*found, strict=True))
    delta_m = m_prime.to(delta_h.dtype) - m
    shift = shifted(patch, block.index, "residual", delta_h)
    delta_h = delta_h if shift is None else delta_h - shift
    # Both in terms of what is added to h after the multiplier.
    added = block.post_feedforward_norm.pair(m, delta_m)[1] if block.post_feedforward_norm else delta_m
    wanted = added + delta_h / block.residual_multiplier
    delta, weight = before_norm(block.post_feedforward_norm, m, wanted)
    run.update(block, "down", delta, z.to(run.decoder.dtype), batch.weights.to(weight.device) * weight, batch)
    return m_prime, m, z


def observe_header(
    run: Run, block: Block, group: Group, x: Tensor, o: Tensor, stage: frozenset[str], patch: ThoughtPatch | None
) -> None:
    """H's own rows with δ = 0: a merged patch acts on them too, and would move the keys that e sees later."""
    if not group.header or run.header_weight == 0:
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = torch.full(x.shape[:2], run.header_weight * group.weight / len(group.header), dtype=wide)
    if "attention" in stage:
        run.update(block, "attention", torch.zeros_like(o, dtype=wide), o, weights)
    if "residual" in stage:
        run.update(block, "residual", torch.zeros_like(x, dtype=wide), None, weights)
    if not stage & {"mlp", "down"}:
        return
    h = block.attention_residual(x, patched(patch, block.index, "attention", o))
    u = block.mlp_input(h, x)
    if "mlp" in stage:
        run.update(block, "mlp", torch.zeros_like(u, dtype=wide), run.mlp_rows(u, h), weights)
    if "down" in stage:
        m, z = block.mlp_activation(patched(patch, block.index, "mlp", u))
        zero, weight = before_norm(block.post_feedforward_norm, m, torch.zeros_like(m, dtype=wide))
        run.update(block, "down", zero, z, weights.to(weight.device) * weight)
