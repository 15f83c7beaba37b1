"""The command line on a tiny random model: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app, options
from thought_kernels.cli.options import read_layers
from thought_kernels.cli.transmute import read_scale
from thought_kernels.evaluation.measures.trial import prompted_texts
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models.load import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder as transformers writes it."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_gemma3(vocab_size=len(tokenizer), tie_word_embeddings=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (options.out, options.err):
        monkeypatch.setattr(console, "_width", 200)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Any, sentence: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert sentence in shown, result.stderr
    assert "Traceback" not in result.output


def printed(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_names_every_command_and_option() -> None:
    shown = printed(run("--help"))
    for command in ("tokens", "transmute", "generate", "verify", "demo"):
        assert command in shown
        assert "--model" in printed(run(command, "--help"))
    assert tk.__version__ in printed(run("--version"))
    for command in ("tokens", "transmute", "verify"):
        assert "(required, or --system or --demonstrations)" in " ".join(
            printed(run(command, "--help")).replace("│", " ").split()
        )


def test_transmute_offers_every_option_of_the_library() -> None:
    from inspect import signature

    from thought_kernels.cli.transmute import transmute as command

    renamed = {"sites": "site", **dict.fromkeys(("progress", "tokenizer", "checkpoint", "distributed"))}
    wanted = {renamed.get(name, name) for name in signature(transmute).parameters} - {None}
    assert wanted <= set(signature(command).parameters)


def test_tokens_shows_the_alignment(folder: str) -> None:
    tokenizer = tiny_tokenizer()
    shown = printed(run("tokens", "-m", folder, "-i", "add", "-e", "3 4", "--completion", "7"))
    example = {"prompt": "3 4", "completion": "7"}
    for part, ids in tk.align(tokenizer, "add", example)._asdict().items():
        assert any(line.startswith(part) and line.endswith(str(ids)) for line in shown.splitlines()), (part, shown)
    rows = [line.split() for line in shown.splitlines()]
    assert [row[-2] for row in rows if row[-1:] == ["completion"]] == ["7", "<end_of_turn>"]


def test_tokens_notes_an_example_that_begins_with_the_instruction(folder: str) -> None:
    told = run("tokens", "-m", folder, "-i", "add", "-e", "add 3 4")
    assert told.exit_code == 0 and "example should be without the instruction, got one that begins" in told.stderr
    assert "without the instruction" not in run("tokens", "-m", folder, "-i", "add", "-e", "3 4").stderr


def test_tokens_shows_both_prefixes(folder: str) -> None:
    tokenizer, format = tiny_tokenizer(), "{prompt} -> {completion}\n"
    given = ("tokens", "-m", folder, "-i", "add", "-e", "3 4", "--format", format.replace("\n", r"\n"))
    for options_, without in (((), None), (("--without", "do not"), "do not")):
        shown = printed(run(*given, *options_))
        found = tk.align(tokenizer, "add", "3 4", format=format, without=without)
        for side, ids in (("with ", found.with_prefix), ("without ", found.without_prefix)):
            (line,) = (line for line in shown.splitlines() if line.startswith(side) and "stand before e" in line)
            assert line.endswith(f"{len(ids)} tokens stand before e: {ids}")
        assert ("I°" in shown) == (without is not None)


def test_a_format_and_a_second_prompt_go_with_the_patch(folder: str, tmp_path: Path) -> None:
    saved, format = tmp_path / "patch", "{prompt} -> {completion}\n"
    options_ = ("--without", "do not", "--format", r"{prompt} -> {completion}\n", "--max-new-tokens", "3")
    printed(run("transmute", "-m", folder, "-i", "add", "-e", "7 1", "-o", saved, "--layers", "0", *options_))
    patch = tk.ThoughtPatch.from_pretrained(saved)
    assert patch.provenance["format"] == format and patch.provenance["without"] == "do not"
    shown = printed(run("generate", "-m", folder, "--patch", saved, "--compare", "-p", "3 4", "--max-new-tokens", "3"))
    model, tokenizer = load(folder)
    for name, told in (("bare", "do not"), ("prompted", "add")):
        (answer,) = prompted_texts(model, tokenizer, told, ["3 4"], format=format, max_new_tokens=3)
        assert any(line.split() == [name, *answer.split()] for line in shown.splitlines()), (name, answer, shown)


def test_verify_takes_a_second_prompt(folder: str) -> None:
    shown = printed(run("verify", "-m", folder, "-i", "add", "-e", "3 4", "--without", "do not"))
    assert "exact to rounding" in shown and "I° " in shown


def test_tokens_says_why_a_prompt_does_not_align(folder: str) -> None:
    refused(run("tokens", "-m", folder, "-i", " ", "-e", "3 4"), "error: align: instruction must not be empty")
    late = run("tokens", "-m", folder, "-i", "add them", "-e", "3 4\nadd them")
    refused(late, "align: instruction must come before the example's text")
    refused(run("tokens", "-m", folder, "-e", "3 4"), "give --instruction", code=2)


def test_demonstrations_are_the_instruction(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    file.write_text('{"prompt": "1 2", "completion": "3"}\n["4 4"]\n'.replace('["4 4"]\n', ""))
    turns = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
    found = options.read_instruction(None, file)
    assert found == turns
    assert options.read_instruction("add", file) == [{"role": "system", "content": "add"}, *turns]
    assert options.read_instruction(None, file, "add") == [{"role": "system", "content": "add"}, *turns]
    assert options.read_instruction(None, None, "add") == [{"role": "system", "content": "add"}]
    with pytest.raises(typer.BadParameter, match="give --system or --instruction, not both"):
        options.read_instruction("add", None, "add")
    expected = tk.align(tiny_tokenizer(), turns, "3 4").I
    shown = printed(run("tokens", "-m", folder, "--demonstrations", file, "-e", "3 4"))
    assert str(expected) in shown
    file.write_text('{"prompt": "1 2"}\n')
    refused(
        run("tokens", "-m", folder, "--demonstrations", file, "-e", "3 4"), "must give each demonstration a completion"
    )


def test_transmute_writes_the_library_s_patch_and_generate_uses_it(folder: str, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "1 2", "completion": "3"}\n"5 5"\n')
    saved = tmp_path / "patch"
    shown = printed(run(
        "transmute", "-m", folder, "-i", "add", "--examples", examples, "-e", "7 1", "-o", saved, "--layers", "0-1",
        "--site", "attention,mlp", "--ridge", "0.3", "--max-new-tokens", "3", "--scale", "attention=1,mlp=0.5",
    ))  # fmt: skip
    assert f"saved to {saved}" in shown and "ridge: 0.3" in shown
    model, tokenizer = tk.load(folder)
    patch = transmute(
        model, tokenizer, "add", [{"prompt": "1 2", "completion": "3"}, "5 5", "7 1"], layers=[0, 1],
        sites=("attention", "mlp"), ridge=0.3, max_new_tokens=3, scale={"attention": 1.0, "mlp": 0.5},
    )  # fmt: skip
    loaded = tk.ThoughtPatch.from_pretrained(saved)
    assert loaded.layers == (0, 1) and loaded.sites == ("attention", "mlp")
    for layer, site in patch.entries:
        torch.testing.assert_close(loaded.matrix(layer, site), patch.matrix(layer, site))

    common = ("-m", folder, "-p", "3 4", "--max-new-tokens", 4)
    bare = printed(run("generate", *common)).rstrip("\n")
    patched = printed(run("generate", *common, "--patch", saved, "--scale", "1000")).rstrip("\n")
    assert printed(run("generate", *common, "--patch", saved, "--scale", "0")).rstrip("\n") == bare
    once, twice = ("--patch", saved), ("--patch", saved, "--patch", saved)
    doubled = {
        scale: [printed(run("generate", *common, *given, "--scale", scale)) for given in (once, twice)]
        for scale in ("10", "20", "50", "100", "200", "400")
    }
    assert doubled["10"][1] == doubled["20"][0] and doubled["100"][1] == doubled["200"][0]
    assert any(one != two for one, two in doubled.values())  # else a second patch that is dropped would pass
    compared = [line.split(maxsplit=1) for line in printed(
        run("generate", *common, "--patch", saved, "--scale", "1000", "--compare")
    ).splitlines()]  # fmt: skip
    assert [row[0] for row in compared] == ["bare", "prompted", "patched"]
    answers = {row[0]: "".join(row[1:]).strip() for row in compared}
    assert answers["bare"] == bare.strip() and answers["patched"] == patched.strip()
    assert answers["patched"] != answers["bare"]


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_what_the_other_side_was_told_is_shown(folder: str, tmp_path: Path) -> None:
    given = ("-m", folder, "-i", "add", "--without", "negate", "-e", "1 2", "--max-new-tokens", 3)
    assert "\n  without: negate\n" in printed(run("transmute", *given, "-o", tmp_path / "patch"))
    compared = run("generate", "-m", folder, "-p", "3 4", "--patch", tmp_path / "patch", "--compare")
    assert printed(compared).splitlines()[-1].split() == ["told", "bare", "and", "patched:", "'negate'"]


def test_the_paper_s_recipe(folder: str, tmp_path: Path) -> None:
    common = ("transmute", "-m", folder, "-i", "add", "-e", "1 2", "--max-new-tokens", "2", "-o", tmp_path / "paper")
    printed(run(*common, "--recipe", "paper", "--layers", "1", "--c1", "0.6", "--c2", "0.2"))
    patch = tk.ThoughtPatch.from_pretrained(tmp_path / "paper")
    model, tokenizer = tk.load(folder)
    recipe = tk.paper_recipe(c1=0.6, c2=0.2, layers=[1])
    expected = transmute(model, tokenizer, "add", ["1 2"], max_new_tokens=2, **recipe)
    torch.testing.assert_close(patch.matrix(1, "mlp"), expected.matrix(1, "mlp"))
    torch.testing.assert_close(patch.vector(1, "residual"), expected.vector(1, "residual"))
    printed(run(*common, "--recipe", "paper", "--layers", "1", "--c1", "0.6", "--mlp-activation", "residual"))
    recipe = tk.paper_recipe(c1=0.6, layers=[1], mlp_activation="residual")
    assert tk.Recipe.from_dict(tk.ThoughtPatch.from_pretrained(tmp_path / "paper").provenance["recipe"]) == recipe
    refused(run(*common, "--mlp-activation", "residual"), "transmute: mlp_activation must be 'input' where sites are")
    refused(run(*common, "--c1", "0.6"), "--c1 belongs to --recipe paper", code=2)
    refused(run(*common, "--recipe", "mine"), "--recipe must be default or paper", code=2)
    refused(run(*common, "--recipe", "paper"), "layers must be distinct 0-based block indices below 3")
    refused(run(*common, "--recipe", "paper"), "name blocks that this model has")
    refused(run(*common, "--recipe", "paper", "--layers", "1", "--c1", "nan"), "paper_recipe: c1 must be finite, got")


def test_verify_passes_and_fails(folder: str) -> None:
    shown = printed(run("verify", "-m", folder, "-i", "add"))
    assert "float64" in shown and "exact to rounding" in shown
    failed = run("verify", "-m", folder, "-i", "add", "--tolerance", "1e-30")
    refused(failed, "verify: the replay must agree to 1.0e-30")
    assert "exact" not in failed.stdout


def test_verify_replays_the_paper_s_own_site(folder: str) -> None:
    model, tokenizer = load(folder, dtype=torch.float64)
    ids = tk.align(tokenizer, "add", "3 1 4")
    shown = printed(run("verify", "-m", folder, "-i", "add", "--site", "mlp"))
    wanted = tk.replay(model, [*ids.H, *ids.I, *ids.e], (len(ids.H), len(ids.H) + len(ids.I)), site="mlp")
    assert "exact to rounding" in shown and f"{wanted.control_error:.2e}" in shown
    assert any(line.split() == ["site", "mlp"] for line in shown.splitlines())
    assert f"{wanted.logit_error:.2e}" in shown
    refused(run("verify", "-m", folder, "-i", "add", "--site", "down"), "--site must be attention or mlp", code=2)


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (
            ["generate", "-p", "x", "-m", "./nowhere"],
            "model must be a folder, a .gguf file or a hub id, got './nowhere'",
            1,
        ),
        (["generate", "-p", "x", "--max-new-tokens", "0"], "--max-new-tokens", 2),
        (["generate", "-p", "x", "--compare"], "--compare needs a patch that knows its instruction", 2),
        (["generate", "-p", "x", "--patch", "nowhere"], "thought_patch.json must be a readable file", 1),
        (["transmute", "-i", "x", "-o", "y"], "give --examples FILE, or --example TEXT", 2),
        (["transmute", "-i", "x", "-o", "y", "-e", "1", "--layers", "3-x"], "--layers must be block indices", 2),
        (["transmute", "-i", "x", "-o", "y", "-e", "1", "--scale", "a=b"], "--scale must be a number, or site=", 2),
        (["transmute", "-i", "x", "-o", "y", "--examples", "no.jsonl"], "examples must be a list of examples or", 1),
        (["demo", "--json", "nowhere/figures.json"], "--json must be a file in a folder that exists", 2),
        (["unknown"], "No such command 'unknown'", 2),
    ],
)
def test_refusals_are_sentences(arguments: list[str], sentence: str, code: int, tmp_path: Path) -> None:
    refused(run(*arguments), sentence, code)


@pytest.mark.parametrize("command", ["transmute", "export", "evaluate"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = {"transmute": ["-i", "x", "-e", "1"], "export": [tmp_path / "patch"], "evaluate": []}[command]
    result = run(command, *given, "-m", "./nowhere", "-o", tmp_path / "file" / "new")
    refused(result, "--output must be a folder, got the file", 2)


def test_what_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = run("transmute", "-i", "x", "-e", "1", "-m", "./nowhere", "-o", tmp_path / "new" / "patch")
    refused(result, "--output must be a folder that may be written to, got", 2)
    result = run("inspect", "./nowhere", "--csv", tmp_path / "rows.csv")
    refused(result, "--csv must be a file that may be written to, got", 2)
    assert not list(tmp_path.iterdir())
    (tmp_path / "rows.csv").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path / "rows.csv")  # but not its folder
    result = run("inspect", "./nowhere", "--csv", tmp_path / "rows.csv")
    refused(result, "--csv must be a file that may be written to, got", 2)


def test_a_device_is_not_replaced_by_a_file() -> None:
    for command, option in (("demo", "--json"), ("inspect", "--csv"), ("bench", "--json")):
        refused(
            run(command, option, os.devnull), f"{option} must be a file in a folder that exists, got {os.devnull}", 2
        )


def test_an_unknown_option_value_leaves_no_folder(folder: str, tmp_path: Path) -> None:
    saved = tmp_path / "patch"
    result = run("transmute", "-m", folder, "-i", "add", "-e", "1 2", "-o", saved, "--pairing", "threefold")
    refused(result, "pairing must be one of two_pass, layerwise, sequential, got 'threefold'")
    assert not saved.exists()


def test_debug_raises(folder: str) -> None:
    result = run("--debug", "tokens", "-m", folder, "-i", " ", "-e", "3")
    assert isinstance(result.exception, ValueError)


def test_layers_and_scales_are_read() -> None:
    assert read_layers("0,3, 5-7") == [0, 3, 5, 6, 7]
    assert read_scale("0.5") == 0.5
    assert read_scale("mlp=0.5, residual=-1") == {"mlp": 0.5, "residual": -1.0}


@pytest.mark.parametrize("text", ["5-2", "1,,2", ",", "", "1-", "-3", "1-2-3", "x"])
def test_layers_that_say_nothing_or_run_backwards_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--layers must be block indices such as 10-19 or 0,3,5-7, got"):
        read_layers(text)


def test_the_installed_command(folder: str) -> None:
    command = [str(Path(sys.executable).with_name("thought-kernels")), "tokens", "-m", folder, "-e", "3"]
    good = subprocess.run([*command, "-i", "add"], capture_output=True, text=True, timeout=300)
    assert good.returncode == 0 and "before the instruction" in good.stdout, good.stderr
    bad = subprocess.run([*command, "-i", " "], capture_output=True, text=True, timeout=300)
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("error: align: instruction must not be empty") and bad.stderr.count("\n") == 1
