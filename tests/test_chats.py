"""Chats made of single inputs: who answers, what stands where, and what stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from test_cli import folder, printed, refused, run  # noqa: F401 (folder is a fixture)

import thought_kernels as tk
from thought_kernels.prompts.examples import Example, load_examples
from thought_kernels.prompts.prompt import encode

TOKENIZER = tiny_tokenizer()
INPUTS = ["8 76", "abc", "9", "a b", "77"]
ANSWERED = [{"prompt": text, "completion": answer} for text, answer in zip(INPUTS, "vwxyz", strict=True)]
FORMAT = "{prompt} -> {completion}\n"


def model_of(seed: int = 0, **changes: object):
    return tiny_gemma3(seed, torch.float32, vocab_size=len(TOKENIZER), **changes)


def texts(chat: list[dict[str, str]], role: str) -> list[str]:
    return [message["content"] for message in chat if message["role"] == role]


def test_given_completions_are_the_earlier_answers() -> None:
    chats = tk.write_chats(model_of(), TOKENIZER, "Sum now", ANSWERED, turns=3)
    assert [texts(chat, "user") for chat in chats] == [*([text] for text in INPUTS), INPUTS[:2], INPUTS[:3], INPUTS[3:]]
    assert [texts(chat, "assistant") for chat in chats[5:]] == [["v", "w"], ["v", "w", "x"], ["y", "z"]]
    assert [example.completion for example in load_examples(chats)] == list("vwxyzwxz")
    assert tk.write_chats(model_of(), TOKENIZER, "Sum now", ANSWERED, turns=1) == chats[:5]


def test_missing_answers_are_the_prompted_models_likeliest() -> None:
    model = model_of(25)  # which answers otherwise than when it is told something else
    chats = tk.write_chats(model, TOKENIZER, "Sum now", INPUTS, turns=3, max_new_tokens=5, batch_size=2)
    assert chats[:5] == [[{"role": "user", "content": text}] for text in INPUTS]
    assert [texts(chat, "user") for chat in chats[5:]] == [INPUTS[:2], INPUTS[:3], INPUTS[3:]]
    for chat, begun in zip(chats[5:], (chats[0], chats[5], chats[3]), strict=True):
        *before, answered, _ = chat
        answer = answered["content"]
        assert before == begun
        row = encode(TOKENIZER, "Sum now", Example(tuple(before), None))
        ids = [*row.with_prefix, *row.tokens]
        for _ in range(5):  # greedy, by whole forwards
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        written = TOKENIZER.decode(ids[-5:], skip_special_tokens=True).strip()
        assert answer and written.startswith(answer)
    other = tk.write_chats(model, TOKENIZER, "Write it backwards 123 zzz", INPUTS, turns=2, max_new_tokens=5)
    assert texts(other[5], "user") == INPUTS[:2] and texts(other[5], "assistant") != texts(chats[5], "assistant")


def test_chats_and_what_does_not_fit_stay_as_they_are() -> None:
    system = [{"role": "system", "content": "q"}, {"role": "user", "content": "9"}]
    given = [ANSWERED[0], system, ANSWERED[2]]
    chats = tk.write_chats(model_of(), TOKENIZER, "Sum now", given, turns=3, max_new_tokens=5)
    assert chats[1] == system and len(chats) == 4  # it is not asked again, and begins the next one's chat
    assert chats[3][:2] == system and texts(chats[3], "user") == ["9", "9"] and chats[3][-1]["content"] == "x"

    longest = max(encode(TOKENIZER, "Sum now", one).length for one in ANSWERED)
    short = tk.write_chats(model_of(max_position_embeddings=longest + 4), TOKENIZER, "Sum now", ANSWERED, turns=3)
    assert [texts(chat, "user") for chat in short] == [[text] for text in INPUTS]

    silent = model_of(1)  # its likeliest answer is none
    with pytest.warns(UserWarning, match=r"^write_chats: examples should be two or more .*, got 5 of which none"):
        chats = tk.write_chats(silent, TOKENIZER, "Sum now", INPUTS, turns=3, max_new_tokens=5)
    assert [texts(chat, "user") for chat in chats] == [[text] for text in INPUTS]

    two = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    long = tk.write_chats(model_of(), TOKENIZER, "Sum now", [two, *ANSWERED], turns=3, max_new_tokens=5)
    assert max(len(texts(chat, "user")) for chat in long) == 3 and long[0] == two


def test_cut_answers_and_a_patched_model_are_told() -> None:
    model = model_of()
    patch = tk.transmute(model, TOKENIZER, "Sum now", ANSWERED)
    with pytest.warns(UserWarning, match=r"^write_chats: 2 of 2 answers did not end within max_new_tokens=5 tokens"):
        tk.write_chats(model, TOKENIZER, "Sum now", INPUTS, turns=2, max_new_tokens=5)
    with patch.applied(model), pytest.warns(UserWarning, match=r"^write_chats: model should be bare, got one that"):
        tk.write_chats(model, TOKENIZER, "Sum now", ANSWERED, turns=2)


def test_without_a_template_and_without_inputs() -> None:
    chats = tk.write_chats(model_of(), TOKENIZER, "Sum now", ANSWERED, turns=2, format=FORMAT)
    row = encode(TOKENIZER, "Sum now", chats[5], format=FORMAT)
    assert TOKENIZER.decode(row.tokens).strip() == "8 76 -> v\nabc -> w"
    shown = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match=r"^write_chats: examples must be given where .* demonstrations, got None"):
        tk.write_chats(model_of(), TOKENIZER, [*shown, *shown], turns=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"turns": 0}, r"^write_chats: turns must be .*, got 0"),
        ({"batch_size": 0}, r"^write_chats: batch_size must be .*, got 0"),
        ({"max_new_tokens": -1}, r"^write_chats: max_new_tokens must be .*, got -1"),
        ({"examples": []}, r"^load_examples: examples must hold at least one"),
        ({"instruction": ""}, r"^align: instruction must not be empty, got ''$"),
        ({"format": "{prompt}"}, r"^align: format must hold \{completion\}[^;]*$"),
        ({"examples": ["Sum now\n9"]}, r"^write_chats: examples must be without the instruction"),
        ({"examples": ["9 " * 400]}, r"^write_chats: examples\[0\] must fit the model's context"),
    ],
)
def test_refusals(changes: dict[str, object], sentence: str) -> None:
    given = {"examples": INPUTS, "instruction": "Sum now", **changes}
    with pytest.raises(ValueError, match=sentence):
        tk.write_chats(model_of(max_position_embeddings=128), TOKENIZER, **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^align: instruction must be a str or a message list, got int"):
        tk.write_chats(model_of(), TOKENIZER, 3, INPUTS)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:(transmute|write_chats). .* did not end")
def test_a_patch_of_chats_is_fitted_on_all_turns(tmp_path: Path, folder: str) -> None:  # noqa: F811
    model = model_of(5)
    chats = tk.write_chats(model, TOKENIZER, "Sum now", ANSWERED, turns=3)
    patch = tk.transmute(model, TOKENIZER, "Sum now", chats)
    single = tk.transmute(model, TOKENIZER, "Sum now", ANSWERED)
    rows = [made.entries[0, "attention"].fit.rows for made in (patch, single)]
    assert rows[0] == sum(len(tk.align(TOKENIZER, "Sum now", chat).e) for chat in chats) > rows[1]

    output = tmp_path / "chats.jsonl"
    given = [part for text in INPUTS for part in ("-e", text)]
    said = printed(run("chats", "-m", folder, "-i", "Sum now", *given, "--max-new-tokens", 4, "-o", output))
    lines = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    later = [chat for chat in lines if len(chat) > 1]
    longest = max(len(texts(chat, "user")) for chat in lines)
    assert f"5 inputs and {len(later)} chats of up to {longest} turns" in said
    assert [texts(chat, "user") for chat in lines[:5]] == [[text] for text in INPUTS] and lines[5:] == later
    printed(
        run(
            "transmute", "-m", folder, "-i", "Sum now", "--examples", output, "--max-new-tokens", 4, "-o",
            tmp_path / "patch", "--written-inputs", 0,
        )
    )  # fmt: skip
    told = ("chats", "-m", folder, "-i", "Sum now")
    refused(run(*told, "-e", "9", "-o", tmp_path), "--output must be a file", 2)
    refused(run(*told, "-e", "9", "-o", tmp_path / "chats.txt"), "--output must end in .jsonl", 2)
    refused(run(*told, "--examples", output, "-o", output), "--output must be another file than --examples", 2)
