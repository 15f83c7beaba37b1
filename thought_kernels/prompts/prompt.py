"""From instruction and example to token ids: two prompts that end alike, [P, e] and [P°, e] of theory §1.

Both are written as text, which must end in the same characters from the example on: these are e, and what stands
before them are the prefixes. Where the instruction is inserted P = [H, I] and P° = H. Tokens are then cut at that
character, and the ids of e must be the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from thought_kernels.prompts.chat import Writer, text_tokenizer, writer_of
from thought_kernels.prompts.cuts import Tokens, check_equal, common_length, cut
from thought_kernels.prompts.examples import Example, check_text, load_examples, read_example
from thought_kernels.prompts.instruction import Instruction, prompted
from thought_kernels.prompts.places import Places, places_of

__all__ = [
    "Alignment",
    "EncodedExample",
    "Example",
    "ExplainedToken",
    "Instruction",
    "Prefixes",
    "align",
    "encode",
    "explain",
    "load_examples",
]


class Alignment(NamedTuple):
    """Token ids before an inserted instruction, of the instruction with its separator, and of everything after it."""

    H: list[int]
    I: list[int]  # noqa: E741 (the paper's letter)
    e: list[int]

    @property
    def with_prefix(self) -> list[int]:
        """P = [H, I]."""
        return [*self.H, *self.I]

    @property
    def without_prefix(self) -> list[int]:
        """P° = H."""
        return self.H


class Prefixes(NamedTuple):
    """Token ids of two prefixes, neither of which begins with the other as insertion has it, and of what follows."""

    with_prefix: list[int]
    without_prefix: list[int]
    e: list[int]


class EncodedExample(NamedTuple):
    """An aligned example: P = header + instruction and P° = header + replaced, each before tokens.

    Attributes:
        header: the ids that both prefixes begin with; H where the instruction is inserted.
        instruction: the rest of P: I, the ids of the instruction and its separator, or of few-shot turns.
        tokens: e, the ids after it, up to and with what closes the completion, or up to where it would start.
        answer_start: index in `tokens` of the token that holds the completion's first character; len(tokens) without a
            completion.
        place: where it stands, for messages, such as "examples[3]" or "FILE, line 4"; None if unknown.
        replaced: I°, the rest of P°; empty where the instruction is inserted.
        share: of one example's weight: 1/k for each of an example's k completions, half of it for an input that the
            model wrote.
    """

    header: list[int]
    instruction: list[int]
    tokens: list[int]
    answer_start: int
    place: str | None = None
    replaced: Sequence[int] = ()
    share: float = 1.0

    @property
    def is_open(self) -> bool:
        """Whether it has no completion: the model is to write it."""
        return self.answer_start == len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the longer prompt, with one for a completion where there is none."""
        return len(self.header) + max(len(self.instruction), len(self.replaced)) + len(self.tokens) + self.is_open

    @property
    def with_prefix(self) -> list[int]:
        """P."""
        return [*self.header, *self.instruction]

    @property
    def without_prefix(self) -> list[int]:
        """P°."""
        return [*self.header, *self.replaced]


class ExplainedToken(NamedTuple):
    """One row of explain: part "H", "I", "I°" or "e", 0-based position in its prompt, and whether the completion's."""

    part: str
    position: int
    token_id: int
    token: str
    answer: bool


def align(
    tokenizer: Any, instruction: Instruction, example: Any, *, without: Instruction | None = None,
    separator: str = "\n", format: str | None = None,
) -> Alignment | Prefixes:  # fmt: skip
    """Splits the prompt's token ids, and those of the prompt on the other side, before what both end in: e.

    The user's turn is instruction + separator + example text. In an example of several turns the instruction stands
    before the first user text; a system message stays where the template puts it, before the instruction in Gemma's.
    e ends with what closes the completion: a special token of the chat template, or the format's text after
    {completion}. Without a completion it ends where the model would write.

    Args:
        tokenizer: a fast transformers tokenizer.
        instruction: a text, or messages: few-shot turns (user, assistant, ...) that come before the example's, a
            system message, or both.
        example: a str, a dict or a message list as load_examples takes them.
        without: what stands on the other side in the instruction's place, as `instruction`; None for the same chat
            without the instruction, with what the template may write then, such as a default system message.
        separator: between instruction and example text; belongs to I. In a format a system message ends with it too.
        format: of one turn, such as "{prompt} -> {completion}\\n"; None for the tokenizer's chat template.

    Returns:
        The id lists (H, I, e) where the instruction is inserted, [H, e] being the prompt on the other side; otherwise
        (with_prefix, without_prefix, e). Both have all of these names but H and I.

    Raises:
        ValueError: if the two prompts do not end alike (both are shown) or are equal, a token straddles an edge of the
            instruction, the instruction stands after the example's text, the template refuses the chat, the format
            lacks a field, or the tokenizer has no chat template and no format is given, or no offsets.
        TypeError: if an argument is of another type.

    Source: "Transmuting prompts into weights", §2.1, the contexts C and C\\I.
    """
    row = encode(tokenizer, instruction, example, without=without, separator=separator, format=format)
    if row.replaced:
        return Prefixes(row.with_prefix, row.without_prefix, row.tokens)
    return Alignment(row.header, row.instruction, row.tokens)


