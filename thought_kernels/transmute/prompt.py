"""From instruction and example to token ids: the prompt C = [H, I, e] of theory §1, aligned by character offsets.

The chat is rendered twice, with and without the instruction, and the two texts must differ by one inserted piece, which
is I. Placeholders rendered in the same places say where the user's text and the completion start in a template that
nobody has described to us. Tokens are then cut at those characters, and the ids of H and e must be the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from thought_kernels.transmute.examples import Example, load_examples, read_example, read_messages

__all__ = [
    "Alignment",
    "EncodedExample",
    "Example",
    "ExplainedToken",
    "Instruction",
    "align",
    "encode",
    "explain",
    "load_examples",
]

Instruction = str | Sequence[Mapping[str, Any]]
Offsets = list[tuple[int, int]]

_SHOWN_TOKENS = 48  # of each side of a mismatch; beyond it, a window around the first difference


class Alignment(NamedTuple):
    """Token ids before the instruction, of the instruction with its separator, and of everything after it."""

    H: list[int]
    I: list[int]  # noqa: E741 (the paper's letter)
    e: list[int]


class EncodedExample(NamedTuple):
    """An aligned example.

    Attributes:
        header: H, the ids before the instruction.
        instruction: I, the ids of the instruction and its separator, or of few-shot turns.
        tokens: e, the ids after it, up to and with the completion's end-of-turn token, or the generation prompt.
        answer_start: index in `tokens` of the completion's first token; len(tokens) without a completion.
        number: place in the user's list of examples, 0-based, for messages; None if unknown.
    """

    header: list[int]
    instruction: list[int]
    tokens: list[int]
    answer_start: int
    number: int | None = None


class ExplainedToken(NamedTuple):
    """One row of explain: part "H", "I" or "e", 0-based position in [H, I, e], and whether it is the completion's."""

    part: str
    position: int
    token_id: int
    token: str
    answer: bool


def align(tokenizer: Any, instruction: Instruction, example: Any, *, separator: str = "\n") -> Alignment:
    """Splits the prompted chat's token ids into C = [H, I, e].

    The user's turn is instruction + separator + example text. In an example of several turns the instruction stands
    before the first user text; a system message stays where the template puts it, before the instruction in Gemma's.
    e ends with the completion's end-of-turn token, and with the generation prompt where there is no completion.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        instruction: a text, or messages: few-shot turns (user, assistant, ...) that come before the example's, a
            system message, or both.
        example: a str, a dict or a message list as load_examples takes them.
        separator: between instruction and example text; belongs to I. Unused where instruction is a message list.

    Returns:
        The id lists (H, I, e); H + e are the ids of the same chat without the instruction.

    Raises:
        ValueError: if the ids of H or e differ with and without the instruction (both are shown), a token straddles
            the instruction's edge, the instruction stands after the example's text, the template refuses the chat, or
            the tokenizer has no chat template or no offsets.
        TypeError: if instruction, separator or example is of another type.

    Source: "Transmuting prompts into weights", §2.1, the contexts C and C\\I.
    """
    encoded = encode(tokenizer, instruction, example, separator=separator)
    return Alignment(encoded.header, encoded.instruction, encoded.tokens)


def explain(tokenizer: Any, instruction: Instruction, example: Any, *, separator: str = "\n") -> list[ExplainedToken]:
    """The rows of a table that shows how a prompt is split: part, position, id, token string, completion or not.

    Args and errors are those of align; the error's sentence says why a prompt does not align.
    """
    header, chunk, tokens, answer_start, *_ = encode(tokenizer, instruction, example, separator=separator)
    ids = [*header, *chunk, *tokens]
    parts = "H" * len(header) + "I" * len(chunk) + "e" * len(tokens)
    answer = len(header) + len(chunk) + answer_start
    strings = text_tokenizer(tokenizer).convert_ids_to_tokens(ids)
    return [
        ExplainedToken(part, position, token_id, token, position >= answer)
        for position, (part, token_id, token) in enumerate(zip(parts, ids, strings, strict=True))
    ]


