"""Completions written by the prompted model itself, for examples that come without one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.generation.continuations import continue_prompts, rooms_behind
from thought_kernels.generation.processes import ALONE, Processes
from thought_kernels.ops.caller import warn
from thought_kernels.prompts.chat import text_tokenizer, writer_of
from thought_kernels.prompts.prompt import EncodedExample, Example


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
        max_new_tokens: where a continuation is cut that has not ended, if the model's context goes so far.
        batch_size: prompts at a time.

    Raises:
        ValueError: if a prompt leaves no room for a token in the model's context.
    """
    return continue_prompts(model, prompts, ending.reached, max_new_tokens=max_new_tokens, batch_size=batch_size)


def within_context(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[list[int]]) -> list[list[int]]:
    """Answers cut where they pass the model's context behind other prompts than those that they were written to.

    Raises:
        ValueError: if a prompt leaves no room for a token.
    """
    return [answer[:room] for answer, room in zip(answers, rooms_behind(model, prompts), strict=True)]


def with_completions(
    model: Any, encoded: Sequence[EncodedExample], *, ending: Ending, max_new_tokens: int, batch_size: int,
    numbers: Sequence[Sequence[int]], seed: int = 0, progress: bool = False, processes: Processes = ALONE,
) -> list[EncodedExample]:  # fmt: skip
    """The same examples, those without a completion once for each that the prompted model writes.

    An example's completions share its weight. Completions that reach max_new_tokens, or the end of the model's context
    behind either prefix, stay cut there, with a warning.

    Args:
        model: a transformers causal language model.
        encoded: aligned examples.
        ending: of a completion.
        max_new_tokens: longest completion.
        batch_size: prompts at a time.
        numbers: of each example's completions: 0 is the likeliest token by token, any other a draw from the model's own
            distribution.
        seed: of the draws, with the example's place and the completion's number.
        progress: show a bar.
        processes: which share the writing.
    """
    wanted = [(index, number) for index, one in enumerate(encoded) if one.is_open for number in numbers[index]]
    prompts = [[*encoded[index].with_prefix, *encoded[index].tokens] for index, _ in wanted]
    seeds = [random.Random(f"{seed} {place} {number}").getrandbits(63) if number else None for place, number in wanted]
    answers = processes.gathered(continue_prompts(
        model, processes.share(prompts), ending.reached, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seeds=processes.share(seeds), progress="completions" if progress else None,
    ))  # fmt: skip
    others = [[*encoded[index].without_prefix, *encoded[index].tokens] for index, _ in wanted]
    answers = within_context(model, others, answers)
    written: dict[int, list[EncodedExample]] = {}
    for (index, _), answer in zip(wanted, answers, strict=True):
        asked = encoded[index]
        row = asked._replace(tokens=[*asked.tokens, *answer], share=asked.share / len(numbers[index]))
        written.setdefault(index, []).append(row)
    cut = sum(not ending.reached(answer) for answer in answers)
    if cut:
        warn(
            f"transmute: {cut} of {len(answers)} completions did not end within max_new_tokens={max_new_tokens} tokens "
            "or the model's context, and were cut there"
        )
    return [row for index, example in enumerate(encoded) for row in written.get(index, [example])]
