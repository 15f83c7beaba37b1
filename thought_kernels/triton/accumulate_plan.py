"""How a call of accumulate is cut into tiles and splits of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Plan(NamedTuple):
    """How the products of one call are cut into programs.

    Attributes:
        operand: dtype in which the matrix units read both factors.
        precision: Triton's input_precision for that dtype.
        block, block_k: tile edge, and rows per step.
        options: num_warps and num_stages.
        tiles_out, tiles_in: tiles down and across cross.
        tiles: of cross and gram together.
        batch: tiles per launch, so that their scratch is bounded.
        splits, rows_per_split: into how many parts the rows are cut, and their size.
    """

    operand: torch.dtype
    precision: str
    block: int
    block_k: int
    options: dict[str, int]
    tiles_out: int
    tiles_in: int
    tiles: int
    batch: int
    splits: int
    rows_per_split: int


def plan(
    delta: torch.dtype, activation: torch.dtype, *, rows: int, d_out: int, d_in: int, gram: bool, scaled: bool,
    processors: int,
) -> Plan:  # fmt: skip
    """Cuts one call into programs; the same arguments always give the same order of summation.

    The operand takes the activation's dtype. float16 that is scaled or subtracted goes through TF32 instead: the same
    11 significant bits, but w δ/‖a‖² leaves float16's range. float32 is multiplied by ordinary instructions, because
    tensor cores truncate as they accumulate, which sums of thousands of float32 products show.

    Args:
        delta, activation: dtypes of the inputs.
        rows, d_out, d_in: sizes, rows > 0.
        gram: whether gram is accumulated too.
        scaled: whether rows are multiplied by a factor, or δ is formed as a difference.
        processors: multiprocessors of the device.
    """
    block, block_k, options = 128, 64, {"num_warps": 8, "num_stages": 5 if scaled else 3}
    if activation == torch.bfloat16:
        operand, precision = torch.bfloat16, "ieee"
    elif activation == torch.float16 and delta == torch.float16 and not scaled:
        operand, precision = torch.float16, "ieee"
    elif activation == torch.float16:
        operand, precision, block_k = torch.float32, "tf32", 32
    else:
        operand, precision, block, block_k = torch.float32, "ieee", 64, 32
    tiles_out, tiles_in = triton.cdiv(d_out, block), triton.cdiv(d_in, block)
    tiles = tiles_out * tiles_in + (tiles_in * (tiles_in + 1) // 2 if gram else 0)
    splits, rows_per_split = split_rows(rows, tiles, processors, block_k)
    batch = min(tiles, 4 * processors)
    return Plan(operand, precision, block, block_k, options, tiles_out, tiles_in, tiles, batch, splits, rows_per_split)


def split_rows(rows: int, tiles: int, processors: int, block_k: int) -> tuple[int, int]:
    """Into how many parts to cut the rows so that ``tiles`` keep ``processors`` busy, and the rows of each part.

    Minimises waves · rows per part + 6 · tiles · parts / processors · waves of scratch traffic, in rows: writing a 128²
    partial tile and reading it back takes all processors together about as long as one processor needs for 6 rows.
    """

    def cost(parts: int) -> int:
        waves = triton.cdiv(tiles * parts, processors)
        return waves * triton.cdiv(rows, parts) + 6 * tiles * parts

    most = max(1, min(triton.cdiv(rows, 4 * block_k), 4 * processors // max(1, tiles)))
    parts = min(range(1, most + 1), key=cost)
    size = triton.cdiv(triton.cdiv(rows, parts), block_k) * block_k
    return triton.cdiv(rows, size), size
