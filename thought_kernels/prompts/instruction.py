"""An instruction in an example's chat: before the user's text, or as turns before the example's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from thought_kernels.prompts.examples import Example, check_text, read_messages
from thought_kernels.prompts.places import first_user

Instruction = str | Sequence[Mapping[str, Any]]


def prompted(name: str, instruction: Instruction, chat: Example, separator: str, user_text: str) -> Example:
    """The example's chat with the instruction in it, before `user_text` or as turns before the example's."""
    messages = list(chat.messages)
    if isinstance(instruction, str):
        if not instruction.strip():
            raise ValueError(f"align: {name} must not be empty, got {instruction!r}{_unsaid(name)}")
        check_text(instruction, f"align: {name}")
        if any(
            _stands_after_input(instruction, separator, turn["content"]) for turn in messages if turn["role"] == "user"
        ):
            raise ValueError(
                f"align: {name} must come before the example's text, got an example that has it after its input; "
                "take it out there, since only tokens after an instruction can follow it"
            )
        first = first_user(chat)
        messages[first] = {"role": "user", "content": instruction + separator + user_text}
        return Example(tuple(messages), chat.completion)
    if not isinstance(instruction, Sequence):  # a generator would be empty for the second example
        raise TypeError(f"align: {name} must be a str or a message list, got {type(instruction).__name__}")
    turns = list(read_messages(instruction, f"align: {name}"))
    if not turns:
        raise ValueError(f"align: {name} must not be empty, got no messages{_unsaid(name)}")
    if turns[-1]["role"] == "user":
        raise ValueError(
            f"align: {name} must be whole turns that end with an assistant message, got a user message at the end"
        )
    if messages[0]["role"] == "system":
        if turns[0]["role"] == "system":
            raise ValueError(f"align: {name} must leave the system message to one side, got one in the example too")
        turns.insert(0, messages.pop(0))  # templates take a system message first or not at all
    return Example((*turns, *messages), chat.completion)


def begins_with(instruction: Instruction, separator: str, chat: Example) -> bool:
    """Whether the example's chat has the instruction already: its turns, or its text at the start of a turn.

    A text is looked for in every user and system turn, and so are the system messages of an instruction of turns.
    """
    if isinstance(instruction, str):
        texts = [instruction]
    else:
        turns = read_messages(instruction, "align: instruction")
        starts = range(len(chat.messages) - len(turns) + 1) if turns else ()
        if any(chat.messages[start : start + len(turns)] == turns for start in starts):
            return True
        texts = [turn["content"] for turn in turns if turn["role"] == "system"]
    told = [turn["content"] for turn in chat.messages if turn["role"] != "assistant"]
    return any(_opens(text.strip(), separator, content.strip()) for text in texts for content in told)


def _opens(wanted: str, separator: str, content: str) -> bool:
    """Whether a turn's text is the wanted one, or goes on after it with a separator or where a word ends."""
    if not wanted or not content.startswith(wanted):
        return False
    rest = content[len(wanted) :]
    in_word = re.match(r"\w\w", wanted[-1] + rest[:1])
    return in_word is None or (separator != "" and rest.startswith(separator))


def _unsaid(name: str) -> str:
    return "; leave it out to compare with the same chat without the instruction" if name == "without" else ""


def _stands_after_input(instruction: str, separator: str, content: str) -> bool:
    """Whether the user's text has the instruction on a later line of its own, or is input + separator + instruction."""
    wanted, content = instruction.strip(), content.strip()
    if f"\n{wanted}\n" in f"{content}\n":
        return True
    before = content.removesuffix(separator + wanted)
    return separator != "" and before != content and before.strip() != ""
