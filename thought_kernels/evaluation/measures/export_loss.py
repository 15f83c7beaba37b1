"""What an export of a patch loses, on real inputs: the patch's own answers, read by what was exported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from thought_kernels.evaluation.measures.metrics import Effect, effect
from thought_kernels.evaluation.measures.trial import bare_prompts
from thought_kernels.generation.completions import Ending, complete
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.patches.patch import ThoughtPatch


def export_loss(
    model: Any,
    tokenizer: Any,
    patch: ThoughtPatch,
    exported: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> Effect:
    """Compares the patched model with one that has only what an export carries, over the patched model's answers.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        patch: the whole patch, whose provenance says how prompts are written; the chat template where it does not.
        exported: what is left of it as a ThoughtPatch, or the exported model itself.
        questions: user texts, at least one.
        max_new_tokens: where an answer is cut.
        batch_size: questions at a time.

    Returns:
        An Effect with the patch in the prompted model's place: ``patched`` is Σ KL(patch ‖ export), ``bare`` is
        Σ KL(patch ‖ unpatched), and ``recovered`` the share of the patch's effect that the export keeps.

    Raises:
        ValueError: no questions, prompts that cannot be written, or a patch that does not fit the model.
    """
    prompts, ending = loss_prompts(model, tokenizer, patch, questions)
    with patch.applied(model):
        answers = complete(model, prompts, ending=ending, max_new_tokens=max_new_tokens, batch_size=batch_size)
        wanted = list(completion_logprobs(model, prompts, answers, batch_size=batch_size))
    as_patch = isinstance(exported, ThoughtPatch)
    with exported.applied(model) if as_patch else nullcontext():
        reader = model if as_patch else exported
        lost = divergence(wanted, completion_logprobs(reader, prompts, answers, batch_size=batch_size))
    bare = divergence(wanted, completion_logprobs(model, prompts, answers, batch_size=batch_size))
    return effect(lost, bare)


def loss_prompts(
    model: Any, tokenizer: Any, patch: ThoughtPatch, questions: Sequence[str]
) -> tuple[list[list[int]], Ending]:
    """The questions as the patched model is asked them, and what ends an answer; nothing is run.

    Args and errors are export_loss's.
    """
    if not questions:
        raise ValueError("export_loss: questions must be at least one, got none")
    made = patch.provenance
    return bare_prompts(
        model, tokenizer, questions, format=made.get("format"), without=made.get("without"),
        separator=made.get("separator", "\n"),
    )  # fmt: skip
