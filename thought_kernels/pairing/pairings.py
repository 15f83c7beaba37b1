"""The three pairings: which activation without the instruction is compared with the one that saw it (theory §2).

    two_pass     its own forward over [P°, e]; the streams part from block 1 on           (TP Algorithm 1, lines 13-14)
    layerwise    the with-context residual stream, only P's keys and values exchanged     (TP §2.2, eq. 5-6)
    sequential   its own forward over [P°, e] with the patches of earlier blocks applied  (ours)

P° is what stands before e without the instruction: H where that is inserted in P = [H, I].

Each pairing streams rows (δ, a, w) of every targeted block and site into a ThoughtAccumulator. Sites of one block are
observed in stages (site.STAGES), each after the patches of the earlier ones have been applied.

Memory, beside the weights, the sums and the prefix's keys and values: one batch at one block for `two_pass` and
`layerwise`, however many examples there are; for `sequential` besides, of all batches, the streams at one boundary
between blocks and what one block needs again, which go to a file past a budget (sequential.py, spill.py).

While a site's rows are fewer than its activation is wide they are kept: copied once, without the padding. Once they are
not, and at once where the first batch has as many, `layerwise` hands δ and a to the sums at the attention site as
paired_attention wrote them: float32 δ and a in the model's dtype, both [B, T, Hq·D] in memory, nothing copied, cast or
transposed in between (tested). Passes over each of
the two between memory and processor: one write by the attention kernel; one read by the check for NaN; in accumulate
one read on a CPU, where a block of rows stays in cache for all its products and sums, and two by Triton and CUDA C++,
for the products and for sums and moments; and a last read, which forms the with-context output from both. All rows of
a batch make one call, so that the two d x d matrices are read and written once a batch. On a CPU at d = 1024, 256 rows
a call cost 1.2 times as much a row as 1024, and 512 cost 1.04 times as much: too little to pay for the memory and the
copies that gathering over batches would take. On a GPU a batch should hold 1024 rows or more.
"""

from __future__ import annotations

from collections.abc import Callable

from thought_kernels.ops.paired_attention import paired_attention
from thought_kernels.pairing.batches import Batch, BlockPrefix, Group
from thought_kernels.pairing.run import MEMORY_BUDGET, Run
from thought_kernels.pairing.sequential import sequential
from thought_kernels.pairing.streams import attend, observe_difference, observe_header, observe_streams, through_mlp
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import STAGES

__all__ = ["MEMORY_BUDGET", "PAIRINGS", "Run", "layerwise", "passes", "sequential", "two_pass"]


def passes(pairing: str, sites: frozenset[str]) -> int:
    """How often the pairing runs over each batch and block."""
    return 1 if pairing == "sequential" else sum(bool(stage & sites) for stage in STAGES)


def layerwise(run: Run) -> None:
    """Streams the layerwise pairing: one stream, the paired attention forks it at every block."""
    _by_stages(run, _layerwise_batch)


def two_pass(run: Run) -> None:
    """Streams the two_pass pairing: both streams as rows of one batch, each with its own prefix."""
    _by_stages(run, _two_pass_batch)


_Pass = Callable[[Run, Group, list[BlockPrefix], Batch, frozenset[str], ThoughtPatch | None], None]


def _by_stages(run: Run, observe_batch: _Pass) -> None:
    """Every batch once for each stage of sites, which sees the patches of the stages before it."""
    patch: ThoughtPatch | None = None
    for stage in run.stages:
        for group, prefixes, batch in run.batches():
            observe_batch(run, group, prefixes, batch, stage, patch)
        for group, prefixes in zip(run.groups, run.prefixes, strict=True):
            for block, prefix in zip(run.blocks, prefixes, strict=True):
                if block.index in run.layers and prefix.header is not None:
                    observe_header(run, block, group, prefix.header.stream, prefix.header.output, stage, patch)
        if stage != run.stages[-1]:
            solved = run.solve(run.layers, stage)
            patch = solved if patch is None else patch + solved


def _layerwise_batch(
    run: Run, group: Group, prefixes: list[BlockPrefix], batch: Batch, stage: frozenset[str], patch: ThoughtPatch | None
) -> None:
    x = run.decoder.embed(batch.tokens, group.positions(batch.tokens.shape[1]))
    for block, prefix in zip(run.blocks, prefixes, strict=True):
        q, k, v = block.qkv(x)
        cos, sin = run.decoder.rotary(block.index, group.positions(x.shape[1]))
        o, delta = paired_attention(
            block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, prefix.with_context, prefix.without_context,
            lengths=batch.lengths.to(q.device), window=block.window, scale=block.scale, softcap=block.softcap,
        )  # fmt: skip
        del q, k, v
        o, delta = block.joined(o), block.joined(delta)
        if block.index in run.layers:
            observe_difference(run, block, x, o, delta, batch, stage, patch)
        if block.index < run.last:
            h = block.attention_residual(x, delta.add_(o).to(o.dtype))
            del o, delta
            x = through_mlp(block, h, x)
            run.check_output(block, x, batch)
        run.tick()


def _two_pass_batch(
    run: Run, group: Group, prefixes: list[BlockPrefix], batch: Batch, stage: frozenset[str], patch: ThoughtPatch | None
) -> None:
    packed = batch.packed()
    x = packed.pack(group.streams(run.decoder, batch.tokens))
    for block, prefix in zip(run.blocks, prefixes, strict=True):
        o = attend(run, block, x, group, [prefix.with_context, prefix.without_context], packed)
        if block.index in run.layers:
            observe_streams(run, block, x, o, packed, stage, patch)
        if block.index < run.last:
            h = block.attention_residual(x, o.to(x.dtype))
            del o
            x = through_mlp(block, h, x)
            run.check_output(block, x, packed)
        run.tick()


PAIRINGS: dict[str, Callable[[Run], None]] = {"two_pass": two_pass, "layerwise": layerwise, "sequential": sequential}
