"""The sequential pairing: block by block over all examples, each block solved before the next is run.

Each stream passes each block once, attention and MLP: what a block needs again when a patch of it has been solved is
kept, in float32 at least. Memory, of all batches together and bounded by a budget (spill.py), for every token, Hq·D
the attention's width, d the hidden size and f the MLP's width:

    2 d              the two streams between blocks
    2 Hq·D           both attention outputs, once the attention site is summed; the one without context where no other
                     site follows
    or 2 d           both streams after attention, once mlp and residual are summed; the one without context likewise
    or 2 d + f       without context, once down is summed: the stream after attention, down_proj's output and its input

The last three lie in one place, one after the other, as wide as the widest of them.

Within a block two visits are as few as there can be for the default's sites: what down_proj has yet to mend depends on
the attention's patch through two norms and the MLP, so its rows exist only once that patch does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from thought_kernels.models.decoder import Block
from thought_kernels.pairing.batches import BlockPrefix, Group, Packed, moved_keys, own_attention
from thought_kernels.pairing.run import Run
from thought_kernels.pairing.spill import buffers
from thought_kernels.pairing.streams import (
    KeysValues,
    after_attention,
    attend,
    observe_attention,
    observe_down,
    observe_header,
    observe_residual,
    patched,
    shifted,
    through_mlp,
)
from thought_kernels.patches.patch import ThoughtPatch


def sequential(run: Run) -> None:
    """Streams the sequential pairing.

    P°'s own patched stream is carried along, so the keys that e sees without context are those of the patched model.
    """
    decoder = run.decoder
    ways = _ways(run)
    befores = [decoder.embed(torch.tensor([g.without_prefix])) if g.without_prefix else None for g in run.groups]
    for block in run.blocks[_restored(run, ways, befores) :]:
        before_outputs, without = _without_context(run, block, befores)
        patch: ThoughtPatch | None = None
        stages = run.stages if block.index in run.layers else []
        for stage in stages:
            for way in ways:
                _observe(run, block, way, without[id(way.group)], stage, patch)
            for group, before, before_o in zip(run.groups, befores, before_outputs, strict=True):
                if before is not None and before_o is not None and group.inserted and group.instruction:
                    observe_header(run, block, group, before, before_o, stage, patch)
            solved = run.solve(frozenset({block.index}), stage)
            patch = solved if patch is None else patch + solved
        for way in ways:
            if block.index < run.last:
                _leave(run, block, way, without[id(way.group)], patch)
            run.tick()
        if block.index < run.last:
            for index, (before, before_o) in enumerate(zip(befores, before_outputs, strict=True)):
                if before is not None and before_o is not None:
                    befores[index] = _rest(block, before, before_o, patch)
            if run.keeper is not None:
                run.keeper.keep(block.index + 1, _between_blocks(ways, befores))


def _restored(run: Run, ways: list[_Way], befores: list[Tensor | None]) -> int:
    """How many blocks the run's keeper has the state behind, which the streams then hold."""
    if run.keeper is None:
        return 0
    befores[:] = [None if before is None else before.clone() for before in befores]  # an embedding's row may be a view
    done = run.keeper.restore(_between_blocks(ways, befores))
    for _ in range(done * len(ways)):
        run.tick()
    return done


def _between_blocks(ways: list[_Way], befores: list[Tensor | None]) -> list[Tensor]:
    """All that goes from one block to the next."""
    return [*(way.streams for way in ways), *(before for before in befores if before is not None)]


@dataclass
class _Way:
    """One batch on its way through the blocks.

    Attributes:
        streams: with context, then patched without, [2, N, d], entering the block. The first is what leaves it once
            its last stage of sites is observed.
        room: for what is kept within a block.
        reached: the last stage that was observed in this block; empty before the first.
    """

    group: Group
    prefixes: list[BlockPrefix]
    batch: Packed
    streams: Tensor
    room: Tensor
    reached: frozenset[str] = frozenset()
    _kept: list[Tensor] = field(default_factory=list)

    def entering(self, block: Block) -> Tensor:
        """Both streams, [2, N, d]."""
        return self.streams.to(block.device)

    def keep(self, stage: frozenset[str], *tensors: Tensor) -> None:
        """Keeps tensors [S, N, width] until the next stage, in place of what was kept before."""
        self.reached, self._kept, start = stage, [], 0
        for tensor in tensors:
            place = self.room[start : start + tensor.numel()].view(tensor.shape)
            self._kept.append(place.copy_(tensor))
            start += tensor.numel()

    def kept(self, block: Block) -> list[Tensor]:
        """What was kept last, on the block's device."""
        return [tensor.to(block.device) for tensor in self._kept]


def _ways(run: Run) -> list[_Way]:
    """Every batch with its streams entering block 0; first streams, then rooms take what the budget has in memory."""
    decoder, batches = run.decoder, [(group, prefixes, batch.packed()) for group, prefixes, batch in run.batches()]
    wide = torch.promote_types(decoder.dtype, torch.float32)
    width = _kept_width(run) * wide.itemsize // decoder.dtype.itemsize
    shapes: list[tuple[int, ...]] = [(2, len(batch.places), decoder.hidden_size) for _, _, batch in batches]
    shapes += [(len(batch.places) * width,) for _, _, batch in batches]
    found = buffers(shapes, decoder.dtype, decoder.device, run.memory_budget)
    ways = []
    for (group, prefixes, batch), streams, room in zip(batches, found, found[len(batches) :], strict=False):
        streams.copy_(batch.pack(group.streams(decoder, batch.batch.tokens)))
        ways.append(_Way(group, prefixes, batch, streams, room.view(wide)))
    return ways


