"""A chat as text and token ids: by the tokenizer's chat template, or by the user's format for one turn."""

from __future__ import annotations

import string
from typing import Any, NamedTuple, Protocol

from thought_kernels.prompts.cuts import Tokens
from thought_kernels.prompts.examples import Example, check_text


class Writer(Protocol):
    """What writes a chat."""

    def text(self, chat: Example) -> str:
        """The chat as text, up to where the model would write, or to the end of a given completion."""
        ...

    def tokens(self, text: str, *, closed: bool) -> Tokens:
        """The text's tokens; `closed` if it ends with a completion."""
        ...

    def opening(self) -> str | None:
        """What opens a user's turn, None if that cannot be told."""
        ...

    def end(self, tokens: Tokens, character: int) -> int:
        """One past the last token of what closes a completion that ends at a character."""
        ...

    def closing(self, chat: Example) -> tuple[list[int], str]:
        """What closes a completion: a special token's id if one does, and the text if not."""
        ...


def writer_of(tokenizer: Any, format: str | None, separator: str) -> Writer:
    """The format's writer if there is one, else the chat template's.

    Args:
        tokenizer: a fast transformers tokenizer, or the processor that holds one.
        format: "{prompt} -> {completion}\\n" or the like; None for the chat template.
        separator: between a system message and the first turn; templates have their own.

    Raises:
        ValueError: neither format nor chat template, a format without its two fields, or a tokenizer without offsets.
        TypeError: a format that is no str.
    """
    tokenizer = text_tokenizer(tokenizer)
    if format is not None:
        return FormatWriter(tokenizer, format, separator)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"align: tokenizer must have a chat template, got {type(tokenizer).__name__} without one; "
            r"give the format of a turn, such as format='{prompt} -> {completion}\n' (--format on the command line)"
        )
    return TemplateWriter(tokenizer)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one that a multimodal model's processor holds; raises as align does."""
    if not hasattr(tokenizer, "is_fast") and hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer  # the processor of a multimodal model
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"align: tokenizer must be a fast one, which tells each token's characters, got {type(tokenizer).__name__};"
            " load it with AutoTokenizer and the tokenizers package"
        )
    return tokenizer


class TemplateWriter:
    """Writes chats by the tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, chat: Example) -> str:
        """The chat as the template writes it; raises ValueError where the template refuses."""
        from jinja2.exceptions import TemplateError  # transformers needs it for any chat template

        turns = list(chat.messages)
        if chat.completion is not None:
            turns.append({"role": "assistant", "content": chat.completion})
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=chat.completion is None
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(
                f"align: example must be a chat that the tokenizer's template takes, got the turns {roles}; {error}"
            ) from error

    def tokens(self, text: str, *, closed: bool) -> Tokens:
        """The text's tokens. The template has written every special token it wants, BOS included."""
        return _tokens(self._tokenizer, text)

    def opening(self) -> str | None:
        """What lies between an answer's closing and the next user text, read off a dialogue."""
        asked, answered, again = "placeholdera", "placeholderb", "placeholderc"
        turn = {"role": "user", "content": asked}
        closed = self.text(Example((turn,), answered)).partition(answered)[2]
        dialogue = (turn, {"role": "assistant", "content": answered}, {"role": "user", "content": again})
        between = self.text(Example(dialogue, None)).partition(answered)[2].partition(again)[0]
        opening = between.removeprefix(closed)
        return opening if opening != between else None

    def end(self, tokens: Tokens, character: int) -> int:
        """One past the first special token from the character on; in a template without one, all tokens."""
        for index in range(tokens.ending_by(character), len(tokens.ids)):
            if self._is_special(tokens.ids[index]):
                return index + 1
        return len(tokens.ids)

    def closing(self, chat: Example) -> tuple[list[int], str]:
        """The first special token after a completion; without one, all that the template writes there."""
        word = "placeholder"
        text = self.text(Example(chat.messages, word))
        character = text.rindex(word) + len(word)
        tokens = self.tokens(text, closed=True)
        last = tokens.ids[self.end(tokens, character) - 1]
        if self._is_special(last):
            return [last], ""
        # Most first tokens of an answer begin with a space, so spaces alone cannot end it.
        return [], text[character:] if text[character:].strip(" ") else ""

    def _is_special(self, token: int) -> bool:
        visible = self._tokenizer.decode([token], skip_special_tokens=False)
        return bool(visible) and not self._tokenizer.decode([token], skip_special_tokens=True)


