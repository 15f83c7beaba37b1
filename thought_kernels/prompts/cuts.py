"""Where a prompt's tokens may be cut: at characters that are the edge of a token, with the same ids on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_SHOWN_TOKENS = 48  # of each side of a mismatch; beyond it, a window around the first difference


class Tokens(NamedTuple):
    """A text as token ids, with the characters [start, stop) that each stands for."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    def ending_by(self, character: int) -> int:
        """How many leading tokens end at or before a character."""
        return next((index for index, (_, stop) in enumerate(self.offsets) if stop > character), len(self.offsets))

    def is_edge(self, character: int) -> bool:
        """Whether no token straddles a character."""
        index = self.ending_by(character)
        return index == len(self.offsets) or self.offsets[index][0] >= character


def cut(tokenizer: Any, tokens: Tokens, character: int, rule: str, part: str = "", other: Sequence[int] = ()) -> int:
    """The index of the first token at or after a character, which must be a token's edge.

    Args:
        tokenizer: for the error's sentence.
        tokens: the prompt.
        character: where to cut.
        rule: what of the prompt must do what there, "instruction must start".
        part: "H" or "e", whose ids in the other prompt are `other`: both are shown then.
        other: those before the character, or after it.

    Raises:
        ValueError: if a token straddles the character.
    """
    index = tokens.ending_by(character)
    if tokens.is_edge(character):
        return index
    start, stop = tokens.offsets[index]
    both = ""
    if part:
        shown = _both(tokenizer, tokens.ids[: index + 1] if part == "H" else tokens.ids[index:], list(other))
        both = f": {part} would be, with it, {shown[0]} and, without it, {shown[1]}"
    mend = ""
    if tokens.text[start:character] == " ":  # a token that holds the space before a word
        mend = ", such as separator=" + ("' '" if part == "H" else r"'\n'")
    raise ValueError(
        f"align: {rule} at the edge of a token, got token "
        f"{tokenizer.convert_ids_to_tokens(tokens.ids[index])!r} (id {tokens.ids[index]}) that straddles it, "
        f"{tokens.text[start:character]!r} before and {tokens.text[character:stop]!r} after{both}; "
        f"change the separator or the whitespace there{mend}"
    )


def check_equal(tokenizer: Any, part: str, prompted: list[int], plain: list[int]) -> None:
    """Raises ValueError, showing both, unless a part has the same ids in both prompts."""
    if prompted == plain:
        return
    shown = _both(tokenizer, prompted, plain)
    raise ValueError(
        f"align: example must give {part} the same token ids with and without the instruction, "
        f"got, with it, {shown[0]} and, without it, {shown[1]}; they differ from token "
        f"{common_length(prompted, plain)} of {part} on: "
        "change the separator or the whitespace at the instruction's edges"
    )


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids two lists share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _both(tokenizer: Any, prompted: list[int], plain: list[int]) -> list[str]:
    """Both id lists with their tokens, as far as they are near their first difference."""
    difference = common_length(prompted, plain)
    window = slice(max(0, difference - _SHOWN_TOKENS // 2), difference + _SHOWN_TOKENS // 2)
    if max(len(prompted), len(plain)) <= _SHOWN_TOKENS:
        window = slice(0, _SHOWN_TOKENS)
    return [f"{ids[window]} {tokenizer.convert_ids_to_tokens(ids[window])}" for ids in (prompted, plain)]
