"""Streaming rank-one accumulation in plain PyTorch: any float dtype, any device, bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # per block: enough for a product at full speed, few enough that the copies stay small


@torch.inference_mode()  # accumulators made in it can be written nowhere else by torch's own operators
def launch(
    cross: Tensor,
    delta: Tensor,
    activation: Tensor,
    *,
    pair: bool,
    weights: Tensor | None,
    normalization: str,
    coefficient: float,
    gram: Tensor | None,
    delta_sum: Tensor | None,
    activation_sum: Tensor | None,
    moments: Tensor | None,
) -> None:
    """Adds the rows' sums to the accumulators in place; arguments are as accumulate() has checked and flattened them.

    Args:
        cross: ``[d_out, d_in]`` float32 or float64; its dtype is that of all products.
        delta: ``[rows, d_out]``; with ``pair``, the with-context activation instead.
        activation: ``[rows, d_in]``.
        pair: whether δ = delta − activation, formed here, rather than delta itself.
        weights: ``[rows]`` or None for ones.
        normalization: "none", "norm" or "squared_norm".
        coefficient: multiplies everything but moments.
        gram: ``[d_in, d_in]`` or None.
        delta_sum: ``[d_out]`` or None.
        activation_sum: ``[d_in]`` or None.
        moments: ``[4]`` float64 or None: Σ w, Σ w/ν, Σ w ‖δ‖²/ν, rows with w ≠ 0.
    """
    dtype = cross.dtype
    # Row factors are float64 also beside float32 products: for a tiny row 1/‖a‖² overflows float32, a/‖a‖² does not.
    wide = torch.float32 if cross.device.type == "mps" else torch.float64
    for start in range(0, activation.shape[0], ROWS):
        a = activation[start : start + ROWS].to(dtype)
        d = delta[start : start + ROWS].to(dtype)
        if pair:
            d = d - a  # never in place: .to() returns the caller's tensor where the dtype already fits
        if weights is None:
            w = torch.ones(a.shape[0], dtype=wide, device=a.device)
        else:
            w = weights[start : start + ROWS].to(wide)
            counted = w != 0
            # Padding contributes nothing, whatever it holds; 0 · NaN would be NaN.
            a = torch.where(counted[:, None], a, 0)
            d = torch.where(counted[:, None], d, 0)
        factor = w
        if normalization != "none":
            squared_norm = a.to(wide).square().sum(1)
            divisor = squared_norm if normalization == "squared_norm" else squared_norm.sqrt()
            factor = torch.where(divisor == 0, 0, w / divisor)
        scaled = (a.to(wide) * factor[:, None]).to(dtype)
        # A zero activation adds nothing, whatever its δ holds, which still counts in delta_sum.
        left = d if normalization == "none" else torch.where(divisor[:, None] == 0, 0, d)
        cross.addmm_(left.T, scaled, alpha=coefficient)
        if gram is not None:
            product = a.T @ scaled
            gram.add_(product.triu() + product.triu(1).T, alpha=coefficient)  # symmetric to the last bit
        if delta_sum is not None:
            delta_sum.add_((w @ d.to(wide)).to(dtype), alpha=coefficient)
        if activation_sum is not None:
            activation_sum.add_((w @ a.to(wide)).to(dtype), alpha=coefficient)
        if moments is not None:
            energy = torch.where(factor == 0, 0, factor * d.to(wide).square().sum(1))
            moments.add_(torch.stack([w.sum(), factor.sum(), energy.sum(), (w != 0).sum()]))
