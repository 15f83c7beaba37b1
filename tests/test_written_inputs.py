"""Inputs that the bare model writes: new ones, as many as there are, and a patch is that of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer

import thought_kernels as tk
from thought_kernels.fitting import encoding
from thought_kernels.fitting.fit import fit
from thought_kernels.generation.completions import Ending, with_completions
from thought_kernels.generation.inputs import written_inputs
from thought_kernels.models import describe
from thought_kernels.prompts.everyday import EVERYDAY
from thought_kernels.prompts.prompt import encode, load_examples

TOKENIZER = tiny_tokenizer()
MODEL = tiny_gemma3(1, vocab_size=len(TOKENIZER), max_position_embeddings=2048)
GIVEN = ["8 76", "5 1 3", "a dog"]
TOLD = "Sum."


class Scripted:
    """Stands for continue_prompts: answers with the given lines, one after the other, whatever it is asked."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.asked = lines, []  # type: ignore[var-annotated]

    def __call__(self, model: Any, prompts: Any, ended: Any, **options: Any) -> list[list[int]]:
        self.asked += [TOKENIZER.decode(prompts[0])]
        drawn = [self.lines[index % len(self.lines)] for index in range(len(prompts))]
        return [TOKENIZER(line, add_special_tokens=False)["input_ids"] for line in drawn]


def scripted(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> Scripted:
    script = Scripted(lines)
    monkeypatch.setattr("thought_kernels.generation.inputs.continue_prompts", script)
    return script


def write(given: list[str] = GIVEN, count: int = 6, **options: Any) -> list[str]:
    return written_inputs(MODEL, TOKENIZER, given, count=count, **{"batch_size": 8, "seed": 0, **options})


def test_lines_that_are_cut_blank_given_or_repeated_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, ["7 7\n", "  \n", "cut", "A  Dog\n", "9 9 \n", "7 7\n"])
    assert write() == ["7 7", "9 9"]
    assert sorted(script.asked[0].removeprefix("<bos>").splitlines()) == sorted(GIVEN)
    assert len(script.asked) == 1  # two draws for each that is wanted, and then it is enough


def test_inputs_of_several_lines_are_listed_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, ['"1\\n2"\n', "no quotes\n", '"open\n', "3\n"])
    assert write(["8\n9", "5"]) == ["1\n2"]
    assert sorted(script.asked[0].removeprefix("<bos>").splitlines()) == ['"5"', '"8\\n9"']


def test_long_inputs_are_shown_as_far_as_a_list_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, ["7\n"])
    write([letter * 200 for letter in "abcde"])
    assert len(script.asked[0].removeprefix("<bos>").splitlines()) == 2
    write(["x" * 900, "y" * 900])
    assert len(script.asked[-1].removeprefix("<bos>").splitlines()) == 1


def test_a_short_context_shows_fewer_inputs_or_has_none_written() -> None:
    short = tiny_gemma3(1, vocab_size=len(TOKENIZER), max_position_embeddings=24)
    assert all(
        len(text) <= 12 for text in written_inputs(short, TOKENIZER, ["1234567890"] * 9, count=3, batch_size=8, seed=0)
    )
    assert written_inputs(short, TOKENIZER, ["1234567890123"], count=3, batch_size=8, seed=0) == []


def test_a_model_writes_the_same_for_the_same_seed_in_batches_of_any_size() -> None:
    found = write(count=20)
    assert len(found) == len(set(found)) and not set(found) & set(GIVEN)
    assert write(count=20, batch_size=3) == found
    assert write(count=20, seed=1) != found


def fitted(examples: Any, **options: Any) -> tk.ThoughtPatch:
    return tk.transmute(MODEL, TOKENIZER, TOLD, examples, **{"max_new_tokens": 5, "written_inputs": 9, **options})


def test_the_patch_is_that_of_the_examples_and_the_inputs_that_it_remembers() -> None:
    patch = fitted(GIVEN, completions=2)
    texts = patch.provenance["written_inputs"]
    assert patch.provenance["examples"] == 3 and texts
    assert patch.provenance["generated_completions"] == 6 + len(texts)
    prompt, decoder = encoding.Prompt(TOLD, None, "\n", None), describe(MODEL)
    rows = [
        prompt.encode(TOKENIZER, load_examples([text])[0], f"examples[{number}]")
        for number, text in enumerate([*GIVEN, *texts])
    ]
    stops = Ending((1, TOKENIZER.convert_tokens_to_ids("<end_of_turn>")), "", TOKENIZER)
    rows[3:] = [row._replace(share=0.5) for row in rows[3:]]
    written = with_completions(
        MODEL, rows, ending=stops, max_new_tokens=5, batch_size=32, numbers=[[0, 1]] * 3 + [[1]] * len(texts)
    )
    again = fit(decoder, tk.Recipe().for_model(decoder), written, batch_size=32)
    for layer, site in patch.entries:
        assert torch.equal(patch.matrix(layer, site), again.matrix(layer, site))


