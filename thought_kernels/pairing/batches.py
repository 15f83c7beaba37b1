"""Examples in padded batches, and the keys and values of the two prefixes that they share, P and P° (theory §1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention
from thought_kernels.prompts.prompt import EncodedExample

MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        tokens: ids of e, [B, T].
        lengths: real tokens per row, [B].
        weights: w_i, share/n_e at the tokens of e that are summed and 0 elsewhere, [B, T] (theory §5).
        examples: each row's place in the user's list of examples, or what else it is, for messages.
        shares: of one example's weight that each row has.
    """

    tokens: Tensor
    lengths: Tensor
    weights: Tensor
    examples: tuple[str, ...]
    shares: tuple[float, ...]

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding, [B, T]."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def example(self, row: int) -> str:
        """ "examples[3]" or what else a token is of, by its row among the B·T."""
        return self.examples[row // self.tokens.shape[1]]

    def packed(self) -> Packed:
        """The same without padding."""
        places = self.real.flatten().nonzero()[:, 0]
        return Packed(self, places, self.weights.flatten()[places][None])


@dataclass(frozen=True)
class Packed:
    """A batch's N real tokens one after the other: attention alone needs them in rows of one length.

    Attributes:
        batch: the padded rows.
        places: of the tokens among the B·T, [N].
        weights: as the batch's, [1, N].
    """

    batch: Batch
    places: Tensor
    weights: Tensor

    @property
    def real(self) -> Tensor:
        """As the batch's: all are, [1, N]."""
        return torch.ones_like(self.weights, dtype=torch.bool)

    @property
    def columns(self) -> Tensor:
        """Each token's place in its row, [1, N]."""
        return self.places[None] % self.batch.tokens.shape[1]

    def example(self, row: int) -> str:
        """As the batch's, by the token's place among the N."""
        return self.batch.example(int(self.places[row]))

    def pack(self, rows: Tensor) -> Tensor:
        """[S, B, T, width] to [S, N, width]."""
        flat = rows.flatten(1, 2)
        return flat if len(self.places) == flat.shape[1] else flat.index_select(1, self.places.to(flat.device))

    def unpack(self, heads: Tensor) -> Tensor:
        """[S, heads, N, D] to [S·B, heads, T, D], with zeros for padding; in memory heads come after tokens."""
        flat = heads.transpose(1, 2)
        if len(self.places) < self.batch.tokens.numel():
            packed, flat = flat, flat.new_zeros(len(flat), self.batch.tokens.numel(), *flat.shape[2:])
            flat[:, self.places.to(flat.device)] = packed
        return flat.unflatten(1, self.batch.tokens.shape).flatten(0, 1).transpose(1, 2)


@dataclass(frozen=True)
class Group:
    """The examples that share both prefixes: P = header + instruction, and P° = header + replaced.

    Where the instruction is inserted `replaced` is empty, and the header is H.
    """

    header: tuple[int, ...]
    instruction: tuple[int, ...]
    replaced: tuple[int, ...]
    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, example: EncodedExample) -> Group:
        """An example's prefixes, without a batch."""
        return cls(tuple(example.header), tuple(example.instruction), tuple(example.replaced), ())

    @property
    def with_prefix(self) -> tuple[int, ...]:
        """P."""
        return self.header + self.instruction

    @property
    def without_prefix(self) -> tuple[int, ...]:
        """P°."""
        return self.header + self.replaced

    @property
    def inserted(self) -> bool:
        """Whether P° is a beginning of P, so that its rows are the same on both sides: δ = 0."""
        return not self.replaced

    @property
    def start(self) -> int:
        """The position of e's first token, right after P; the keys of P° are rotated so that they end before it too."""
        return len(self.with_prefix)

    @property
    def weight(self) -> float:
        """Total weight of the rows: 1 for each of the user's examples, whose rows share it."""
        return math.fsum(share for batch in self.batches for share in batch.shares)

    def positions(self, length: int) -> Tensor:
        """Positions of e's tokens in [P, e], [1, T]; rotary attention without context uses them too."""
        return torch.arange(self.start, self.start + length)[None]

    def streams(self, decoder: Decoder, tokens: Tensor) -> Tensor:
        """The residual streams of e entering block 0 with and without context, [2, B, T, d], from tokens [B, T].

        They differ only where positions are learned: each stream then has those of its own prompt, which is what the
        patched model will be given.
        """
        told = decoder.embed(tokens, self.positions(tokens.shape[1]))
        if decoder.positions == "rotary":
            return told.expand(2, *told.shape)
        before = len(self.without_prefix)
        return torch.stack([told, decoder.embed(tokens, torch.arange(before, before + tokens.shape[1])[None])])


