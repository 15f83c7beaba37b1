"""Whether a model can read a prompt: it is no longer than its context, of tokens that it has an embedding for."""

from __future__ import annotations

from typing import Any

from thought_kernels.prompts.chat import text_tokenizer
from thought_kernels.prompts.prompt import EncodedExample


def check_fits(subject: str, row: EncodedExample, tokenizer: Any, context: int | None, vocabulary: int) -> None:
    """Raises ValueError, with a sentence that `subject` opens, unless a model can read both of a row's prompts.

    Args:
        subject: "transmute: examples[3]" or the like.
        row: both prompts.
        tokenizer: for the error's sentence.
        context: the model's longest prompt, None where it names none.
        vocabulary: how many embeddings it has.
    """
    if context is not None and row.length > context:
        raise ValueError(
            f"{subject} must fit the model's context of {context} tokens, got {row.length} with the instruction; "
            "shorten it or drop it"
        )
    parts = {
        "what stands before the instruction": row.header,
        "the instruction": row.instruction,
        "what stands in the instruction's place": row.replaced,
        "the example": row.tokens[: row.answer_start],
        "the completion": row.tokens[row.answer_start :],
    }
    for part, ids in parts.items():
        unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise ValueError(
                f"{subject} must be of tokens that the model has an embedding for, ids below {vocabulary}, got "
                f"{text_tokenizer(tokenizer).convert_ids_to_tokens(unknown)!r} (id {unknown}) in {part}; take the "
                "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and train what is new"
            )
