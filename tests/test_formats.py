"""Prompts in a user's format for one turn, for tokenizers that know no chat."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import thought_kernels as tk
from thought_kernels.prompts.prompt import align, encode

ARROW = "{prompt} -> {completion}\n"
LETTERS = "Q: {prompt}\nA: {completion}\n\n"
LINES = "{prompt}\n->\n{completion}\n\n"
DEMONSTRATION = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]


def base_tokenizer(*merges: tuple[str, str], first: str = "<bos> $A", template: str | None = None) -> Any:
    """A base model's: no chat template, and it puts BOS before a text itself."""
    tokenizer = tiny_tokenizer(merges, template=template)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=first, special_tokens=ids)
    return tokenizer


# Tokens that hold the space before a word, as those of real models do.
SPACED = tuple(("▁", character) for character in "347sS-")


def parts(instruction: Any, example: Any, tokenizer: Any = None, **options: Any) -> list[str]:
    tokenizer = tokenizer or base_tokenizer()
    return [
        "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")
        for ids in align(tokenizer, instruction, example, **options)
    ]


@pytest.mark.parametrize("prompt", ["4", "4 5", "a\nb"])
@pytest.mark.parametrize(
    ("format", "before", "between", "after"),
    [(ARROW, "", " -> ", "\n"), (LETTERS, "Q: ", "\nA: ", "\n\n"), (LINES, "", "\n->\n", "\n\n")],
    ids=["arrow", "letters", "lines"],
)
def test_few_shot_turns_are_written_in_the_format(
    format: str, before: str, between: str, after: str, prompt: str
) -> None:
    shown = f"{before}1 2{between}3{after}"
    example = {"prompt": prompt, "completion": "9"}
    header, chunk, e = parts(DEMONSTRATION, example, format=format)
    assert (header, chunk, e) == ("<bos>", shown, f"{before}{prompt}{between}9{after}")
    header, chunk, e = parts(DEMONSTRATION, prompt, format=format)
    assert (header, chunk, e) == ("<bos>", shown, f"{before}{prompt}{between}".rstrip(" "))
    assert parts("sum", example, format=format, separator=": ") == [
        f"<bos>{before}", "sum: ", f"{prompt}{between}9{after}",
    ]  # fmt: skip


def test_a_system_message_comes_before_the_first_turn_with_the_separator() -> None:
    system = [{"role": "system", "content": "Add up."}]
    assert parts(system, "4", format=ARROW) == ["<bos>", "Add up.\n", "4 ->"]
    assert parts([*system, *DEMONSTRATION], "4", format=LETTERS, separator="\n\n") == [
        "<bos>", "Add up.\n\nQ: 1 2\nA: 3\n\n", "Q: 4\nA:",
    ]  # fmt: skip
    assert parts(DEMONSTRATION, [*system, {"role": "user", "content": "4"}], format=ARROW) == [
        "<bos>Add up.\n", "1 2 -> 3\n", "4 ->",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "header"), [("<bos> $A", "<bos>"), ("<bos> $A <eos>", "<bos>"), ("$A <eos>", ""), ("$A", "")]
)
def test_the_header_is_what_the_tokenizer_puts_first_and_never_an_eos(first: str, header: str) -> None:
    tokenizer = base_tokenizer(first=first)
    assert parts(DEMONSTRATION, {"prompt": "4", "completion": "7"}, tokenizer, format=ARROW) == [
        header, "1 2 -> 3\n", "4 -> 7\n",
    ]  # fmt: skip


def test_a_format_without_a_text_after_the_completion_ends_with_eos() -> None:
    format = "{prompt}={completion}"
    assert parts("sum", {"prompt": "4", "completion": "7"}, format=format)[2] == "4=7<eos>"
    assert parts("sum", "4", format=format)[2] == "4="
    encoded = encode(base_tokenizer(), "sum", {"prompt": "4", "completion": ""}, format=format)
    assert encoded.answer_start == len(encoded.tokens) - 1


def test_braces_of_the_text_are_written_twice() -> None:
    assert parts("sum", {"prompt": "{4}", "completion": "{7}"}, format="{{{prompt}}}{completion};")[2] == "{4}}{7};"


def test_a_format_takes_the_place_of_a_chat_template() -> None:
    tokenizer = base_tokenizer(template="{{ messages[0]['content'] }}")
    assert parts("sum", "4", tokenizer, format=ARROW) == ["<bos>", "sum\n", "4 ->"]
    with pytest.raises(ValueError, match=r"without one; give the format of a turn, such as format='\{prompt\} -> "):
        align(base_tokenizer(), "sum", "4")


