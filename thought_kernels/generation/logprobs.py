"""What a model thinks of given completions: log-probabilities at their tokens, and divergences between two models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from thought_kernels.generation.padding import Ids, may_pad, padded
from thought_kernels.generation.prefix import behind, run_prefix, sees_all, shared_length
from thought_kernels.models.undisturbed import undisturbed

# Logits held at once, [rows, tokens, vocabulary] in float32: 256 MiB. Gemma's vocabulary has 262,144 entries.
MAX_LOGITS = 2**26
# A beginning that rows share is run once from so many tokens on; a pass of its own reads all weights once more.
_MIN_SHARED = 16


@torch.no_grad()
def completion_logprobs(model: Any, prompts: Ids, answers: Ids, *, batch_size: int) -> Iterator[Tensor]:
    """The model's log-probabilities at each token of given answers to given prompts.

    What all prompts begin with is run once.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each with at least one.
        answers: token ids to follow them, one list per prompt.
        batch_size: prompts at a time at most; fewer where the vocabulary is large (MAX_LOGITS).

    Yields:
        Natural log-probabilities, float32 (float64 for a float64 model), [n_answer, vocabulary], in order.

    Raises:
        ValueError: if prompts and answers differ in number.
    """
    if len(prompts) != len(answers):
        raise ValueError(
            f"completion_logprobs: answers must be one per prompt, got {len(answers)} for {len(prompts)} prompts"
        )
    embedding = model.get_input_embeddings().weight
    mixed, shared = may_pad(model), _shared(model, prompts, answers)
    with undisturbed(model):
        prefix = run_prefix(model, prompts[0][:shared] if shared else [])
    start = 0
    while start < len(prompts):
        stop = _batch_stop(answers, start, batch_size, embedding.shape[0])
        if not mixed:
            stop = start + equal_lengths([[*prompts[i], *answers[i]] for i in range(start, stop)])
        rows = [[*prompts[i][shared:], *answers[i]] for i in range(start, stop)]
        counts = [len(answers[i]) for i in range(start, stop)]
        ids, mask, positions = padded(rows, embedding.device, before=shared)  # on the left: answers end together
        keep = max(counts) + 1
        with undisturbed(model):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep,
                use_cache=bool(shared), **behind(prefix, len(rows), ids.shape[1]),
            ).logits  # fmt: skip
        wide = torch.promote_types(logits.dtype, torch.float32)
        for index, count in enumerate(counts):
            # The token before the answer predicts its first; what the last one predicts is not asked.
            yield torch.log_softmax(logits[index, keep - 1 - count : keep - 1].to(wide), dim=-1)
        start = stop


def _shared(model: Any, prompts: Ids, answers: Ids) -> int:
    """How many tokens are run once for all rows."""
    shared = shared_length(prompts) if len(prompts) > 1 else 0
    longest = max((len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)), default=0)
    return shared if shared >= _MIN_SHARED and sees_all(model, longest) else 0


def equal_lengths(rows: Ids) -> int:
    """How many leading rows are as long as the first."""
    return next((index for index, row in enumerate(rows) if len(row) != len(rows[0])), len(rows))


def _batch_stop(answers: Ids, start: int, batch_size: int, vocabulary: int) -> int:
    """The end of the longest batch from `start` whose logits stay below MAX_LOGITS; one row at least."""
    stop, keep = start + 1, len(answers[start]) + 1
    while stop < min(len(answers), start + batch_size):
        keep = max(keep, len(answers[stop]) + 1)
        if (stop + 1 - start) * keep * vocabulary > MAX_LOGITS:
            break
        stop += 1
    return stop


def divergence(reference: Iterable[Tensor], other: Iterable[Tensor]) -> list[Tensor]:
    """KL(reference ‖ other) = Σ_v p_v (log p_v − log q_v) at each token, nats, one [n_answer] tensor an example.

    Args:
        reference: log p, [n_answer, vocabulary] each; −inf where p is 0.
        other: log q, the same shapes.
    """
    return [
        # A token that the reference rules out adds nothing, though 0 · inf would be NaN.
        torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
        for p, q in zip(reference, other, strict=True)
    ]
