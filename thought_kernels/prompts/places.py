"""Where the parts of a chat stand in its text, whatever writes it: found by placeholders rendered in their places."""

from __future__ import annotations

from dataclasses import dataclass

from thought_kernels.prompts.chat import Writer
from thought_kernels.prompts.examples import Example


@dataclass(frozen=True)
class Places:
    """A chat's text and the places in it, in characters from its end, where prompts that end alike agree.

    Attributes:
        text: of the chat.
        turn: the start of the first user turn; None where something stands between that and the user's text.
        user: the start of the first user text.
        user_text: that text as it is written (trimmed, say).
        answer: the start of the completion; None without one.
        answer_end: its end.
    """

    text: str
    turn: int | None
    user: int
    user_text: str
    answer: int | None
    answer_end: int


def places_of(writer: Writer, chat: Example) -> Places:
    """The places of a chat's parts.

    Raises:
        ValueError: where the writer changes the user's text or the completion beyond recognition.
    """
    text = writer.text(chat)
    placeholder = _placeholder(text)
    before, user_text = _user_text(writer, chat, text, placeholder)
    opening = writer.opening()
    turn = None if opening is None or not before.endswith(opening) else len(text) - len(before) + len(opening)
    answer, answer_end = None, 0
    if chat.completion is not None:
        answer, answer_end = _completion(writer, chat, text, placeholder)
    return Places(text, turn, len(text) - len(before), user_text, answer, answer_end)


def first_user(chat: Example) -> int:
    """The index of a chat's first user message."""
    return next(index for index, turn in enumerate(chat.messages) if turn["role"] == "user")


def _placeholder(text: str) -> str:
    """A word that templates leave as it is and that `text` does not contain."""
    word = "placeholder"
    while word in text:
        word += "x"
    return word


def _user_text(writer: Writer, chat: Example, text: str, placeholder: str) -> tuple[str, str]:
    """What `text` has before the first user text, and that text as it is written."""
    first = first_user(chat)
    content = chat.messages[first]["content"]
    marked = list(chat.messages)
    marked[first] = {"role": "user", "content": placeholder}
    before, found, after = writer.text(Example(tuple(marked), chat.completion)).partition(placeholder)
    written = text[len(before) : len(text) - len(after)]
    if not found or text != before + written + after or written not in content:
        raise ValueError(
            "align: tokenizer must have a template that writes the user's text as it is, "
            f"got {text!r:.200}; where the instruction would start cannot be told"
        )
    return before, written


def _completion(writer: Writer, chat: Example, text: str, placeholder: str) -> tuple[int, int]:
    """Start and end of the completion as it is written, from the end of `text`."""
    before, found, closing = writer.text(Example(chat.messages, placeholder)).rpartition(placeholder)
    if not found or not text.startswith(before) or not text.endswith(closing):
        raise ValueError(
            "align: tokenizer must have a template that writes the completion as it is, "
            f"got {text!r:.200}; where the completion starts cannot be told"
        )
    return len(text) - len(before), len(closing)
