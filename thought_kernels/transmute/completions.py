"""Completions written by the prompted model itself, for examples that come without one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.transmute.chat import text_tokenizer, writer_of
from thought_kernels.transmute.generation import continue_greedily
from thought_kernels.transmute.prompt import EncodedExample, Example


@dataclass(frozen=True)
class Ending:
    """What ends a completion; what does is its last token.

    Attributes:
        ids: any one of these.
        text: or the first token with which the decoded completion holds this text; "" for none.
        tokenizer: decodes.
    """

    ids: tuple[int, ...]
    text: str
    tokenizer: Any

    def reached(self, answer: Sequence[int]) -> bool:
        """Whether a completion, whose tokens before the last did not end it, ends with its last token."""
        return len(answer) > 0 and (answer[-1] in self.ids or bool(self.text and self.text in self._decode(answer)))

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Completions as text up to what ends them, without special tokens and outer whitespace."""
        decoded = self.tokenizer.batch_decode([list(ids) for ids in answers], skip_special_tokens=True)
        return [(text.partition(self.text)[0] if self.text else text).strip() for text in decoded]

    def _decode(self, answer: Sequence[int]) -> str:
        return self.tokenizer.decode(list(answer), clean_up_tokenization_spaces=False)


def ending_of(model: Any, tokenizer: Any, example: Example, *, format: str | None = None) -> Ending:
    """What ends a completion in this tokenizer's chats, or in a format, and what the model's generation config names.

    Args:
        model: a transformers causal language model.
        tokenizer: its fast tokenizer.
        example: a chat that the template takes.
        format: of a turn; None for the chat template.
    """
    ids, text = writer_of(tokenizer, format, "").closing(example)
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    every = {*ids, *([named] if isinstance(named, int) else named or [])}
    return Ending(tuple(sorted(every)), text, text_tokenizer(tokenizer))


def complete(
    model: Any, prompts: Sequence[Sequence[int]], *, ending: Ending, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy continuations of id lists, in order.

    Each ends with what ends it, or has max_new_tokens tokens. What the model's own generation config says of sampling,
    beams or penalties does not apply. What all prompts begin with is run once.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each with at least one.
        ending: of a continuation.
        max_new_tokens: where a continuation is cut that has not ended.
        batch_size: prompts at a time.
    """
    return continue_greedily(model, prompts, ending.reached, max_new_tokens=max_new_tokens, batch_size=batch_size)


def with_completions(
    model: Any, encoded: Sequence[EncodedExample], *, ending: Ending, max_new_tokens: int, batch_size: int
) -> list[EncodedExample]:
    """The same examples, those without a completion completed by the prompted model.

    Completions that reach max_new_tokens stay cut there, with a warning.
    """
    open_ended = [index for index, example in enumerate(encoded) if example.answer_start == len(example.tokens)]
    prompts = [[*encoded[i].with_prefix, *encoded[i].tokens] for i in open_ended]
    answers = complete(model, prompts, ending=ending, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completed = list(encoded)
    for index, answer in zip(open_ended, answers, strict=True):
        completed[index] = encoded[index]._replace(tokens=[*encoded[index].tokens, *answer])
    cut = sum(not ending.reached(answer) for answer in answers)
    if cut:
        warnings.warn(
            f"transmute: {cut} of {len(prompts)} completions did not end within max_new_tokens={max_new_tokens} tokens "
            "and were cut there",
            stacklevel=3,
        )
    return completed
