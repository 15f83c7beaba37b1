"""Examples that no model could learn from, in a list and in files, and the sentences that refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny_tokenizer

import thought_kernels as tk
from thought_kernels.prompts.examples import load_examples

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize("example", ["", "  \n", {"prompt": " "}, {"messages": [{"role": "user", "content": "\t"}]}])
def test_a_blank_example_is_refused(example: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^load_examples: examples\[1\] must have a user text, got a blank one"):
        load_examples(["1", example])
    path = tmp_path / "examples.jsonl"
    path.write_text('"1"\n' + json.dumps(example) + "\n")
    with pytest.raises(ValueError, match=r"^load_examples: .*examples.jsonl, line 2, must have a user text"):
        load_examples(path)


def test_a_blank_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_text("prompt,completion\n1,2\n ,3\n")
    with pytest.raises(ValueError, match="^load_examples: .*examples.csv, line 3, must have a user text, got a blank"):
        load_examples(path)


LONE = "a\ud800b"
SENTENCE = r"must be text, got the lone surrogate '\\ud800' at character 1; mend or drop it"


@pytest.mark.parametrize(
    ("example", "part"),
    [
        (LONE, ""),
        ({"prompt": LONE}, ""),
        ({"prompt": "1", "completion": LONE}, ", completion,"),
        ([*CHAT, {"role": "user", "content": LONE}], ", message 2,"),
        ([{"role": "user", "content": [{"type": "text", "text": LONE}]}], ", message 0,"),
    ],
)
def test_half_a_surrogate_pair_is_refused(example: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^load_examples: examples\[1\]{part} {SENTENCE}"):
        load_examples(["1", example])
    path = tmp_path / "examples.jsonl"
    path.write_text('"1"\n' + json.dumps(example) + "\n")  # written as the escape \ud800
    with pytest.raises(ValueError, match=rf"examples.jsonl, line 2,.* {SENTENCE}"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("instruction", {"instruction": LONE}),
        ("instruction, message 0,", {"instruction": [{"role": "system", "content": LONE}]}),
        ("without", {"instruction": "sum", "without": LONE}),
        ("separator", {"instruction": "sum", "separator": LONE}),
        ("format", {"instruction": "sum", "format": "a\ud800{prompt}{completion}"}),
    ],
)
def test_half_a_surrogate_pair_is_refused_in_every_argument(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^align: {name} {SENTENCE}"):
        tk.align(TOKENIZER, example="1 2", **options)


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_that_python_cannot_hold_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f'"1"\n{line}\n')
    with pytest.raises(ValueError, match="^load_examples: .*examples.jsonl, line 2, must be one JSON value, got '"):
        load_examples(path)
    path = tmp_path / "examples.json"
    path.write_text(line)
    with pytest.raises(ValueError, match="^load_examples: .*examples.json must be JSON, got something else; "):
        load_examples(path)
