"""Two models matrix by matrix, each figure beside what the same change with its entries shuffled gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from thought_kernels.spectral.comparison import Change, compare_matrices, compare_models
from thought_kernels.spectral.neighbours import shuffle_
from thought_kernels.spectral.stored import StoredMatrix

_NULLS = ("stable_rank", "top_share", "spectral_distance", "dimensionality_change", "other_saturation")


@dataclass(frozen=True)
class ChangeRow(Change):
    """A Change and its nulls.

    Attributes:
        stable_rank_null, top_share_null, spectral_distance_null, dimensionality_change_null, other_saturation_null: the
            figures of W and W plus the shuffled entries of W' − W; None where nothing changed.
    """

    stable_rank_null: float | None = None
    top_share_null: float | None = None
    spectral_distance_null: float | None = None
    dimensionality_change_null: float | None = None
    other_saturation_null: float | None = None


def inspect_changes(
    ours: Sequence[StoredMatrix],
    theirs: Sequence[StoredMatrix],
    wanted: Sequence[int],
    *,
    features: str,
    progress: bool,
) -> Iterator[ChangeRow]:
    """compare_models for some of a model's matrices, with nulls.

    Args:
        ours, theirs: matrices of the two models.
        wanted: places in ``ours``.
        features, progress: as compare_models takes them.

    Yields:
        A ChangeRow for each that is wanted.

    Raises:
        ValueError: as compare_models does.
    """
    others = {matrix.name: matrix for matrix in theirs}
    chosen = [ours[place] for place in wanted]
    if not chosen:
        return
    common = [matrix for matrix in ours if matrix.name in others][:1]
    # Never reached, but without it models would be refused of which only matrices without counterpart are left.
    found = compare_models([*chosen, *common], list(theirs), features=features, progress=progress)
    for matrix, change in zip(chosen, islice(found, len(chosen)), strict=True):
        nulls: dict[str, Any] = {}
        if change.change:
            nulls = shuffled_change(matrix.read(), others[matrix.name].read(), features=features)
        yield ChangeRow(**asdict(change), **nulls)


def shuffled_change(W: Tensor, other: Tensor, *, features: str = "longer") -> dict[str, float]:
    """What a change of the same entries gives that knows nothing of W: ChangeRow's nulls.

    Args:
        W, other: ``[rows, columns]``, as compare_matrices takes them, not the same.
        features: as compare_matrices takes it.

    Source: ours.
    """
    wide = torch.float64 if torch.float64 in (W.dtype, other.dtype) else torch.float32
    step = shuffle_(other.to(wide) - W.to(wide)).add_(W)
    figures = compare_matrices(W, step, features=features)
    return {f"{name}_null": figures[name] for name in _NULLS}
