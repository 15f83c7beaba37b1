"""What a command line can be refused for without a model is refused before one is loaded, and work that is done stays.

Every command here is given a model that is not there: a sentence about anything else was said before it was looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import random_patch
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app, options
from thought_kernels.cli.options import read_layers
from thought_kernels.demo import CHECKPOINT
from thought_kernels.patches.site import Fit, SitePatch

NOWHERE = "./nowhere"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_gemma3(vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def shown(result: Any) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


TRANSMUTE = ("transmute", "-i", "x", "-e", "1", "-m", NOWHERE)
ADDITION = ("experiment", "addition", "-m", NOWHERE)
TURN = "{prompt} -> {answer}"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        ((*TRANSMUTE, "--layers", "5-2"), "--layers must be block indices such as 10-19 or 0,3,5-7, got '5-2'", 2),
        ((*TRANSMUTE, "--layers", "1,,2"), "--layers must be block indices such as 10-19 or 0,3,5-7, got '1,,2'", 2),
        ((*TRANSMUTE, "--layers", "0-99999999999"), "--layers must be block indices below 10000, got '0-9999999", 2),
        ((*TRANSMUTE, "--layers", "9" * 5000), "--layers must be block indices below 10000, got '99999", 2),
        ((*ADDITION, "--layers", "5-2"), "--layers must be block indices such as 10-19 or 0,3,5-7, got '5-2'", 2),
        ((*TRANSMUTE, "--recipe", "paper", "--c1", "nan"), "paper_recipe: c1 must be finite, got nan", 1),
        ((*ADDITION, "--c1", "nan"), "paper_recipe: c1 must be finite, got nan", 1),
        ((*ADDITION, "--c2", "inf"), "paper_recipe: c2 must be finite, got inf", 1),
        (
            (*ADDITION, "--lines", "paper,ours"),
            "experiment: lines must be among paper, tuned, residual, default, got",
            1,
        ),
        ((*ADDITION, "--match", "fuzzy"), "scorer must be one of exact, contains", 1),
        ((*TRANSMUTE, "--pairing", "threefold"), "pairing must be one of", 1),
        ((*TRANSMUTE, "--format", TURN), "align: format must hold {completion}", 1),
        (("generate", "-p", "x", "-m", NOWHERE, "--format", TURN), "align: format must hold {completion}", 1),
        (("evaluate", "-m", NOWHERE, "--format", TURN), "align: format must hold {completion}", 1),
        (("evaluate", "-m", NOWHERE, "--scorer", "fuzzy"), "scorer must be one of exact", 1),
        (("evaluate", "-m", NOWHERE, "--held-out", "no.jsonl"), "'--held-out': file 'no.jsonl' does not exist", 2),
        (
            ("transmute", "-m", NOWHERE, "-e", "1", "--demonstrations", "no.jsonl"),
            "'--demonstrations': file 'no.jsonl' does not exist",
            2,
        ),
        (
            ("experiment", "knowledge", "-m", NOWHERE, "--questions", "no.jsonl"),
            "'--questions': file 'no.jsonl' does not exist",
            2,
        ),
        (("demo", "-m", NOWHERE, "--instructions", "fly"), "instructions must be among", 1),
        (("demo", "-m", NOWHERE, "--match", "fuzzy"), "--match must be exact or contains, got 'fuzzy'", 2),
        (("generate", "-p", "x", "-m", "modle.gguf"), "model must be a folder, a .gguf file or a hub id", 1),
        *(
            (("evaluate", "-m", NOWHERE, "--recipe", text), sentence, 2)
            for text, sentence in (
                ("{", "--recipe must be JSON, got '{'"),
                ("[1]", "--recipe must be a JSON object, got '[1]'"),
                ('{"rigde": 1}', "options must be among layers, sites,"),
                ('{"ridge": NaN}', "ridge must be finite, got nan"),
                ('{"layers": 3}', "layers must be 0-based block indices or None, got 3"),
                ('{"scale": 0}', "scale must not be 0 at every site, got 0"),
            )
        ),
    ],
)
def test_it_is_refused_before_a_model_is_looked_for(
    arguments: tuple[str, ...], sentence: str, code: int, tmp_path: Path
) -> None:
    output = [] if arguments[0] in ("generate", "demo") else ["-o", tmp_path / "new"]
    result = run(*arguments, *output)
    assert "asking the hub" not in result.stderr
    assert result.exit_code == code and sentence in shown(result).replace(": File", ": file"), result.output
    assert "Traceback" not in result.output and not (tmp_path / "new").exists()


def test_layers_are_read_whole() -> None:
    assert read_layers("0,3, 5 - 7,2-2") == [0, 3, 5, 6, 7, 2]


@pytest.mark.parametrize("option", [("--recipe", "paper"), ("--layers", "1-3")])
def test_blocks_that_a_model_has_not_are_refused_before_its_weights_are_read(
    folder: str, option: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thought_kernels.models.load._weights", lambda *_: pytest.fail("weights were read"))
    commands: list[tuple[Any, ...]] = [("transmute", "-i", "x", "-e", "1", *option)]
    if option[0] == "--layers":
        commands += [("experiment", "addition", *option), ("evaluate", "--recipe", '{"layers": [1, 2, 3]}')]
    for command in commands:
        result = run(*command, "-m", folder, "-o", tmp_path / "new")
        assert result.exit_code == 1, result.output
        assert "layers must be distinct 0-based block indices below 3, got" in shown(result)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate",),
        ("experiment", "addition"),
        ("experiment", "composition"),
        ("demo",),
        ("inspect", "--plot", "x.png"),
    ],
)
def test_a_missing_matplotlib_is_said_first(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    where = () if command[0] == "inspect" else ("-m", NOWHERE)
    result = run(*command, *where)
    assert result.exit_code == 1 and "matplotlib must be installed to " in shown(result), result.output
    assert "pip install 'thought_kernels[demo]'" in shown(result) and not list(tmp_path.iterdir())


def test_the_library_says_it_first_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="evaluate: jinja2 and matplotlib must be installed to write the"):
        tk.evaluate(None, None, "Sum", ["1"], held_out=["2", "3"], output=tmp_path / "new")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_that_cannot_write_a_letter_is_no_failure(folder: str, tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}

    def call(*arguments: Any) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", "from thought_kernels.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=300, env=environment)

    done = call("transmute", "-m", folder, "-i", "ж ‖", "-e", "1 2", "-o", tmp_path / "patch", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert b"instruction: ? ?" in done.stdout and b"saved to" in done.stdout
    assert tk.ThoughtPatch.from_pretrained(tmp_path / "patch").provenance["instruction"] == "ж ‖"
    refused = call("tokens", "-m", folder, "-i", "x", "-e", "y", "--format", "‖Δ‖")
    assert refused.returncode == 1 and b"format must hold {prompt}" in refused.stderr


def test_a_patch_goes_into_the_model_that_it_was_made_for(folder: str, tmp_path: Path) -> None:
    saved = tmp_path / "patch"
    first = run("transmute", "-m", folder, "-i", "add", "-e", "7 1", "-o", saved, "--max-new-tokens", 3)
    assert first.exit_code == 0 and f"saved to {saved}\n" in first.stdout, first.output
    again = run("transmute", "-m", folder, "-i", "add", "-e", "7 1", "-o", saved, "--max-new-tokens", 3)
    assert f"saved to {saved}, in place of the patch there" in again.stdout
    named = run("generate", "-p", "3 4", "--patch", saved, "--max-new-tokens", 3, "-m", folder)
    remembered = run("generate", "-p", "3 4", "--patch", saved, "--max-new-tokens", 3)
    assert named.exit_code == remembered.exit_code == 0 and named.stdout == remembered.stdout, remembered.output
    assert f"the patch was made for {folder}, which is used" in shown(remembered)
    assert run("export", saved, "-o", tmp_path / "adapter").exit_code == 0
    assert "in place of the export there" in run("export", saved, "-o", tmp_path / "adapter").stdout

    gone = tk.ThoughtPatch.from_pretrained(saved)
    gone.provenance["model"] = str(tmp_path / "gone")
    gone.save_pretrained(saved)
    for command in (("generate", "-p", "3 4", "--patch", saved), ("export", saved, "-o", tmp_path / "other")):
        result = run(*command)
        assert result.exit_code == 2 and "give --model: the patch was made for" in shown(result), result.output


def test_the_shipped_model_is_known_wherever_it_was_installed() -> None:
    assert options.patch_model(None, {}) == options.patch_model(None, {"model": None}) == options.DEFAULT_MODEL
    elsewhere = Path("/elsewhere", *CHECKPOINT.parts[-3:])
    assert options.patch_model(None, {"model": str(elsewhere)}) == options.DEFAULT_MODEL
    assert options.patch_model("mine", {"model": str(elsewhere)}) == "mine"
    assert options.patch_model(None, {"model": "owner/name"}) == "owner/name"


def test_the_hub_is_not_waited_for_without_a_word(monkeypatch: pytest.MonkeyPatch, capsys: Any, folder: str) -> None:
    monkeypatch.setattr("thought_kernels.models.load.load", lambda *_, **__: ("model", "tokenizer"))
    assert options.load_model("nobody/no-such-model") == ("model", "tokenizer")
    said = " ".join(capsys.readouterr().err.split())
    assert said == "nobody/no-such-model is no folder here; asking the hub for it, which may take a while"
    options.load_model("nobody/no-such-model", offline=True)
    options.load_model(folder)
    assert capsys.readouterr().err == ""


def test_a_path_that_is_none_is_a_sentence(folder: str) -> None:
    patch = random_patch(sites=["mlp"])
    model, _ = tk.load(folder)
    calls = {
        "from_pretrained: directory": lambda: tk.ThoughtPatch.from_pretrained(None),  # type: ignore[arg-type]
        "save_pretrained: directory": lambda: patch.save_pretrained(None),  # type: ignore[arg-type]
        "export_peft: directory": lambda: patch.export_peft(None, model),  # type: ignore[arg-type]
        "load: model": lambda: tk.load(None),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} must be a path, got NoneType"):
            call()


def test_a_printed_patch_explains_an_infinite_condition() -> None:
    def printed(condition: float) -> str:
        fit = Fit(rows=3, residual=0.1, condition=condition, fold_residual=None)
        return str(tk.ThoughtPatch({(0, "mlp"): SitePatch(torch.eye(4), fit=fit)}))

    assert "condition inf: Z is singular" in printed(float("inf"))
    assert "singular" not in printed(12.0)