def test_a_completion_may_begin_inside_a_token() -> None:
    tokenizer = base_tokenizer(*SPACED)
    example = {"prompt": "4", "completion": "7"}
    row = encode(tokenizer, DEMONSTRATION, example, format=ARROW)
    strings = tokenizer.convert_ids_to_tokens(row.tokens)
    assert strings[row.answer_start :] == ["▁7", "\n"]
    open_ended = encode(tokenizer, DEMONSTRATION, "4", format=ARROW)
    assert row.tokens[: row.answer_start] == open_ended.tokens
    # In a chat too: a token across the end of "model\n" and the completion's start.
    chat = tiny_tokenizer((("\n", "3"),))
    row = encode(chat, "sum", {"prompt": "1", "completion": "3"})
    assert chat.convert_ids_to_tokens(row.tokens[row.answer_start :]) == ["\n3", "<end_of_turn>"]


def test_the_space_before_the_user_s_text_goes_with_its_token() -> None:
    """ "Q: 4" and "Q: Sum: 4" share the token " 4": e starts with it, if the separator ends with the same space."""
    tokenizer = base_tokenizer(*SPACED)
    assert parts("Sum:", "4", tokenizer, format=LETTERS, separator=" ") == ["<bos>Q:", " Sum:", " 4\nA:"]
    assert parts("+", "4", tokenizer, format=LETTERS, separator=" ") == ["<bos>Q:", " +", " 4\nA:"]
    with pytest.raises(ValueError, match="change the separator or the whitespace there, such as separator=' '"):
        align(tokenizer, "Sum:", "4", format=LETTERS)
    with pytest.raises(ValueError, match=r"change the separator or the whitespace there, such as separator='\\n'"):
        align(tokenizer, "Sum:", "4", format=ARROW, separator=" ")


ONCE = "format must hold {prompt} and {completion} once each and no other field, as in '{prompt} -> {completion}\\n', "


@pytest.mark.parametrize(
    ("format", "kind", "expected"),
    [
        ("{completion}", ValueError, "format must hold {prompt}, as in '{prompt} -> {completion}\\n', got"),
        ("{prompt}\n", ValueError, "format must hold {completion}, as in"),
        ("no field", ValueError, "format must hold {prompt}"),
        ("{completion} <- {prompt}", ValueError, "format must have {prompt} before {completion}"),
        ("{prompt} {x} {completion}", ValueError, ONCE + "got {prompt}, {x}, {completion} in"),
        ("{prompt} {prompt} {completion}", ValueError, ONCE),
        ("{prompt!r} {completion}", ValueError, ONCE),
        ("{prompt} {} {completion}", ValueError, ONCE + "got {prompt}, {}, {completion} in"),
        ("{prompt} } {completion}", ValueError, "format must be a format string, "),
        ("{prompt} = {completion} ", ValueError, "format must have nothing, or more than spaces, after {completion}, "),
        (7, TypeError, "format must be a str, got int"),
    ],
)
def test_other_formats_are_refused(format: Any, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=re.escape(f"align: {expected}")):
        align(base_tokenizer(), "sum", "4", format=format)


def test_an_empty_completion_that_nothing_closes_is_refused() -> None:
    tokenizer = base_tokenizer()
    empty = {"prompt": "4", "completion": ""}
    for format in (ARROW, "{prompt}={completion}"):  # a newline closes the one, EOS the other
        row = encode(tokenizer, DEMONSTRATION, empty, format=format)
        assert len(row.tokens) == row.answer_start + 1 and not row.is_open
    tokenizer.eos_token = None
    assert encode(tokenizer, DEMONSTRATION, empty, format=ARROW) == encode(
        base_tokenizer(), DEMONSTRATION, empty, format=ARROW
    )
    assert not encode(tokenizer, DEMONSTRATION, empty | {"completion": "8"}, format="{prompt}={completion}").is_open
    with pytest.raises(ValueError, match="align: example must have a completion of at least a token .*, got an empty"):
        encode(tokenizer, DEMONSTRATION, empty, format="{prompt}={completion}")


def test_turns_must_alternate() -> None:
    user, assistant = DEMONSTRATION
    for chat, expected in (([user, user], "two in a row"), ([user, assistant, assistant, user], "without one")):
        with pytest.raises(ValueError, match=expected):
            align(base_tokenizer(), "sum", chat, format=ARROW)


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_a_base_model_is_transmuted_from_demonstrations() -> None:
    tokenizer = base_tokenizer(*SPACED)
    model = tiny_gemma3(0, torch.float64, vocab_size=len(tokenizer))
    examples = ["4", {"prompt": "5", "completion": "7"}]
    patch = tk.transmute(model, tokenizer, DEMONSTRATION, examples, format=ARROW, completions=2, max_new_tokens=3)
    assert patch.provenance["format"] == ARROW and patch.provenance["without"] is None
    assert patch.provenance["generated_completions"] == 2
