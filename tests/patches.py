"""Random patches that fit the tiny models, and what a model's weights and hooks are compared by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import MATRIX_SITES, SITES, Fit, SitePatch

HIDDEN, ATTENTION, INTERMEDIATE = 36, 40, 52  # of tiny_gemma3: hidden size, heads times head_dim, width of the MLP
MATRICES, ALL = MATRIX_SITES, SITES


def random_patch(
    seed: int = 0,
    *,
    layers: Iterable[int] = (0, 2),
    sites: Iterable[str] = ALL,
    vectors: bool = True,
    rank: int | None = None,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    hidden: int = HIDDEN,
    attention: int = ATTENTION,
    intermediate: int = INTERMEDIATE,
    provenance: dict[str, Any] | None = None,
) -> ThoughtPatch:
    """Matrices of operator norm about 2 · size, vectors with elements of that size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    entries = {}
    for layer in layers:
        for site in sites:
            d = attention if site == "attention" else hidden
            d_in = intermediate if site == "down" else d
            vector = normal(d) * size if vectors or site == "residual" else None
            if site == "residual":
                entries[layer, site] = SitePatch(vector=vector, fit=Fit(7, 0.5))
                continue
            matrix, factors = None, None
            if rank is None:
                matrix = normal(d, d_in) * size / d_in**0.5
            else:
                factors = (normal(d, rank) * size / d**0.5, normal(d_in, rank) / d_in**0.5)
            entries[layer, site] = SitePatch(matrix, factors, vector, normal(d_in), Fit(7, 0.25, float("inf"), 0.1))
    return ThoughtPatch(entries, {"hidden_size": hidden, **(provenance or {})})


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(6, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = weights(model)
    return now.keys() == before.keys() and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((now[name].contiguous(), before[name].contiguous()) for name in now)
    )


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def fitting_patch(model: Any, sites: Iterable[str] = MATRICES, **options: Any) -> ThoughtPatch:
    """As random_patch, of a model's widths."""
    decoder = describe(model)
    block = decoder.blocks[0]
    shape = {"hidden": decoder.hidden_size, "attention": block.attention_width, "intermediate": block.mlp_width}
    return random_patch(**{"sites": sites, "vectors": False, "layers": (0, 2), **shape, **options})
