"""The mean-difference steering vector, contrastive activation addition."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, spread
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_means
from thought_kernels.evaluation.rivals.steering import steered
from thought_kernels.models import describe


def mean_differences(model: Any, rows: Rows) -> dict[int, Tensor]:
    """Per block, the mean over answer positions of its output with minus without the instruction, [d], float32.

    Source: Rimsky et al., "Steering Llama 2 via contrastive activation addition", §3, and the authors' code
        (nrimsky/CAA, generate_vectors.py). Their pairs differ in the answer, these in the instruction; an answer here
        has many tokens, and the difference is read at all that predict one.
    """
    modules = {block.index: block.layer for block in describe(model).blocks}
    told, bare = (
        answer_means(model, prompts, rows.written, modules, inside=False)
        for prompts in (rows.prompts, rows.bare_prompts)
    )
    return {layer: told[layer] - bare[layer] for layer in told}


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """The vector of the best block, with the best multiplier.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: to read the activations of.
        choice: rows that are read, to choose by.

    Source: Rimsky et al., §3: added to all tokens after the user's prompt, times a multiplier. The steering-vectors
        package adds to every token unless told otherwise; both places are tried.
    """
    found = mean_differences(model, rows)
    return steered(model, choice, {layer: found[layer] for layer in spread(len(found))})