def group_examples(examples: Sequence[EncodedExample], batch_size: int, tokens: str, dtype: torch.dtype) -> list[Group]:
    """Examples by their two prefixes, each group in padded batches of similar length.

    Args:
        examples: aligned examples, every one with at least one summed token.
        batch_size: examples in a batch at most; a batch holds at most MAX_BATCH_TOKENS padded tokens besides.
        tokens: "all" sums every token of e, "answer" those of the completion.
        dtype: of the weights.
    """
    shared: dict[tuple[tuple[int, ...], ...], list[tuple[str, EncodedExample]]] = {}
    for index, example in enumerate(examples):
        place = f"examples[{index}]" if example.place is None else example.place
        prefixes = tuple(example.header), tuple(example.instruction), tuple(example.replaced)
        shared.setdefault(prefixes, []).append((place, example))
    groups = []
    for (header, instruction, replaced), members in shared.items():
        members = sorted(members, key=lambda member: len(member[1].tokens))
        groups.append(Group(header, instruction, replaced, tuple(_batches(members, batch_size, tokens, dtype))))
    return groups


def _batches(
    members: list[tuple[str, EncodedExample]], batch_size: int, tokens: str, dtype: torch.dtype
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
            weights[row, first:length] = example.share / (length - first)
        lengths = torch.tensor([len(example.tokens) for _, example in rows])
        shares = tuple(example.share for _, example in rows)
        yield Batch(ids, lengths, weights, tuple(place for place, _ in rows), shares)
        start = stop


@dataclass(frozen=True)
class PrefixRows:
    """What one block does at a prefix's own tokens, in its own forward from position 0.

    Attributes:
        stream: residual stream entering the block, [1, P, d].
        output: attention output, heads concatenated, [1, P, Hq*D].
    """

    stream: Tensor
    output: Tensor


@dataclass(frozen=True)
class BlockPrefix:
    """One block's share of the prefixes: rotated keys and values [Hkv, length, D] that end right before e.

    Attributes:
        with_context: of P.
        without_context: of P°, None if it is empty. The keys of the shorter prefix are rotated further on (theory §3).
        header: rows of H where an instruction is inserted, which are the same on both sides; None if there are none.
    """

    with_context: tuple[Tensor, Tensor]
    without_context: tuple[Tensor, Tensor] | None
    header: PrefixRows | None


def own_attention(decoder: Decoder, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of a stream over itself from position 0: (o [B, T, Hq*D], unrotated keys, values)."""
    q, k, v = block.qkv(x)
    cos, sin = decoder.rotary(block.index, torch.arange(x.shape[1])[None])
    alone = torch.full((len(x),), -1, device=q.device)
    o = shared_prefix_attention(
        block.rotate(q, cos, sin), block.rotate(k, cos, sin), v, [], alone,
        window=block.window, scale=block.scale, softcap=block.softcap,
    )  # fmt: skip
    return block.joined(o), k, v


def moved_keys(decoder: Decoder, block: Block, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Unrotated keys [1, Hkv, n, D] rotated to positions first, first+1, ..., with their values: each [Hkv, n, D]."""
    cos, sin = decoder.rotary(block.index, torch.arange(first, first + keys.shape[2])[None])
    return block.rotate(keys, cos, sin)[0], values[0]


def prefix_blocks(decoder: Decoder, group: Group, last: int) -> list[BlockPrefix]:
    """Runs P once through blocks 0..last, and P° too where it is no beginning of P: H never sees what follows it."""
    header, prefixes = len(group.header), []
    others = None if group.inserted else _own_forward(decoder, group.without_prefix, last)
    for block, x, o, k, v in _own_forward(decoder, group.with_prefix, last):
        told = moved_keys(decoder, block, k, v, group.start - len(group.with_prefix))
        bare, rows = None, None
        if others is not None:
            _, _, _, other_k, other_v = next(others)
            bare = moved_keys(decoder, block, other_k, other_v, group.start - len(group.without_prefix))
        elif header:
            bare = moved_keys(decoder, block, k[:, :, :header], v[:, :, :header], len(group.instruction))
            if group.instruction:  # Copies: views would keep the whole prefix's streams of all blocks alive.
                rows = PrefixRows(x[:, :header].clone(), o[:, :header].clone())
        prefixes.append(BlockPrefix(told, bare, rows))
    return prefixes


def _own_forward(
    decoder: Decoder, ids: tuple[int, ...], last: int
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor, Tensor]]:
    """A prefix's own forward: each block with its input x, attention output o, unrotated keys and values."""
    x = decoder.embed(torch.tensor([ids]))
    for block in decoder.blocks[: last + 1]:
        o, k, v = own_attention(decoder, block, x)
        yield block, x, o, k, v
        if block.index < last:
            h = block.attention_residual(x, o)
            x = block.mlp_output(h, block.mlp_input(h, x), x=x)
