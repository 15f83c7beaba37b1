"""The sums of one block and site: what its rows are added to, and what is solved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """What one site of one block has accumulated.

    Attributes:
        cross: C = Σ w δ aᵀ/ν ``[d_out, d_in]``, None for the residual site.
        gram: Z = Σ w a aᵀ/ν ``[d_in, d_in]``, None for the residual site.
        delta_sum: b = Σ w δ ``[d_out]``.
        activation_sum: ā = Σ w a ``[d_in]``, None for the residual site.
        moments: float64 ``[4]``: Σ w, Σ w/ν, Σ w ‖δ‖²/ν, number of rows with w ≠ 0.
    """

    cross: Tensor | None
    gram: Tensor | None
    delta_sum: Tensor
    activation_sum: Tensor | None
    moments: Tensor

    @property
    def widths(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.delta_sum), len(self.delta_sum if self.activation_sum is None else self.activation_sum)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.delta_sum.device

    def tensors(self) -> dict[str, Tensor]:
        """The sums that exist, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


def zeros(widths: tuple[int, int], *, matrix: bool, dtype: torch.dtype, device: torch.device) -> Sums:
    """Sums of no rows, of widths (d_out, d_in), with or without those of a matrix."""
    # Rows may come from inference mode; sums created there could not be added to outside it.
    with torch.inference_mode(False):
        delta_sum, activation_sum = (torch.zeros(width, dtype=dtype, device=device) for width in widths)
        moments = torch.zeros(4, dtype=torch.float64, device=device)
        if not matrix:
            return Sums(None, None, delta_sum, None, moments)
        cross, gram = (torch.zeros(width, widths[1], dtype=dtype, device=device) for width in widths)
        return Sums(cross, gram, delta_sum, activation_sum, moments)


def copied(tensors: Mapping[str, Tensor], device: torch.device | None) -> Sums:
    """Sums from copies of their tensors by name, on a device or where each lies."""
    copies = {name: tensor.detach().to(device or tensor.device, copy=True) for name, tensor in tensors.items()}
    return Sums(**{name: copies.get(name) for name in Sums._fields})  # type: ignore[arg-type]