def encode(tokenizer: Any, instruction: Instruction, example: Any, *, separator: str = "\n") -> EncodedExample:
    """Aligns one example as align does, and finds where its completion starts.

    Args and errors are those of align; a token that straddles the completion's start is an error too.

    Returns:
        The EncodedExample.
    """
    tokenizer = text_tokenizer(tokenizer)
    chat = read_example(example, "align: example")
    if not isinstance(separator, str):
        raise TypeError(f"align: separator must be a str, got {type(separator).__name__}")
    plain = _render(tokenizer, chat)
    placeholder = _placeholder(plain)
    before, user_text = _user_text(tokenizer, chat, plain, placeholder)
    text = _render(tokenizer, _prompted(instruction, chat, separator, user_text))
    candidates = (
        [len(before)] if isinstance(instruction, str) else [*_turn_start(tokenizer, before, placeholder), len(before)]
    )
    start = _insertion(plain, text, candidates, instruction.strip() if isinstance(instruction, str) else "")
    inserted = len(text) - len(plain)

    with_ids, with_offsets = _tokenize(tokenizer, text)
    plain_ids, plain_offsets = _tokenize(tokenizer, plain)
    plain_first = _ending_by(plain_offsets, start)
    first = _cut(tokenizer, with_ids, with_offsets, start, text, "start", plain_ids[:plain_first])
    after = _cut(tokenizer, with_ids, with_offsets, start + inserted, text, "end", plain_ids[plain_first:])
    with_end, plain_end, answer = len(with_ids), len(plain_ids), len(with_ids)
    if chat.completion is not None:
        answer_start, answer_stop = _completion_span(tokenizer, chat, plain, placeholder)
        answer = _cut(tokenizer, with_ids, with_offsets, answer_start + inserted, text, "completion")
        with_end = _turn_end(tokenizer, with_ids, with_offsets, answer_stop + inserted, text)
        plain_end = _turn_end(tokenizer, plain_ids, plain_offsets, answer_stop, plain)

    header, tokens = with_ids[:first], with_ids[after:with_end]
    _check_equal(tokenizer, "H", header, plain_ids[:plain_first])
    _check_equal(tokenizer, "e", tokens, plain_ids[plain_first:plain_end])
    return EncodedExample(header, with_ids[first:after], tokens, answer - after)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one that a multimodal model's processor holds; raises as align does."""
    if not hasattr(tokenizer, "is_fast") and hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer  # the processor of a multimodal model
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"align: tokenizer must be a fast one, which tells each token's characters, got {name}; "
            "load it with AutoTokenizer and the tokenizers package"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"align: tokenizer must have a chat template, got {name} without one; "
            "take the instruction-tuned model's tokenizer or set tokenizer.chat_template"
        )
    return tokenizer


def _prompted(instruction: Instruction, chat: Example, separator: str, user_text: str) -> Example:
    """The example's chat with the instruction in it, before `user_text` or as turns before the example's."""
    messages = list(chat.messages)
    if isinstance(instruction, str):
        if not instruction.strip():
            raise ValueError(f"align: instruction must not be empty, got {instruction!r}")
        if any(
            _stands_after_input(instruction, separator, turn["content"]) for turn in messages if turn["role"] == "user"
        ):
            raise ValueError(
                "align: instruction must come before the example's text, got an example that has it after its input; "
                "take it out there, since only tokens after an instruction can follow it"
            )
        first = _first_user(chat)
        messages[first] = {"role": "user", "content": instruction + separator + user_text}
        return Example(tuple(messages), chat.completion)
    if not isinstance(instruction, Sequence):  # a generator would be empty for the second example
        raise TypeError(f"align: instruction must be a str or a message list, got {type(instruction).__name__}")
    turns = list(read_messages(instruction, "align: instruction"))
    if not turns:
        raise ValueError("align: instruction must not be empty, got no messages")
    if turns[-1]["role"] == "user":
        raise ValueError(
            "align: instruction must be whole turns that end with an assistant message, got a user message at the end"
        )
    if messages[0]["role"] == "system":
        if turns[0]["role"] == "system":
            raise ValueError("align: instruction must leave the system message to one side, got one in the example too")
        turns.insert(0, messages.pop(0))  # templates take a system message first or not at all
    return Example((*turns, *messages), chat.completion)


def _first_user(chat: Example) -> int:
    return next(index for index, turn in enumerate(chat.messages) if turn["role"] == "user")


def _stands_after_input(instruction: str, separator: str, content: str) -> bool:
    """Whether the user's text has the instruction on a later line of its own, or is input + separator + instruction."""
    wanted, content = instruction.strip(), content.strip()
    if f"\n{wanted}\n" in f"{content}\n":
        return True
    before = content.removesuffix(separator + wanted)
    return separator != "" and before != content and before.strip() != ""


def _render(tokenizer: Any, chat: Example) -> str:
    from jinja2.exceptions import TemplateError  # transformers needs it for any chat template

    messages = list(chat.messages)
    if chat.completion is not None:
        messages.append({"role": "assistant", "content": chat.completion})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=chat.completion is None)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise ValueError(
            f"align: example must be a chat that the tokenizer's template takes, got the turns {roles}; {error}"
        ) from error


def _placeholder(text: str) -> str:
    """A word that templates leave as it is and that `text` does not contain."""
    word = "placeholder"
    while word in text:
        word += "x"
    return word


def _user_text(tokenizer: Any, chat: Example, plain: str, placeholder: str) -> tuple[str, str]:
    """What `plain` has before the first user text, and that text as the template writes it (trimmed, say)."""
    first = _first_user(chat)
    content = chat.messages[first]["content"]
    marked = list(chat.messages)
    marked[first] = {"role": "user", "content": placeholder}
    before, found, after = _render(tokenizer, Example(tuple(marked), chat.completion)).partition(placeholder)
    written = plain[len(before) : len(plain) - len(after)]
    if not found or plain != before + written + after or written not in content:
        raise ValueError(
            "align: tokenizer must have a template that writes the user's text as it is, "
            f"got {plain!r:.200}; where the instruction would start cannot be told"
        )
    return before, written


