"""Examples that cannot be read: the first stops a run, or all are left out and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.patches.card import shareable
from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.examples import load_examples, read_examples

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
    assert patch.provenance["left_out"] == {"count": 2, "places": [f"examples.jsonl, line {line}" for line in (2, 3)]}
    assert str(tmp_path) not in json.dumps(shareable(patch.provenance))
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
        patch = tk.transmute(short, TOKENIZER, "Sum now", given, bad_examples="skip")
    assert patch.provenance["left_out"]["places"] == ["examples[0]", "examples[2]"]
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


def test_every_example_keeps_its_place(tmp_path: Path) -> None:
    path, bad = written(tmp_path, "a.jsonl", FILE), BadExamples("skip")
    found = read_examples([path, 5, "9"], bad)
    assert [place for place, _ in found] == [f"{path}, line 1", f"{path}, line 4", "examples[2]"]
    assert [place for place, _ in bad.left_out] == [f"{path}, line 2", f"{path}, line 3", "examples[1]"]
    assert found[-1].example.messages[-1]["content"] == "9"


def test_a_line_of_a_file_that_does_not_fit_is_named_by_its_line(tmp_path: Path) -> None:
    short = tiny_gemma3(0, torch.float64, vocab_size=len(TOKENIZER), max_position_embeddings=64)
    path = written(tmp_path, "a.txt", "8 76\n\n" + "8 " * 80 + "\n7 1\n")
    with pytest.raises(ValueError, match=r"^transmute: .*a\.txt, line 3, must fit the model's context"):
        tk.transmute(short, TOKENIZER, "Sum now", path, max_new_tokens=2)
    with pytest.warns(UserWarning, match=r"1 of 3 examples are left out: \(1\) transmute: .*a\.txt, line 3"):
        tk.transmute(short, TOKENIZER, "Sum now", path, max_new_tokens=2, bad_examples="skip")


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.txt", b"8 76\n7 \xe9\r\n9\r\n", ["a.txt, line 2"]),
        ("a.jsonl", b'\xef\xbb\xbf"8 76"\n"7 \xe9"\n"9"', ["a.jsonl, line 2"]),
        ("a.csv", b'prompt,completion\n8,1\n"8" 1,ok\n9,2\n', ["a.csv, line 3"]),
        ("a.csv", b'prompt\n"8\n1"\n"7" 7\n9\n', ["a.csv, line 4"]),
        ("a.csv", b'prompt,completion\n8,1\n"7,ok\n9,2\n', ["a.csv, line 3"]),
        ("a.csv", b"prompt,completion\n8,1\n7\n9,2\n", ["a.csv, line 3"]),
    ],
)
def test_a_line_that_cannot_be_read_does_not_hide_those_behind_it(
    name: str, content: bytes, places: list[str], tmp_path: Path
) -> None:
    path, bad = tmp_path / name, BadExamples("skip")
    path.write_bytes(content)
    found = [example.messages[-1]["content"] for _, example in read_examples(path, bad)]
    assert [found[0][0], found[-1]] == ["8", "9"] and len(found) == 2
    assert [Path(place).name for place, _ in bad.left_out] == places
    with pytest.raises(ValueError, match=rf"{places[0].partition(', ')[2]}"):
        read_examples(path, BadExamples())


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": None}, {"type": "text"}, {1: "text", "text": "8"}, {"type": "image", "text": "8"}]
)
def test_parts_that_are_no_text_are_refused_in_a_sentence(part: Any) -> None:
    chat = [{"role": "user", "content": [part]}]
    if part.get("type") is None:
        chat = [{"role": "user", "content": "8", 1: 2}]
    with pytest.raises(ValueError, match=r"^load_examples: examples\[0\]"):
        load_examples([chat])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"instruction": ""}, "^align: instruction must not be empty, got ''$"),
        ({"instruction": 5}, "^align: instruction must be a str or a message list, got int$"),
        ({"without": ""}, "^align: without must not be empty"),
        ({"format": "{prompt}"}, "^align: format must"),
    ],
)
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_what_is_wrong_with_the_call_is_not_blamed_on_examples(choice: str, options: Any, sentence: str) -> None:
    given = {"instruction": "Sum now", **options}
    with pytest.raises((ValueError, TypeError), match=sentence):
        tk.transmute(model(), TOKENIZER, given.pop("instruction"), GOOD, bad_examples=choice, **given)


def test_one_that_is_told_already_is_named_by_its_place_among_all() -> None:
    given = [5, 6, GOOD[0], {"prompt": "Sum now\n8", "completion": "ok"}]
    with pytest.warns(UserWarning) as told:
        tk.transmute(model(), TOKENIZER, "Sum now", given, bad_examples="skip")
    assert any("got 1 of 2 that begin with it, the first at examples[3]" in str(one.message) for one in told)


def test_a_run_that_skips_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    given = {"examples": [GOOD[0], 5, GOOD[1]], "bad_examples": "skip", "checkpoint": tmp_path / "state"}
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 3 examples are left out"):
            patch = tk.transmute(model(), TOKENIZER, "Sum now", **given)
        assert same(patch, tk.transmute(model(), TOKENIZER, "Sum now", GOOD))


def test_the_command_line_skips_too(tmp_path: Path) -> None:
    model().float().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    path, output = written(tmp_path, "a.jsonl", FILE), tmp_path / "patch"
    arguments = ["transmute", "-m", tmp_path / "model", "-i", "Sum now", "--examples", path, "-o", output]
    stopped = CliRunner().invoke(app, [*map(str, arguments)])
    assert stopped.exit_code == 1 and "line 2, must be one JSON value" in " ".join(stopped.stderr.split())
    result = CliRunner().invoke(app, [*map(str, arguments), "--bad-examples", "skip"])
    assert result.exit_code == 0 and "2 of 4 examples are left out" in " ".join(result.stderr.split())
    assert tk.ThoughtPatch.from_pretrained(output).provenance["left_out"]["count"] == 2
    nothing = written(tmp_path, "b.jsonl", "{\n{\n")
    arguments[6] = nothing
    refused = CliRunner().invoke(app, [*map(str, arguments), "--bad-examples", "skip"])
    assert refused.exit_code == 1 and "at least one that can be read" in " ".join(refused.stderr.split())
