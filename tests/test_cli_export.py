"""The export and bench commands: what they write, what they say is lost, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import ATTENTION, HIDDEN, random_patch
from safetensors.torch import load_file
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app, bench, options
from thought_kernels.evaluation.measures.export_loss import export_loss
from thought_kernels.generation.completions import complete
from thought_kernels.patches.export_peft import CONFIG_FILE, WEIGHT_FILE
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_gemma3(vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (options.out, options.err):
        monkeypatch.setattr(console, "_width", 300)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def saved(path: Path, **choices: Any) -> Path:
    settings = {"size": 0.1, "vectors": False, "sites": ["attention", "mlp"], **choices}
    random_patch(provenance={"instruction": "Add them"}, **settings).save_pretrained(path)
    return path


def test_export_writes_a_lora_folder(folder: Path, tmp_path: Path) -> None:
    patch = saved(tmp_path / "patch", rank=3)
    result = run("export", patch, "--format", "peft", "--model", folder, "--output", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    assert "--enable-lora --max-lora-rank 8" in result.stdout
    assert "100.00 % kept (on 'Add them'); give --example or" in result.stdout
    config = json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())
    assert config["r"] == 3 and config["base_model_name_or_path"] == str(folder)
    halved = run("export", patch, "-m", folder, "-o", tmp_path / "half", "--scale", 0.5)
    assert halved.exit_code == 0, halved.output
    whole, half = (load_file(tmp_path / name / WEIGHT_FILE) for name in ("lora", "half"))
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
    products = [t[name.format("B")] @ t[name.format("A")] for t in (whole, half)]
    assert torch.allclose(0.5 * products[0], products[1], atol=1e-6)


def test_what_is_lost_is_measured_and_printed(folder: Path, tmp_path: Path) -> None:
    patch = saved(tmp_path / "patch", vectors=True)
    plain = ("export", patch, "-m", folder, "-o", tmp_path / "lora", "--max-new-tokens", 4)
    refused = run(*plain, "--rank", 5)
    assert refused.exit_code == 1 and "export_peft: patch must have no vector" in refused.stderr
    assert not (tmp_path / "lora").exists()
    result = run(*plain, "--rank", 5, "--fold", "-e", "3 4", "-e", "5 6")
    assert result.exit_code == 0, result.output
    assert "truncated" in result.stdout and "4 of 4 sites" in result.stdout
    assert "relative squared error on the fitted rows at worst 0.1" in result.stdout
    assert "nats per token of the patched answers" in result.stdout and "(on 2 inputs)" in result.stdout
    unasked = run(*plain, "--fold")
    assert unasked.exit_code == 0 and "on 'Add them'); give --example" in unasked.stdout
    texts = tmp_path / "texts.txt"
    texts.write_text("3 4\n5 6\n7 8\n")
    dropped = run(*plain, "--drop", "--energy", 0.5, "--examples", texts)
    assert dropped.exit_code == 0 and "(on 3 inputs)" in dropped.stdout, dropped.output
    assert "left out" in dropped.stdout and "4 of 4 sites: block 0 attention, block 0 mlp" in dropped.stdout
    written = random_patch(provenance={"written_inputs": ["3 4", "5"]}, vectors=False, size=0.1)
    (0.5 * written).save_pretrained(tmp_path / "written")
    told = run("export", tmp_path / "written", *plain[2:], "--drop")
    assert told.exit_code == 0 and "(on 2 inputs)" in told.stdout, told.output


def kept(text: str) -> float:
    return float(text.partition(" % kept")[0].rpartition(": ")[2])


def test_a_merged_checkpoint_is_measured_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    patch = saved(tmp_path / "patch")
    result = run("export", patch, "-f", "merged", "-m", folder, "-o", tmp_path / "m", "--max-shard-size", "60KB")
    assert result.exit_code == 0, result.output
    assert kept(result.stdout) == pytest.approx(100, abs=0.01)
    shards = len(list((tmp_path / "m").glob("*.safetensors")))
    assert shards > 1 and ["files", str(shards)] in [line.split() for line in result.stdout.splitlines()]
    model, tokenizer = tk.load(tmp_path / "m")
    bare, _ = tk.load(folder)
    ids = tokenizer("3 4", return_tensors="pt").input_ids
    with torch.no_grad(), ThoughtPatch.from_pretrained(patch).applied(bare):
        assert torch.allclose(model(ids).logits, bare(ids).logits, atol=1e-4)
    again = run("export", patch, "-f", "merged", "-m", folder, "-o", tmp_path / "m")
    assert again.exit_code == 1 and "export_merged: directory must be empty or not there" in again.stderr
    rounded = run("export", patch, "-f", "merged", "-m", folder, "-o", tmp_path / "b", "--dtype", "bfloat16")
    assert rounded.exit_code == 0 and 50 < kept(rounded.stdout) < 99.999, rounded.output


def test_gguf_exports_and_a_control_vector_s_way_back(folder: Path, tmp_path: Path) -> None:
    patch = saved(tmp_path / "patch", sites=["attention", "residual"], layers=[1])
    out = tmp_path / "out"
    plain = ("export", patch, "-m", folder, "-o", out, "-e", "3 4", "--max-new-tokens", 4)
    refused = run(*plain, "-f", "gguf-lora")
    assert refused.exit_code == 1 and "no residual vector" in refused.stderr and not out.exists()
    adapter = run(*plain, "-f", "gguf-lora", "--drop")
    assert adapter.exit_code == 0 and f"--lora {out / 'adapter.gguf'}" in adapter.stdout, adapter.output
    vector = run(*plain, "-f", "gguf-vector", "--drop")
    assert vector.exit_code == 0 and f"--control-vector {out / 'control_vector.gguf'}" in vector.stdout, vector.output
    assert kept(adapter.stdout) < 100 > kept(vector.stdout)
    back = run("import", out / "control_vector.gguf", "-o", tmp_path / "back", "--scale", 0.5)
    assert back.exit_code == 0 and "sites residual" in back.stdout, back.output
    found, original = (ThoughtPatch.from_pretrained(path) for path in (tmp_path / "back", patch))
    assert torch.equal(found.vector(1, "residual"), 0.5 * original.vector(1, "residual"))
    wrong = run("import", patch / "thought_patch.json", "-o", tmp_path / "x")
    assert wrong.exit_code == 1 and "from_control_vector: file must be a GGUF control vector" in wrong.stderr


def test_the_loss_is_zero_of_everything_and_all_of_nothing(folder: Path) -> None:
    model, tokenizer = options.load_model(str(folder))
    patch = random_patch(sites=["attention"], vectors=False, size=0.2)
    limits = {"max_new_tokens": 5}
    nothing = ThoughtPatch({key: entry.scaled(0.0) for key, entry in patch.entries.items()})
    kept = export_loss(model, tokenizer, patch, patch.truncate(ATTENTION), ["3 4", "5"], **limits)
    lost = export_loss(model, tokenizer, patch, nothing, ["3 4", "5"], **limits)
    assert kept.bare == pytest.approx(lost.bare) and kept.bare > 1e-3
    assert kept.recovered == pytest.approx(1, abs=1e-6) and lost.recovered == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="export_loss: questions must be at least one, got none"):
        export_loss(model, tokenizer, patch, patch, [])


@pytest.mark.parametrize("chosen", [{}, {"without": "Turn them", "separator": " "}])
def test_the_loss_is_measured_on_the_prompts_that_the_patch_was_made_for(
    folder: Path, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = options.load_model(str(folder))
    made = {"format": "{prompt} -> {completion}\n", **chosen}
    patch = random_patch(sites=["attention"], vectors=False, size=0.2, provenance={"instruction": "Add", **made})
    asked: list[list[list[int]]] = []

    def watched(model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        asked.append(prompts)
        return complete(model, prompts, **settings)

    monkeypatch.setattr("thought_kernels.evaluation.measures.export_loss.complete", watched)
    export_loss(model, tokenizer, patch, patch, ["3 4", "5"], max_new_tokens=2)
    rows = [encode(tokenizer, "Add", question, **made) for question in ("3 4", "5")]
    assert asked == [[[*row.without_prefix, *row.tokens] for row in rows]]


def test_a_base_models_export_is_measured_by_the_patchs_format_and_refused_early_without_one(tmp_path: Path) -> None:
    base, tokenizer = tmp_path / "base", tiny_tokenizer(template=None)
    tiny_gemma3(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    patch = saved(tmp_path / "patch")
    refused = run("export", patch, "-m", base, "-o", tmp_path / "lora", "--rank", 5)
    assert refused.exit_code == 1 and "tokenizer must have a chat template" in " ".join(refused.stderr.split())
    assert not (tmp_path / "lora").exists()
    told = random_patch(
        size=0.1, vectors=False, sites=["attention"], provenance={"format": "{prompt} -> {completion}\n"}
    )
    told.save_pretrained(tmp_path / "told")
    result = run("export", tmp_path / "told", "-m", base, "-o", tmp_path / "lora", "--rank", 5, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "nats per token of the patched answers" in result.stdout


def test_export_refuses_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    patch, other = saved(tmp_path / "patch"), saved(tmp_path / "other", hidden=HIDDEN + 4)
    file = tmp_path / "file"
    file.write_text("")
    for arguments, sentence, code in (
        (
            (patch, "-o", tmp_path / "x", "--format", "gguf"),
            "--format must be one of peft, merged, gguf-lora, gguf-vector",
            2,
        ),
        ((patch, "-o", tmp_path / "x", "-f", "merged", "--rank", 3), "--rank is of no use with --format merged", 2),
        ((patch, "-o", tmp_path / "x", "-f", "gguf-vector"), "export_control_vector: patch must hold nothing but", 1),
        ((patch, "-o", file), "--output must be a folder, got the file", 2),
        ((patch, "-o", tmp_path / "x", "--rank", 0), "--rank", 2),
        ((other, "-o", tmp_path / "x"), "check: patch must have the model's hidden size 36, got 40", 1),
        ((tmp_path, "-o", tmp_path / "x"), "from_pretrained:", 1),
    ):
        result = run("export", *arguments, "-m", folder)
        assert result.exit_code == code, result.output
        assert sentence in " ".join(result.stderr.replace("│", " ").split()), result.stderr
        assert not (tmp_path / "x").exists()


def test_bench_checks_and_times_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run("bench", "--seconds", 0.01, "--rows", 64, "--hidden", 16, "--json", path)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert {row["op"] for row in rows} == {"accumulate", "paired_attention", "rms_norm_pair"}
    for op in ("accumulate", "paired_attention", "rms_norm_pair"):
        there = {name for name in ("reference", "cpp") if tk.available_backends(op, "cpu")[name] is None}
        timed = {row["backend"] for row in rows if row["op"] == op and "ms" in row}
        assert timed == {"torch", *there}
        times = {row["backend"]: row["ms"] for row in rows if row["op"] == op and "ms" in row}
        for row in rows:
            if row["op"] == op and "ms" in row:  # the columns of the table agree with one another
                assert row["speedup"] == pytest.approx(times["torch"] / row["ms"])
        assert all(row["error"] < 1e-4 for row in rows if row["op"] == op and row["backend"] in timed - {"torch"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_bench_in_other_dtypes(dtype: str) -> None:
    result = run("bench", "--seconds", 0.01, "--rows", 64, "--hidden", 16, "--dtype", dtype)
    assert result.exit_code == 0 and "reference" in result.stdout, result.output


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tk.rms_norm_pair

    def wrong(*arguments: Any, backend: str, **options: Any) -> Any:
        plain, change = right(*arguments, backend="reference", **options)
        return plain, change * (1 if backend == "reference" else 1.01)

    monkeypatch.setattr(tk, "rms_norm_pair", wrong)
    monkeypatch.setattr(tk, "available_backends", lambda op, device: {"reference": None, "cpp": None})
    cases = [case for case in bench._cases(64, 16, torch.float32, "cpu") if case.op == "rms_norm_pair"]
    monkeypatch.setattr(bench, "_cases", lambda *arguments: cases)
    result = run("bench", "--seconds", 0.01)
    assert result.exit_code == 1
    assert "errs too much, not timed" in result.stdout and "must agree with float64" in result.stderr


def test_bench_refuses_in_a_sentence(tmp_path: Path) -> None:
    assert "--dtype must be one of" in " ".join(run("bench", "--dtype", "int8").stderr.replace("│", " ").split())
    for device in ("nowhere", "meta"):
        refused = run("bench", "--device", device)
        assert refused.exit_code == 1 and "bench: device must be one that torch can use here" in refused.stderr