class Turn(NamedTuple):
    """What a format writes before, between and after a turn's prompt and completion."""

    before: str
    between: str
    after: str


class FormatWriter:
    """Writes chats in a format for one turn, for models that know no chat.

    A system message is written before the first turn, with the separator after it. The tokenizer's own special tokens
    come first. A completion is closed by the format's text after it, or by EOS where there is none.
    """

    def __init__(self, tokenizer: Any, format: str, separator: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator
        self._turn = read_format(format)
        self._first = _leading_special_ids(tokenizer)

    def text(self, chat: Example) -> str:
        """The turns one after another; an open one ends before its completion and the spaces there.

        Tokens such as " answer" hold the space, so a prompt that ended with it would split them.
        """
        before, between, after = self._turn
        written, asked = "", False
        for turn in chat.messages:
            if asked and turn["role"] == "user":
                raise ValueError("align: example must have an answer to each user turn but the last, got two in a row")
            if turn["role"] == "assistant" and not asked:
                raise ValueError("align: example must have a user turn before each answer, got an answer without one")
            if turn["role"] == "system":
                written += turn["content"] + self._separator
            else:
                asked = turn["role"] == "user"
                written += before + turn["content"] + between if asked else turn["content"] + after
        return written.rstrip(" ") if chat.completion is None else written + chat.completion + after

    def tokens(self, text: str, *, closed: bool) -> Tokens:
        """The text's tokens behind the special ones that the tokenizer puts first, and EOS if nothing else closes."""
        found = _tokens(self._tokenizer, text)
        ids, offsets = [*self._first, *found.ids], [*[(0, 0)] * len(self._first), *found.offsets]
        eos = self._tokenizer.eos_token_id
        if closed and not self._turn.after and eos is not None:
            ids.append(eos)
            offsets.append((len(text), len(text) + 1))
        return Tokens(text, ids, offsets)

    def opening(self) -> str:
        """The format's text before the prompt."""
        return self._turn.before

    def end(self, tokens: Tokens, character: int) -> int:
        """All tokens: the format's text after a completion is the last of a prompt."""
        return len(tokens.ids)

    def closing(self, chat: Example) -> tuple[list[int], str]:
        """The format's text after a completion, or EOS."""
        eos = self._tokenizer.eos_token_id
        return ([] if self._turn.after or eos is None else [eos], self._turn.after)


def read_format(format: str) -> Turn:
    """What a format writes around a prompt and its completion; raises as writer_of does."""
    if not isinstance(format, str):
        raise TypeError(f"align: format must be a str, got {type(format).__name__}")
    check_text(format, "align: format")
    needed = r"as in '{prompt} -> {completion}\n'"
    try:
        parts = list(string.Formatter().parse(format))
    except ValueError as error:
        raise ValueError(f"align: format must be a format string, {needed}, got {format!r}; {error}") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    for name in ("prompt", "completion"):
        if name not in fields:
            raise ValueError(f"align: format must hold {{{name}}}, {needed}, got {format!r}")
    plain = all(not spec and not conversion for _, _, spec, conversion in parts)
    if sorted(fields) != ["completion", "prompt"] or not plain:
        shown = ", ".join(f"{{{name}}}" for name in fields)
        raise ValueError(
            f"align: format must hold {{prompt}} and {{completion}} once each and no other field, {needed}, got {shown}"
            f" in {format!r}; a brace of the text itself is written twice"
        )
    if fields[0] == "completion":
        raise ValueError(f"align: format must have {{prompt}} before {{completion}}, {needed}, got {format!r}")
    texts = [""]
    for text, field, _, _ in parts:
        texts[-1] += text
        if field is not None:
            texts.append("")
    turn = Turn(*texts)
    if turn.after and not turn.after.strip(" "):
        raise ValueError(
            f"align: format must have nothing, or more than spaces, after {{completion}}, {needed}, got {format!r}; "
            "most first tokens of an answer begin with a space, and would end it"
        )
    return turn


def _leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: BOS, where it has one and writes it."""
    full, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:start])


def _tokens(tokenizer: Any, text: str) -> Tokens:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Tokens(text, encoding["input_ids"], encoding["offset_mapping"])
