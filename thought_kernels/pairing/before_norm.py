"""From a wanted change of a block's output back to a change of what down_proj must return (the down site's δ).

Where nothing stands between down_proj and the residual stream the two are one. Gemma 2 and 3 and OLMo 2
and 3 have an RMSNorm there, y = h + n(m), n(m) = g ⊙ m r with r = (mean m² + eps)^(-1/2), which takes the length of m
away: no m gives n(m) + δ unless that has n's own length, so the change below is exact to first order in δ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thought_kernels.models.norm import Norm

# Of the mean square of g: an element of y that g all but silences is not worth a large change of m.
_GUARD = 1e-3


def linearised(m: Tensor, r: Tensor, change: Tensor) -> Tensor:
    """The smallest δm with n(m + δm) = n(m) + δ to first order, as nearly as n allows.

    δn = g r (1 − m mᵀ r²/d) δm: along m nothing can be done, and orthogonally to it δm = (δ/g) / r. Exact to first
    order in δ, but for δ/g's part along m.
    """
    along = (m * change).sum(-1, keepdim=True) / m.square().sum(-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
    return (change - along * m) / r


def before_norm(norm: Norm | None, m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The change of the MLP's output m that changes n(m) by δ, and what an error in it costs.

    Args:
        norm: between the MLP and the residual stream, None for nothing.
        m: output of down_proj, [B, T, d].
        delta: δ, the wanted change of n(m), [B, T, d], float32 or float64.

    Returns:
        δm [B, T, d] in delta's dtype, and the factor r² of the rows' weights [B, T]: n scales errors in m by r. Where m
        is not finite the factor is 1, so that the row keeps its weight and is refused, or stays padding.
    """
    if norm is None:
        return delta, delta.new_ones(delta.shape[:-1])
    m = m.to(delta.dtype)
    g = norm.weight_offset + norm.module.weight.to(delta.dtype)
    r = torch.rsqrt(m.square().mean(-1, keepdim=True) + norm.eps)
    change = delta * (g / (g.square() + _GUARD * g.square().mean()))
    weight = r.squeeze(-1).square()
    return linearised(m, r, change), torch.where(m.isfinite().all(-1), weight, 1)