def explain(
    tokenizer: Any, instruction: Instruction, example: Any, *, without: Instruction | None = None,
    separator: str = "\n", format: str | None = None,
) -> list[ExplainedToken]:  # fmt: skip
    """The rows of a table that shows how a prompt is split: part, position, id, token string, completion or not.

    Where P° is no beginning of P, the rows of I°, which stands in I's place there, follow those of I. Args and errors
    are those of align; the error's sentence says why a prompt does not align.
    """
    row = encode(tokenizer, instruction, example, without=without, separator=separator, format=format)
    first = len(row.header)
    start = first + max(len(row.instruction), len(row.replaced))
    parts = (("H", 0, row.header), ("I", first, row.instruction), ("I°", first, row.replaced), ("e", start, row.tokens))
    strings = text_tokenizer(tokenizer)
    return [
        ExplainedToken(part, position, token_id, token, part == "e" and position >= start + row.answer_start)
        for part, begin, ids in parts
        for position, (token_id, token) in enumerate(
            zip(ids, strings.convert_ids_to_tokens(list(ids)), strict=True), start=begin
        )
    ]


def encode(
    tokenizer: Any, instruction: Instruction, example: Any, *, without: Instruction | None = None,
    separator: str = "\n", format: str | None = None,
) -> EncodedExample:  # fmt: skip
    """Aligns one example as align does, and finds where its completion starts.

    Args and errors are those of align.

    Returns:
        The EncodedExample.
    """
    if not isinstance(separator, str):
        raise TypeError(f"align: separator must be a str, got {type(separator).__name__}")
    check_text(separator, "align: separator")
    tokenizer = text_tokenizer(tokenizer)
    writer = writer_of(tokenizer, format, separator)
    chat = read_example(example, "align: example")
    places = places_of(writer, chat)
    told = writer.text(prompted("instruction", instruction, chat, separator, places.user_text))
    bare = places.text
    if without is not None:
        bare = writer.text(prompted("without", without, chat, separator, places.user_text))
    either_text = isinstance(instruction, str) or isinstance(without, str)
    starts = [places.user] if either_text or places.turn is None else [places.turn, places.user]
    start = _common_start(places, told, bare, starts, given=without is not None)
    closed = chat.completion is not None
    prompts = _Prompts(tokenizer, writer.tokens(told, closed=closed), writer.tokens(bare, closed=closed))
    inserted = without is None and len(told) > len(bare) and told.startswith(bare[: len(bare) - start])
    return _encoded(prompts, writer, places, start, inserted)


class _Prompts(NamedTuple):
    """Both prompts as tokens."""

    tokenizer: Any
    told: Tokens
    bare: Tokens


def _encoded(prompts: _Prompts, writer: Writer, places: Places, start: int, inserted: bool) -> EncodedExample:
    """Cuts both prompts `start` characters before their ends.

    Where the instruction is inserted its own start must be an edge too, so that H is the same in both.
    """
    tokenizer, told, bare = prompts
    start = _on_edges(told, bare, start, inserted)
    told_at, bare_at = len(told.text) - start, len(bare.text) - start
    if inserted:
        split = bare.ending_by(bare_at)
        first = cut(tokenizer, told, bare_at, "instruction must start", "H", bare.ids[:split])
        after = cut(tokenizer, told, told_at, "instruction must end", "e", bare.ids[split:])
        check_equal(tokenizer, "H", told.ids[:first], bare.ids[:split])
    else:
        split = cut(tokenizer, bare, bare_at, "without must end")
        after = cut(tokenizer, told, told_at, "instruction must end", "e", bare.ids[split:])
        first = common_length(told.ids[:after], bare.ids[:split])
    ends = [len(told.ids), len(bare.ids)]
    answer = ends[0]
    if told.ids[:after] == bare.ids[:split]:
        raise ValueError(
            f"align: instruction must change the prompt, got the same with and without it, {told.text!r:.200}"
        )
    if places.answer is not None:
        answer = told.ending_by(len(told.text) - places.answer)
        ends = [writer.end(tokens, len(tokens.text) - places.answer_end) for tokens in (told, bare)]
        if answer == ends[0]:
            raise ValueError(
                "align: example must have a completion of at least a token with what closes it, got an empty one that "
                "nothing closes; give a text, or no completion where the model is to write it"
            )
    tokens = told.ids[after : ends[0]]
    check_equal(tokenizer, "e", tokens, bare.ids[split : ends[1]])
    replaced = tuple(bare.ids[first:split])
    return EncodedExample(told.ids[:first], told.ids[first:after], tokens, answer - after, replaced=replaced)


def _on_edges(told: Tokens, bare: Tokens, start: int, inserted: bool) -> int:
    """`start`, or if a token straddles the edge there, an edge further left among the spaces that both prompts have.

    In "Q: sum: 1 2" beside "Q: 1 2" what is inserted may be read as "sum: " or as " sum:"; the latter is whole tokens
    where those hold the space before a word.
    """
    spaces = min(len(tokens.text[:-start]) - len(tokens.text[:-start].rstrip(" ")) for tokens in (told, bare))
    for moved in range(start, start + spaces + 1):
        told_at, bare_at = len(told.text) - moved, len(bare.text) - moved
        if bare.is_edge(bare_at) and told.is_edge(told_at) and (not inserted or told.is_edge(bare_at)):
            return moved
    return start


def _common_start(places: Places, told: str, bare: str, starts: list[int], *, given: bool) -> int:
    """The first of the places, from the end, from which on both prompts are the example's own chat."""
    if places.user == 0:
        raise ValueError(
            f"align: example must leave something after the instruction, got {places.text!r} without it; give a text"
        )
    for start in starts:
        tail = places.text[-start:]
        if told.endswith(tail) and bare.endswith(tail):
            return start
    if given:
        raise ValueError(
            "align: without must give a prompt that ends as the one with the instruction does, from the example's text "
            f"on, got {told!r} with the instruction and {bare!r} without"
        )
    raise ValueError(
        "align: instruction must come before the example's text and leave the rest of the chat as it is, "
        f"got {told!r} with it and {bare!r} without; the template puts it after the input or changes more than that"
    )
