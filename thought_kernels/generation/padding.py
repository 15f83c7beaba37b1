"""Rows of different lengths in one batch of a model: padded on the left, so that what follows them lines up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ids = Sequence[Sequence[int]]


class Padded(NamedTuple):
    """A batch of B rows, as a model takes it.

    Attributes:
        ids: token ids, 0 where there is padding, [B, T].
        mask: 1 at tokens and 0 at padding, those before the rows included, [B, before + T].
        positions: of the tokens, each row's own whatever stands before it, [B, T]; learned ones need that.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor


def padded(rows: Ids, device: torch.device, *, before: int = 0) -> Padded:
    """Rows of token ids in one batch, on a device.

    Args:
        rows: at least one.
        device: the model's.
        before: tokens that every row has in the cache already; padding stands between them and the row.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), before + longest, dtype=torch.long)
    mask[:, :before] = 1
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, before + longest - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
    return Padded(ids.to(device), mask.to(device), positions.to(device))


def may_pad(model: Any) -> bool:
    """Whether rows of different lengths may share a batch of this model.

    Not in float64: transformers masks a padded row with float64's minimum and then takes the softmax in float32, where
    that is −inf and the row NaN, which spreads to all tokens.
    """
    return bool(model.get_input_embeddings().weight.dtype != torch.float64)
