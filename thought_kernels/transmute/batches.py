"""Examples in padded batches, and the keys and values of the prefix they share, with and without the instruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention
from thought_kernels.transmute.prompt import EncodedExample

MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        tokens: ids of e, [B, T].
        lengths: real tokens per row, [B].
        weights: w_i, 1/n_e at the tokens of e that are summed and 0 elsewhere, [B, T] (theory §5).
        examples: each row's place in the user's list of examples, for messages.
    """

    tokens: Tensor
    lengths: Tensor
    weights: Tensor
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """The examples that share one header and one instruction."""

    header: tuple[int, ...]
    instruction: tuple[int, ...]
    batches: tuple[Batch, ...]

    @property
    def weight(self) -> int:
        """Total weight of the examples, which is their number."""
        return sum(len(batch.examples) for batch in self.batches)

    def positions(self, length: int) -> Tensor:
        """Positions of e's tokens in the full prompt [H, I, e], [1, T]. The stream without context uses them too."""
        start = len(self.header) + len(self.instruction)
        return torch.arange(start, start + length)[None]


def group_examples(examples: Sequence[EncodedExample], batch_size: int, tokens: str, dtype: torch.dtype) -> list[Group]:
    """Examples by header and instruction, each group in padded batches of similar length.

    Args:
        examples: aligned examples, every one with at least one summed token.
        batch_size: examples in a batch at most; a batch holds at most MAX_BATCH_TOKENS padded tokens besides.
        tokens: "all" sums every token of e, "answer" those of the completion.
        dtype: of the weights.
    """
    shared: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, EncodedExample]]] = {}
    for index, example in enumerate(examples):
        number = index if example.number is None else example.number
        shared.setdefault((tuple(example.header), tuple(example.instruction)), []).append((number, example))
    groups = []
    for (header, instruction), members in shared.items():
        members = sorted(members, key=lambda member: len(member[1].tokens))
        groups.append(Group(header, instruction, tuple(_batches(members, batch_size, tokens, dtype))))
    return groups


def _batches(
    members: list[tuple[int, EncodedExample]], batch_size: int, tokens: str, dtype: torch.dtype
) -> Iterator[Batch]:
    start = 0
    while start < len(members):
        stop = start + 1
        while (
            stop < len(members)
            and stop - start < batch_size
            and len(members[stop][1].tokens) * (stop + 1 - start) <= MAX_BATCH_TOKENS
        ):
            stop += 1
        rows = members[start:stop]
        longest = len(rows[-1][1].tokens)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        weights = torch.zeros(len(rows), longest, dtype=dtype)
        for row, (_, example) in enumerate(rows):
            length = len(example.tokens)
            first = example.answer_start if tokens == "answer" else 0
            ids[row, :length] = torch.as_tensor(example.tokens)
            weights[row, first:length] = 1 / (length - first)
        lengths = torch.tensor([len(example.tokens) for _, example in rows])
        yield Batch(ids, lengths, weights, tuple(number for number, _ in rows))
        start = stop


@dataclass(frozen=True)
class BlockPrefix:
    """One block's share of a prefix: rotated keys and values [Hkv, length, D], and the header's attention output.

    Attributes:
        with_context: of [H, I].
        without_context: of H, its keys rotated |I| positions further on (theory §3); None if H is empty.
        header_stream: residual stream entering the block at H's tokens, [1, |H|, d].
        header_output: attention output at H's tokens, heads concatenated, [1, |H|, Hq*D].
    """

    with_context: tuple[Tensor, Tensor]
    without_context: tuple[Tensor, Tensor] | None
    header_stream: Tensor
    header_output: Tensor


def heads_last(o: Tensor) -> Tensor:
    """[B, Hq, T, D] to [B, T, Hq*D], the layout of o_proj's input."""
    return o.transpose(1, 2).flatten(2)


def own_attention(decoder: Decoder, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of a stream over itself from position 0: (o [B, T, Hq*D], unrotated keys, values)."""
    q, k, v = block.qkv(x)
    cos, sin = decoder.rotary(block.index, torch.arange(x.shape[1])[None])
    alone = torch.full((len(x),), -1, device=q.device)
    o = shared_prefix_attention(
        block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, [], alone,
        window=block.window, scale=block.scale, softcap=block.softcap,
    )  # fmt: skip
    return heads_last(o), k, v


def moved_keys(decoder: Decoder, block: Block, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Unrotated keys [1, Hkv, n, D] rotated to positions first, first+1, ..., with their values: each [Hkv, n, D]."""
    cos, sin = decoder.rotary(block.index, torch.arange(first, first + keys.shape[2])[None])
    return block.rotate(keys, cos, sin)[0], values[0]


def prefix_blocks(decoder: Decoder, group: Group, last: int) -> list[BlockPrefix]:
    """Runs [H, I] once through blocks 0..last; H's own stream never sees I, so it serves both sides."""
    header = len(group.header)
    ids = torch.tensor([[*group.header, *group.instruction]])
    x = decoder.embed(ids)
    prefixes = []
    for block in decoder.blocks[: last + 1]:
        o, k, v = own_attention(decoder, block, x)
        without = None
        if header:
            without = moved_keys(decoder, block, k[:, :, :header], v[:, :, :header], len(group.instruction))
        # Copies: views would keep the whole prefix's streams of all blocks alive.
        kept = x[:, :header].clone(), o[:, :header].clone()
        prefixes.append(BlockPrefix(moved_keys(decoder, block, k, v, 0), without, *kept))
        if block.index < last:
            h = block.attention_residual(x, o)
            x = block.mlp_output(h, block.mlp_input(h, x), x=x)
    return prefixes
