"""What modules take in or give out at the positions that predict an answer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.rows import BATCH_SIZE
from thought_kernels.generation.logprobs import equal_lengths
from thought_kernels.generation.padding import Padded, may_pad, padded
from thought_kernels.models.undisturbed import undisturbed

Ids = Sequence[Sequence[int]]


@torch.no_grad()
def answer_states(
    model: Any, prompts: Ids, answers: Ids, modules: Mapping[int, Any], *, inside: bool
) -> Iterator[dict[int, Tensor]]:
    """The inputs or outputs of modules at the prompt's last token and at all of the answer's but its last.

    Args:
        model: a transformers causal language model.
        prompts, answers: token ids, one list of each a row.
        modules: by block index.
        inside: what each takes in, its first argument; else what it gives out.

    Yields:
        For each row, by block index, [n_answer, width].
    """
    device = model.get_input_embeddings().weight.device
    every = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    start = 0
    while start < len(every):
        rows = every[start : start + BATCH_SIZE]
        if not may_pad(model):
            rows = rows[: equal_lengths(rows)]
        seen = _watched(model, padded(rows, device), modules, inside)  # on the left: answers end together
        for index in range(len(rows)):
            count = len(answers[start + index])
            yield {layer: states[index, -1 - count : -1] for layer, states in seen.items()}
        start += len(rows)


def _watched(model: Any, batch: Padded, modules: Mapping[int, Any], inside: bool) -> dict[int, Tensor]:
    """What each module takes in or gives out in a forward."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any = None) -> None:
            seen[layer] = args[0] if inside else (output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [
        module.register_forward_pre_hook(keep(layer)) if inside else module.register_forward_hook(keep(layer))
        for layer, module in modules.items()
    ]
    try:
        with undisturbed(model):
            model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, logits_to_keep=1,
                use_cache=False,
            )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return seen


def answer_means(
    model: Any, prompts: Ids, answers: Ids, modules: Mapping[int, Any], *, inside: bool, tokens: int | None = None
) -> dict[int, Tensor]:
    """The mean of answer_states over rows and tokens, or over the first tokens of each row, [width] float32 each."""
    totals: dict[int, Tensor] = {}
    count = 0
    for states in answer_states(model, prompts, answers, modules, inside=inside):
        for layer, rows in states.items():
            totals[layer] = totals.get(layer, 0) + rows[:tokens].double().sum(0)
        count += len(next(iter(states.values()))[:tokens])
    return {layer: (total / count).float() for layer, total in totals.items()}
