"""One transmutation under way: what the pairings read, and where their rows go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.estimation.rows import NonFiniteRows
from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.pairing.batches import Batch, BlockPrefix, Group, Packed, prefix_blocks
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import STAGES, is_finite

MEMORY_BUDGET = 2 << 30  # bytes
MLP_ACTIVATIONS = ("input", "residual")


class Keeper(Protocol):
    """What keeps the state of a run between two blocks."""

    def restore(self, streams: Sequence[Tensor]) -> int:
        """Fills the streams with those kept last, and says how many blocks are behind them, 0 where none were."""
        ...

    def keep(self, blocks: int, streams: Sequence[Tensor]) -> None:
        """Keeps the streams that so many blocks have been passed by."""
        ...


@dataclass
class Run:
    """One transmutation under way.

    Attributes:
        decoder: the described model.
        groups: examples by shared prefix.
        layers: targeted block indices.
        sites: targeted sites.
        accumulator: receives the rows. Each call adds all rows of a batch at one block and site, or none where one of
            them is not finite; what earlier batches and earlier blocks of this batch have added stays as it is.
            (Whether a block is finite shows when it is run. To hold a batch's rows back until its last block would
            take 2 · blocks · rows · width numbers, more than all else beside weights and sums; to subtract them again
            would leave rounding behind.)
        solve: (layers, sites) -> the patch of what has been accumulated there.
        header_weight: total weight of H's rows, which enter with δ = 0, relative to that of the examples.
        tick: called after each batch and block.
        memory_budget: bytes of hidden states that `sequential` keeps in memory, see spill.py.
        mlp_activation: of MLP_ACTIVATIONS, what a is at the mlp site.
        keeper: of `sequential`'s state between blocks; None for none.
    """

    decoder: Decoder
    groups: list[Group]
    layers: frozenset[int]
    sites: frozenset[str]
    accumulator: ThoughtAccumulator
    solve: Callable[[frozenset[int], frozenset[str]], ThoughtPatch]
    header_weight: float
    tick: Callable[[], object]
    memory_budget: int = MEMORY_BUDGET
    mlp_activation: str = "input"
    keeper: Keeper | None = None
    prefixes: list[list[BlockPrefix]] = field(init=False)

    def __post_init__(self) -> None:
        self.prefixes = [prefix_blocks(self.decoder, group, self.last) for group in self.groups]

    @property
    def last(self) -> int:
        """The last targeted block; no later one is run."""
        return max(self.layers)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.decoder.blocks[: self.last + 1]

    @property
    def stages(self) -> list[frozenset[str]]:
        """Sites in the order in which they are fitted within a block."""
        return [stage & self.sites for stage in STAGES if stage & self.sites]

    def batches(self) -> Iterator[tuple[Group, list[BlockPrefix], Batch]]:
        for group, prefixes in zip(self.groups, self.prefixes, strict=True):
            for batch in group.batches:
                yield group, prefixes, batch

    def mlp_rows(self, u: Tensor, h: Tensor) -> Tensor:
        """a at the mlp site: the MLP's input u, or the residual stream h that it is the norm of (theory §5)."""
        return h if self.mlp_activation == "residual" else u

    def update(
        self,
        block: Block,
        site: str,
        delta: Tensor,
        activation: Tensor | None,
        weights: Tensor,
        batch: Batch | Packed | None = None,
    ) -> None:
        """Adds a batch's rows, or H's where there is no batch, to the sums of one block and site.

        Raises:
            ValueError: NaN or an infinity in a row of nonzero weight, with its block and example. Nothing has
                been added then.
        """
        try:
            self.accumulator.update(block.index, site, delta, activation, weights.to(delta.device))
        except NonFiniteRows as error:
            place = "H" if batch is None else batch.example(error.row)
            raise ValueError(_not_finite(f"{error.name} of {place}", f"block {block.index}, site {site!r}")) from error

    def check_output(self, block: Block, y: Tensor, batch: Batch | Packed) -> None:
        """Raises ValueError, with block and example, unless y is finite at every token.

        Args:
            block: whose output y is.
            y: [B, T, d] of a batch; one or two streams [S, N, d] of a packed one.
            batch: whose tokens they are.
        """
        if is_finite(y):  # one reduction and no copy
            return
        real = batch.real
        bad = ~y.isfinite().all(dim=-1).cpu() & real.repeat(len(y) // len(real), 1)
        if bad.any():
            # Not the token: kernels multiply hidden values by weights of 0, so NaN may reach tokens before it.
            place = batch.example(int(bad.flatten().nonzero()[0]) % real.numel())
            raise ValueError(_not_finite(f"the block's output for {place}", f"block {block.index}"))


def _not_finite(what: str, where: str) -> str:
    return (
        f"transmute: activations must be finite, got NaN or an infinity in {what}; {where}. "
        "Look at this block's weights, or load the model in a dtype with a wider range"
    )
