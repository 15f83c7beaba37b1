"""Alignment of instruction and example on token ids, with tokenizers and templates that try to break it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_tokenizer
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from thought_kernels.evaluation.experiments.pairs import read_pairs
from thought_kernels.prompts.prompt import Example, align, encode, explain, load_examples

TOKENIZER = tiny_tokenizer()
DEMONSTRATION = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
HEADER = "<bos><start_of_turn>user\n"

CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{ '<start_of_turn>system\nBe kind.<end_of_turn>\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>assistant\n' }}{%- endif -%}"""


def text(ids: list[int]) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(ids)).replace("▁", " ")


def texts(instruction: Any, example: Any, tokenizer: Any = TOKENIZER, **options: Any) -> tuple[str, str, str]:
    header, chunk, tokens = align(tokenizer, instruction, example, **options)
    return text(header), text(chunk), text(tokens)


def test_without_completion_e_ends_with_the_generation_prompt() -> None:
    assert texts("sum", "1 2") == (HEADER, "sum\n", "1 2<end_of_turn>\n<start_of_turn>model\n")
    encoded = encode(TOKENIZER, "sum", "1 2")
    assert encoded.answer_start == len(encoded.tokens)


def test_with_completion_e_ends_with_its_end_of_turn_token() -> None:
    encoded = encode(TOKENIZER, "sum", {"prompt": "1 2", "completion": "3"})
    assert text(encoded.tokens) == "1 2<end_of_turn>\n<start_of_turn>model\n3<end_of_turn>"
    assert text(encoded.tokens[encoded.answer_start :]) == "3<end_of_turn>"


def test_ids_are_those_of_the_rendered_chat_and_of_the_chat_without_instruction() -> None:
    aligned = align(TOKENIZER, "sum up", {"prompt": "1 2", "completion": "3"}, separator=": ")
    answer = {"role": "assistant", "content": "3"}
    for content, ids in (("sum up: 1 2", [*aligned.H, *aligned.I, *aligned.e]), ("1 2", [*aligned.H, *aligned.e])):
        chat = [{"role": "user", "content": content}, answer]
        expected = TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert expected[: len(ids)] == ids and text(expected[len(ids) :]) == "\n"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    instruction=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(str.strip),
    prompt=st.text(st.sampled_from("ab 12\n\té"), max_size=12).filter(str.strip),
    completion=st.none() | st.text(st.sampled_from("ab 12\n"), max_size=6),
    separator=st.sampled_from(["\n", "", " ", "\n\n", ": "]),
    few_shot=st.booleans(),
)
def test_whatever_aligns_is_the_chat_with_and_without_the_instruction(
    instruction: str, prompt: str, completion: str | None, separator: str, few_shot: bool
) -> None:
    """Every character is a token here, so that nothing can straddle and only the refusals by content remain."""
    example = {"prompt": prompt, "completion": completion}
    given_instruction: Any = instruction
    if few_shot:
        given_instruction = [{"role": "user", "content": instruction}, {"role": "assistant", "content": "b"}]
    try:
        header, chunk, tokens = texts(given_instruction, example, separator=separator)
    except ValueError as error:
        assert "after its input" in str(error) and instruction.strip() in prompt
        return
    unknown = prompt.strip().replace("\t", "<unk>")
    ending = "" if completion is None else completion.strip() + "<end_of_turn>"
    assert tokens.removeprefix("<start_of_turn>user\n") == f"{unknown}<end_of_turn>\n<start_of_turn>model\n{ending}"
    if few_shot:
        asked = f"<start_of_turn>user\n{instruction.strip()}<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        assert (header, chunk) == ("<bos>", asked)
    else:
        assert (header, chunk) == (HEADER, (instruction + separator).lstrip())


def test_an_instruction_that_the_prompt_starts_with_is_still_the_first_copy() -> None:
    assert texts("1 ", "1 1 2", separator="")[1:] == ("1 ", "1 1 2<end_of_turn>\n<start_of_turn>model\n")
    assert texts("sum", "sum")[1] == "sum\n"