def _kept_width(run: Run) -> int:
    """Numbers that are kept for each token within a block, those of the widest block."""
    width = 0
    for block in (run.decoder.blocks[layer] for layer in run.layers):
        for stage in run.stages:
            streams = 1 if stage == run.stages[-1] else 2
            if "attention" in stage:
                width = max(width, streams * block.attention_width)
            elif "down" in stage:
                width = max(width, 2 * run.decoder.hidden_size + (block.mlp_width or 0))
            else:
                width = max(width, streams * run.decoder.hidden_size)
    return width


def _observe(
    run: Run, block: Block, way: _Way, without: KeysValues | None, stage: frozenset[str], patch: ThoughtPatch | None
) -> None:
    """Rows of a batch at one stage of sites. After the last stage the stream with context leaves the block."""
    x, batch, last = way.entering(block), way.batch, stage == run.stages[-1]
    prime_x = x.chunk(2)[0]
    if "attention" in stage:
        o = attend(run, block, x, way.group, [way.prefixes[block.index].with_context, without], batch)
        observe_attention(run, block, x, o, batch)
        prime, plain = o.chunk(2)
        kept, leave = [plain if last else o], partial(_rest, block, prime_x, prime, None)
    else:
        h = _after_attention(run, block, way, without, patch)
        prime, plain = h.chunk(2)
        if "down" in stage:
            m_prime, m, z = observe_down(run, block, x, h, batch, patch)
            kept, leave = [plain, m, z], partial(_after_mlp, block, prime_x, prime, m_prime)
        else:
            observe_residual(run, block, x, h, batch, stage)
            kept, leave = [plain if last else h], partial(_through_mlp, block, prime_x, prime)
    if last and block.index == run.last:
        return
    if last:
        _overwrite(run, block, way.streams[:1], leave(), batch)
    way.keep(stage, *kept)


def _after_attention(
    run: Run, block: Block, way: _Way, without: KeysValues | None, patch: ThoughtPatch | None
) -> Tensor:
    """Both streams after attention, from what is kept of the block: these, the attention's outputs, or nothing."""
    if way.reached and "attention" not in way.reached:
        (h,) = way.kept(block)
        return h
    x = way.entering(block)
    if way.reached:
        (o,) = way.kept(block)
    else:
        o = attend(run, block, x, way.group, [way.prefixes[block.index].with_context, without], way.batch)
    return after_attention(block, x, o, patch)


def _leave(run: Run, block: Block, way: _Way, without: KeysValues | None, patch: ThoughtPatch | None) -> None:
    """The rest of a block, from what is kept of it: of the stream without context, or of both where none was fitted."""
    x, stage = way.entering(block), way.reached
    if not stage:
        o = attend(run, block, x, way.group, [way.prefixes[block.index].with_context, without], way.batch)
        _overwrite(run, block, way.streams, _rest(block, x, o, None), way.batch)
        return
    way.reached, x = frozenset(), x.chunk(2)[1]
    kept = way.kept(block)
    if "attention" in stage:
        y = _rest(block, x, kept[0], patch)
    elif "down" in stage:
        h, m, z = kept
        shift = shifted(patch, block.index, "down", z)
        y = patched(patch, block.index, "residual", _after_mlp(block, x, h, m if shift is None else m + shift))
    else:
        y = _through_mlp(block, x, kept[0], patch)
    _overwrite(run, block, way.streams[1:], y, way.batch)


def _overwrite(run: Run, block: Block, streams: Tensor, y: Tensor, batch: Packed) -> None:
    """Puts streams [S, N, d] that leave a block in the place of those that entered it."""
    run.check_output(block, y, batch)
    streams.copy_(y)


def _rest(block: Block, x: Tensor, o: Tensor, patch: ThoughtPatch | None) -> Tensor:
    """The rest of a block after attention, with its patch: y of theory §1."""
    h = block.attention_residual(x, patched(patch, block.index, "attention", o).to(x.dtype))
    return through_mlp(block, h, x, patch)


def _through_mlp(block: Block, x: Tensor, h: Tensor, patch: ThoughtPatch | None = None) -> Tensor:
    """y of a stream h after attention, which stays as it is."""
    return through_mlp(block, h.to(x.dtype, copy=True), x, patch)


def _after_mlp(block: Block, x: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """y of a stream h after attention and the MLP's output m, in x's dtype as the model has it."""
    return block.mlp_residual(h.to(x.dtype), m.to(x.dtype), x=x)


def _without_context(
    run: Run, block: Block, befores: list[Tensor | None]
) -> tuple[list[Tensor | None], dict[int, KeysValues | None]]:
    """Of each group's P°: what its attention gives at a block, and, by the group's id, the keys and values e sees."""
    outputs: list[Tensor | None] = []
    seen: dict[int, KeysValues | None] = {}
    for group, before in zip(run.groups, befores, strict=True):
        if before is None:
            seen[id(group)] = None
            outputs.append(None)
            continue
        o, k, v = own_attention(run.decoder, block, before)
        seen[id(group)] = moved_keys(run.decoder, block, k, v, group.start - len(group.without_prefix))
        outputs.append(o)
    return outputs, seen
