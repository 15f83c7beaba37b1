"""Inputs as later turns of chats, for a patch that is to hold there too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from thought_kernels.fitting.encoding import Prompt, check_row, check_tokenizer, check_untold, check_writes
from thought_kernels.generation.completions import ending_of
from thought_kernels.generation.continuations import continue_prompts
from thought_kernels.models import in_memory
from thought_kernels.models.decoder import Decoder
from thought_kernels.ops.caller import warn
from thought_kernels.ops.checks import as_integer
from thought_kernels.patches.apply import is_patched
from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.everyday import everyday
from thought_kernels.prompts.examples import Example, Placed, read_examples
from thought_kernels.prompts.instruction import Instruction
from thought_kernels.prompts.prompt import EncodedExample

_NAME = "write_chats"


@torch.no_grad()
def write_chats(
    model: Any,
    tokenizer: Any,
    instruction: Instruction,
    examples: Iterable[Any] | str | os.PathLike[str] | None = None,
    *,
    turns: int = 3,
    separator: str = "\n",
    format: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    progress: bool = False,
) -> list[list[dict[str, str]]]:
    """Examples, and chats that ask them again in the second, third, ... turn, after what the prompted model answers.

    A patch that is fitted on first turns alone may add too much in later ones, where the earlier answers show the model
    already what it was told. Give what this returns to `transmute` in the examples' place. Example i (from 0) is asked
    again as the last turn of a chat of 1 + i mod `turns` turns, unless that is one. The turns before it are the
    examples before it, each with its completion or, where it has none, the prompted model's likeliest one.

    An example that is a chat already or has a system message, that comes after an empty answer, or whose chat would
    have more turns or not fit the model's context, is not asked again; another one's chat may begin with it.

    Args:
        model: a transformers causal language model; it is only read.
        tokenizer: its fast tokenizer.
        instruction: what the earlier answers follow, as for transmute.
        examples: as for transmute; None for everyday requests.
        turns: of the longest chats; 1 returns the examples alone.
        separator, format: as for transmute.
        batch_size: answers written at a time.
        max_new_tokens: where an answer is cut that has not ended; it stands in the chats as if it had.
        progress: show a bar on stderr for each turn.

    Returns:
        Message lists: first the examples, in order, then the chats. Each ends with an example's input, or with its
        completion if it has one.

    Raises:
        ValueError: a count below 1, no examples beside two demonstrations or more, a prompt that does not align or that
            is longer than the model's context, examples that begin with the instruction, a model without a head to
            write with, or one whose weights are not all in memory or are divided among processes.
        TypeError: a model without an adapter, or arguments of another type.

    Warns:
        UserWarning: answers that were cut, a model that a patch acts on, or no chat at all.
    """
    turns = as_integer(_NAME, "turns", turns, least=1)
    batch_size = as_integer(_NAME, "batch_size", batch_size, least=1)
    max_new_tokens = as_integer(_NAME, "max_new_tokens", max_new_tokens, least=1)
    decoder = in_memory(_NAME, model)
    chats = _Chats(decoder, tokenizer, Prompt(instruction, None, separator, format))
    chats.prompt.check(tokenizer)
    if is_patched(decoder.model):
        warn(f"{_NAME}: model should be bare, got one that a patch acts on; the answers are those of both")
    asked = _read(instruction, examples)
    told = [example for _, example in asked]
    given = list(told)
    check_tokenizer(decoder, tokenizer, _NAME)
    check_untold(instruction, separator, asked, _NAME)
    check_writes(decoder, told, _NAME)
    rows = [chats.row(example, place) for place, example in asked]
    for turn in range(1, min(turns, len(told))):
        before = range(turn - 1, len(told) - 1, turns)
        bar = f"answers, turn {turn}" if progress else None
        answers = chats.answers([(told[index], rows[index]) for index in before], batch_size, max_new_tokens, bar)
        for index, answer in zip(before, answers, strict=True):
            chat = _joined(told[index], answer, told[index + 1], turns)
            row = None if chat is None else chats.fitting(chat)
            if chat is not None and row is not None:
                told[index + 1], rows[index + 1] = chat, row
    longer = [chat for chat, example in zip(told, given, strict=True) if chat is not example]
    if turns > 1 and not longer:
        warn(
            f"{_NAME}: examples should be two or more single user texts that the model answers, got {len(given)} of "
            "which none could be asked after another; there are no chats"
        )
    return [_messages(example) for example in [*given, *longer]]


class _Chats(NamedTuple):
    """The model that answers, and how its prompts are written."""

    decoder: Decoder
    tokenizer: Any
    prompt: Prompt

    def row(self, example: Example, place: str) -> EncodedExample:
        """An example as ids; raises ValueError where it does not align, or is too long."""
        row = self.prompt.encode(self.tokenizer, example, place)
        check_row(self.decoder, self.tokenizer, row, _NAME)
        return row

    def fitting(self, example: Example) -> EncodedExample | None:
        """The same, None in place of a ValueError."""
        try:
            return self.row(example, "a chat")
        except ValueError:
            return None

    def answers(
        self, asked: Sequence[tuple[Example, EncodedExample]], batch_size: int, most: int, bar: str | None
    ) -> list[str]:
        """Each example's completion, or the likeliest that the prompted model writes."""
        ending = ending_of(self.decoder.model, self.tokenizer, asked[0][0], format=self.prompt.format)
        prompts = [[*row.with_prefix, *row.tokens] for _, row in asked if row.is_open]
        written = continue_prompts(
            self.decoder.model, prompts, ending.reached, max_new_tokens=most, batch_size=batch_size, progress=bar
        )
        cut = sum(not ending.reached(answer) for answer in written)
        if cut:
            warn(
                f"{_NAME}: {cut} of {len(written)} answers did not end within max_new_tokens={most} tokens or the "
                "model's context, and stand cut in the chats"
            )
        texts = iter(ending.texts(written))
        return [next(texts) if example.completion is None else example.completion for example, _ in asked]


def _read(instruction: Instruction, examples: Any) -> list[Placed]:
    """The examples, each with its place."""
    if examples is not None:
        return read_examples(examples, BadExamples())
    shown, requests = everyday(instruction)
    if not requests:
        raise ValueError(
            f"{_NAME}: examples must be given where the instruction is demonstrations, got None; "
            "give inputs like theirs"
        )
    return [Placed(f"everyday request {index}", example) for index, example in enumerate(shown)]


def _joined(before: Example, answer: str, following: Example, turns: int) -> Example | None:
    """The chat that goes on with another example; None for another chat, without an answer, or past so many turns."""
    asked = sum(message["role"] == "user" for message in before.messages)
    if len(following.messages) > 1 or not answer.strip() or asked >= turns:
        return None
    answered = {"role": "assistant", "content": answer}
    return Example((*before.messages, answered, *following.messages), following.completion)


def _messages(example: Example) -> list[dict[str, str]]:
    answer = [] if example.completion is None else [{"role": "assistant", "content": example.completion}]
    return [*map(dict, example.messages), *answer]
