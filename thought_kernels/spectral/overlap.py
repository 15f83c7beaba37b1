"""How far two edits W (1 + Δ) of one weight matrix get in each other's way, from the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """What two edits W (1 + A) and W (1 + B) share; A is the patch that is diagnosed, B the other one.

    Attributes:
        read: ‖A Bᵀ‖² / (‖AᵀA‖ ‖BᵀB‖), the cosine of the inputs they read, weighted by their strengths; in [0, 1].
        write: the same of what they write through W, ‖(WA)ᵀ WB‖² / (‖(WA)ᵀ WA‖ ‖(WB)ᵀ WB‖); in [0, 1].
        alignment: ⟨WA, WB⟩ / (‖WA‖ ‖WB‖), in [−1, 1]: negative where they undo each other.
        felt: ‖W B Aᵀ‖ / ‖W A Aᵀ‖: on the inputs that A reads, what B does through W over what A does.
        caused: ‖W A Bᵀ‖ / ‖W B Bᵀ‖: the same the other way round.
    """

    read: float
    write: float
    alignment: float
    felt: float
    caused: float


@dataclass(frozen=True)
class Interference:
    """What one patch, A, shares with another, B, over all blocks and sites.

    Attributes:
        sites: Overlap per (block, site) that both edit.
        felt: predicted disturbance of A by B: the root mean square of Overlap.felt over A's sites, 0 where B does
            nothing.
        caused: the same the other way round, over B's sites.
    """

    sites: Mapping[tuple[int, str], Overlap]
    felt: float
    caused: float


def overlap(A: Tensor, B: Tensor, F: Tensor) -> Overlap:
    """The Overlap of two edits, norms being Frobenius norms.

    An edit is fitted to its examples' inputs, so its strong right singular directions are those its inputs have: the
    products with Aᵀ stand for the inputs of A's examples, which the patch itself no longer has.

    Args:
        A, B: ``[d_out, d_in]`` float64, nonzero.
        F: WᵀW ``[d_out, d_out]`` float64, the frame operator of the rows of the W that the edits' outputs go through.

    Returns:
        An Overlap.
    """
    # All in [d_out, d_out], which is the smaller side at down: ‖AᵀFB‖² = tr(F AAᵀ F BBᵀ), and ‖AᵀA‖ = ‖AAᵀ‖.
    own_a, own_b, both = A @ A.T, B @ B.T, A @ B.T
    reads = _squared(both) / _positive(_norm(own_a) * _norm(own_b))
    through_a, through_b = F @ own_a, F @ own_b
    sizes = [float((one * one.T).sum()) for one in (through_a, through_b)]
    writes = float((through_a * through_b.T).sum()) / _positive(max(sizes[0], 0.0) * max(sizes[1], 0.0)) ** 0.5
    trace_a, trace_b = (float(one.diagonal().sum()) for one in (through_a, through_b))
    alignment = float((F * both).sum()) / _positive(max(trace_a, 0.0) * max(trace_b, 0.0)) ** 0.5
    return Overlap(
        read=min(reads, 1.0),
        write=max(0.0, min(writes, 1.0)),
        alignment=max(-1.0, min(alignment, 1.0)),
        felt=_root((both @ F) * both) / _positive(_root(through_a * own_a)),
        caused=_root((F @ both) * both) / _positive(_root(through_b * own_b)),
    )


def _root(terms: Tensor) -> float:
    """√Σ of a sum that is nonnegative but for rounding: ‖W C‖_F from C ⊙ FC."""
    return max(0.0, float(terms.sum())) ** 0.5


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _squared(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _positive(number: float) -> float:
    # An edit that W does not pass on (in its kernel) overlaps with nothing: 0 / inf.
    return number if number > 0 else float("inf")