def test_they_stand_in_the_examples_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "8"}, {"role": "assistant", "content": "9"}]
    chats = [[*turns, {"role": "user", "content": text}] for text in ("1", "4")]
    rows = []
    monkeypatch.setattr("thought_kernels.fitting.prepared.more_inputs", lambda *_: ["4"])
    monkeypatch.setattr("thought_kernels.fitting.transmute.fit", lambda decoder, recipe, found, **_: rows.extend(found))
    fitted(chats[:1], completions=1)
    wanted = encode(TOKENIZER, TOLD, chats[1])
    assert rows[1].with_prefix == wanted.with_prefix and rows[1].place == "written input 0"
    assert rows[1].tokens[: len(wanted.tokens)] == wanted.tokens


def test_texts_that_the_prompt_cannot_stand_before_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fitted(GIVEN, written_inputs=0)
    monkeypatch.setattr("thought_kernels.fitting.prepared.more_inputs", lambda *_: [" ", f"{TOLD}\n3", "x" * 2100])
    patch = fitted(GIVEN)
    assert torch.equal(patch.matrix(1, "attention"), plain.matrix(1, "attention"))
    assert patch.provenance["written_inputs"] == []


@pytest.mark.parametrize("completions", [("1", "2"), ("1", None)])
def test_none_are_written_where_an_example_brings_its_completion(completions: tuple[str | None, ...]) -> None:
    examples = [{"prompt": text, "completion": one} for text, one in zip(GIVEN, completions, strict=False)]
    assert fitted(examples).provenance["written_inputs"] == []


def test_a_saved_patch_remembers_them(tmp_path: Path) -> None:
    patch = fitted(GIVEN)
    patch.save_pretrained(tmp_path)
    held = tk.ThoughtPatch.from_pretrained(tmp_path).provenance["written_inputs"]
    assert held == patch.provenance["written_inputs"]


def captured(monkeypatch: pytest.MonkeyPatch, instruction: Any, texts: list[str], **options: Any) -> list[Any]:
    """The rows that a patch without examples would be fitted on, where the model writes `texts`."""
    rows: list[Any] = []
    monkeypatch.setattr("thought_kernels.fitting.prepared.more_inputs", lambda *_: texts)
    monkeypatch.setattr("thought_kernels.fitting.transmute.fit", lambda decoder, recipe, found, **_: rows.extend(found))
    tk.transmute(MODEL, TOKENIZER, instruction, max_new_tokens=2, completions=1, **options)
    return rows


def test_without_examples_a_patch_is_fitted_on_everyday_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"^transmute: examples should be given to a model of \d+ tokens, got None"):
        rows = captured(monkeypatch, TOLD, ["4"])
    assert len(rows) == len(EVERYDAY) + 1
    for row, text in zip(rows, [*EVERYDAY, "4"], strict=True):
        wanted = encode(TOKENIZER, TOLD, text)
        assert (row.with_prefix, row.tokens[: len(wanted.tokens)]) == (wanted.with_prefix, wanted.tokens)


DEMONSTRATIONS = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]


def test_without_examples_demonstrations_show_what_inputs_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = captured(monkeypatch, DEMONSTRATIONS, ["e", "f"])
    for row, text in zip(rows, "ef", strict=True):
        wanted = encode(TOKENIZER, DEMONSTRATIONS, text)
        assert row.tokens[: len(wanted.tokens)] == wanted.tokens
    asked = Scripted(["9\n"])
    monkeypatch.undo()
    monkeypatch.setattr("thought_kernels.generation.inputs.continue_prompts", asked)
    tk.transmute(MODEL, TOKENIZER, DEMONSTRATIONS, max_new_tokens=2)
    assert sorted(asked.asked[0].removeprefix("<bos>").splitlines()) == ["a", "c"]


def test_demonstrations_that_the_model_cannot_go_on_with_ask_for_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^transmute: examples must be given where the model writes no inputs like"):
        captured(monkeypatch, DEMONSTRATIONS, [])


def test_progress_shows_what_is_written_and_what_is_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(GIVEN, progress=True)
    shown = capsys.readouterr().err
    assert shown.index("inputs: ") < shown.index("completions: ") < shown.index("transmute: ")
    fitted(GIVEN)
    assert capsys.readouterr().err == ""
