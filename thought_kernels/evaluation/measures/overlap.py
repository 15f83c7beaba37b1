"""How much two patches overlap, and so may disturb each other: from the patches, and where one of them acts.

For patches of A and B, with D = [Δ | v] at each block and site and activations ã = [a; 1] under A's patch:

    cosine       ⟨D_A, D_B⟩ / (‖D_A‖ ‖D_B‖) over all blocks and sites
    outputs      overlap of the column spaces, Σ tr(G_A G_B) / √(Σ tr G_A² Σ tr G_B²) with G = D Dᵀ
    inputs       the same of the row spaces, G = Dᵀ D
    disturbance  Σ E‖D_B ã‖² / Σ E‖D_A ã‖²: how large B's change is where A's acts
    direction    Σ E⟨D_A ã, D_B ã⟩ / √(Σ E‖D_A ã‖² Σ E‖D_B ã‖²): how far it points the same way
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch

Key = tuple[int, str]
PREDICTORS = ("cosine", "outputs", "inputs", "disturbance", "direction")


@contextmanager
def activation_moments(model: Any, patch: ThoughtPatch) -> Iterator[dict[Key, Tensor]]:
    """Collects M = Σ ã ãᵀ, ã = [a; 1], of what enters each patched site while the context is open; float64.

    a is taken before the patch acts on it, provided that the patch was applied first. At the residual site, where
    nothing is multiplied, M counts tokens: [[n]].
    """
    moments: dict[Key, Tensor] = {}
    blocks = describe(model).blocks

    def add(key: Key, a: Tensor) -> None:
        rows = a.detach().double().flatten(0, -2).cpu()
        if key[1] == "residual":
            rows = rows[:, :0]
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        moments[key] = moments.get(key, 0) + rows.T @ rows

    handles = []
    try:
        for key in patch.entries:
            block = blocks[key[0]]
            module = block.o_proj if key[1] == "attention" else block.mlp
            if key[1] == "down" and block.down_proj is not None:
                module = block.down_proj
            handles.append(module.register_forward_pre_hook(
                lambda _, args, key=key: add(key, args[0]), prepend=True
            ))  # fmt: skip
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def predictions(ours: ThoughtPatch, theirs: ThoughtPatch, moments: Mapping[Key, Tensor]) -> dict[str, float]:
    """PREDICTORS of what `theirs` does to `ours`; 0 where they share no block and site.

    Args:
        ours, theirs: patches.
        moments: Σ [a; 1][a; 1]ᵀ at the sites of `ours`, from activation_moments.
    """
    keys = [key for key in ours.entries if key in theirs.entries]
    inner = dict.fromkeys(("dot", "out", "in", "act"), 0.0)
    squares = {name: [0.0, 0.0] for name in inner}
    for patch, side in ((ours, 0), (theirs, 1)):
        for key in patch.entries:
            d = augmented(patch, key)
            squares["dot"][side] += float(d.square().sum())
            outer = float((d @ d.T).square().sum())  # ‖DᵀD‖_F too, whose side is the longer one
            squares["out"][side] += outer
            squares["in"][side] += outer
            if key in moments:
                moved = d @ moments[key]
                squares["act"][side] += float((moved * d).sum())
                if side and key in ours.entries:
                    inner["act"] += float((moved * augmented(ours, key)).sum())
    for key in keys:
        a, b = augmented(ours, key), augmented(theirs, key)
        inner["dot"] += float((a * b).sum())
        inner["out"] += float(((a @ a.T) * (b @ b.T)).sum())
        inner["in"] += float((a @ b.T).square().sum())

    def ratio(name: str) -> float:
        size = math.sqrt(squares[name][0] * squares[name][1])
        return inner[name] / size if size > 0 else 0.0

    disturbance = squares["act"][1] / squares["act"][0] if squares["act"][0] > 0 else 0.0
    return {
        "cosine": ratio("dot"), "outputs": ratio("out"), "inputs": ratio("in"), "disturbance": disturbance,
        "direction": ratio("act"),
    }  # fmt: skip


def augmented(patch: ThoughtPatch, key: Key) -> Tensor:
    """[Δ | v] of a site, [d_out, d_in + 1], or [v], [d, 1], at the residual site; float64."""
    matrix, vector = patch.matrix(*key), patch.vector(*key)
    if key[1] == "residual":
        assert vector is not None
        return vector.double().cpu()[:, None]
    entry = patch.entries[key]
    width = entry.output_width
    dense = torch.zeros(width, entry.input_width or width) if matrix is None else matrix
    column = torch.zeros(width) if vector is None else vector
    return torch.cat([dense.double().cpu(), column.double().cpu()[:, None]], dim=1)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's ρ: Pearson's correlation of ranks, ties given their mean rank; None where either is constant."""
    ranks = []
    for values in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[inverse])
    if len(x) < 3 or any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
