"""Low-rank patches of one site side by side, as `gathered_low_rank` reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from thought_kernels.patches.site import SitePatch


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether gradients are recorded, backward or forward."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Stack:
    """The factors of all patches that have some at a site: V [P, d_in, r], Uᵀ [P, r, d_out] and v [P, d_out].

    Args:
        entries: the patches there, low-rank ones, None for one that has none.
        device, dtype: of the arithmetic.
    """

    def __init__(self, entries: Sequence[SitePatch | None], device: torch.device, dtype: torch.dtype) -> None:
        present = [entry for entry in entries if entry is not None]
        factors = [entry.factors for entry in present if entry.factors is not None]
        rank = max(left.shape[1] for left, _ in factors)
        (d_out, _), (d_in, _) = (factor.shape for factor in factors[0])
        self.right = torch.zeros(len(factors), d_in, rank, device=device, dtype=dtype)
        self.left = torch.zeros(len(factors), rank, d_out, device=device, dtype=dtype)
        for place, (left, right) in enumerate(factors):
            self.right[place, :, : right.shape[1]] = right
            self.left[place, : left.shape[1]] = left.T
        self.vector: Tensor | None = None
        if any(entry.vector is not None for entry in present):
            self.vector = torch.zeros(len(factors), d_out, device=device, dtype=dtype)
            for place, entry in enumerate(present):
                if entry.vector is not None:
                    self.vector[place] = entry.vector
        stacked = iter(range(len(factors)))
        self._places = [-1 if entry is None else next(stacked) for entry in entries]

    def shift(self, x: Tensor, index: Tensor) -> Tensor:
        """x_b V_p U_pᵀ + v_p of each row, in torch's own products, which copy each row's factors; 0 for none."""
        own = index.clamp(min=0)
        shift = torch.bmm(torch.bmm(x, self.right[own]), self.left[own])
        if self.vector is not None:
            shift = shift + self.vector[own][:, None]
        return torch.where(index[:, None, None] >= 0, shift, 0)

    def index(self, rows: Sequence[int | None]) -> Tensor:
        """Where in the stack the patch of each row is, −1 for none."""
        return torch.tensor([-1 if row is None else self._places[row] for row in rows], device=self.right.device)