def _insertion(plain: str, text: str, candidates: list[int], opening: str) -> int:
    """The first candidate character of `plain` where inserting something that opens with `opening` gives `text`."""
    for start in candidates:
        stop = len(text) - (len(plain) - start)
        inserted = stop > start and text[:start] == plain[:start] and text[stop:] == plain[start:]
        if inserted and text[start:stop].lstrip().startswith(opening):
            return start
    raise ValueError(
        "align: instruction must come before the example's text and leave the rest of the chat as it is, "
        f"got {text!r} with it and {plain!r} without; the template puts it after the input or changes more than that"
    )


def _turn_start(tokenizer: Any, before: str, word: str) -> list[int]:
    """Where the turn opens whose user text follows `before`: [that character], or [] if something stands between.

    What opens a user's turn is read off a dialogue: all that lies between an answer's closing and the next user text.
    """
    asked, answered, again = word + "a", word + "b", word + "c"
    turn = {"role": "user", "content": asked}
    closed = _render(tokenizer, Example((turn,), answered)).partition(answered)[2]
    dialogue = (turn, {"role": "assistant", "content": answered}, {"role": "user", "content": again})
    between = _render(tokenizer, Example(dialogue, None)).partition(answered)[2].partition(again)[0]
    opening = between.removeprefix(closed)
    return [len(before) - len(opening)] if opening != between and before.endswith(opening) else []


def _completion_span(tokenizer: Any, chat: Example, plain: str, placeholder: str) -> tuple[int, int]:
    """The characters of `plain` that hold the completion, as trimmed by the template."""
    before, found, closing = _render(tokenizer, Example(chat.messages, placeholder)).rpartition(placeholder)
    if not found or not plain.startswith(before) or not plain.endswith(closing):
        raise ValueError(
            "align: tokenizer must have a template that writes the completion as it is, "
            f"got {plain!r:.200}; where the completion starts cannot be told"
        )
    return len(before), len(plain) - len(closing)


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    # The template has written every special token it wants, BOS included.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _ending_by(offsets: Offsets, character: int) -> int:
    """How many leading tokens end at or before a character."""
    return next((index for index, (_, stop) in enumerate(offsets) if stop > character), len(offsets))


def _cut(
    tokenizer: Any, ids: list[int], offsets: Offsets, character: int, text: str, edge: str, plain: Sequence[int] = ()
) -> int:  # fmt: skip
    """The index of the first token at or after a character, which must be a token's edge.

    `plain` holds the ids on the same side of it without the instruction: those before its start, or after its end.
    """
    index = _ending_by(offsets, character)
    if index < len(offsets) and offsets[index][0] < character:
        token_start, token_stop = offsets[index]
        subject, rule = ("completion", "start") if edge == "completion" else ("instruction", edge)
        both = ""
        if edge != "completion":
            part, prompted = ("H", ids[: index + 1]) if edge == "start" else ("e", ids[index:])
            shown = _both(tokenizer, prompted, list(plain))
            both = f": {part} would be, with it, {shown[0]} and, without it, {shown[1]}"
        raise ValueError(
            f"align: {subject} must {rule} at the edge of a token, got token "
            f"{tokenizer.convert_ids_to_tokens(ids[index])!r} (id {ids[index]}) that straddles it, "
            f"{text[token_start:character]!r} before and {text[character:token_stop]!r} after{both}; "
            "change the separator or the whitespace there"
        )
    return index


def _turn_end(tokenizer: Any, ids: list[int], offsets: Offsets, character: int, text: str) -> int:
    """One past the end-of-turn token that follows a completion ending at `character`.

    That is the first special token there; in a template without one, whatever it writes but the whitespace at the end.
    """
    for index in range(_ending_by(offsets, character), len(ids)):
        visible = tokenizer.decode([ids[index]], skip_special_tokens=False)
        if visible and not tokenizer.decode([ids[index]], skip_special_tokens=True):
            return index + 1
    return sum(start < max(character, len(text.rstrip())) for start, _ in offsets)


def _check_equal(tokenizer: Any, part: str, prompted: list[int], plain: list[int]) -> None:
    if prompted == plain:
        return
    shown = _both(tokenizer, prompted, plain)
    difference = _difference(prompted, plain)
    raise ValueError(
        f"align: example must give {part} the same token ids with and without the instruction, "
        f"got, with it, {shown[0]} and, without it, {shown[1]}; they differ from token {difference} of {part} on: "
        "change the separator or the whitespace at the instruction's edges"
    )


def _difference(prompted: list[int], plain: list[int]) -> int:
    pairs = zip(prompted, plain, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompted), len(plain)))


def _both(tokenizer: Any, prompted: list[int], plain: list[int]) -> list[str]:
    """Both id lists with their tokens, as far as they are near their first difference."""
    difference = _difference(prompted, plain)
    window = slice(max(0, difference - _SHOWN_TOKENS // 2), difference + _SHOWN_TOKENS // 2)
    if max(len(prompted), len(plain)) <= _SHOWN_TOKENS:
        window = slice(0, _SHOWN_TOKENS)
    return [f"{ids[window]} {tokenizer.convert_ids_to_tokens(ids[window])}" for ids in (prompted, plain)]
