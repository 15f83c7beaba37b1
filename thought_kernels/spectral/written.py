"""Which tokens a patch writes towards: its changes of the residual stream beside the unembedding's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.models.linear import linear_weight
from thought_kernels.models.sharded import gathered
from thought_kernels.ops.library import message
from thought_kernels.spectral.diagnosis import edits_of, weights_of


class WrittenToken(NamedTuple):
    """A token, by name or number, and how much of the patch's writing is along it, over what chance gives."""

    name: str
    gain: float


def written_tokens(
    patch: Any, model: Any, names: Sequence[str] | None = None, *, count: int = 10
) -> Mapping[tuple[int, str], list[WrittenToken]]:
    """The tokens whose unembedding lies most along what a patch adds to the residual stream, site by site.

    gain_t = d ‖u_tᵀ C‖² / (‖u_t‖² ‖C‖_F²),  C = W Δ at the attention site, Δ at down;  1 for a direction of chance

    u_t is token t's row of the unembedding without the mean of all, which moves every logit alike. Norms after the
    site, and what later blocks make of it, do not enter: read the last blocks first. The mlp site writes into no
    residual stream and is left out.

    Args:
        patch, model: as diagnose takes them.
        names: of the tokens; their numbers if not given.
        count: tokens for each site.

    Returns:
        For each (block, site), the tokens of largest gain first.

    Raises:
        TypeError, ValueError: as diagnose does; fewer names than tokens.

    Source: ours.
    """
    edits = {key: edit for key, edit in edits_of("written_tokens", patch, "patch").items() if key[1] != "mlp"}
    weights = weights_of("written_tokens", model, [("patch", edits)])
    U = gathered(linear_weight(describe(model).lm_head)).detach().to("cpu", torch.float32)
    if names is not None and len(names) < len(U):
        raise ValueError(message("written_tokens", "names", f"be {len(U)}, one for each token", len(names)))
    U = U - U.mean(0)
    squares = U.square().sum(1).clamp(min=torch.finfo(U.dtype).tiny)
    found = {}
    for key, edit in edits.items():
        change = edit.delta if key[1] == "down" else weights[key][0].to("cpu", torch.float64) @ edit.delta
        gain = _gain(U, squares, change)
        values, indices = gain.topk(min(count, len(gain)))
        found[key] = [
            WrittenToken(str(i) if names is None else names[i], value)
            for i, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]
    return found


def _gain(U: Tensor, squares: Tensor, change: Tensor) -> Tensor:
    written = (change @ change.T).to(U.dtype)
    return len(change) * ((U @ written) * U).sum(1) / squares / written.diagonal().sum()
