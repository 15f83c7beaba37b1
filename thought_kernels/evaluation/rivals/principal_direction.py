"""The principal direction of activation differences, representation engineering."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_states
from thought_kernels.evaluation.rivals.steering import ANSWER, PLACES, Steering
from thought_kernels.models import describe

# Shares of the depth that are steered together: the example of repeng, the thirds, and nearly all.
WINDOWS = ((0.4, 0.85), (0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0), (0.1, 1.0))
STRENGTHS = (0.25, 0.5, 1.0, 2.0)


def principal_directions(model: Any, rows: Rows) -> dict[int, tuple[Tensor, float]]:
    """Per block, the first principal direction of its output's differences, and the mean difference along it.

    Differences are those of with and without the instruction, at each position that predicts a token of the answer. The
    direction is the uncentred one, as of pairs in random order, whose mean is 0; its sign is that of the mean.

    Returns:
        By block index, (unit vector [d] float32, mean difference along it).

    Source: Zou et al., "Representation engineering", §3.1.1 (PCA of differences, of pairs in random order), and the
        authors' code (andyzoujm/representation-engineering, repe/rep_readers.py); the same as method "pca_center" of
        repeng, and as pca_aggregator of steering-vectors.
    """
    modules = {block.index: block.layer for block in describe(model).blocks}
    moments: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    count = 0
    both = (
        answer_states(model, prompts, rows.written, modules, inside=False)
        for prompts in (rows.prompts, rows.bare_prompts)
    )
    for told, bare in zip(*both, strict=True):
        for layer in told:
            difference = (told[layer] - bare[layer]).double()
            moments[layer] = moments.get(layer, 0) + difference.T @ difference
            sums[layer] = sums.get(layer, 0) + difference.sum(0)
        count += len(difference)
    found = {}
    for layer, moment in moments.items():
        direction = torch.linalg.eigh(moment).eigenvectors[:, -1]
        along = float(sums[layer] @ direction) / count
        found[layer] = ((direction if along >= 0 else -direction).float(), abs(along))
    return found


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """Unit directions times one coefficient, in several blocks at once.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: to read the activations of.
        choice: rows that are read, to choose blocks, place and coefficient by.

    Source: Zou et al., §3.2.1 (linear combination), and repeng's ControlModel.set_control: a unit direction of each
        block, one coefficient. It is tried in units of the median over blocks of the mean difference along it.
    """
    found = principal_directions(model, rows)
    suffix = choice.suffix
    candidates = []
    for low, high in WINDOWS:
        layers = range(round(low * len(found)), max(round(high * len(found)), round(low * len(found)) + 1))
        unit = statistics.median(found[layer][1] for layer in layers)
        for strength in STRENGTHS:
            vectors = {layer: strength * unit * found[layer][0] for layer in layers}
            for place in PLACES:
                name = f"blocks {layers[0]} to {layers[-1]}, added {place}, coefficient {strength * unit:.3g}"
                candidates.append((name, Steering(vectors, suffix if place == ANSWER else ())))
    return choose(model, choice, candidates)
