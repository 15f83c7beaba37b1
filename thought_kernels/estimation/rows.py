"""Checks of the rows given to an accumulator, and the sums of the residual site, which has no matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thought_kernels.estimation.sums import Sums
from thought_kernels.patches.site import SITES, is_finite

_ROWS_PER_CHUNK = 4096


class NonFiniteRows(ValueError):
    """NaN or an infinity in a row of nonzero weight.

    Attributes:
        name: "delta" or "activation".
        row: the first such row, its leading dimensions flattened.
    """

    def __init__(self, message: str, name: str, row: int) -> None:
        super().__init__(message)
        self.name = name
        self.row = row


def checked_place(layer: int, site: str) -> str:
    """Names a block and site in words for messages, once both are valid."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"update: layer must be a 0-based block index, got {layer!r}")
    if site not in SITES:
        raise ValueError(f"update: site must be one of {', '.join(SITES)}, got {site!r}")
    return f"block {layer}, site {site!r}"


def check_shapes(rows: Mapping[str, object], delta: Tensor, where: str, *, one_width: bool) -> None:
    """Raises unless all are floating-point tensors of delta's leading shape, and of its width where asked for."""
    for name, tensor in rows.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"update: {name} must be a floating-point tensor, got {kind}; {where}")
        widths_differ = tensor.shape[-1:] != delta.shape[-1:] and one_width
        if tensor.ndim == 0 or tensor.shape[:-1] != delta.shape[:-1] or widths_differ:
            raise ValueError(
                f"update: {name} must have shape [..., d] equal to delta's, "
                f"got {list(tensor.shape)} and {list(delta.shape)}; {where}"
            )


def check_weights(weights: Tensor | None, shape: torch.Size, where: str) -> None:
    """Raises unless the weights are None, or finite floats, not negative, of the rows' leading shape."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"update: weights must be a floating-point tensor, got {kind}; {where}")
    if weights.shape != shape:
        raise ValueError(
            f"update: weights must have the leading shape {list(shape)} of delta, got {list(weights.shape)}; {where}"
        )
    if weights.numel():
        low, high = (float(extreme) for extreme in torch.aminmax(weights))
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"update: weights must be finite and not negative, got {low} to {high}; {where}")


def check_rows(name: str, rows: Tensor, weights: Tensor | None, where: str) -> None:
    """Raises NonFiniteRows if a row of nonzero weight is not finite; reads the data once, copies none of it."""
    if is_finite(rows):
        return
    bad = ~torch.isfinite(rows).all(dim=-1)
    counted = (bad if weights is None else bad & (weights != 0)).reshape(-1)
    if counted.any():
        first = int(counted.nonzero()[0])
        message = (
            f"update: {name} must be finite in rows of nonzero weight, got NaN or an infinity in {int(counted.sum())} "
            f"of {len(counted)} rows, first in row {first}; {where}"
        )
        raise NonFiniteRows(message, name, first)


def add_vectors(sums: Sums, delta: Tensor, weights: Tensor | None) -> None:
    """delta_sum += Σ w δ and the moments with ν = 1, in chunks so that no float copy of all rows is made."""
    total, moments = torch.zeros_like(sums.delta_sum), torch.zeros_like(sums.moments)
    delta = delta.reshape(-1, delta.shape[-1])
    weights = total.new_ones(len(delta)) if weights is None else weights.reshape(-1).to(total.dtype)
    for start in range(0, len(delta), _ROWS_PER_CHUNK):
        w = weights[start : start + _ROWS_PER_CHUNK]
        rows = delta[start : start + _ROWS_PER_CHUNK].to(total.dtype)
        rows = torch.where(w[:, None] != 0, rows, 0)  # padding may hold NaN, and 0 · NaN is NaN
        total += w @ rows
        energy = (rows.square().sum(dim=-1, dtype=torch.float64) * w).sum()
        weight = w.sum(dtype=torch.float64)
        moments += torch.stack([weight, weight, energy, (w != 0).sum().double()])
    sums.delta_sum.add_(total)
    sums.moments.add_(moments)