def test_only_an_instruction_on_its_own_is_one_after_the_input() -> None:
    assert texts("Sum now", "please Sum now")[1] == "Sum now\n"
    assert texts("Sum now", "what does (Sum now)", separator="")[1] == "Sum now"
    for example, separator in (("1 2\nSum now", "\n"), ("1\nSum now\n2", " "), ("1: Sum now", ": ")):
        with pytest.raises(ValueError, match="got an example that has it after its input"):
            texts("Sum now", example, separator=separator)


def test_contents_may_be_lists_of_text_parts_and_examples_objects() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "2"}]}]
    expected = align(TOKENIZER, "sum", "1 2")
    assert align(TOKENIZER, "sum", parts) == expected
    assert align(TOKENIZER, "sum", load_examples(["1 2"])[0]) == expected
    assert align(SimpleNamespace(tokenizer=TOKENIZER), "sum", "1 2") == expected


def test_in_a_chat_of_several_turns_the_instruction_opens_the_first() -> None:
    chat = [*DEMONSTRATION, {"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]
    rest = "1 2<end_of_turn>\n<start_of_turn>model\n3<end_of_turn>\n"
    rest += "<start_of_turn>user\n4<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>"
    assert texts("sum", chat) == (HEADER, "sum\n", rest)
    encoded = encode(TOKENIZER, "sum", chat)
    assert text(encoded.tokens[encoded.answer_start :]) == "5<end_of_turn>"


def test_a_system_message_belongs_to_the_header() -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 2"}]
    assert texts("sum", chat)[:2] == (HEADER + "Be kind.\n\n", "sum\n")
    # The turns that stand in for an instruction come after it.
    header, chunk, tokens = texts(DEMONSTRATION, chat)
    assert header == HEADER + "Be kind.\n\n"
    assert chunk == "1 2<end_of_turn>\n<start_of_turn>model\n3<end_of_turn>\n<start_of_turn>user\n"
    assert tokens == "1 2<end_of_turn>\n<start_of_turn>model\n"


def test_few_shot_turns_are_the_instruction() -> None:
    header, chunk, tokens = texts(DEMONSTRATION, {"prompt": "4", "completion": "5"})
    assert header == "<bos>"
    assert chunk == "<start_of_turn>user\n1 2<end_of_turn>\n<start_of_turn>model\n3<end_of_turn>\n"
    assert tokens == "<start_of_turn>user\n4<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>"


def test_a_system_message_may_be_the_instruction() -> None:
    system = [{"role": "system", "content": "sum"}]
    assert texts(system, "1 2")[:2] == (HEADER, "sum\n\n")
    assert texts([*system, *DEMONSTRATION], "4")[0] == "<bos>"
    with pytest.raises(ValueError, match="system message to one side, got one in the example too"):
        align(TOKENIZER, system, [*system, {"role": "user", "content": "1"}])


def test_a_header_that_ends_like_the_turns_is_not_rotated_into_them() -> None:
    tokenizer = tiny_tokenizer(template=CHATML)
    default = "<start_of_turn>system\nBe kind.<end_of_turn>\n"
    header, chunk, tokens = texts(DEMONSTRATION, "4", tokenizer)
    assert header == default  # not cut before its <end_of_turn>, which the turns have too
    assert chunk == "<start_of_turn>user\n1 2<end_of_turn>\n<start_of_turn>assistant\n3<end_of_turn>\n"
    assert tokens == "<start_of_turn>user\n4<end_of_turn>\n<start_of_turn>assistant\n"
    assert texts("sum", "4", tokenizer)[0] == default + "<start_of_turn>user\n"


def test_a_template_without_bos_and_without_turn_tokens() -> None:
    template = """{%- for message in messages -%}
    {{ message['role'] + ': ' + message['content'] + '\n\n' }}{%- endfor -%}
    {%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""
    tokenizer = tiny_tokenizer(template=template)
    assert texts("sum", "4", tokenizer) == ("user: ", "sum\n", "4\n\nassistant: ")
    assert texts("sum", {"prompt": "4", "completion": "5"}, tokenizer)[2] == "4\n\nassistant: 5\n\n"


def test_a_template_that_puts_system_text_after_the_input_is_refused() -> None:
    template = """{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
    {%- for message in messages if message['role'] != 'system' -%}{{ message['content'] + '\n' }}{%- endfor -%}
    {{ system + '>' }}"""
    with pytest.raises(ValueError, match="instruction must come before the example's text"):
        align(tiny_tokenizer(template=template), [{"role": "system", "content": "sum"}], "4")


@pytest.mark.parametrize("prompt", ["1 2\nsum it", "1 2\nsum it ", "1 2\nsum it\n3"])
def test_an_instruction_after_the_input_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="instruction must come before the example's text, got an example that has it"):
        align(TOKENIZER, "sum it", prompt)


@pytest.mark.parametrize(
    ("merge", "instruction", "example", "expected"),
    [
        (("\n", "1"), "sum", "1 2", r"instruction must end at the edge of a token, got token '\n1' (id 111) that str"),
        (
            ("\n", "s"),
            "sum",
            "1 2",
            r"instruction must start at the edge of a token, got token '\ns' (id 111) that str",
        ),
    ],
)
def test_a_straddling_token_is_shown(merge: tuple[str, str], instruction: str, example: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"align: {expected}".replace(r"\n", "\\n"))):
        align(tiny_tokenizer((merge,)), instruction, example)


def test_a_straddling_token_s_message_shows_both_id_lists() -> None:
    tokenizer = tiny_tokenizer((("m", "x"),))
    plain = [tokenizer.convert_tokens_to_ids(token) for token in ("x", "4", "<end_of_turn>")]
    with pytest.raises(ValueError, match="straddles it, 'm' before and 'x' after") as error:
        align(tokenizer, "sum", "x4", separator="")
    assert f"without it, {plain}"[:-1] in str(error.value)
    assert f"with it, [{tokenizer.convert_tokens_to_ids('mx')}, {plain[1]}, {plain[2]}" in str(error.value)


def test_ids_that_differ_without_the_instruction_are_both_shown() -> None:
    tokenizer = tiny_tokenizer((("\n", "1"),))
    with pytest.raises(ValueError) as error:
        align(tokenizer, "sum", "1 2", separator=" ")
    with_it, without = tokenizer.convert_tokens_to_ids(["user", "\n"]), tokenizer.convert_tokens_to_ids(["user", "\n1"])
    message = str(error.value)
    assert "must give H the same token ids with and without the instruction" in message
    assert f"[2, 4, {with_it[0]}, {with_it[1]}] ['<bos>', '<start_of_turn>', 'user', '\\n']" in message
    assert f"[2, 4, {without[0]}]" in message


def test_a_mismatch_inside_e_shows_the_tokens_around_it() -> None:
    tokenizer = tiny_tokenizer((("2", "2"),))
    # "22" is one token after a colon and two elsewhere: nothing straddles, yet the ids depend on what precedes.
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"(?<=:)22|[\s\S]"), "isolated")
    with pytest.raises(ValueError, match="must give e the same token ids with and without the instruction") as error:
        align(tokenizer, "sum", "22" + "a" * 200, separator=":")
    message = str(error.value)
    assert "['22', 'a'," in message and "['2', '2', 'a'," in message
    assert "they differ from token 0 of e on" in message
    assert message.count("'a'") < 60


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer must have a chat template, got .* without one; give the format"):
        align(tiny_tokenizer(template=None), "sum", "1")
    slow = SimpleNamespace(is_fast=False, chat_template="x")
    with pytest.raises(ValueError, match="tokenizer must be a fast one, which tells each token's characters"):
        align(slow, "sum", "1")
    shouting = tiny_tokenizer(template="<bos>{{ messages[0]['content'] | upper }}<end_of_turn>")
    with pytest.raises(ValueError, match="must have a template that writes the user's text as it is"):
        align(shouting, "sum", "a")


@pytest.mark.parametrize(
    ("instruction", "example", "kind", "expected"),
    [
        ("", "1", ValueError, "instruction must not be empty, got ''"),
        (" \n", "1", ValueError, "instruction must not be empty"),
        ([], "1", ValueError, "instruction must not be empty, got no messages"),
        (7, "1", TypeError, "instruction must be a str or a message list, got int"),
        ({"role": "user"}, "1", TypeError, "instruction must be a str or a message list, got dict"),
        (iter(DEMONSTRATION), "1", TypeError, "instruction must be a str or a message list, got list_iterator"),
        (DEMONSTRATION[:1], "1", ValueError, "instruction must be whole turns"),
        ("sum", 7, TypeError, "align: example must be a str, a dict with prompt and completion, or a message list"),
        ("sum", DEMONSTRATION[1:], ValueError, "example must end with a user message"),
        (DEMONSTRATION, [*DEMONSTRATION[:1], *DEMONSTRATION[:1]], ValueError, "roles must alternate"),
    ],
)
def test_bad_arguments_are_named(instruction: Any, example: Any, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=expected):
        align(TOKENIZER, instruction, example)


def test_the_separator_is_a_str() -> None:
    with pytest.raises(TypeError, match="separator must be a str, got NoneType"):
        align(TOKENIZER, "sum", "1", separator=None)  # type: ignore[arg-type]


def test_explain_lists_every_token_once() -> None:
    rows = explain(TOKENIZER, "sum", {"prompt": "1", "completion": "3"})
    encoded = encode(TOKENIZER, "sum", {"prompt": "1", "completion": "3"})
    assert [row.token_id for row in rows] == [*encoded.header, *encoded.instruction, *encoded.tokens]
    assert "".join(row.part for row in rows) == "HHHH" + "IIII" + "e" * len(encoded.tokens)
    assert [row.position for row in rows] == list(range(len(rows)))
    assert [row.token for row in rows if row.answer] == ["3", "<end_of_turn>"]


CHAT = Example(({"role": "user", "content": "1 2"},), "3")


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "1 2", "completion": "3"},
        DEMONSTRATION,
        {"messages": DEMONSTRATION},
        {"prompt": DEMONSTRATION[:1], "completion": DEMONSTRATION[1:]},
        {"prompt": DEMONSTRATION[:1], "completion": "3"},
        CHAT,
    ],
    ids=["prompt-completion", "messages", "messages-key", "conversational", "mixed", "example"],
)
def test_every_form_of_an_example_reads_the_same(example: Any, tmp_path: Path) -> None:
    assert load_examples([example]) == [CHAT]
    if example is not CHAT:
        path = tmp_path / "examples.jsonl"
        path.write_text("\ufeff" + json.dumps(example) + "\n\n" + json.dumps("4") + "\n", encoding="utf-8")
        read = [CHAT, Example(({"role": "user", "content": "4"},), None)]
        assert load_examples(path) == load_examples(str(path)) == load_examples([path]) == read


def test_examples_may_be_any_iterable() -> None:
    rows = ({"prompt": str(number), "completion": None} for number in range(3))
    assert [example.messages[0]["content"] for example in load_examples(rows)] == ["0", "1", "2"]


class DatasetDict(dict):  # stands in for datasets.DatasetDict, whose iteration gives split names
    pass


@pytest.mark.parametrize(
    ("examples", "kind", "expected"),
    [
        ([], ValueError, "examples must hold at least one example, got none"),
        (5, TypeError, "examples must be a list or a path, got int"),
        ("no/such.jsonl", ValueError, "got 'no/such.jsonl', where no file is"),
        (DatasetDict(train=[]), TypeError, "got a DatasetDict; choose one of its splits"),
        ({"prompt": "1"}, TypeError, "got a dict; put it in a list"),
        (["1", None], TypeError, r"examples\[1\] must be a str, a dict .* got NoneType"),
        (
            [{"question": "1", "answer": "2"}],
            ValueError,
            r"keys prompt and completion, .* got \['answer', 'question'\]",
        ),
        (DEMONSTRATION, ValueError, "a chat is a list of its messages"),
        ([{"prompt": "1", "completion": 3}], TypeError, "completion, must be a str or a message list, got int"),
        ([{"prompt": "1", "completion": DEMONSTRATION}], ValueError, "must be one assistant message, got 2 messages"),
        ([{"prompt": DEMONSTRATION, "completion": "3"}], ValueError, "prompt, must end with a user message"),
        ([[{"role": "tool", "content": "1"}]], ValueError, "roles among system, user, assistant, got 'tool' at 0"),
        ([[*DEMONSTRATION, {"role": "system", "content": "1"}]], ValueError, "system message first, got it at 2"),
        ([[{"role": "user"}]], ValueError, r"messages with keys role and content, got keys \['role'\] at 0"),
        ([("3 4", "7")], ValueError, r'got str at 0; a text and its answer are \{"prompt": \.\.\., "completion": '),
        ([[{"role": "user", "content": [{"type": "image"}]}]], ValueError, "images cannot be transmuted"),
        ([[{"role": "user", "content": None}]], TypeError, "text as its content, got NoneType"),
        ([[]], ValueError, "must end with a user message"),
    ],
)
def test_examples_of_other_forms_are_refused(examples: Any, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=expected):
        load_examples(examples)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{", "must be one JSON value, got '{'"), ("3", "got int"), ('{"prompt": 3}', "line 2, prompt, must be a str")],
)
def test_a_bad_line_of_a_file_is_named(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f'"1"\n{line}\n')
    with pytest.raises((ValueError, TypeError), match="examples.jsonl, line 2, ") as caught:
        load_examples(path)
    assert expected in str(caught.value)


def users(texts: list[str]) -> list[Example]:
    return [Example(({"role": "user", "content": text},), None) for text in texts]


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.txt"
    path.write_bytes(b"\xef\xbb\xbf8 7\r\n\r\nabc, d\n")
    assert load_examples(path) == load_examples([path]) == users(["8 7", "abc, d"])


def test_a_json_file_holds_a_list_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(["4", {"prompt": "1 2", "completion": "3"}], indent=1))
    assert load_examples(path) == [*users(["4"]), CHAT]
    for text, expected in (("{}", "must be a list of examples, got a JSON dict"), ("[", "must be JSON"), ("[1]", "0,")):
        path.write_text(text)
        with pytest.raises((ValueError, TypeError), match=re.escape(f"{path}")) as caught:
            load_examples(path)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,completion\n1 2,3\n", [CHAT]),
        ("Completion, Prompt\n3,1 2\n\n,4\n", [CHAT, *users(["4"])]),
        ('prompt\n"1, 2\n3"\n4\n', users(["1, 2\n3", "4"])),
        ("1 2\r\n4\r\n", users(["1 2", "4"])),
    ],
    ids=["both", "order", "prompt", "single"],
)
def test_a_csv_file_has_columns_or_one_column(text: str, expected: list[Example], tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_bytes(text.encode())
    assert load_examples(path) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("question,answer\n1,2\n", "line 1, must name the columns prompt and completion, .* got question, answer"),
        ("completion\n", None),
        ('prompt,completion\n"1\n2",3\n4\n', "line 4, must have 2 cells as the first row has, got 1"),
        (
            "prompt;completion\n1;2\n",
            "line 1, must name columns with commas between them, got 'prompt;completion'; save",
        ),
        ("Question\n1\n", "line 1, must name the column prompt, got 'question'; rename it"),
        ("prompt\n1, 2\n", "line 2, must have 1 cells .* got 2; a text with a comma"),
        ('prompt\n"1\n', "line 2, must be comma-separated values"),
    ],
)
def test_a_bad_csv_file_is_named_with_its_line(text: str, expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_text(text)
    if expected is None:  # one column of any other name is a list of prompts
        assert load_examples(path) == users(["completion"])
        return
    with pytest.raises(ValueError, match=f"load_examples: {re.escape(str(path))}, {expected}"):
        load_examples(path)


@pytest.mark.parametrize("read", [load_examples, read_pairs])
def test_a_file_that_is_no_text_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="examples.jsonl(, line 1,)? must be text in UTF-8, got other bytes"):
        read(path)


@pytest.mark.parametrize("read", [load_examples, lambda path: load_examples([path])])
def test_an_empty_file_holds_no_example(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one example"):
        read(path)
