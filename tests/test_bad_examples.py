"""Examples that cannot be read: the first stops a run, or all are left out and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer

import thought_kernels as tk
from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.examples import read_examples

TOKENIZER = tiny_tokenizer()
GOOD = [{"prompt": "8 76", "completion": "x=2 ok"}, {"prompt": "7 1", "completion": "ok"}]
FILE = """{"prompt": "8 76", "completion": "x=2 ok"}
{"prompt": "8 7
{"prompt": " "}
{"prompt": "7 1", "completion": "ok"}
"""


def model() -> Any:
    return tiny_gemma3(0, torch.float64, vocab_size=len(TOKENIZER))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def same(patch: tk.ThoughtPatch, other: tk.ThoughtPatch) -> bool:
    return all(
        torch.equal(patch.matrix(layer, site), other.matrix(layer, site))
        for layer in (0, 1)
        for site in ("attention", "down")
    )


def test_the_first_one_stops_a_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 2, must be one JSON value"):
        tk.transmute(model(), TOKENIZER, "Sum now", written(tmp_path, "examples.jsonl", FILE))


def test_the_others_make_the_patch_that_they_make_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "examples.jsonl", FILE)
    with pytest.warns(UserWarning, match="2 of 4 examples are left out") as told:
        patch = tk.transmute(model(), TOKENIZER, "Sum now", path, bad_examples="skip")
    sentence = str(told[0].message)
    assert "line 2, must be one JSON value" in sentence and "line 3, must have a user text" in sentence
    assert [sentence.count(text) for text in patch.provenance["left_out"]] == [1, 1]
    assert patch.provenance["examples"] == 2
    alone = tk.transmute(model(), TOKENIZER, "Sum now", GOOD)
    assert same(patch, alone) and "left_out" not in alone.provenance
    assert same(patch, tk.transmute(model(), TOKENIZER, "Sum now", GOOD, bad_examples="skip"))


@pytest.mark.parametrize(
    "bad", [5, {"prompt": "8", "answer": "x"}, [], "8 \ud800", "", {"prompt": "8", "completion": 3}]
)
def test_whatever_is_wrong_with_one_of_a_list(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"examples\[1\]"):
        tk.transmute(model(), TOKENIZER, "Sum now", [GOOD[0], bad, GOOD[1]])
    with pytest.warns(UserWarning, match=r"1 of 3 examples are left out: \(1\) load_examples: examples\[1\]"):
        patch = tk.transmute(model(), TOKENIZER, "Sum now", [GOOD[0], bad, GOOD[1]], bad_examples="skip")
    assert patch.provenance["examples"] == 2


def test_one_that_does_not_fit_or_align_is_named_by_its_place_among_all() -> None:
    short = tiny_gemma3(0, torch.float64, vocab_size=len(TOKENIZER), max_position_embeddings=64)
    given = [5, GOOD[0], {"prompt": "8 " * 80, "completion": "ok"}, GOOD[1]]
    with pytest.warns(UserWarning, match=r"2 of 4 .*\(2\) transmute: examples\[2\] must fit the model's context"):
        tk.transmute(short, TOKENIZER, "Sum now", given, bad_examples="skip")
    merged = tiny_tokenizer((("\n", "1"),))  # a token across the edge between the instruction and "1 2"
    wide = tiny_gemma3(0, torch.float64, vocab_size=len(merged))
    with pytest.raises(ValueError, match=r"straddles it.*; found at examples\[1\]"):
        tk.transmute(wide, merged, "Sum now", [GOOD[0], {"prompt": "1 2", "completion": "ok"}])


def test_nothing_is_left(tmp_path: Path) -> None:
    for examples in ([5, ""], written(tmp_path, "examples.csv", "prompt,completion\n8\n9\n")):
        with pytest.raises(ValueError, match="examples must hold at least one that can be read, got none; "):
            tk.transmute(model(), TOKENIZER, "Sum now", examples, bad_examples="skip")
    with pytest.raises(ValueError, match="bad_examples must be one of stop, skip, got 'mend'"):
        tk.transmute(model(), TOKENIZER, "Sum now", GOOD, bad_examples="mend")


def test_many_are_counted_and_some_shown() -> None:
    with pytest.warns(UserWarning, match=r"5 of 7 examples are left out: .*; and 2 more$"):
        tk.transmute(model(), TOKENIZER, "Sum now", [*GOOD, *range(5)], bad_examples="skip")


def test_a_file_keeps_the_places_of_what_is_left_out(tmp_path: Path) -> None:
    found = read_examples([written(tmp_path, "a.jsonl", FILE), 5, "9"], BadExamples("skip"))
    assert [example is None for example in found] == [False, True, True, False, True, False]
    assert found[-1].messages[-1]["content"] == "9"
